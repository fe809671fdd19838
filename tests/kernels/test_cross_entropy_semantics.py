"""Cross entropy at its edges: ignored rows, words that can't be, bad targets, gradients in place, what is refused."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import cross_entropy, use_backend
from fused_transformer.kernels.cross_entropy import op
from tests.inputs import FLOATS, as_strided, dtype_id, normal, running_on
from tests.oracle import assert_backend_matches, assert_equal, run_with_gradients

BACKENDS = op.order
ROWS, V = 11, 300
NOWHERE = torch.iinfo(torch.int64).max // 2  # as a row offset, beyond any memory


def make(rows=ROWS, vocabulary=V, dtype=torch.float32, device="cpu"):
    return {
        "logits": normal(rows, vocabulary, dtype=dtype, device=device, std=3.0),
        "targets": torch.randint(0, vocabulary, (rows,)).to(device),
    }


# ---------------------------------------------------------------- ignored rows


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 0, NOWHERE])
@pytest.mark.parametrize("vocabulary", [V, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend, vocabulary, ignore_index, label_smoothing, device):
    tensors = make(vocabulary=vocabulary, device=device)
    ignored = torch.tensor([0, 3, 4, 10])
    tensors["targets"][tensors["targets"] == ignore_index] = 1
    tensors["targets"][ignored] = ignore_index
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "z_loss": 0.01}
    clean = assert_backend_matches(cross_entropy, backend, tensors, **options)
    tensors["logits"][ignored] = torch.nan
    tensors["logits"][3] = torch.inf
    with running_on(backend):
        got = run_with_gradients(cross_entropy, tensors, **options)
    assert_equal(got, clean)
    assert not got["dlogits"][ignored].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_is_over_the_rows_that_count(backend, dtype, device):
    tensors = make(dtype=dtype, device=device)
    tensors["targets"][4:] = -100
    with running_on(backend):
        mean = cross_entropy(**tensors)
        alone = cross_entropy(**{name: x[:4] for name, x in tensors.items()}, reduction="none")
    torch.testing.assert_close(mean, alone.mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_row_that_counts_the_mean_is_nan_the_sum_0_and_the_gradient_0(backend, device):
    tensors = make(device=device)
    tensors["targets"].fill_(-100)
    with running_on(backend):
        mean = run_with_gradients(cross_entropy, tensors)
        total = run_with_gradients(cross_entropy, tensors, reduction="sum")
    assert mean["out"].isnan() and total["out"] == 0
    assert not mean["dlogits"].any() and not total["dlogits"].any()


# ---------------------------------------------------------------- infinite logits


@pytest.mark.parametrize("vocabulary", [V, 5000])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_words_that_can_not_be_have_no_probability_and_no_gradient(backend, dtype, vocabulary, device):
    tensors = make(vocabulary=vocabulary, dtype=dtype, device=device)
    never = torch.rand(ROWS, vocabulary) < 0.5
    never[:, : vocabulary - 100] |= torch.tensor([True] + [False] * (ROWS - 1))[:, None]  # row 0: whole chunks of them
    never[torch.arange(ROWS), tensors["targets"].cpu()] = False
    never = never.to(device)
    tensors["logits"][never] = -torch.inf
    got = assert_backend_matches(cross_entropy, backend, tensors, z_loss=0.01, reduction="none")
    assert got["out"].isfinite().all() and got["dlogits"].isfinite().all()
    assert not got["dlogits"][never].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_losses_are_torchs(backend, label_smoothing, device):
    """Of -inf at the target, or with smoothing anywhere; a whole row of them is NaN, as any NaN or +inf in a row is."""
    tensors = make(7, device=device)
    tensors["targets"][:] = torch.tensor([5, 6, 7, 8, 9, 10, 11])
    logits = tensors["logits"]
    logits[0, 5], logits[1, 20:], logits[2, :7] = -torch.inf, -torch.inf, -torch.inf
    logits[3], logits[4, 100], logits[5, 100] = -torch.inf, torch.nan, torch.inf
    got = assert_backend_matches(cross_entropy, backend, tensors, label_smoothing=label_smoothing, reduction="none")
    losses, gradients = got["out"], got["dlogits"]
    smoothed = label_smoothing > 0.0
    assert losses[0] == torch.inf
    assert bool((losses[1:3] == torch.inf).all()) == smoothed and losses[3:6].isnan().all() and losses[6].isfinite()
    assert gradients[:3].isfinite().all() and gradients[3:6].isnan().all() and gradients[6].isfinite().all()


# ---------------------------------------------------------------- bad targets


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (V, rf"targets holds {V} at index \[2, 1\], outside the vocabulary of {V} \(0 ... {V - 1}\)"),
        (-1, r"targets holds -1 at index \[2, 1\], .* it is not ignore_index \(-100\)"),
        (NOWHERE, rf"targets holds {NOWHERE} at"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_outside_the_vocabulary_is_an_index_error_that_names_it(backend, target, message):
    targets = torch.randint(0, V, (4, 3))
    targets[2, 1] = target
    targets[3, 2] = V + 7  # the first one is told
    with running_on(backend), pytest.raises(IndexError, match=message):
        cross_entropy(torch.randn(4, 3, V), targets)


def test_a_lone_target_outside_the_vocabulary():
    with pytest.raises(IndexError, match=r"targets holds 7, outside the vocabulary of 5"):
        cross_entropy(torch.randn(5), torch.tensor(7))


@pytest.mark.parametrize("target", [V, -1, NOWHERE, -NOWHERE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nobody_looks_a_bad_target_gives_nan_and_reads_nothing(backend, target, device):
    """A GPU's targets are not looked at ahead of the kernel, which then has to be safe by itself."""
    module = op.module(backend)
    if isinstance(module, str):
        pytest.skip(f"cross_entropy, {backend}: {module}")
    tensors = make(device=device)
    logits, targets = tensors["logits"], tensors["targets"]
    if backend == "cpu" and device != "cpu":
        pytest.skip("it takes the addresses it is given for those of a CPU")
    targets[4] = target
    rest = (0.9, 0.1 / V, 0.0, -100)
    with running_on(backend):
        losses, *statistics = module.forward(logits, targets, *rest)
        dlogits = module.backward(torch.ones_like(losses), logits, targets, *statistics, *rest, False)
    others = torch.arange(ROWS) != 4
    assert losses[4].isnan() and losses[others].isfinite().all()
    assert dlogits[4].isnan().all() and dlogits[others].isfinite().all()


