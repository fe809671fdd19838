"""What the environment may say to the build, checked once."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CUDA_ARCHS = "80+PTX;90a"


def cuda_wanted() -> str:
    """FUSED_TRANSFORMER_CUDA: "auto" (CUDA where nvcc is found), "0" (never) or "1" (must)."""
    wanted = os.environ.get("FUSED_TRANSFORMER_CUDA", "") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FUSED_TRANSFORMER_CUDA must be auto, 0 or 1, got {wanted!r}")
    return wanted


def cuda_archs() -> list[str]:
    """FUSED_TRANSFORMER_CUDA_ARCHS as nvcc's own names: sm_80 is machine code, compute_80 is PTX.

    Entries are separated by ';', ',' or spaces and written 80, 8.0, sm_80 or compute_80; +PTX after one adds its
    PTX. The default has machine code for A100 (which the 8.x after it run too) and H100, and the PTX of 80 for
    every later GPU: that of 90a would run on no other than H100.
    """
    text = os.environ.get("FUSED_TRANSFORMER_CUDA_ARCHS", "") or DEFAULT_CUDA_ARCHS
    codes: list[str] = []
    for entry in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(sm_|compute_)?(\d+)\.?(\d)([af]?)(\+PTX)?", entry, re.IGNORECASE)
        if match is None:
            raise SystemExit(
                f"FUSED_TRANSFORMER_CUDA_ARCHS must be a list like {DEFAULT_CUDA_ARCHS!r}; {entry!r} is no architecture"
            )
        kind, major, minor, suffix, ptx = match.groups()
        number = f"{major}{minor}{(suffix or '').lower()}"
        codes.append(f"{(kind or 'sm_').lower()}{number}")
        if ptx:
            codes.append(f"compute_{number}")
    if not codes:
        raise SystemExit(f"FUSED_TRANSFORMER_CUDA_ARCHS must be a list like {DEFAULT_CUDA_ARCHS!r}, got {text!r}")
    # machine code first, PTX last; each once
    return sorted(dict.fromkeys(codes), key=lambda code: code.startswith("compute_"))


def objects_folder() -> Path:
    """FUSED_TRANSFORMER_OBJECTS: where compiled objects are kept for the next build; build/objects if not set."""
    folder = os.environ.get("FUSED_TRANSFORMER_OBJECTS", "")
    return Path(folder).resolve() if folder else ROOT / "build" / "objects"


def max_jobs() -> int:
    """MAX_JOBS, or as many as this process may use processors."""
    text = os.environ.get("MAX_JOBS", "")
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit(f"MAX_JOBS must be a positive number, got {text!r}")
    return int(text)
