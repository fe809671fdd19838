"""Layer norm's dropout, its gradients one by one, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_transformer.kernels import (
    _philox,
    add_layer_norm,
    add_layer_norm_with_total,
    add_rms_norm_with_total,
    layer_norm,
    rms_norm,
    use_backend,
)
from fused_transformer.kernels.layer_norm import op
from tests.inputs import FLOATS, dtype_id, normal, running_on
from tests.oracle import assert_equal, run_with_gradients

BACKENDS = op.order
ROWS, COLS = 23, 71


def new_seed(device="cpu"):
    return torch.tensor([2**50 + 99], device=device)


def five(device="cpu", dtype=torch.float32):
    rows = {name: normal(ROWS, COLS, device=device, dtype=dtype) for name in ("x", "residual")}
    return rows | {name: normal(COLS, device=device, dtype=dtype) for name in ("weight", "bias", "x_bias")}


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("cols", [1, 3, 64, 71, 300, 1029])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_philoxs_in_forward_and_backward(backend, dtype, cols, device):
    x, zeros = torch.ones(ROWS, cols, dtype=dtype, device=device), torch.zeros(ROWS, cols, dtype=dtype, device=device)
    x.requires_grad_()
    keep = _philox.keep_rows(new_seed(device), 0.25, ROWS, cols)
    with running_on(backend):
        _, total = add_layer_norm_with_total(x, zeros, dropout_p=0.25, seed=new_seed(device))
    (dx,) = torch.autograd.grad(total, x, torch.ones_like(total))
    expected = torch.where(keep, 1 / 0.75, 0.0).to(dtype)
    assert_equal(total.detach(), expected)
    assert_equal(dx, expected)


@pytest.mark.parametrize("cols", [10_007, 20_011])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_row_draws_the_same_mask_whenever_it_is_visited(backend, cols, device):
    # 10007 columns are more than the CPU and CUDA kernels keep: they draw the mask three times; 20011, than Triton's
    x = torch.ones(2, cols, dtype=torch.bfloat16, device=device)
    keep = _philox.keep_rows(new_seed(device), 0.5, 2, cols)
    with running_on(backend):
        y, total = add_layer_norm_with_total(x, torch.zeros_like(x), dropout_p=0.5, seed=new_seed(device))
    assert_equal(total, torch.where(keep, 2.0, 0.0).bfloat16())
    expected = F.layer_norm(total.double(), (cols,))
    torch.testing.assert_close(y.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("cols", [71, 96])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_may_be_anything(backend, cols, garbage, device):
    keep = _philox.keep_rows(new_seed(device), 0.5, ROWS, cols)
    tensors = {name: normal(ROWS, cols, device=device) for name in ("x", "residual")}
    dtotal = normal(ROWS, cols, device=device)

    def run(x, upstream):
        leaves = {**tensors, "x": x.requires_grad_()}
        with running_on(backend):
            y, total = add_layer_norm_with_total(**leaves, dropout_p=0.5, seed=new_seed(device))
            (dx,) = torch.autograd.grad(total, leaves["x"], upstream)
        return y.detach(), total.detach(), dx

    clean = run(tensors["x"].clone(), dtotal)
    dirty = run(torch.where(keep, tensors["x"], garbage), torch.where(keep, dtotal, garbage))
    for got, expected in zip(dirty, clean, strict=True):
        assert_equal(got, expected)
    assert bool((dirty[2][~keep] == 0).all())


def test_about_p_of_all_elements_are_dropped_and_the_mean_stays():
    x = torch.ones(1000, 1000)
    _, total = add_layer_norm_with_total(x, torch.zeros_like(x), dropout_p=0.1, seed=new_seed())
    assert abs(float((total == 0).float().mean()) - 0.1) < 0.001  # three standard deviations
    assert abs(float(total.mean()) - 1.0) < 0.002


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_p_of_one_only_the_residual_is_left(backend, device):
    tensors = five(device)
    with running_on(backend):
        results = run_with_gradients(add_layer_norm_with_total, tensors, dropout_p=1.0, seed=new_seed(device))
    assert_equal(results["out1"], tensors["residual"])
    assert bool((results["dx"] == 0).all()) and bool((results["dx_bias"] == 0).all())
    assert bool((results["dresidual"] != 0).any())


def test_torchs_generator_governs_the_mask():
    tensors = five()
    torch.manual_seed(7)
    first, second = (add_layer_norm(**tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(7)
    assert_equal(add_layer_norm(**tensors, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_without_dropout_the_seed_and_the_generator_do_not_matter():
    tensors = five()
    state = torch.get_rng_state()
    assert_equal(add_layer_norm(**tensors, seed=new_seed()), add_layer_norm(**tensors))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias", "x_bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone_is_the_one_computed_among_all(backend, name, dropout_p, device):
    tensors = five(device)
    options = {"dropout_p": dropout_p, "seed": new_seed(device)}
    with running_on(backend):
        together = run_with_gradients(add_layer_norm_with_total, tensors, **options)
        alone = tensors | {name: tensors[name].clone().requires_grad_()}
        outputs = add_layer_norm_with_total(**alone, **options)
    upstream = [torch.Generator().manual_seed(20170612 + i) for i in range(2)]
    upstream = [torch.randn(ROWS, COLS, generator=g, dtype=torch.float64).float().to(device) for g in upstream]
    outputs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    (gradient,) = torch.autograd.grad([o for o, _ in outputs], alone[name], [g for _, g in outputs])
    assert_equal(gradient, together["d" + name])


@pytest.mark.parametrize("function", [add_layer_norm_with_total, add_rms_norm_with_total])
@pytest.mark.parametrize("used", ["y", "total"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_into_one_output_is_that_with_zeros_into_the_other(backend, used, function, device):
    tensors = five(device)
    if function is add_rms_norm_with_total:
        del tensors["bias"]
    upstream = normal(ROWS, COLS, device=device)
    results = []
    for fill in (True, False):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        with running_on(backend):
            y, total = function(**leaves, dropout_p=0.2, seed=new_seed(device))
        mine, other = (y, total) if used == "y" else (total, y)
        outputs, gradients = ([mine, other], [upstream, torch.zeros_like(other)]) if fill else ([mine], [upstream])
        found = torch.autograd.grad(outputs, list(leaves.values()), gradients, allow_unused=True)
        found = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), found, strict=True)]
        results.append(dict(zip(leaves, found, strict=True)))
    assert_equal(results[0], results[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_one_tensor_can_be_changed_one_at_a_time(backend, device):
    # Without dropout dx and dresidual are the same numbers, and the backends return one tensor for both.
    tensors = {name: t.requires_grad_() for name, t in five(device).items()}
    upstream = normal(ROWS, COLS, device=device)
    with running_on(backend):
        y = add_layer_norm(**tensors)
    (y + 0.5 * tensors["x"]).backward(upstream, retain_graph=True)  # x's gradient is a sum, residual's is not
    expected = tensors["residual"].grad.clone()
    torch.testing.assert_close(tensors["x"].grad, expected + 0.5 * upstream)
    y.backward(upstream)
    torch.testing.assert_close(tensors["residual"].grad, 2 * expected)
    for t in tensors.values():
        t.grad = None
    with running_on(backend):
        add_layer_norm(**tensors).backward(upstream)
    assert_equal(tensors["x"].grad, tensors["residual"].grad)
    tensors["x"].grad.zero_()
    assert_equal(tensors["residual"].grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_may_be_its_own_residual(backend, device):
    x = normal(ROWS, COLS, device=device).requires_grad_()
    upstream = normal(ROWS, COLS, device=device)
    with running_on(backend):
        (got,) = torch.autograd.grad(add_layer_norm(x, x), x, upstream)
    (expected,) = torch.autograd.grad(F.layer_norm(x + x, (COLS,)), x, upstream)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_any_strides(backend, device):
    tensors = {name: t.requires_grad_() for name, t in five(device).items()}
    leaves = list(tensors.values())
    with running_on(backend):
        y, total = add_layer_norm_with_total(**tensors)
    base = normal(COLS, 2 * ROWS, device=device)
    transposed, expanded = base[:, ::2].t(), base[0, 0].expand(ROWS, COLS)
    strided = torch.autograd.grad((y, total), leaves, (transposed, expanded), retain_graph=True)
    dense = torch.autograd.grad((y, total), leaves, (transposed.contiguous(), expanded.contiguous()))
    if backend == "reference":  # torch's own sums go by the layout
        torch.testing.assert_close(strided, dense)
    else:
        assert_equal(strided, dense)


def test_nothing_is_kept_without_a_gradient_to_come(indirect):
    tensors = five()
    seen = []
    backend = op.pick(*[tensors["x"], *[None] * 5, 1e-5, 0.0, False, False, False])

    class Spy:
        @staticmethod
        def forward(*args):
            seen.append(args[-2:])  # keep_total, keep_statistics
            return backend.forward(*args)

    real, op.pick = op.pick, lambda *args: Spy
    try:
        indirect(add_layer_norm, **tensors)
        indirect(add_layer_norm_with_total, **tensors)
        tensors["bias"].requires_grad_()
        with torch.no_grad():
            indirect(add_layer_norm, **tensors)
        indirect(add_layer_norm, **tensors)
    finally:
        op.pick = real
    assert seen == [(False, False), (True, False), (False, False), (True, True)]


def test_y_is_the_same_with_and_without_a_gradient_to_come():
    for dtype in FLOATS:
        tensors = five(dtype=dtype)
        plain = add_layer_norm(**tensors, dropout_p=0.1, seed=new_seed())
        y, total = add_layer_norm_with_total(**tensors, dropout_p=0.1, seed=new_seed())
        trained = add_layer_norm(**{n: t.requires_grad_() for n, t in tensors.items()}, dropout_p=0.1, seed=new_seed())
        assert_equal(plain, y)
        assert_equal(plain, trained.detach())
        assert_equal(layer_norm(total, tensors["weight"], tensors["bias"]).detach(), plain)


def test_changing_a_saved_tensor_before_backward_is_an_error():
    for function, name in ((layer_norm, "x"), (layer_norm, "weight"), (rms_norm, "x")):
        x, weight = normal(3, 8).requires_grad_(), normal(8).requires_grad_()
        y = function(x, weight)
        with torch.no_grad():
            {"x": x, "weight": weight}[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_outputs_may_be_changed_in_place():
    tensors = {name: t.requires_grad_() for name, t in five().items()}
    y, total = add_layer_norm_with_total(**tensors)
    y.add_(1)  # y is not saved
    total.sum().backward()


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    x = normal(3, 8).requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
def test_a_forward_mode_derivative_is_an_error_and_not_a_wrong_number():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(normal(3, 8), normal(3, 8))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            layer_norm(x)


def test_gradients_under_deterministic_algorithms_do_not_warn():
    assert torch.are_deterministic_algorithms_enabled()
    run_with_gradients(add_layer_norm, five())  # a warning is an error here


# ---------------------------------------------------------------- arguments


def test_another_dtype_of_the_residual_widens_both():
    x, residual = normal(4, 9, dtype=torch.bfloat16).requires_grad_(), normal(4, 9).requires_grad_()
    y, total = add_layer_norm_with_total(x, residual, normal(9))
    assert y.dtype == total.dtype == torch.float32
    assert_equal(total.detach(), (x + residual).detach())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and residual.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            r"x must have shape \(..., N\) with N >= 1, got \(\)",
            {"x": torch.tensor(1.0), "residual": torch.tensor(1.0)},
        ),
        (r"x must have shape .* got \(3, 0\)", {"x": torch.ones(3, 0), "residual": torch.ones(3, 0)}),
        (r"x must be float32, float16, bfloat16 or float64, got int64", {"x": torch.ones(ROWS, COLS).long()}),
        (r"residual must have x's shape \(23, 71\), got \(71,\)", {"residual": torch.ones(COLS)}),
        (r"weight must have shape \(71,\), got \(23, 71\)", {"weight": torch.ones(ROWS, COLS)}),
        (r"bias must have shape \(71,\), got \(70,\)", {"bias": torch.ones(COLS - 1)}),
        (r"x_bias must have shape \(71,\), got \(1,\)", {"x_bias": torch.ones(1)}),
        (r"weight must be float32 or, as x is, float32; got float16", {"weight": torch.ones(COLS).half()}),
        (r"must have the same device, got x: cpu, .* bias: meta", {"bias": torch.ones(COLS, device="meta")}),
        (r"eps must be at least 0, got -1", {"eps": -1.0}),
        (r"eps must be at least 0, got nan", {"eps": float("nan")}),
        (r"dropout_p must be between 0 and 1, got 1.5", {"dropout_p": 1.5}),
        (r"seed must be a torch.int64 tensor with one element", {"dropout_p": 0.5, "seed": torch.ones(1)}),
    ],
)
def test_a_wrong_argument_is_named(message, change):
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**{**five(), **change})


def test_what_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"weight must be a torch.Tensor, got float"):
        layer_norm(torch.ones(2, 3), 1.0)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        rms_norm([1.0, 2.0])


def test_a_forced_backend_that_cannot_says_why():
    with use_backend("cuda"), pytest.raises(NotImplementedError, match=r"layer_norm: no backend .*\n  cuda: "):
        layer_norm(torch.ones(2, 3))


def test_native_checks():
    from fused_transformer.kernels import _native

    forward = _native.library().layer_norm_forward
    good = [1, 8, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 8, 1e-5, 0, 1.0, False, 0, 0]
    forward(*good)  # no rows: nothing is read
    for index, value, message in ((13, 0, "N >= 1"), (12, -1, "M >= 0"), (19, 1, "float32 or in the dtype of x")):
        with pytest.raises(ValueError, match=message):
            forward(*good[:index], value, *good[index + 1 :])


def test_torch_compile_gives_what_eager_gives():
    tensors = five()
    compiled = torch.compile(lambda x, r, w, b: add_layer_norm(x * 2, r, w, b) + 1, backend="eager")
    arguments = [tensors[name] for name in ("x", "residual", "weight", "bias")]
    assert_equal(compiled(*arguments), add_layer_norm(arguments[0] * 2, *arguments[1:]) + 1)
