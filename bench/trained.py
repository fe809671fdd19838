"""A trained model beside CTranslate2: BLEU for each kind of weights, and whether both find the same translations.

    python -m bench.trained --model DIR --source FILE --reference FILE [--output FILE]

The model is what `python -m fused_transformer train` wrote. Both engines search 4 beams by CTranslate2's rules: a
sentence is done with its first 4 finished hypotheses, ranked by log-probability / length ** penalty, eos counted, once
with its default of 1 and once with 0. Nothing is timed here: that is `bench.ctranslate2`'s part.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from bench import machine
from bench.ctranslate2 import CONTESTANTS
from bench.report import write_comparison
from fused_transformer import SearchOptions, Transformer, export
from fused_transformer.checkpoint import find_checkpoint, load_checkpoint
from fused_transformer.evaluation import bleu
from fused_transformer.text import read_parallel
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.translation import Translator, with_weights

BEAM_SIZE, LONGEST = 4, 100
PENALTIES = (1.0, 0.0)

Tokens = list[int]


def theirs(model: Transformer, sources: Sequence[Tokens], weights: str, penalty: float) -> list[Tokens]:
    """CTranslate2's translations."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        path = export.ctranslate2(model, Path(folder) / "model", quantization=weights)
        translator = ctranslate2.Translator(str(path), device="cpu", compute_type=weights)
        results = translator.translate_batch(
            [[str(token) for token in source] for source in sources],
            beam_size=BEAM_SIZE,
            length_penalty=penalty,
            max_decoding_length=LONGEST,
            max_batch_size=64,
        )
    return [[int(token) for token in result.hypotheses[0]] for result in results]


def ours(model: Transformer, tokenizer: Tokenizer, lines: Sequence[str], weights: str, penalty: float) -> list[Tokens]:
    """This package's translations, by the same rules."""
    options = SearchOptions(
        beam_size=BEAM_SIZE,
        length_penalty=penalty,
        penalty="power",
        patience=1.0,
        max_length=LONGEST,
        max_length_beyond_source=LONGEST,
    )
    translations = Translator(with_weights(model, weights), tokenizer).translate(lines, options)
    return [list(best.tokens) for best, *_ in translations]


def compare(path: Path, source: str, reference: str) -> dict:
    """A row for each length penalty, engine and kind of weights."""
    model, tokenizer, state, _ = load_checkpoint(find_checkpoint(path))
    model.eval()
    lines, references = read_parallel(source, reference)
    sources = tokenizer.encode(lines)
    rows = []
    signature = ""
    for penalty in PENALTIES:
        first: list[Tokens] | None = None
        for engine, weights in CONTESTANTS:
            found = (
                theirs(model, sources, weights, penalty)
                if engine == "ctranslate2"
                else ours(model, tokenizer, lines, weights, penalty)
            )
            first = found if first is None else first
            score, signature = bleu(tokenizer.decode(found), references)
            same = sum(a == b for a, b in zip(first, found, strict=True))
            rows.append(
                {"length_penalty": penalty, "engine": engine, "weights": weights, "bleu": round(score, 2), "same": same}
            )
    import ctranslate2

    return {
        "machine": machine.facts() | {"ctranslate2": ctranslate2.__version__},
        "date": f"{date.today():%Y-%m-%d}",
        "model": model.config.to_dict(),
        "step": (state.get("progress", {}).get("best") or {}).get("step"),
        "source": Path(source).stem,
        "beam_size": BEAM_SIZE,
        "sentences": len(lines),
        "signature": signature,
        "rows": rows,
    }


def table(result: dict) -> str:
    """The rows as text."""
    lines = [f"{result['sentences']} sentences, beam {result['beam_size']}, {result['signature']}"]
    for row in result["rows"]:
        lines.append(
            f"length penalty {row['length_penalty']:.1f}  {row['engine']:12}{row['weights']:10}BLEU {row['bleu']:.2f}  "
            f"same as CTranslate2's float32: {row['same']}"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint, or the folder that train wrote")
    parser.add_argument("--source", required=True, help="text to translate, a sentence a line")
    parser.add_argument("--reference", required=True, help="its translation, line by line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="default: bench/results/trained/<processor>_<date>.json")
    parsed = parser.parse_args(arguments)
    if importlib.util.find_spec("ctranslate2") is None:
        sys.stdout.write("skipped: ctranslate2 is not installed; pip install 'fused-transformer[ctranslate2]'\n")
        return 0
    torch.set_num_threads(parsed.threads)
    result = compare(parsed.model, parsed.source, parsed.reference)
    sys.stdout.write(table(result))
    write_comparison("trained", result, parsed.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
