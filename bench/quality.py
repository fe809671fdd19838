"""BLEU of trained models on a test set, beside how long they trained: a paper's table.

    python -m bench.quality "ours=DIR" "torch.nn=DIR" --source test.en --reference test.fr [--prepared] [--output FILE]

A DIR is what `train` or `bench.twin` wrote. Each model translates with beam search (alpha 0.6) and is judged by
sacreBLEU three times: as it is written, with lower case on both sides, and as papers on Multi30k report BLEU, in lower
case over the tokens of Moses, which needs `pip install sacremoses`. --prepared is for models that were trained on what
`bench.moses` made of the text: the source is prepared so for them, and their tokens are joined for sacreBLEU.

Steps, tokens a second and minutes are those of the run's log.jsonl. The rate is what nine tenths of the log's lines
stay below, as a run may have shared its machine; the minutes are all there were.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import sacrebleu
import torch

from bench import machine, moses
from bench.report import write_comparison
from bench.report_training import of_quality
from fused_transformer.checkpoint import find_checkpoint, load_checkpoint
from fused_transformer.evaluation import bleu
from fused_transformer.text import read_parallel
from fused_transformer.translation import Translator


def logged(folder: Path) -> dict:
    """Of a run: its last step, its rate in target tokens a second, and the minutes that its clock says.

    Raises:
        OSError, ValueError: there is no log, or no step in it.
    """
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        raise ValueError(f"{folder / 'log.jsonl'} holds no step")
    rates = [line["tokens_per_second"] for line in steps]
    rate = statistics.quantiles(rates, n=10)[-1] if len(rates) > 1 else rates[0]
    return {
        "steps": steps[-1]["step"],
        "tokens_per_second": round(rate),
        "minutes": round(steps[-1]["seconds"] / 60, 1),
    }


def lower_cased(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    metric = sacrebleu.metrics.BLEU(lowercase=True)
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return score, str(metric.get_signature())


def tokenised(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """BLEU over tokens of `bench.moses`, and its signature: what multi-bleu.perl gives on such text."""
    metric = sacrebleu.metrics.BLEU(tokenize="none", force=True)  # force: it is tokenised text, on purpose
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return score, f"{metric.get_signature()}, of lower-cased tokens of {moses.name()}"


def judge(folder: Path, source: Sequence[str], references: Sequence[str], options: argparse.Namespace) -> dict:
    """A row: the model's size, its training, and the three BLEUs with their signatures."""
    path = find_checkpoint(folder)
    model, _, state, _ = load_checkpoint(path)
    translations = Translator.load(path).translate(source, beam_size=options.beam_size)
    found = [best.text for best, *_ in translations]
    tokens = found if options.prepared else moses.tokens(found, options.language)
    written = moses.joined(found, options.language) if options.prepared else found
    scores = {
        "bleu": bleu(written, references),
        "bleu_lower_cased": lower_cased(written, references),
        "bleu_tokenised": tokenised(tokens, moses.tokens(references, options.language)),
    }
    if options.prepared:
        del scores["bleu"]  # their case is lost
    best = state.get("progress", {}).get("best") or {}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": state.get("settings", {}),
        **logged(folder),
        "best_step": best.get("step"),
        "averaged": best.get("averaged", 1),
        **{name: round(score, 2) for name, (score, _) in scores.items()},
        "signatures": {name: signature for name, (_, signature) in scores.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--source", required=True, help="text to translate, a sentence a line")
    parser.add_argument("--reference", required=True, help="its translation, line by line")
    parser.add_argument("--prepared", action="store_true", help="the models were trained on text of bench.moses")
    parser.add_argument("--language", help="of the reference, for Moses (default: the ending of its name)")
    parser.add_argument("--beam-size", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="default: bench/results/quality/<processor>_<date>.json")
    parsed = parser.parse_args(arguments)
    wrong = [run for run in parsed.runs if not run.partition("=")[2]]
    if wrong:
        parser.error(f"a run is NAME=DIR, got {wrong[0]!r}")
    if not moses.installed():
        parser.error(moses.MISSING)
    try:
        parsed.language = moses.language_of(parsed.reference, parsed.language)
        source_language = moses.language_of(parsed.source) if parsed.prepared else ""
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(parsed.threads)
    source, references = read_parallel(parsed.source, parsed.reference)
    if parsed.prepared:
        source = moses.tokens(source, source_language)
    rows = {}
    for run in parsed.runs:
        name, _, folder = run.partition("=")
        rows[name] = judge(Path(folder), source, references, parsed)
    result = {
        **{"machine": machine.facts(), "date": f"{date.today():%Y-%m-%d}", "source": Path(parsed.source).name},
        **{"beam_size": parsed.beam_size, "sentences": len(source)},
        **{"prepared": parsed.prepared, "rows": rows},
    }
    sys.stdout.write(of_quality(result) + "\n")
    write_comparison("quality", result, parsed.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
