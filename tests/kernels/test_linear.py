"""linear with packed weights, on every backend and with every multiplier the processor has, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fused_transformer.kernels import _native, use_backend
from fused_transformer.kernels.linear import WEIGHTS, PackedLinear, linear, op
from tests.inputs import LAYOUTS, Case, case_id, normal, running_on, threads
from tests.oracle import assert_equal, assert_matches

pytestmark = pytest.mark.every_isa

every_backend = pytest.mark.parametrize("backend", op.order)
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
every_form = pytest.mark.parametrize("weights", WEIGHTS)

# Panels have 64 columns, tasks 384 rows, tiles 16 rows and depths of 32 (bfloat16) and 64 (int8).
CASES = (
    Case("one", rows=1, n=1, k=1),
    Case("prime", rows=7, n=131, k=37),
    Case("one_row", rows=1, n=192, k=512),
    Case("panel", rows=4, n=64, k=64),
    Case("below_a_panel", rows=6, n=63, k=63),
    Case("above_a_panel", rows=8, n=65, k=65),
    Case("a_tile", rows=16, n=128, k=128),
    Case("above_a_tile", rows=17, n=80, k=96),
    Case("two_tiles", rows=32, n=80, k=96),
    Case("above_a_task", rows=389, n=70, k=33),
    Case("feed_forward", rows=33, n=512, k=2048),
    Case("empty", rows=0, n=64, k=64),
)


def make(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, W, b and a residual."""
    rows, n, k = case["rows"], case["n"], case["k"]
    return normal(rows, k), normal(n, k, std=k**-0.5), normal(n), normal(rows, n)


def cpu_backend():
    module = op.module("cpu")
    if isinstance(module, str):
        pytest.skip(module)
    return module


def multipliers(weights: str) -> list[str]:
    """Those that this processor has for this form of the weights."""
    cpu = cpu_backend()
    has = _native.library().linear_has_multiplier
    return [name for name, number in cpu.MULTIPLIERS.items() if has(WEIGHTS[weights], number)]


def exact(x, layer, activation="none", residual=None, weights="float32"):
    """In float64, from what the packed weights stand for and, with int8 weights, the levels of x."""
    x = x.double()
    if weights == "int8":
        largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x
        scale = torch.where(largest > 0, largest / 127, 1.0)
        x = (x / scale).round() * scale
    y = F.linear(x, layer.matrix().double(), None if layer.bias is None else layer.bias.double())
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@every_backend
def test_float32_is_as_good_as_torch(backend, activation, case):
    x, weight, bias, residual = make(case)
    layer = PackedLinear(weight, bias)
    with running_on(backend):
        got = linear(x, layer, activation=activation, residual=residual)
    naive = ACTIVATIONS[activation](F.linear(x, weight, bias)) + residual
    # Sums of K terms one after the other, where torch's product adds parts of them side by side.
    assert_matches(got, exact(x, layer, activation, residual), naive, factor=4.0, ulps=4.0)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_every_multiplier_gives_what_the_rounded_weights_stand_for(weights, case):
    x, weight, bias, residual = make(case)
    layer = PackedLinear(weight, bias, weights=weights)
    expected = exact(x, layer, "gelu", residual, weights)
    # bfloat16: x may be rounded too, an error of 2^-9 in each of K terms of random sign. int8: a level may be the
    # neighbour where x lies in the middle.
    size = (x.double().abs() @ layer.matrix().double().abs().T).amax() if x.numel() else 0.0
    bound = (2.0**-9 if weights == "bfloat16" else 1.0 / 127 / max(case["k"], 1)) * float(size) + 1e-5
    for multiplier in multipliers(weights):
        got = cpu_backend().forward(x, layer, "gelu", residual, multiplier)
        assert got.shape == expected.shape and got.isfinite().all()
        if got.numel():
            assert (got - expected).abs().max() <= bound, multiplier


@every_form
def test_half_the_bits_are_half_the_memory(weights):
    layer = PackedLinear(torch.randn(128, 192), weights=weights)
    assert layer.nbytes == 128 * 192 * {"float32": 4, "bfloat16": 2, "int8": 1}[weights]


@every_form
def test_packed_weights_are_the_rounded_ones(weights):
    weight = torch.randn(70, 45)
    matrix = PackedLinear(weight, weights=weights).matrix()
    if weights == "float32":
        assert_equal(matrix, weight)
    elif weights == "bfloat16":
        assert_equal(matrix, weight.bfloat16().float())
    else:
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((matrix - weight).abs() <= 0.5001 * step).all()
        assert_equal((matrix / step).round().abs().amax(1), torch.full((70,), 127.0))


