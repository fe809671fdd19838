"""What a planted bug is: see planted_bugs.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    op: str  # whose calls (calls.py) must notice
    name: str
    file: str  # below csrc/
    right: str
    wrong: str
