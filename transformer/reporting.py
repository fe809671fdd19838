"""model_report(model, ...): which backend every op of a model runs on, and why not on a faster one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fused_transformer.fusing import Part, grouped, parts_as_lines, stood_in_for, why_not
from fused_transformer.kernels import observe

# The kernels of a device, the fastest first; what runs on another device is no choice.
KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class OpCall:
    """One call of an op.

    Attributes:
        module: the name of the innermost module that was running, "" for the model itself.
        op, backend: what ran: "attention" on "triton".
        inputs: its tensors: "float16 (8, 16, 128, 64), (8, 16, 128, 64), (8, 16, 128, 64)".
        reasons: (backend, sentence) for each faster backend of that device: why it did not run. Empty if none is.
    """

    module: str
    op: str
    backend: str
    inputs: str
    reasons: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ModelReport:
    """What `model_report` saw. `print` it.

    Attributes:
        calls: the ops' calls in the order in which they happened.
        torchs: the modules of torch.nn that were called and that `fuse` swaps, or why it does not.
    """

    calls: tuple[OpCall, ...]
    torchs: tuple[Part, ...]

    def __str__(self) -> str:
        backends = Counter(call.backend for call in self.calls)
        counts = ", ".join(f"{count} on {backend}" for backend, count in backends.most_common())
        lines = [f"{len(self.calls)} calls of ops" + (f": {counts}" if counts else "")]
        rows = list(grouped((c.module, (c.op, c.backend, c.inputs, c.reasons)) for c in self.calls))
        names = max((len(name) for name, _, _ in rows), default=0)
        ops, kernels = (max((len(getattr(c, what)) for c in self.calls), default=0) for what in ("op", "backend"))
        for name, (op, backend, inputs, reasons), count in rows:
            times = f"  × {count}" if count > 1 else ""
            lines.append(f"  {name:{names}}  {op:{ops}}  {backend:{kernels}}  {inputs}{times}")
            lines += [f"      not {other}: {why}" for other, why in reasons]
        if self.torchs:
            lines += ["", "called, and torch's own:", *parts_as_lines(self.torchs)]
        return "\n".join(lines)


def model_report(model: nn.Module, *inputs, **options) -> ModelReport:
    """Call model(*inputs, **options) once, as it is (training mode, gradients, autocast), and tell which kernels ran.

        print(fused_transformer.model_report(model, tokens))

    Returns:
        The report: each call of an op with its module, backend and, where a faster backend of that device did not take
        it, that backend's reason; and which modules are torch.nn's own still. Ops inside a fused step (a norm that a
        layer computes with the sum before it) are listed under the layer, as the norm itself is not called.
    """
    names = {module: name for name, module in model.named_modules()}
    running: list[nn.Module] = []
    calls: list[OpCall] = []
    torchs: dict[nn.Module, Part] = {}
    thread = threading.get_ident()

    def enter(module: nn.Module, _arguments) -> None:
        if threading.get_ident() != thread:
            return
        running.append(module)
        theirs = stood_in_for(module)
        if theirs is not None and module not in torchs:
            why = why_not(module, theirs) or "fuse(model) makes it ours"
            torchs[module] = Part(names.get(module, "(outside)"), type(module).__name__, why)

    def leave(module: nn.Module, _arguments, _result) -> None:
        if threading.get_ident() == thread and running:
            running.pop()

    def see(op, backend: str, arguments: tuple) -> None:
        if threading.get_ident() == thread:
            inner = next((names[module] for module in reversed(running) if module in names), "")
            reasons = _reasons(op.why_not, op.preference(*arguments), backend, arguments)
            calls.append(OpCall(inner, op.name, backend, _described(arguments), reasons))

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with observe(see):
            model(*inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    return ModelReport(tuple(calls), tuple(torchs.values()))


def _tensors(arguments: tuple) -> list[Tensor]:
    return [x for x in arguments if isinstance(x, Tensor) and x.dim() > 0]


def _reasons(
    why: Callable[..., str | None], order: tuple[str, ...], chosen: str, arguments: tuple
) -> tuple[tuple[str, str], ...]:
    """Why the kernels that are faster than the chosen one on the arguments' device did not run."""
    tensors = _tensors(arguments)
    on_device = KERNELS.get(tensors[0].device.type if tensors else "cpu", ())
    kernels = [name for name in order if name in on_device]
    faster = kernels[: kernels.index(chosen)] if chosen in kernels else kernels
    return tuple((name, why(name, *arguments) or f"use_backend({chosen!r}) forces another") for name in faster)


def _described(arguments: tuple) -> str:
    """The floats among an op's tensors: their dtypes, one word where they agree, and shapes."""
    floats = [x for x in _tensors(arguments) if x.is_floating_point()]
    dtypes = {str(x.dtype).removeprefix("torch.") for x in floats}
    shapes = [str(tuple(x.shape)) for x in floats if x.dim() > 1]
    return " and ".join(sorted(dtypes)) + " " + ", ".join(shapes)
