"""What the machine code of a Triton kernel does in its innermost loop: its instructions, and those that spill.

A kernel's spills in all say little: most lie in loops that are seldom entered, as the one that takes NaN out of values.
What costs is the loop over whole tiles. It is the shortest of the innermost loops with the most products, since the
others hold the same products and the comparisons of masks beside them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
BRANCH = re.compile(r"\bBRA\b.*?\b(0x[0-9a-f]+)")
PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|FFMA2?)\b")
SPILL = re.compile(r"\b(?:STL|LDL)\b")  # stores to and loads from a thread's local memory


class Loop(NamedTuple):
    instructions: int
    products: int  # on tensor cores or off them
    spills: int  # instructions that reach local memory


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin, by the program that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def innermost_loops(sass: str) -> list[Loop]:
    """The loops that hold no other, in the order of their code: from where a branch leads back to, to that branch."""
    code = [(int(address, 16), text) for address, text in INSTRUCTION.findall(sass)]
    jumps = ((address, BRANCH.search(text)) for address, text in code)
    spans = {(int(to[1], 16), address) for address, to in jumps if to and int(to[1], 16) < address}
    loops = []
    for begin, end in sorted(spans):
        if any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans):
            continue
        body = [text for address, text in code if begin <= address <= end]
        count = [sum(bool(pattern.search(text)) for text in body) for pattern in (PRODUCT, SPILL)]
        loops.append(Loop(len(body), *count))
    return loops


def main_loop(sass: str) -> Loop | None:
    """The loop over whole tiles; None where there is no loop with products."""
    loops = [loop for loop in innermost_loops(sass) if loop.products]
    most = max((loop.products for loop in loops), default=0)
    # nearly the most: a loop may have a multiply-add more than another for its addresses
    return min((loop for loop in loops if loop.products >= 0.9 * most), default=None)