@every_form
@pytest.mark.parametrize("k", [96, 715])
def test_a_row_does_not_depend_on_the_others(weights, k):
    """Nor on how many there are: few rows, many and those of a second group go different ways."""
    x, layer = torch.randn(200, k), PackedLinear(torch.randn(100, k), torch.randn(100), weights=weights)
    for multiplier in multipliers(weights):
        whole = cpu_backend().forward(x, layer, "none", None, multiplier)
        for rows in (1, 2, 5, 16, 23, 24, 31, 40, 97):
            assert_equal(cpu_backend().forward(x[:rows], layer, "none", None, multiplier), whole[:rows])


@every_form
def test_the_same_bits_with_any_threads_and_on_every_call(weights):
    x, layer = torch.randn(65, 256), PackedLinear(torch.randn(300, 256), weights=weights)
    results = []
    for count in (1, 2, 2, 3):
        with threads(count):
            results.append(linear(x, layer, activation="relu"))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.7, 0.8])
@pytest.mark.parametrize("k", [1, 40, 300, 2048, 9000])
def test_zeros_that_are_left_out_change_no_bit(k, share, rows):
    """As ReLU leaves them. Beside many rows nothing is left out, and a row has the same bits in any batch."""
    x = normal(40, k)
    x[:rows, torch.rand(k) >= share] = 0.0
    x[0, torch.rand(k) >= 0.5] = -0.0
    layer = PackedLinear(normal(131, k, std=k**-0.5), normal(131))
    for activation in ("none", "relu"):
        assert_equal(linear(x[:rows], layer, activation=activation), linear(x, layer, activation=activation)[:rows])


