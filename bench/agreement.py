"""No speed without truth: every implementation of a row gives the right result before it is timed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.timing import context_of
from fused_transformer.kernels import observe
from tests.oracle import assert_matches


def forward_backward(function: Callable) -> Callable:
    """function's outputs and the gradients of those args that require them, as one implementation of `compare`.

    The upstream gradient is random, the same for every implementation of outputs of one shape.
    """
    kept = {}

    def run(*args):
        out = function(*args)
        shape = (out.shape, out.dtype)
        if shape not in kept:
            generator = torch.Generator(out.device).manual_seed(1)
            kept[shape] = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
        leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
        return (out, *torch.autograd.grad(out, leaves, kept[shape]))

    return run


def agree(implementations: dict, args: tuple, exact, check, ours: str, refused: dict[str, str]) -> set[str]:
    """Every implementation gives the right result, or is taken out with its reason. The backends `ours` ran on."""
    results, backends = {}, set()
    seen = {ours: lambda _op, backend, _args: backends.add(backend)}
    for label, implementation in list(implementations.items()):
        try:
            with context_of(implementation), observe(seen.get(label, _nobody)):
                results[label] = detached(implementation(*args))
        except RuntimeError as refusal:
            if label in (ours, "naive"):
                raise
            lines = str(refusal).strip().splitlines() or [type(refusal).__name__]
            # The last line of ours is the reason of the backend that was forced.
            refused[label] = lines[-1 if label.startswith(f"{ours} ") else 0].strip()[:200]
            del implementations[label]
    if check is not None:
        check(results)
        return backends
    truth = detached(exact(*args) if exact else implementations["naive"](*map(_double, args)))
    naive = results["naive"]
    for label, got in results.items():
        try:
            # Ours: twice the tests' bound, since sums are thousands of terms long here. A baseline need only do the
            # same work.
            strict = {"factor": 4.0, "ulps": 4.0} if label == ours else {"factor": 20.0, "ulps": 20.0}
            assert_matches(got, truth, naive, **strict)
        except AssertionError as difference:
            raise AssertionError(f"{label} is wrong: {difference}") from None
    return backends


def _nobody(*_) -> None:
    """An observer of ops that looks away."""


def detached(results):
    if isinstance(results, torch.Tensor):
        return results.detach()
    if isinstance(results, dict):
        return {name: x.detach() for name, x in results.items()}
    return tuple(x.detach() for x in results)


def _double(x):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def assert_close_in_norm(got: dict, exact: dict, *, within: float = 1e-2, naive: dict | None = None) -> None:
    """For gradients through ReLU: each tensor's difference has at most `within` of the tensor's norm, or twice what
    naive's has.

    Where a pre-activation is 0 to the last bit, ReLU's derivative is 0 in one model and 1 in the other, and a row of
    gradients differs by more than rounding.
    """

    def error(x: torch.Tensor, expected: torch.Tensor) -> float:
        return float((x.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))

    for name, x in got.items():
        bound = within if naive is None else max(within, 2 * error(naive[name], exact[name]))
        assert error(x, exact[name]) <= bound, f"{name}: relative error {error(x, exact[name]):.1e} in norm"
