"""What is aimed at on a CPU, and what came out: the table between <!-- aims:begin --> and its end in bench/README.md.

    python -m bench.aims [FILE.json ...]      a column for each; without files, for the newest of each processor

What bench.training and bench.ctranslate2 last wrote for the same processor counts too. What is below its aim is named,
in bold; of the rest the least and the greatest are told. No row of a group is left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import compare, report
from bench.aims_rows import rows_of

ATTENTION = "attention (with lengths|causal|unmasked|keep mask|bias)"
SEVERAL = r" L(?!1 )"  # queries: one alone reads more than it multiplies
# Of a row's group, what its aim says already.
UNTOLD = "^attention( with lengths)?|^add layer norm( by rows)?$|^(small|training|fused|embed).*| forward backward"


@dataclass(frozen=True)
class Aim:
    """`least` of what a row has: a share of "matmul" or "copy", or the time over ours of the quickest alternative whose
    name begins with `of`. `group` is the whole of a row's, `name` a part, `dtype` the beginning.
    """

    what: str
    least: float
    of: str
    group: str
    name: str = ""
    dtype: str = ""

    def figures(self, rows: list[dict]) -> Iterator[tuple[str, float]]:
        for row in rows:
            named = re.fullmatch(self.group, row["group"]) and re.search(self.name, row["name"])
            if named and row["dtype"].startswith(self.dtype):
                times = [ratio for label, ratio in report.others(row).items() if label.startswith(self.of)]
                share = row.get(f"share_of_{self.of}")
                figure = min(times, default=None) if share is None else share
                if figure is not None:  # an alternative may not have been timed
                    yield self.short(row), figure

    def short(self, row: dict) -> str:
        """What tells a row from the others of an aim; how much it moves, where that decides which cache holds it."""
        name = re.sub(r"\b[BHDEV]\d+(/\d+)?\b ?|transformer-(base )?|^batch ", "", row["name"]).strip()
        size = f" ({row['bytes'] / 1e6:.1f} MB)" if self.of == "copy" and "bytes" in row else ""
        return f"{re.sub(UNTOLD, '', row['group'])} {name}".strip() + size

    def told(self, figure: float) -> str:
        return f"{figure:.0%}".replace("%", " %") if self.of in ("matmul", "copy") else f"{figure:.2f}"

    def cell(self, rows: list[dict]) -> str:
        found = list(self.figures(rows))
        below = [f"{name} {self.told(figure)}" for name, figure in found if figure < self.least]
        rest = sorted(figure for _, figure in found if figure >= self.least)
        ends = " to ".join(dict.fromkeys(map(self.told, (rest[0], rest[-1])))) if rest else ""
        words = [f"**{', '.join(below)}**"] * bool(below) + [f"else {ends}" if below else ends] * bool(rest)
        return "; ".join(words) or "not in the file"


AIMS = (
    Aim("attention forward: 60 % of a large product's rate", 0.6, "matmul", ATTENTION, SEVERAL, "float32"),
    Aim("the same in bfloat16, of a large product in bfloat16", 0.6, "matmul", ATTENTION, SEVERAL, "bfloat16"),
    Aim("forward and backward: 50 %", 0.5, "matmul", f"{ATTENTION} forward backward"),
    Aim("one query, of a copy's rate: no aim", 0, "copy", ATTENTION, " L1 "),
    Aim("2.5 times SDPA with lengths, 128 and 512 keys", 2.5, "sdpa", "attention with lengths", r" L(128|512) D64$"),
    Aim("2 times SDPA causal, 512 keys", 2, "sdpa", "attention causal", " L512 "),
    Aim("the same with backward", 2, "sdpa", "attention causal forward backward", " L512 "),
    Aim("add + norm, norm: 85 % of a copy's rate", 0.85, "copy", "(add )?layer norm"),
    Aim("add + norm of more than 100 MB: 85 %", 0.85, "copy", "add layer norm by rows"),
    Aim("embedding: 85 %", 0.85, "copy", "embedding"),
    Aim("the same with dropout or backward: no aim", 0, "copy", "(add layer norm|embedding) (dropout|forward .*)"),
    Aim("training step of Transformer-base: 1.8 times torch.nn", 1.8, "torch.nn", "training (step|mix)", "base|^[mw]"),
    Aim("1.3 times torch.compile of it", 1.3, "compile", "training mix"),
    Aim("small calls never slower than torch", 1, "naive", "small calls"),
    Aim("the same with gradients", 1, "naive", "small calls forward backward"),
    Aim("float32 over CTranslate2's, batch 1 greedy: 2.2", 2.2, "ctranslate2 f", "fused float32", "h 1 greedy"),
    Aim("batch 1, 4 beams: 2.5", 2.5, "ctranslate2 f", "fused float32", "h 1 beam"),
    Aim("batch 8 greedy: 2.0", 2, "ctranslate2 f", "fused float32", "h 8 greedy"),
    Aim("batch 8, 4 beams: 1.5", 1.5, "ctranslate2 f", "fused float32", "h 8 beam"),
    Aim("batch 64: 1.4", 1.4, "ctranslate2 f", "fused float32", "h 64 "),
    Aim("bfloat16 no slower than CTranslate2's int8", 1, "ctranslate2 i", "fused bfloat16"),
    Aim("int8 at batch 1: 1.3 times that", 1.3, "ctranslate2 i", "fused int8", "h 1 "),
)


def table(paths: list[Path]) -> list[str]:
    columns = [rows_of(path) for path in paths]
    lines = [f"| aim | {' | '.join(path.stem for path in paths)} |", "|---" * (len(paths) + 1) + "|"]
    return lines + [f"| {aim.what} | {' | '.join(aim.cell(rows) for rows in columns)} |" for aim in AIMS]


def newest() -> list[Path]:
    files = report.newest(report.ROOT / "bench" / "results")
    return [path for path in files if compare.read(path)["machine"]["device"] == "cpu"]


def main(arguments: list[str]) -> int:
    try:
        sys.stdout.write("\n".join(table([Path(name) for name in arguments] or newest())) + "\n")
    except ValueError as error:
        sys.stderr.write(f"python -m bench.aims: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
