"""`python -m fused_transformer demo`: a small model learns a little English and French, and shows what it learned."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from fused_transformer import demo
from fused_transformer.demo import DemoResult
from fused_transformer.demo.it import ItHeads, first_that_links
from fused_transformer.show import distributions
from fused_transformer.show.picture import require_matplotlib

SHOWN = 10  # wrong translations of a kind
TITLES = {
    "plain": "sentences",
    "it": "sentences where only the right noun for *it* gives the right French",
    "rivals": "the same, where both nouns are animals and two words decide which one is meant",
    "wanted": "sentences that end in *it*, which is le or la",
    "people": "French to English",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, translate, print; 0 if done, 130 if interrupted, 1 with a message on standard error for wrong options."""
    options = parser().parse_args(arguments)
    try:
        _demo(options)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_transformer demo",
        description="Train a small Transformer on made-up English and French sentences, in under two minutes on two "
        "CPU cores, and translate sentences that it has not seen. No data is needed.",
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=demo.STEPS, help="of training (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1.5, help="most time to train (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--output", metavar="DIR", help="keep the model there, for translate and show")
    parser.add_argument(
        "--show",
        metavar="DIR",
        help="find the head that tells what *it* stands for, and draw it there, as a figure and as pages; trains with "
        "one seed after the other until there is one",
    )
    parser.add_argument("--tries", type=int, default=24, help="seeds to train with at most, for --show (default: 24)")
    return parser


def _demo(options: argparse.Namespace) -> None:
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be positive, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.show:
        require_matplotlib()  # ahead of a minute of training
    if not options.show:
        result = _train(options, options.seed)
    else:
        result, found, seeds = first_that_links(partial(_train, options), options.seed, options.tries)
    print("\n".join(report(result)))
    if options.show:
        print("\n".join(_show(result, found, seeds, Path(options.show))))
    if options.output:
        path = result.save(options.output)
        print(f"\nThe model is {path}. It knows the words of its sentences alone; try")
        print(f'  echo "{demo.WIDE.source}" | python -m fused_transformer translate --model {options.output}')


def _train(options: argparse.Namespace, seed: int) -> DemoResult:
    with tqdm(total=options.steps, unit="step", disable=None, dynamic_ncols=True, leave=False) as bar:
        bar.set_description(f"seed {seed}", refresh=False)

        def on_step(step: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        return demo.run(seed, steps=options.steps, minutes=options.minutes, on_step=on_step)


def _show(result: DemoResult, found: ItHeads, seeds: list[int], folder: Path) -> list[str]:
    """Draw what *it* stands for, and the tutorial's distributions; what was found, and the files."""
    folder.mkdir(parents=True, exist_ok=True)
    tired, wide = found.views()
    outputs = {"untrained": result.outputs.before, "trained": result.outputs.after}
    labels = result.tokenizer.pieces(range(len(result.tokenizer)))
    files = [
        found.figure().save(folder / "it.svg"),
        tired.save(folder / "tired.html"),
        wide.save(folder / "wide.html"),
        distributions(outputs, result.outputs.targets, labels=labels, most=8).save(folder / "distributions.svg"),
    ]
    tried = f"{len(seeds)} model{'s' if len(seeds) > 1 else ''} trained, seed {result.seed} shown"
    if not (found.query == "it" and found.clear):
        tried += "; no head of theirs links *it* itself clearly to the right noun"
    return ["", f"What *it* stands for ({tried}):", "", f"  {found}", "", *map(str, files)]


def report(result: DemoResult) -> list[str]:
    """What a run was and what came of it, as lines."""
    parameters = sum(p.numel() for p in result.model.parameters())
    lines = [
        f"{len(result.text.training)} sentence pairs, {len(result.tokenizer)} tokens, {parameters} parameters; "
        f"{result.steps} steps in {result.seconds:.0f} s" + ("" if result.finished else ", cut short by --minutes"),
        "",
        f'Probability of the next word of "{result.outputs.sentence.target}", from '
        f'"{result.outputs.sentence.source}" and the words ahead of it:',
        "",
        result.outputs.table(result.tokenizer),
        "",
        "The tutorial's sentences, not one of them seen in training:",
        "",
    ]
    for sentence, translation in result.tutorial:
        lines += [f"  {sentence.source}", f"  → {translation}{_verdict(translation, sentence.target)}"]
    lines += ["", "Held out: no training sentence has the same pair of nouns, or of pronoun and profession."]
    for kind, score in result.scores.items():
        lines += ["", f"{score.right} of {score.total} right: {TITLES[kind]}"]
        for sentence, translation in score.wrong[:SHOWN]:
            lines += [f"  {sentence.source}", f"  → {translation}{_verdict(translation, sentence.target)}"]
        if len(score.wrong) > SHOWN:
            lines.append(f"  and {len(score.wrong) - SHOWN} more")
    return lines


def _verdict(translation: str, expected: str) -> str:
    return "" if translation == expected else f"   (should be: {expected})"
