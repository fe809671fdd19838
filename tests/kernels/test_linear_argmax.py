"""linear_argmax: what a search through all results of `linear` finds, to the bit, from a few of them."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import _native, use_backend
from fused_transformer.kernels.linear import PackedLinear, linear
from fused_transformer.kernels.linear_argmax import ScreenedLinear, linear_argmax, op
from tests.inputs import LAYOUTS, Case, case_id, normal, running_on, threads
from tests.oracle import assert_equal

pytestmark = pytest.mark.every_isa

every_backend = pytest.mark.parametrize("backend", op.order)

CASES = (
    Case("one", rows=1, n=1, k=1),
    Case("prime", rows=7, n=131, k=37),
    Case("below_a_panel", rows=2, n=63, k=63),
    Case("panel", rows=3, n=64, k=64),
    Case("above_a_panel", rows=4, n=65, k=65),
    Case("vocabulary", rows=1, n=5003, k=512),
    Case("many_rows", rows=40, n=700, k=96),
    Case("deep", rows=2, n=100, k=4096),
    Case("empty", rows=0, n=64, k=64),
)


def assert_found(x: torch.Tensor, layer: ScreenedLinear) -> None:
    """Against all results, and torch's own words for the first of the largest."""
    values, places = linear_argmax(x, layer)
    assert values.shape == places.shape == x.shape[:-1] and places.dtype == torch.int64
    assert_largest(linear(x, layer.linear).view(-1, layer.linear.out_features), values.flatten(), places.flatten())
    if layer.native is None or x.numel() == 0:
        return
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with use_backend("cpu"):
        y = linear(rows, layer.linear)
    for levels in (1, 2):  # whichever is the quicker here
        assert_largest(y, *blocks(rows, layer, levels)[1:])


