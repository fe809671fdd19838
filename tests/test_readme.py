"""README's Python blocks run as they stand, each on its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_block_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_first_example_fits_a_glance():
    """The quick start is what a newcomer copies: a dozen lines of code at most, with the check that it is right."""
    first = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(first) <= 12
    assert "assert_close" in BLOCKS[0]


def test_every_op_of_the_package_is_in_the_table():
    from fused_transformer import kernels

    ops = [name for name in kernels.__all__ if callable(getattr(kernels, name)) and name not in ("use_backend",)]
    table = README[README.index("## Which kernels there are") : README.index("What they promise")]
    for name in ops:
        stem = name.removesuffix("_with_total")
        assert stem in table or name in ("new_seed", "why_not", "backends"), f"{name} is not in README's table"