# ---------------------------------------------------------------- the gradient in place


def memory_of(x):
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", [lambda x: x, as_strided], ids=["dense", "strided"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_in_place_is_the_one_out_of_place(backend, dtype, reduction, layout, device):
    tensors = make(dtype=dtype, device=device)
    tensors["targets"][3] = -100
    options = {"label_smoothing": 0.1, "reduction": reduction}
    with running_on(backend):
        expected = run_with_gradients(cross_entropy, tensors, **options)
        x = tensors["logits"].clone().requires_grad_()
        logits = layout(x * 1.0)
        loss = cross_entropy(logits, tensors["targets"], inplace_backward=True, **options)
    assert_equal(logits.detach(), tensors["logits"])  # until the backward pass they are what they were
    upstream = torch.Generator().manual_seed(20170612)
    upstream = torch.randn(loss.shape, generator=upstream, dtype=torch.float64).float().to(device)
    gradients = torch.autograd.grad(loss, [logits, x], upstream)
    assert memory_of(gradients[0]) == memory_of(logits)
    assert_equal(gradients[1], expected["dlogits"])
    assert_equal(logits.detach(), expected["dlogits"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_a_gradient_in_place_a_second_backward_pass_is_an_error(backend, device):
    tensors = make(device=device)
    x = tensors["logits"].requires_grad_()
    with running_on(backend):
        logits = x * 1.0
        loss = cross_entropy(logits, tensors["targets"], inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_a_gradient_in_place_who_else_saved_the_logits_gets_an_error(backend, device):
    tensors = make(device=device)
    x = tensors["logits"].requires_grad_()
    with running_on(backend):
        logits = x * 1.0
        other = cross_entropy(logits, tensors["targets"])
        loss = cross_entropy(logits.view(1, ROWS, V), tensors["targets"][None], inplace_backward=True)
    loss.backward(retain_graph=True)
    for also in (other, logits.square().sum()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (also + loss).backward(retain_graph=True)


def test_what_a_gradient_in_place_would_destroy():
    tensors = make()
    parameter = tensors["logits"].requires_grad_()
    with pytest.raises(ValueError, match="would overwrite logits that no operation made"):
        cross_entropy(parameter, tensors["targets"], inplace_backward=True)
    with pytest.raises(ValueError, match="rows do not share memory"):
        cross_entropy((parameter[:1] * 1.0).expand(ROWS, V), tensors["targets"], inplace_backward=True)
    with torch.no_grad():  # no backward pass will follow
        assert cross_entropy(parameter, tensors["targets"], inplace_backward=True).isfinite()


# ---------------------------------------------------------------- autograd and compile


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    """Also where the upstream gradient is the constant 1: a gradient's penalty is not left out in silence."""
    tensors = make()
    logits = tensors["logits"].requires_grad_()
    for function in (lambda loss: loss, torch.square):
        loss = function(cross_entropy(logits, tensors["targets"]))
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (loss + gradient.square().sum()).backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
def test_a_forward_mode_derivative_is_an_error_and_not_a_wrong_number():
    tensors = make()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(tensors["logits"], torch.ones_like(tensors["logits"]))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            cross_entropy(x, tensors["targets"])


def test_torch_compile_gives_what_eager_gives():
    tensors = make()
    compiled = torch.compile(lambda x, t: cross_entropy(x * 2, t, label_smoothing=0.1) + 1, backend="eager")
    assert_equal(
        compiled(*tensors.values()), cross_entropy(tensors["logits"] * 2, tensors["targets"], label_smoothing=0.1) + 1
    )


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"logits must be \(..., V\) with V >= 1 and targets \(...\), got shapes \(11, 300\) and \(4,\)",
         {"targets": torch.ones(4).long()}),
        (r"got shapes \(\) and \(\)", {"logits": torch.tensor(1.0), "targets": torch.tensor(1)}),
        (r"got shapes \(11, 0\) and \(11,\)", {"logits": torch.ones(ROWS, 0)}),
        (r"logits must be float32, float16, bfloat16 or float64, got int64", {"logits": torch.ones(ROWS, V).long()}),
        (r"targets must be int32 or int64, got float32", {"targets": torch.ones(ROWS)}),
        (r"targets must be on cpu, as logits are, got meta", {"targets": torch.ones(ROWS, device="meta").long()}),
        (r"label_smoothing must be between 0 and 1, got 1.1", {"label_smoothing": 1.1}),
        (r"label_smoothing must be between 0 and 1, got nan", {"label_smoothing": float("nan")}),
        (r"leaves the target less than its share of 300", {"smoothing": "others", "label_smoothing": 1.0}),
        (r"z_loss must be at least 0, got -1", {"z_loss": -1.0}),
        (r"smoothing must be one of 'uniform', 'others', got 'fairseq'", {"smoothing": "fairseq"}),
        (r"reduction must be one of 'mean', 'sum', 'none', got 'batchmean'", {"reduction": "batchmean"}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(message, change):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{**make(), **change})


def test_what_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"logits must be a torch.Tensor, got list"):
        cross_entropy([1.0, 2.0], torch.tensor(1))
    with pytest.raises(TypeError, match=r"targets must be a torch.Tensor, got int"):
        cross_entropy(torch.ones(3), 1)


def test_the_target_may_have_no_more_than_its_share():
    tensors = make()
    loss = cross_entropy(**tensors, label_smoothing=1 - 1 / V, smoothing="others")
    torch.testing.assert_close(loss, cross_entropy(**tensors, label_smoothing=1.0))


def test_a_forced_backend_that_cannot_says_why():
    with use_backend("cuda"), pytest.raises(NotImplementedError, match=r"cross_entropy: no backend .*\n  cuda: "):
        cross_entropy(**make())
