"""`python -m fused_transformer info`: what is installed, what runs here, and why the rest does not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence

import torch

from fused_transformer.kernels import BACKENDS, OPS, _direct, _native, _node, matmul

GPU_BACKENDS = ("cuda", "triton")


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report; 0 always, as a missing backend is no error."""
    argparse.ArgumentParser(prog="python -m fused_transformer info", description=__doc__).parse_args(arguments)
    print(report())
    return 0


def report() -> str:
    """The text that `info` prints."""
    facts = {
        "fused-transformer": _version("fused-transformer"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "machine": _machine(),
        "cpu kernels": _cpu(),
        "direct calls": "yes" if _direct.WHY_NONE is None else f"no: {_direct.WHY_NONE}",
        "autograd nodes": "in C++" if _node.WHY_NONE is None else f"in Python: {_node.WHY_NONE}",
        "products": _products(),
        "cuda kernels": _cuda(),
        "cuda device": _device(),
        "hopper attention": _hopper_attention(),
    }
    width = max(map(len, facts)) + 2
    lines = [f"{name:{width}}{value}" for name, value in facts.items()]
    return "\n".join([*lines, "", *backend_table()])


def backend_table() -> list[str]:
    """op × backend with yes or no, then the reason of each no."""
    reasons = {name: {backend: unavailable(name, backend) for backend in BACKENDS} for name in OPS}
    width = max(map(len, [*OPS, "op"])) + 2
    lines = ["op".ljust(width) + "".join(backend.ljust(11) for backend in BACKENDS).rstrip()]
    for name, row in reasons.items():
        lines.append(name.ljust(width) + "".join(("no" if why else "yes").ljust(11) for why in row.values()).rstrip())
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, row in reasons.items():
        for backend, why in row.items():
            if why:
                grouped.setdefault((backend, why), []).append(name)
    if grouped:
        lines.append("")
    lines += [f"no {backend} for {', '.join(names)}: {why}" for (backend, why), names in grouped.items()]
    return lines


def unavailable(op: str, backend: str) -> str | None:
    """Why `backend` of `op` can serve no call on this machine, or None if it can."""
    if backend not in OPS[op].order:
        return "the op has no such backend"
    module = OPS[op].module(backend)
    if isinstance(module, str):
        return module
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend in GPU_BACKENDS and not torch.cuda.is_available() and not interpreted:
        return "there is no CUDA device here"
    return None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"


def _cpu() -> str:
    try:
        library = _native.library()
    except ImportError as error:
        return f"none: {error}"
    return f"{library.isa()}, {library.cpu_threads()} threads"


def _products() -> str:
    """Whose products of matrices the layers take on the CPU."""
    own = sorted(str(dtype).removeprefix("torch.") for dtype in matmul.QUICKER)
    if matmul.QUICKER_FOR_FEW:
        own.append(f"float32 of few rows and {matmul.MANY_WEIGHTS:,} weights")
    return f"this package's own in {', '.join(own)}, else torch's" if own else "torch's"


def _cuda() -> str:
    try:
        archs = _native.cuda_library().cuda_archs
    except ImportError as error:
        return f"none: {error}"
    return "compiled for " + ", ".join(
        f"PTX of {code}, which newer GPUs compile" if code.startswith("compute_") else code for code in archs.split(";")
    )


def _device() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def _hopper_attention() -> str:
    """Whether the forward kernel that only Hopper runs is taken, on the current device."""
    try:
        from fused_transformer.kernels.attention import cuda_sm90
    except ImportError as error:
        return f"no: {error}"
    if not torch.cuda.is_available():
        return "no: there is no CUDA device here"
    why = cuda_sm90.why_not_here(torch.device("cuda", torch.cuda.current_device()))
    return "yes: forward, where its kernel takes the call" if why is None else f"no: {why}"
