"""Decoding beside CTranslate2: the same weights, the same sources, the same tokens out.

    python -m bench.ctranslate2 [--quick] [--threads 1 2] [--batches 1 8 64] [--rounds 7] [--output FILE]

Transformer-base (6 + 6 layers, 32,000 subwords) with random weights translates random sources of 8 to 60 tokens into
exactly 32 tokens each: the rows of the special tokens in the table of embeddings are 0, so that none of them is ever
likely. The engines take turns, each in a process of its own (why: `bench.contestant`). A row holds tokens a second
(medians), how many of CTranslate2's float32 translations an engine found too, and the share of the least time that
reading the weights and multiplying by them takes, at rates measured in the same run. An engine in float32 that finds
others fails the run, unless float64 says that rounding made the choice. Load time and memory are of a process each.

--quick is a tiny model and one round, to see that it works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from torch import nn

from bench import machine
from bench.contestant import Contestant
from bench.decoding_work import SPECIAL, Work, least_seconds, make_work, rates
from bench.engines import ENGINES, EXPORTED, MODEL_FILE, Tokens
from bench.report import ROOT, write_comparison
from bench.timing import in_turn, quantiles
from fused_transformer import Transformer, TransformerConfig, export
from fused_transformer.checkpoint import load_model, save_model
from fused_transformer.guessing import levels_for

# Engine and weights; the first is what the others must agree with and are compared with.
CONTESTANTS = (
    ("ctranslate2", "float32"),
    ("ctranslate2", "int8"),
    ("fused", "float32"),
    ("fused", "bfloat16"),
    ("fused", "int8"),
)
# Timed beside "fused" where that looks ahead: what it is without.
ONE_BY_ONE = ("one_by_one", "float32")
BASE = TransformerConfig(source_vocab_size=32_000)
TINY = TransformerConfig(
    source_vocab_size=300, d_model=32, num_heads=2, d_feedforward=64, num_encoder_layers=2, num_decoder_layers=2
)
BEAMS = (1, 4)
# Where two hypotheses are as likely as this to float64, which one is found is a matter of rounding.
TIE = 1e-4


def write_models(config: TransformerConfig, folder: Path) -> None:
    """One model with random weights, for both engines."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    nn.init.zeros_(model.source_embedding.weight[:SPECIAL])
    save_model(folder / MODEL_FILE, model)
    for engine, weights in CONTESTANTS:
        if engine == "ctranslate2":
            export.ctranslate2(model, folder / f"{EXPORTED}{weights}", longest=128, quantization=weights)


# ---------------------------------------------------------------------------------------------- agreement


@torch.no_grad()
def log_probability(model: Transformer, source: Sequence[int], target: Tokens) -> float:
    """log p(target | source) of a float64 model."""
    config = model.config
    tokens = torch.tensor([[config.bos_idx, *target[:-1]]])
    logits = model(torch.tensor([[*source, config.eos_idx]]), tokens)[0]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum())


def is_tie(judge: Transformer, source: Sequence[int], theirs: Tokens, ours: Tokens, greedy: bool) -> bool:
    """Whether float64 finds both as likely: greedily the tokens where they part, else the whole translations."""
    end = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b) + 1 if greedy else len(ours)
    gap = log_probability(judge, source, ours[:end]) - log_probability(judge, source, theirs[:end])
    return abs(gap) <= TIE


def agreement(work: Work, expected: list[Tokens], found: list[Tokens], judge: Transformer | None) -> dict[str, int]:
    """How many translations are the same, how many of the others are ties, and how many are neither.

    Args:
        judge: the model in float64; without one, differences are counted and no more.

    Raises:
        AssertionError: a translation has another length; or one is neither, with a judge. (Of beams one in 64 may be:
            which ones live on can turn on a tie in the middle, that the translations found at the end do not show.)
    """
    sources = [source for batch in work.batches for source in batch]
    counts = {"sentences": len(sources), "same": 0, "ties": 0, "others": 0}
    for source, theirs, ours in zip(sources, expected, found, strict=True):
        assert len(theirs) == len(ours) == work.length, f"{work.name}: {len(theirs)} and {len(ours)} tokens"
        if theirs == ours:
            counts["same"] += 1
        elif judge is not None and is_tie(judge, source, theirs, ours, work.beam_size == 1):
            counts["ties"] += 1
        else:
            counts["others"] += 1
    allowed = 0 if work.beam_size == 1 else len(sources) // 64
    assert judge is None or counts["others"] <= allowed, f"{work.name}: other translations: {counts}"
    return counts


# ---------------------------------------------------------------------------------------------- measuring


