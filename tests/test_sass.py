"""What tests/sass.py reads out of machine code, on code written for it."""

from __future__ import annotations

from tests import sass


def listing(*instructions):
    return "\n".join(f"        /*{16 * i:04x}*/    {text} ;    /* 0x0 */" for i, text in enumerate(instructions))


# An outer loop from 0x10 to 0xe0, in it the loop over whole tiles, the one over cut tiles, and one without products.
CODE = listing(
    "S2R R0, SR_TID.X",
    "IADD3 R1, R1, 0x1, RZ",
    "HMMA.16816.F32 R4, R8, R10, R4",
    "LDL R5, [R1+0x4]",
    "@P0 BRA 0x20",
    "HMMA.16816.F32 R4, R8, R10, R4",
    "ISETP.LT.AND P1, PT, R2, R3, PT",
    "STL [R1], R5",
    "LDL R5, [R1]",
    "@P0 BRA.U 0x50",
    "FADD R1, R2, R3",
    "@!P2 BRA 0xa0",
    "NOP",
    "BRA 0xf0",
    "@P3 BRA 0x10",
    "EXIT",
    "BRA 0x100",
)


def test_innermost_loops():
    assert sass.innermost_loops(CODE)[:3] == [sass.Loop(3, 1, 1), sass.Loop(5, 1, 2), sass.Loop(2, 0, 0)]


def test_the_loop_over_whole_tiles_is_the_shortest_with_products():
    assert sass.main_loop(CODE) == sass.Loop(3, 1, 1)
    assert sass.main_loop(listing("NOP", "EXIT")) is None
