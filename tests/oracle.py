"""When is a result right? The oracle of all op tests.

`got` is right when it is as good as plain torch in the same dtype:

    max|got - exact| <= 2 · max|naive - exact| + 2 ulp(max|exact|)        on a GPU, in float32, 3 · and 2 ulp

where `exact` is the reference in float64 and `naive` the reference in the dtype under test; shapes and dtypes are
equal, and got is finite exactly where exact is. NaN can't pass. On a GPU naive is nearer to exact than a sum of one
number after the other would be: cuBLAS sums in many short runs. The usual test is one call:

    assert_backend_matches(layer_norm, "cpu", dict(x=x, weight=weight, bias=bias), eps=1e-5)

It runs the public function on the backend (a refusal skips the test with its sentence), on the reference in float64
and on the reference in the inputs' dtype, and compares every output and the gradient of every float tensor for random
upstream gradients. For other baselines:

    got = run_with_gradients(function, tensors, **options)         # {"out": ..., "dx": ..., "dweight": ...}
    exact = run_with_gradients(other, in_float64(tensors), rounded_to=x.dtype, **options)
    assert_matches(got, exact, naive)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fused_transformer.kernels import use_backend
from tests.inputs import running_on

Results = dict[str, Tensor]


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from |value| to the next number of `dtype`."""
    info = torch.finfo(dtype)
    value = abs(float(value))
    if value < info.smallest_normal:
        return info.smallest_normal * info.eps
    return info.eps * 2.0 ** (math.frexp(value)[1] - 1)


def assert_matches(got, exact, naive, *, factor: float | None = None, ulps: float = 2.0) -> None:
    """AssertionError unless each tensor of `got` is as good as the one of `naive`, judged by `exact`.

    Args:
        got, exact, naive: a tensor, a sequence of tensors or a dict of named tensors; the same names in all three.
        factor, ulps: the bound is factor · max|naive - exact| + ulps · ulp(max|exact| in got's dtype). The factor is 2,
            for float32 on a GPU 3, if not given.
    """
    got, exact, naive = _named(got), _named(exact), _named(naive)
    assert got.keys() == exact.keys() == naive.keys(), f"results differ: {[*got]}, {[*exact]}, {[*naive]}"
    problems = []
    for name in got:
        usual = 3.0 if got[name].is_cuda and got[name].dtype == torch.float32 else 2.0
        problem = _problem(got[name], exact[name], naive[name], usual if factor is None else factor, ulps)
        if problem:
            problems.append(f"{name}: {problem}")
    assert not problems, "\n" + "\n".join(problems)


def assert_equal(got, expected) -> None:
    """AssertionError unless the tensors agree bit for bit (NaN equals NaN, 0 equals -0)."""
    got, expected = _named(got), _named(expected)
    assert got.keys() == expected.keys(), f"results differ: {[*got]}, {[*expected]}"
    for name in got:
        try:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, equal_nan=True)
        except AssertionError as difference:
            raise AssertionError(f"{name}: {difference}") from None


def run_with_gradients(
    function: Callable, tensors: Mapping[str, Tensor | None], *, rounded_to: torch.dtype | None = None, **options: Any
) -> Results:
    """Call function(**tensors, **options); its outputs, and the gradients of all float tensors as "d" + name.

    The upstream gradients are random: the same for every call with outputs of the same shapes, rounded to
    `rounded_to` (default: the output's dtype), so that runs in different dtypes can be compared. Outputs that
    don't require a gradient get none. Strides of the tensors given are kept.
    """
    leaves = {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in tensors.items()
    }
    outputs = function(**leaves, **options)
    results = _named(outputs)
    wanted = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
    differentiable = [x for x in results.values() if x.requires_grad]
    if wanted and differentiable:
        upstream = [_upstream(x, index, rounded_to or x.dtype) for index, x in enumerate(differentiable)]
        gradients = torch.autograd.grad(differentiable, list(wanted.values()), upstream, allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            results["d" + name] = torch.zeros_like(wanted[name]) if gradient is None else gradient
    return {name: x.detach() for name, x in results.items()}


def in_float64(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors with every float one in float64 (strides may change: values are what counts)."""
    return {
        name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in tensors.items()
    }


def assert_backend_matches(
    function: Callable,
    backend: str,
    tensors: Mapping[str, Tensor | None],
    *,
    judge: Callable[[Results, Results, Results], None] | None = None,
    **options,
) -> Results:
    """The usual op test (see the top of this file); returns the backend's results for further checks.

    judge: instead of assert_matches, of got, exact and naive.
    """
    dtype = next(x.dtype for x in tensors.values() if isinstance(x, Tensor) and x.is_floating_point())
    with running_on(backend):
        got = run_with_gradients(function, tensors, rounded_to=dtype, **options)
    with use_backend("reference"):
        exact = run_with_gradients(function, in_float64(tensors), rounded_to=dtype, **options)
        naive = run_with_gradients(function, tensors, rounded_to=dtype, **options)
    (judge or assert_matches)(got, exact, naive)
    return got


def _named(results) -> Results:
    if isinstance(results, Tensor):
        return {"out": results}
    if isinstance(results, Mapping):
        return dict(results)
    return {f"out{index}" if index else "out": x for index, x in enumerate(results)}


def _upstream(output: Tensor, index: int, rounded_to: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(20170612 + index)
    random = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return random.to(rounded_to).to(output.dtype).to(output.device)


def _problem(got: Tensor, exact: Tensor, naive: Tensor, factor: float, ulps: float) -> str | None:
    if got.shape != exact.shape or got.shape != naive.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(exact.shape)} (naive: {tuple(naive.shape)})"
    if got.dtype != naive.dtype:
        return f"dtype {got.dtype}, expected {naive.dtype}"
    if not got.dtype.is_floating_point:
        return None if torch.equal(got, naive) else "integers differ"
    dtype = got.dtype
    got, exact, naive = (x.double().to(got.device) for x in (got, exact, naive))
    rounded = exact.to(dtype).double()  # beyond float16's largest number, infinity is the right answer
    finite = rounded.isfinite()
    # infinities must be the same infinity, NaN must be NaN
    same = torch.where(finite, got.isfinite(), (got == rounded) | (got.isnan() & rounded.isnan()))
    if not bool(same.all()):
        where = _index(~same)
        count = int((~same).sum())
        values = f"got {got[where]}, exact {exact[where]}"
        return f"not finite exactly where it should be, {count} times; first at {where}: {values}"
    if not bool(finite.any()):
        return None
    error = torch.where(finite, (got - exact).abs(), 0)
    usable = finite & naive.isfinite()
    naive_error = float(torch.where(usable, (naive - exact).abs(), 0).max())
    largest = float(torch.where(finite, exact.abs(), 0).max())
    bound = factor * naive_error + ulps * ulp(largest, dtype)
    worst = float(error.max())
    if worst <= bound:
        return None
    where = _index(error == worst)
    return (
        f"max|got - exact| = {worst:.3e} > {bound:.3e} = {factor:g} · max|naive - exact| ({naive_error:.3e}) "
        f"+ {ulps:g} ulp of {largest:.3e}; worst at {where}: got {got[where]:.8g}, exact {exact[where]:.8g}, "
        f"naive {naive[where]:.8g}; {int((error > bound).sum())} of {error.numel()} beyond the bound"
    )


def _index(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])
