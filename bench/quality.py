"""BLEU of trained models on a test set, beside how long they trained: a paper's table.

    python -m bench.quality "ours=DIR" "torch.nn=DIR" --source test.en --reference test.fr [--output FILE]

A DIR is what `train` or `bench.twin` wrote. Each model translates with beam search (alpha 0.6) and is judged by
sacreBLEU three times: as it is written, with lower case on both sides, and as papers on Multi30k report BLEU, in lower
case over the tokens of Moses (punctuation normalised first), which needs `pip install sacremoses`. Steps, tokens a
second and minutes are those of the run's log.jsonl: the rate is a median, as a run may have shared its machine or been
paused.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import sacrebleu
import torch

from bench import machine
from bench.report import write_comparison
from bench.report_training import of_quality
from fused_transformer.checkpoint import find_checkpoint, load_checkpoint
from fused_transformer.evaluation import bleu
from fused_transformer.text import read_parallel
from fused_transformer.translation import Translator


def logged(folder: Path) -> dict:
    """Of a run: its last step, the median rate in target tokens a second, and the minutes that its clock says.

    Raises:
        OSError, ValueError: there is no log, or no step in it.
    """
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        raise ValueError(f"{folder / 'log.jsonl'} holds no step")
    rate = statistics.median(line["tokens_per_second"] for line in steps)
    return {
        "steps": steps[-1]["step"],
        "tokens_per_second": round(rate),
        "minutes": round(steps[-1]["seconds"] / 60, 1),
    }


def lower_cased(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    metric = sacrebleu.metrics.BLEU(lowercase=True)
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return score, str(metric.get_signature())


def moses_tokens(sentences: Sequence[str], language: str) -> list[str]:
    """What Multi30k's own preparation makes of a text: punctuation normalised, lower case, tokens apart.

    Raises:
        ModuleNotFoundError: sacremoses is not installed.

    Source: Koehn et al. 2007 (Moses); Elliott et al. 2016, arXiv:1605.00459, section 4.
    """
    import sacremoses

    normalizer, tokenizer = sacremoses.MosesPunctNormalizer(language), sacremoses.MosesTokenizer(language)
    return [tokenizer.tokenize(normalizer.normalize(line).lower(), return_str=True) for line in sentences]


def tokenised(hypotheses: Sequence[str], references: Sequence[str], language: str) -> tuple[float, str]:
    """BLEU in lower case over Moses's tokens, and its signature: what multi-bleu.perl gives on such text."""
    metric = sacrebleu.metrics.BLEU(tokenize="none", force=True)  # force: it is tokenised text, on purpose
    found, wanted = moses_tokens(hypotheses, language), moses_tokens(references, language)
    score = metric.corpus_score(found, [wanted]).score
    return score, f"{metric.get_signature()}, of lower-cased tokens of sacremoses {version('sacremoses')}"


def judge(folder: Path, source: Sequence[str], references: Sequence[str], beam_size: int, language: str) -> dict:
    """A row: the model's size, its training, and the three BLEUs with their signatures."""
    path = find_checkpoint(folder)
    model, _, state, _ = load_checkpoint(path)
    translations = Translator.load(path).translate(source, beam_size=beam_size)
    found = [best.text for best, *_ in translations]
    (score, signature), (lower, lower_signature) = bleu(found, references), lower_cased(found, references)
    tokens, tokens_signature = tokenised(found, references, language)
    best = state.get("progress", {}).get("best") or {}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": state.get("settings", {}),
        **logged(folder),
        "best_step": best.get("step"),
        "averaged": best.get("averaged", 1),
        "bleu": round(score, 2),
        "signature": signature,
        "bleu_lower_cased": round(lower, 2),
        "signature_lower_cased": lower_signature,
        "bleu_tokenised": round(tokens, 2),
        "signature_tokenised": tokens_signature,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--source", required=True, help="text to translate, a sentence a line")
    parser.add_argument("--reference", required=True, help="its translation, line by line")
    parser.add_argument("--language", help="of the reference, for Moses (default: the ending of its name)")
    parser.add_argument("--beam-size", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="default: bench/results/quality/<processor>_<date>.json")
    parsed = parser.parse_args(arguments)
    wrong = [run for run in parsed.runs if not run.partition("=")[2]]
    if wrong:
        parser.error(f"a run is NAME=DIR, got {wrong[0]!r}")
    if importlib.util.find_spec("sacremoses") is None:
        parser.error("Moses's tokens need sacremoses: pip install sacremoses")
    language = parsed.language or Path(parsed.reference).suffix[1:]
    if not language:
        parser.error(f"the name of {parsed.reference} ends in no language: give --language, as in --language fr")
    torch.set_num_threads(parsed.threads)
    source, references = read_parallel(parsed.source, parsed.reference)
    rows = {}
    for run in parsed.runs:
        name, _, folder = run.partition("=")
        rows[name] = judge(Path(folder), source, references, parsed.beam_size, language)
    result = {
        **{"machine": machine.facts(), "date": f"{date.today():%Y-%m-%d}", "source": Path(parsed.source).name},
        **{"beam_size": parsed.beam_size, "sentences": len(source), "rows": rows},
    }
    sys.stdout.write(of_quality(result) + "\n")
    write_comparison("quality", result, parsed.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
