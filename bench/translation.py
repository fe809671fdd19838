"""Trains on Multi30k, French to English, and writes what came of it into README.

    python -m bench.translation DATA OUTPUT [--from-log LOG]

DATA holds train, val and test_2016_flickr, each .fr and .en (the data set is not ours to ship). The training is
README's own command; its BLEU is sacreBLEU's of the test set, beam 4. With --from-log the log of a finished run is
read instead.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

from bench import machine
from bench.report import ROOT

RESULT = ROOT / "bench" / "results" / "translation" / "multi30k_fr-en.json"
BEGIN, END = "<!-- translation:begin -->", "<!-- translation:end -->"
OPTIONS = [
    *("--preset", "small", "--source", "train.fr", "--target", "train.en"),
    *("--valid-source", "val.fr", "--valid-target", "val.en"),
    *("--test-source", "test_2016_flickr.fr", "--test-target", "test_2016_flickr.en"),
    *("--output", "model", "--minutes", "19", "--every", "500", "--bleu-sentences", "500", "--threads", "2"),
]


def train(data: Path, output: Path) -> str:
    """Runs README's command in `data`; what it printed."""
    options = [str(output.resolve()) if word == "model" else word for word in OPTIONS]
    command = [sys.executable, "-m", "fused_transformer", "train", *options]
    return subprocess.run(command, cwd=data, check=True, stdout=subprocess.PIPE, text=True).stdout


def outcome(log: str) -> dict:
    """The figures of a finished run, from its log.

    Raises:
        ValueError: the log has no test BLEU: the run did not finish.
    """
    patterns = {
        "size": r"^(\d+ sentence pairs, \d+ subwords, [\d.]+ million parameters), ",
        "steps": r"^done after step (\d+),",
        "minutes": r"^done after step \d+, ([\d.]+) minutes",
        "bleu": r"^test BLEU ([\d.]+) ",
        "signature": r"^test BLEU .*; (.*)\)$",
    }
    found = {name: re.search(pattern, log, flags=re.MULTILINE) for name, pattern in patterns.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise ValueError(f"not the log of a finished training: no {', '.join(missing)}")
    values = {name: match[1] for name, match in found.items() if match}
    return {**values, "steps": int(values["steps"]), "minutes": float(values["minutes"]), "bleu": float(values["bleu"])}


def section(result: dict) -> str:
    words = " ".join(OPTIONS)
    for option in ("--valid-source", "--test-source", "--output"):
        words = words.replace(option, f"\\\n  {option}")
    return (
        f"```console\npython -m fused_transformer train {words}\n"
        "echo 'Deux chiens jouent dans la neige.' | python -m fused_transformer translate --model model --beam-size 4\n"
        "```\n\n"
        f"That is {result['size']}; {result['steps']} steps in {result['minutes']} minutes on two threads of "
        f"{result['processor']}, then **{result['bleu']:.2f} sacreBLEU** on test_2016_flickr with beam 4 "
        f"({result['date']}, torch {result['torch']}; `{result['signature']}`)."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--from-log", type=Path)
    arguments = parser.parse_args()
    log = arguments.from_log.read_text() if arguments.from_log else train(arguments.data, arguments.output)
    facts = {name: machine.facts()[name] for name in ("processor", "isa", "torch", "python")}
    result = {**outcome(log.replace("\r", "\n")), **facts, "date": f"{date.today():%Y-%m-%d}"}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    readme.write_text(f"{before}\n{section(result)}\n{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
