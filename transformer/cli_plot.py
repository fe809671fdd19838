"""`python -m fused_transformer plot`: the curves of one or several trainings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_transformer.training_plot import training_curves

CURVES = "curves.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; 0 if done, 1 with a message on standard error if something is wrong."""
    options = parser().parse_args(arguments)
    try:
        first = Path(options.training[0])
        path = Path(options.output) if options.output else (first if first.is_dir() else first.parent) / CURVES
        print(training_curves(options.training).save(path))
    except (OSError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_transformer plot",
        description="Draw loss, learning rate and BLEU of trainings against steps and minutes; several are compared.",
    )
    parser.add_argument("training", nargs="+", metavar="DIR", help="a folder that train wrote")
    what = f"what to write: .png, .svg, .pdf or .html, as its ending says (default: {CURVES} in the first folder)"
    parser.add_argument("-o", "--output", metavar="FILE", help=what)
    return parser