def assert_largest(y: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
    for row, value, place in zip(y, values, places, strict=True):
        wanted = row.isnan() if row.isnan().any() else row == row.max()
        assert place == wanted.nonzero()[0, 0]
        assert_equal(value, row[place])


def blocks(x: torch.Tensor, layer: ScreenedLinear, levels: int = 0) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How many were computed from the float32 weights; values and places."""
    values, places = torch.empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    where = (x.data_ptr(), x.stride(0))
    count = _native.library().linear_argmax(layer.native, len(x), where, values.data_ptr(), places.data_ptr(), levels)
    return count, values, places


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("bias", [False, True])
@every_backend
def test_it_is_the_largest_of_all_results(backend, bias, case):
    rows, n, k = case["rows"], case["n"], case["k"]
    layer = ScreenedLinear(PackedLinear(normal(n, k, std=k**-0.5), normal(n) if bias else None))
    with running_on(backend):
        assert_found(normal(rows, k), layer)


def heavy_tailed(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * torch.randn(shape).mul(2).exp()


def near_ties(n: int, k: int) -> torch.Tensor:
    """Rows that float32 can hardly tell apart, which int8 can't at all."""
    return torch.randn(1, k).expand(n, k) * (1 + 1e-7 * torch.randint(-3, 4, (n, 1)))


WEIGHTS = {
    "heavy_tailed": lambda: heavy_tailed(700, 64),
    "near_ties": lambda: near_ties(700, 64),
    "equal_rows": lambda: torch.randn(1, 64).expand(700, 64),
    "pairs_of_rows": lambda: torch.randn(350, 64).repeat(2, 1),
    "zeros": lambda: torch.zeros(700, 64),
    "a_zero_row": lambda: torch.randn(700, 64).index_fill(0, torch.tensor([3]), 0.0),
    "large": lambda: torch.randn(700, 64) * 1e20,
    "one_large_number": lambda: torch.randn(700, 64).index_fill(1, torch.tensor([5]), 1e6),
    "small": lambda: torch.randn(700, 64) * 1e-30,
    "signs": lambda: torch.randn(700, 64).sign(),  # all the largest that bytes hold
}
INPUTS = {
    "normal": lambda: torch.randn(3, 64),
    "heavy_tailed": lambda: heavy_tailed(3, 64),
    "levels": lambda: torch.randint(-127, 128, (3, 64)).float(),
    "signs": lambda: torch.randn(3, 64).sign(),
    "ones": lambda: torch.ones(3, 64),
    "one_hot": lambda: torch.eye(64)[:3],
    "zeros": lambda: torch.zeros(3, 64),
    "large": lambda: torch.randn(3, 64) * 1e12,
    "too_large": lambda: torch.randn(3, 64) * 1e30,
    "small": lambda: torch.randn(3, 64) * 1e-12,
    "too_small": lambda: torch.randn(3, 64) * 1e-40,
    "outlier": lambda: torch.randn(3, 64).index_fill(1, torch.tensor([9]), 1e4),
    "nan": lambda: torch.randn(3, 64).index_fill(1, torch.tensor([9]), float("nan")),
    "infinity": lambda: torch.randn(3, 64).index_fill(1, torch.tensor([9]), float("inf")),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_bounds_hold_on_odd_numbers(weights, inputs):
    assert_found(INPUTS[inputs](), ScreenedLinear(PackedLinear(WEIGHTS[weights]())))


@pytest.mark.parametrize("inputs", ["normal", "zeros", "nan", "infinity"])
@pytest.mark.parametrize("weights", ["heavy_tailed", "equal_rows", "pairs_of_rows", "zeros", "signs"])
def test_many_rows(weights, inputs):
    """Where bounds leave much, all results are computed, some columns at a time: ties between and within these, NaN."""
    x = torch.cat([torch.randn(37, 64), INPUTS[inputs]()])
    for bias in (None, torch.randn(700), torch.zeros(700).index_fill(0, torch.tensor([77, 650]), float("inf"))):
        assert_found(x, ScreenedLinear(PackedLinear(WEIGHTS[weights](), bias)))


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_at_random(seed):
    torch.manual_seed(seed)
    n, k = int(torch.randint(1, 900, ())), int(torch.randint(1, 300, ()))
    layer = ScreenedLinear(PackedLinear(heavy_tailed(n, k), heavy_tailed(n)))
    assert_found(heavy_tailed(5, k), layer)


def test_an_error_along_x_is_all_that_the_bound_allows():
    """The largest result has an int8 form that is 26 below another, with x along the 28.4 that rounding took."""
    k, sign = 64, torch.randn(64).sign()
    near = sign * torch.randint(20, 101, (k,))
    near[0] = 127 * sign[0]  # so that a level is 1
    weight = torch.zeros(700, k)
    weight[500] = near
    weight[20] = near + 0.45 * sign
    weight[20, 1:27] -= sign[1:27]
    weight[20, 0] = near[0]
    layer = ScreenedLinear(PackedLinear(weight))
    y, rounded = linear(sign, layer.linear), linear(sign, PackedLinear(weight, weights="int8"))
    assert y.argmax() == 20 and rounded[20] < rounded[500] - 20
    assert_found(sign, layer)


def test_what_sixteen_bits_of_x_can_not_tell():
    """Sums of two numbers that differ less than the levels which a third one's size leaves them; int8 has the rows."""
    weight = torch.zeros(3000, 300)
    weight.scatter_(1, torch.randint(1, 300, (3000, 2)), 127.0)
    layer, other = ScreenedLinear(PackedLinear(weight)), 0
    for _ in range(20):
        x = 1 + 1e-5 * torch.randn(4, 300)
        x[:, 0] = 0.5 / 127
        assert_found(x, layer)
        other += int((linear(x, layer.linear).argmax(1) != linear(as_sixteen_bits(x), layer.linear).argmax(1)).sum())
    assert other > 0  # else there was nothing to miss


def as_sixteen_bits(x: torch.Tensor) -> torch.Tensor:
    """As levels of each row's largest number, and levels of what these leave."""

    def levels(x):
        step = x.abs().amax(1, keepdim=True) / 127
        return (x / step).round() * step

    return levels(x) + levels(x - levels(x))


def only(rows: dict[int, list[float]]) -> ScreenedLinear:
    """128 rows of zeros but for these; 0 and 64 are in different panels."""
    weight = torch.zeros(128, len(rows[0]))
    for number, row in rows.items():
        weight[number] = torch.tensor(row)
    return ScreenedLinear(PackedLinear(weight))


def test_numbers_at_the_ends_of_float32():
    # A part of a sum overflows; the scale of the int8 product rounds to 0; weights that are a few of the least steps.
    assert_found(torch.full((1, 4), 1e14), only({0: [2e24, 2e24, -2e24, -2e24], 64: [7e23] * 4}))
    assert_found(torch.tensor([[1e-14, 0.0]]), only({0: [1e-28, 0.0], 64: [1.8e-29, 1.8e-29 * 127]}))
    step = 2.0**-149
    assert_found(torch.tensor([[1e14, 0.985e14]]), only({0: [128 * step] * 2, 64: [254 * step, 0.0]}))
    for size in (1e-44, 1e-40, 1e-36, 1e-30, 1e30, 1e36):
        for length in (1e-15, 1e-12, 1.0, 1e12, 1e15):
            layer = ScreenedLinear(PackedLinear(torch.randn(300, 40).mul(size).clamp(-3e38, 3e38)))
            assert_found(torch.randn(2, 40) * length, layer)


def test_infinite_biases():
    bias = torch.randn(700)
    bias[::2] = -float("inf")
    x, weight = torch.randn(3, 64), torch.randn(700, 64)
    assert_found(x, ScreenedLinear(PackedLinear(weight, bias)))
    assert_found(x, ScreenedLinear(PackedLinear(weight, torch.full((700,), -float("inf")))))
    bias[301] = float("inf")
    assert_found(x, ScreenedLinear(PackedLinear(weight, bias)))


def test_most_results_are_never_computed():
    if not _native.available():
        pytest.skip("no compiled extension")
    layer = ScreenedLinear(PackedLinear(torch.randn(16_000, 256) * 256**-0.5))
    x = torch.nn.functional.layer_norm(torch.randn(8, 256), (256,))
    forbidden = torch.zeros(16_000).index_fill(0, torch.arange(100, 15_000), -float("inf"))
    few = ScreenedLinear(PackedLinear(torch.randn(16_000, 256) * 256**-0.5, forbidden))
    for levels, most in ((1, 30), (2, 8)):  # of 250 or 1000 a row; about 4 or 8, and 2 were measured
        assert 8 <= blocks(x, layer, levels)[0] <= 8 * most
        assert blocks(x, few, levels)[0] <= 8 * most
        assert blocks(torch.full((1, 256), float("nan")), layer, levels)[0] in (250, 1000)
    assert blocks(x, layer)[0] in (blocks(x, layer, 1)[0], blocks(x, layer, 2)[0])
    many = torch.nn.functional.layer_norm(torch.randn(40, 256), (256,))
    if _native.library().isa() != "baseline":
        assert 40 <= blocks(many, layer)[0] <= 40 * 30
    equal = ScreenedLinear(PackedLinear(torch.randn(1, 256).expand(16_000, 256)))
    for rows in (x, many):
        assert blocks(rows, equal)[0] in (len(rows) * 250, len(rows) * 1000)
    assert layer.nbytes == 16_000 * 256 + 2 * 4 * 16_000 and "out_features=16000" in repr(layer)
    assert layer.most_rows >= 4
    with pytest.raises(ValueError, match="levels must be 0, 1 or 2"):
        blocks(x, layer, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    x = LAYOUTS[layout](torch.randn(6, 37))
    layer = ScreenedLinear(PackedLinear(torch.randn(150, 37), torch.randn(150)))
    assert_found(x, layer)
    values, places = linear_argmax(x.reshape(2, 3, 37), layer)
    assert values.shape == places.shape == (2, 3)
    assert_equal([values.flatten(), places.flatten()], list(linear_argmax(x, layer)))
    assert linear_argmax(x[0], layer)[1].shape == ()


def test_the_same_with_any_threads():
    x, layer = torch.randn(4, 256), ScreenedLinear(PackedLinear(torch.randn(3000, 256)))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(linear_argmax(x, layer))
    for result in results[1:]:
        assert_equal(list(result), list(results[0]))


WRONG = (
    (ValueError, "x must have shape (..., 8), got (2, 7)", lambda layer: linear_argmax(torch.zeros(2, 7), layer)),
    (ValueError, "x must be float32", lambda layer: linear_argmax(torch.zeros(2, 8, dtype=torch.float64), layer)),
    (ValueError, "x must be on the CPU", lambda layer: linear_argmax(torch.zeros(2, 8, device="meta"), layer)),
    (ValueError, "has no gradient", lambda layer: linear_argmax(torch.zeros(2, 8, requires_grad=True), layer)),
    (TypeError, "x must be a torch.Tensor, got list", lambda layer: linear_argmax([0.0], layer)),
    (TypeError, "must be a ScreenedLinear", lambda layer: linear_argmax(torch.zeros(2, 8), layer.linear)),
    (TypeError, "linear must be a PackedLinear", lambda _: ScreenedLinear(torch.zeros(4, 8))),
    (ValueError, "got int8", lambda _: ScreenedLinear(PackedLinear(torch.zeros(4, 8), weights="int8"))),
    (ValueError, "not finite", lambda _: ScreenedLinear(PackedLinear(torch.full((4, 8), torch.inf)))),
    (
        ValueError,
        "a bias with NaN",
        lambda _: ScreenedLinear(PackedLinear(torch.zeros(4, 8), torch.full((4,), torch.nan))),
    ),
)


@pytest.mark.parametrize(("kind", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_wrong_arguments_are_named(kind, message, call):
    layer = ScreenedLinear(PackedLinear(torch.randn(4, 8)))
    with pytest.raises(kind) as error:
        call(layer)
    assert message in str(error.value)


def test_without_the_extension_the_reference_serves(monkeypatch):
    def missing():
        raise ImportError("no extension here")

    monkeypatch.setattr(_native, "library", missing)
    layer = ScreenedLinear(PackedLinear(torch.randn(70, 40)))
    assert layer.nbytes == layer.most_rows == 0
    assert_found(torch.randn(3, 40), layer)
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="packed without the compiled extension"):
        linear_argmax(torch.randn(3, 40), layer)