@pytest.mark.parametrize("columns", [64, 131])
@pytest.mark.parametrize("rows", [31, 32, 97, 400])
@pytest.mark.parametrize("k", [127, 128, 130, 300, 2048, 2500])
def test_zeros_of_each_rows_own_change_no_bit(k, rows, columns):
    """Of rows whose zeros lie here and there; a row alone leaves out nothing, or its own."""
    layer = PackedLinear(normal(columns, k, std=k**-0.5), normal(columns))
    residual = normal(rows, columns)
    for share in (0.0, 0.1, 0.3, 1.0):
        x = torch.where(torch.rand(rows, k) < share, normal(rows, k), 0.0)
        x[rows // 3] = normal(k)
        x[-1, k // 2] = -0.0
        for activation in ("none", "gelu"):
            y = linear(x, layer, activation=activation, residual=residual)
            for m in (0, rows // 3, rows - 1):
                alone = linear(x[m : m + 1], layer, activation=activation, residual=residual[m : m + 1])
                assert_equal(y[m : m + 1], alone)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_of_zeros_and_of_what_is_not_finite(count):
    x = torch.where(torch.rand(500, 300) < 0.2, normal(500, 300), 0.0)
    x[7, 3], x[450, 299], x[499] = float("nan"), float("inf"), 0.0
    weight, bias = normal(100, 300), normal(100)
    with threads(count):
        y = linear(x, PackedLinear(weight, bias))
    assert_equal(y.isfinite().all(1).nonzero()[:, 0], torch.tensor([m for m in range(500) if m not in (7, 450)]))
    assert_equal(y[499], bias)
    torch.testing.assert_close(y[:7], F.linear(x[:7], weight, bias), rtol=1e-4, atol=1e-4)
    weight[5, 6] = float("inf")
    assert linear(x, PackedLinear(weight))[:, 5].isnan().sum() > 300  # 0 times infinity


def test_zeros_times_what_is_not_finite_are_not_left_out():
    x, weight = torch.zeros(2, 300), torch.randn(64, 300)
    weight[7, 200] = float("inf")
    got = linear(x, PackedLinear(weight))
    assert got[:, 7].isnan().all() and (got.nan_to_num() == 0).all()
    x[1, 250] = float("nan")
    assert_equal(linear(x, PackedLinear(weight.nan_to_num(posinf=1.0))).isnan().all(1), torch.tensor([False, True]))


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(weights, layout):
    x, residual = LAYOUTS[layout](torch.randn(9, 37)), LAYOUTS[layout](torch.randn(9, 50))
    layer = PackedLinear(torch.randn(50, 37), weights=weights)
    got = linear(x, layer, residual=residual)
    assert_equal(got, linear(x.contiguous(), layer, residual=residual.contiguous()))
    assert linear(x.reshape(3, 3, 37), layer).shape == (3, 3, 50)


@every_form
@pytest.mark.parametrize("rows", [20, 45])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_row_alone(weights, value, rows):
    x, layer = torch.randn(rows, 64), PackedLinear(torch.randn(64, 64), weights=weights)
    clean = linear(x, layer)
    x[3, 5] = value
    for multiplier in multipliers(weights):
        if multiplier == "best":
            got = linear(x, layer, activation="none")
            assert not got[3].isfinite().any()
            others = torch.arange(rows) != 3
            assert_equal(got[others], clean[others])
        assert not cpu_backend().forward(x, layer, "relu", None, multiplier)[3].isfinite().all()


def test_a_layer_is_a_copy_with_a_bias_of_its_own():
    weight, bias = torch.randn(8, 8), torch.randn(8)
    layer, x = PackedLinear(weight, bias), torch.randn(2, 8)
    before = linear(x, layer)
    weight.zero_()
    bias.zero_()
    assert_equal(linear(x, layer), before)
    assert "in_features=8, out_features=8, bias=True, weights='float32'" in repr(layer)


def test_gelu_keeps_its_tail():
    x = torch.linspace(-30, 30, 4001).unsqueeze(1)
    layer = PackedLinear(torch.ones(1, 1))
    got = linear(x, layer, activation="gelu")
    # By erfc: torch's own gelu takes 1 - erf there, and has nothing left.
    want = torch.tensor([[v * 0.5 * math.erfc(-v / math.sqrt(2))] for v in x[:, 0].tolist()], dtype=torch.float64)
    # x^2 / 2 is rounded before it is an exponent, which is a relative error of x^2 / 2 times 2^-24 there.
    assert ((got - want).abs() <= (1e-6 + 6e-8 * x.double() ** 2) * want.abs() + 1e-37).all()
    assert_equal(
        linear(torch.tensor([[-float("inf")], [float("inf")]]), layer, activation="relu")[:, 0].isfinite(),
        torch.tensor([True, False]),
    )


WRONG = (
    ("x must have shape (..., 8), got (2, 7)", lambda layer: linear(torch.zeros(2, 7), layer)),
    ("x must be float32", lambda layer: linear(torch.zeros(2, 8, dtype=torch.float64), layer)),
    ("x must be on the CPU", lambda layer: linear(torch.zeros(2, 8, device="meta"), layer)),
    ("residual must have shape (2, 4)", lambda layer: linear(torch.zeros(2, 8), layer, residual=torch.zeros(2, 8))),
    ("activation must be one of", lambda layer: linear(torch.zeros(2, 8), layer, activation="tanh")),
    ("linear has no gradient, and x requires one", lambda layer: linear(torch.zeros(2, 8, requires_grad=True), layer)),
    ("weights must be one of", lambda _: PackedLinear(torch.zeros(4, 8), weights="int4")),
    ("weight must be (N, K)", lambda _: PackedLinear(torch.zeros(4))),
    ("weight must be (N, K)", lambda _: PackedLinear(torch.zeros(0, 4))),
    ("bias must be (4,)", lambda _: PackedLinear(torch.zeros(4, 8), torch.zeros(8))),
    ("weight must be a float tensor", lambda _: PackedLinear(torch.zeros(4, 8, dtype=torch.int64))),
    ("cannot be rounded to int8", lambda _: PackedLinear(torch.full((4, 8), torch.nan), weights="int8")),
)


@pytest.mark.parametrize(("message", "call"), WRONG, ids=[message for message, _ in WRONG])
def test_wrong_arguments_are_named(message, call):
    layer = PackedLinear(torch.randn(4, 8))
    with pytest.raises(ValueError) as error:
        call(layer)
    assert message in str(error.value)


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="layer must be a PackedLinear, got Tensor"):
        linear(torch.zeros(2, 8), torch.zeros(4, 8))
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got list"):
        PackedLinear([[1.0]])


def test_without_the_extension_the_reference_serves(monkeypatch):
    def missing():
        raise ImportError("no extension here")

    monkeypatch.setattr(_native, "library", missing)
    layer = PackedLinear(torch.randn(70, 40), weights="bfloat16")
    x = torch.randn(3, 40)
    assert layer.nbytes == 70 * 40 * 2
    assert_equal(linear(x, layer), F.linear(x, layer.matrix()))
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="packed without the compiled extension"):
        linear(x, layer)


@pytest.mark.parametrize("size", [1e-36, 1e-37, 1e-42, 1e-45])
def test_rows_next_to_zero_have_no_level_but_zero(size):
    """127 / size is infinite from the second on."""
    row = torch.tensor([1.0, 0.0, -0.5, 0.25])
    layer = PackedLinear(torch.stack([row * size, row]), weights="int8")
    assert (layer.matrix()[0] - row * size).abs().max() <= (size / 127 if size == 1e-36 else size)
    assert (layer.matrix()[1] - row).abs().max() <= 1 / 127
    y = linear(torch.stack([row * size, row]), layer)
    assert (y[0].abs() <= 1.5 * size).all() and y[1, 0].abs() <= 1.5 * size and abs(y[1, 1] - 1.3125) < 0.02
