"""The torch that csrc/with_torch is compiled with: the one that is installed where this package will be."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# A build environment of pip's own hides what is installed around it; -I looks past it.
FIND = "import importlib.util as u; spec = u.find_spec('torch'); print(spec.origin if spec else '')"


@dataclass
class Torch:
    root: Path
    version: str

    @property
    def includes(self) -> list[Path]:
        return [self.root / "include", self.root / "include" / "torch" / "csrc" / "api" / "include"]

    @property
    def link_flags(self) -> list[str]:
        # Found again by their names alone, in a process that has imported torch.
        return [f"-L{self.root / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]


def wanted() -> str:
    """FUSED_TRANSFORMER_NODES: "auto" (where torch is found), "0" (never) or "1" (must)."""
    text = os.environ.get("FUSED_TRANSFORMER_NODES", "") or "auto"
    if text not in ("auto", "0", "1"):
        raise SystemExit(f"FUSED_TRANSFORMER_NODES must be auto, 0 or 1, got {text!r}")
    return text


def find_torch() -> Torch | str:
    """The installed torch, or why there is none to compile with."""
    spec = find_spec("torch")
    origin = spec.origin if spec is not None else _around()
    if not origin:
        return "torch is not installed here"
    root = Path(origin).parent
    if not (root / "include" / "torch" / "csrc" / "autograd" / "function.h").is_file():
        return "this torch has no headers"
    try:
        return Torch(root, runpy.run_path(str(root / "version.py"))["__version__"])
    except (OSError, KeyError) as error:
        return f"this torch does not tell its version ({error!r})"


def _around() -> str | None:
    done = subprocess.run([sys.executable, "-I", "-c", FIND], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
