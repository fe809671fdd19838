"""fuse(model): torch.nn's attention, norms and Transformer inside any model become ours, in place, and back again."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fused_transformer.nn import TransformerDecoder, TransformerEncoder
from fused_transformer.nn.stand_in import OURS, adopt, release

K = TypeVar("K", bound=Hashable)
MARK = "_fused_in_place"  # an attribute of the modules that fuse changed: copies and pickles keep it


@dataclass(frozen=True)
class Part:
    """A module of the model, by its name there and its class's name; `why` it was left alone, or None."""

    name: str
    kind: str
    why: str | None = None


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` (or `unfuse`) changed, and what it left alone and why. `print` it."""

    swapped: tuple[Part, ...]
    kept: tuple[Part, ...]

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left alone {len(self.kept)}"]
        for title, parts in (("swapped", self.swapped), ("left alone", self.kept)):
            if parts:
                lines += ["", f"{title}:", *parts_as_lines(parts)]
        return "\n".join(lines)


def fuse(model: nn.Module, *, keep: Iterable[str] = (), skip_padding: bool = False) -> FuseReport:
    """Swap torch.nn's modules inside `model` (and the model itself) for ours, in place.

    MultiheadAttention, LayerNorm, RMSNorm, TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder,
    TransformerDecoder and Transformer become those of `fused_transformer.nn`. Each module stays the object it was, only
    its class is another one: parameters (an optimizer made before goes on), buffers, hooks, training mode, device,
    dtype, requires_grad and names are what they were, state_dict and checkpoints too, and a module used in two places
    is swapped in both.

    What our classes do otherwise is in their docstrings: in short, no NaN for rows with nothing to attend to, the same
    numbers in train and eval, and a gradient of a gradient is an error.

    Left alone, with the reason in the report: subclasses (they may compute something else), modules with
    parametrizations, quantised or sharded ones, TorchScript, and modules whose forward was replaced. Inside our layers
    they are called as in torch's.

    Args:
        model: any module, compiled or not.
        keep: names of modules to leave alone with all that is in them, as named_modules gives them; "*" matches
            anything: ("decoder", "*.norm1").
        skip_padding: let the encoders and decoders swapped, and those that are ours already, work on the real tokens
            alone, on a CPU; rows of padding come out as 0 then. See `fused_transformer.nn.TransformerEncoder`.

    Returns:
        The report; print it.
    """
    keep = tuple(keep)
    swapped, kept = [], []
    for name, module in list(model.named_modules()):
        pattern = next((p for p in keep if _within(name, p)), None)
        theirs = stood_in_for(module)
        if theirs is None:
            if skip_padding and pattern is None and isinstance(module, (TransformerEncoder, TransformerDecoder)):
                module.skip_padding = True  # ours already
            continue
        why = f"keep has {pattern!r}" if pattern is not None else why_not(module, theirs)
        if why is not None:
            kept.append(Part(name, type(module).__name__, why))
            continue
        adopt(module)
        setattr(module, MARK, True)
        if skip_padding and isinstance(module, (TransformerEncoder, TransformerDecoder)):
            module.skip_padding = True
        swapped.append(Part(name, type(module).__name__))
    kept += [Part(name, type(m).__name__, "no class of torch.nn") for name, m in _look_alikes(model)]
    return FuseReport(tuple(swapped), tuple(kept))


def unfuse(model: nn.Module) -> FuseReport:
    """Undo `fuse`: the modules it swapped, in this model or in one this is a copy of, are torch.nn's again.

    Modules that were made as ours stay so, and so do those whose class has changed since (by a parametrization, by
    fully_shard), which the report names. What a pickle of the rest loads needs this package no more.
    """
    swapped, kept = [], []
    for name, module in model.named_modules():
        if not module.__dict__.get(MARK):
            continue
        if type(module) not in OURS.values():  # and it keeps its mark, to be undone later
            kept.append(Part(name, type(module).__name__, "of another class since: undo what changed it first"))
            continue
        delattr(module, MARK)
        module.__dict__.pop("skip_padding", None)
        release(module)
        swapped.append(Part(name, type(module).__name__))
    return FuseReport(tuple(swapped), tuple(kept))


def stood_in_for(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that `module` is or derives from, if there is one of ours for it and it is not ours yet."""
    if isinstance(module, tuple(OURS.values())) or type(module).__module__.startswith("fused_transformer."):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return next((theirs for theirs in OURS if theirs.__name__ == module.original_name), None)
    return next((theirs for theirs in OURS if isinstance(module, theirs)), None)


def why_not(module: nn.Module, theirs: type[nn.Module]) -> str | None:
    """Why `module` can't become ours, in one sentence; None if it can."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript, which can't compile ours: torch.jit.trace can"
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"has parametrizations of {names}: call fuse before registering them"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, and what replaced it would go on calling torch's"
    if kind is theirs:
        return None
    if kind.__module__.startswith("torch.ao.") or "quantized" in kind.__module__:
        return f"quantised: {kind.__module__}.{kind.__qualname__}"
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        return "sharded by fully_shard: call fuse before it"
    return f"a subclass of torch.nn.{theirs.__name__}, which may compute something else"


def _look_alikes(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Attention and norms of others, by the names of their classes; not those that hold one of torch.nn's or ours."""
    known = (*OURS, *OURS.values())
    for name, module in model.named_modules():
        if not re.search(r"(Attention|LayerNorm|RMSNorm)$", type(module).__name__):
            continue
        if type(module).__module__.startswith(("torch.", "fused_transformer.")):
            continue
        if not any(isinstance(part, known) for part in module.modules()):
            yield name, module


def _within(name: str, pattern: str) -> bool:
    """Whether `name` or a module that it is in matches."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def grouped(rows: Iterable[tuple[str, K]]) -> Iterator[tuple[str, K, int]]:
    """(name, rest, how often) of (name, rest): rows that differ in a name's numbers alone are one, with * for them."""
    groups: dict[tuple[str, K], list[str]] = {}
    for name, rest in rows:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)  # encoder.layers.*.norm1
        groups.setdefault((pattern, rest), []).append(name)
    for (pattern, rest), names in groups.items():
        name = pattern if len(set(names)) > 1 else names[0]
        yield name or "(the model)", rest, len(names)


def parts_as_lines(parts: Iterable[Part]) -> list[str]:
    """A line for each part: its name, its class, and why it was left alone."""
    rows = list(grouped((part.name, (part.kind, part.why)) for part in parts))
    width = max((len(name) for name, _, _ in rows), default=0)
    lines = []
    for name, (kind, why), count in rows:
        times = f" × {count}" if count > 1 else ""
        lines.append(f"  {name:{width}}  {kind}{times}" + (f": {why}" if why else ""))
    return lines