def load(folder: Path, threads: int) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants by name, and why others are not among them."""
    engines, absent = {}, {}
    for engine, weights in (*CONTESTANTS, ONE_BY_ONE):
        try:
            engines[f"{engine} {weights}"] = Contestant(engine, weights, folder, threads)
        except NotImplementedError as error:
            absent[f"{engine} {weights}"] = str(error)
    return engines, absent


def measure(work: Work, engines: dict[str, Contestant], config: TransformerConfig, rounds: int, judge, rate) -> dict:
    """One row: what each engine found, then how long it took, in turns that rotate from round to round."""
    if not levels_for(work.batch, work.beam_size):
        engines = {name: engine for name, engine in engines.items() if name != " ".join(ONE_BY_ONE)}
    found = {name: engine.translate(work)[0] for name, engine in engines.items()}  # and a warm-up
    first = next(iter(engines))
    agreements = {
        name: agreement(work, found[first], tokens, judge if name.endswith("float32") else None)
        for name, tokens in found.items()
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds):
        for name in in_turn(engines, number):
            times[name].append(engines[name].translate(work)[1])
    row: dict = {"name": work.name, **{key: getattr(work, key) for key in ("batch", "beam_size", "threads", "length")}}
    row["engines"] = {}
    medians = {name: quantiles(taken)["median_us"] for name, taken in times.items()}
    for name, median in medians.items():
        weights = name.split()[-1]
        row["engines"][name] = {
            "tokens_per_second": round(work.tokens / median * 1e6, 1),
            "speedup": round(medians[first] / median, 3),
            "share_of_limit": round(least_seconds(config, work, weights, rate) / median * 1e6, 3),
            **quantiles(times[name]),
            **agreements[name],
        }
    return row


def _status_megabytes(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def probe(folder: Path, engine: str, weights: str, threads: int, work: Work) -> dict:
    """In a process of its own: how long loading takes, and what memory it and a round take."""
    Path("/proc/self/clear_refs").write_text("5")  # the most memory so far is forgotten: imports take more for a moment
    before, start = _status_megabytes("VmRSS"), time.perf_counter()
    loaded = ENGINES[engine](folder, weights, threads)
    took, after = time.perf_counter() - start, _status_megabytes("VmRSS")
    work.run(loaded)
    return {
        "load_seconds": round(took, 3),
        "before_megabytes": round(before, 1),
        "loaded_megabytes": round(after, 1),
        "peak_megabytes": round(_status_megabytes("VmHWM"), 1),
    }


def probes(folder: Path, names: Sequence[str], work: Work) -> dict[str, dict]:
    """`probe` of each contestant."""
    options = [str(folder), str(work.threads), str(work.batch), str(work.beam_size), str(work.length)]
    results = {}
    for name in names:
        command = [sys.executable, "-m", "bench.ctranslate2", "--probe", *name.split(), *options]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout)
    return results


def table(result: dict) -> str:
    """The rows as text."""
    lines = []
    for row in result["rows"]:
        lines.append(row["name"])
        for name, figures in row["engines"].items():
            lines.append(
                f"  {name:22}{figures['tokens_per_second']:10.1f} tokens/s  {figures['speedup']:6.2f}x  "
                f"{figures['share_of_limit']:6.1%} of the limit  same {figures['same']}/{figures['sentences']}"
            )
    for name, figures in result["processes"].items():
        lines.append(
            f"{name:24}loads in {figures['load_seconds']:.2f} s; {figures['before_megabytes']:.0f} MB before, "
            f"{figures['loaded_megabytes']:.0f} MB loaded, {figures['peak_megabytes']:.0f} MB at most"
        )
    lines += [f"{name}: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines) + "\n"


def compare(arguments: argparse.Namespace, folder: Path) -> dict:
    """The whole comparison."""
    config, length = (TINY, 8) if arguments.quick else (BASE, 32)
    write_models(config, folder)
    judge = load_model(folder / MODEL_FILE, dtype=torch.float64)
    rows, measured, absent, names = [], {}, {}, []
    for threads in arguments.threads:
        measured[threads] = rate = rates(threads)
        engines, absent = load(folder, threads)
        names = list(engines)
        for batch in arguments.batches:
            for beam_size in BEAMS:
                work = make_work(batch, beam_size, threads, length, config.target_vocab_size)
                rows.append(measure(work, engines, config, arguments.rounds, judge, rate))
                sys.stdout.write(f"{work.name}: done\n")
                sys.stdout.flush()
        for engine in engines.values():
            engine.stop()
    largest = make_work(max(arguments.batches), max(BEAMS), max(arguments.threads), length, config.target_vocab_size)
    import ctranslate2

    return {
        "machine": machine.facts() | {"ctranslate2": ctranslate2.__version__},
        "date": f"{date.today():%Y-%m-%d}",
        "quick": arguments.quick,
        "processes_of_their_own": True,
        "looks_ahead": True,
        "model": config.to_dict(),
        "rates": measured,
        "rows": rows,
        "processes": probes(folder, names, largest),
        "processes_work": {key: value for key, value in asdict(largest).items() if key != "batches"},
        "absent": absent,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--probe"]:
        engine, weights, folder, *numbers = words[1:]
        threads, batch, beam_size, length = map(int, numbers)
        config = load_model(Path(folder) / MODEL_FILE, device="meta").config
        work = make_work(batch, beam_size, threads, length, config.target_vocab_size)
        sys.stdout.write(json.dumps(probe(Path(folder), engine, weights, threads, work)))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round; no file unless --output")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, help="turns of each engine in a row; default 7, or 1 if --quick")
    parser.add_argument("--output", type=Path, help="default: bench/results/ctranslate2/<processor>_<date>.json")
    parsed = parser.parse_args(words)
    if importlib.util.find_spec("ctranslate2") is None:
        sys.stdout.write("skipped: ctranslate2 is not installed; pip install 'fused-transformer[ctranslate2]'\n")
        return 0
    parsed.rounds = parsed.rounds or (1 if parsed.quick else 7)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(parsed, Path(folder))
    sys.stdout.write(table(result))
    if parsed.output or not parsed.quick:
        write_comparison("ctranslate2", result, parsed.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
