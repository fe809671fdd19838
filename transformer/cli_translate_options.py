"""The options of `translate`, and the formats it writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import fields

import torch

from fused_transformer.search_options import PENALTIES, SearchOptions
from fused_transformer.translation import WEIGHTS, Translation

_EPILOG = """\
With --top-beams or --samples a line has up to so many output lines: its number from 0 ||| translation ||| score.
Ctrl-C leaves complete lines only."""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_transformer translate",
        description="Translate UTF-8 text, a sentence a line. Empty lines stay empty.",
        epilog=_EPILOG,
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="a checkpoint, or the folder that train wrote")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    weights = "how the weights are kept, on a CPU: fewer bits are less to read, and a little less exact"
    parser.add_argument("--weights", choices=WEIGHTS, default="float32", help=weights)
    parser.add_argument("--int8", action="store_const", dest="weights", const="int8", help="--weights int8")
    graphs = "on a CUDA device a step is captured as a graph, and replayed"
    parser.add_argument("--cuda-graphs", action="store_true", help=graphs)
    _add_text(parser.add_argument_group("text"))
    _add_search(parser.add_argument_group("search"))
    _add_sampling(parser.add_argument_group("sampling, instead of searching for the likeliest"))
    return parser


def _add_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--input", metavar="FILE", help="default: standard input")
    group.add_argument("--output", metavar="FILE", help="default: standard output")
    group.add_argument("--prefixes", metavar="FILE", help="line by line, what the translations are to begin with")
    group.add_argument(
        "--format",
        choices=FORMATS,
        help="text: the best translation; nbest: all of a line, numbered, "
        "with scores; json: an object a line, with tokens' log-probabilities (default: text, or nbest "
        "where there can be several)",
    )
    group.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8 end the translation, or become U+FFFD (default: %(default)s)",
    )
    group.add_argument(
        "--interactive",
        action="store_true",
        help="translate each line as soon as it is there, as is done for what is typed on a terminal",
    )
    group.add_argument(
        "--chunk",
        type=int,
        default=1000,
        metavar="LINES",
        help="lines read, sorted by length, translated and written at a time (default: %(default)s)",
    )
    group.add_argument(
        "--batch-tokens",
        "--max-tokens",
        dest="max_tokens",
        type=int,
        default=2048,
        metavar="N",
        help="source tokens of a batch (default: %(default)s)",
    )


def _add_search(group: argparse._ArgumentGroup) -> None:
    default = SearchOptions()
    group.add_argument(
        "--beam-size",
        type=int,
        default=default.beam_size,
        metavar="N",
        help="hypotheses; 1 is greedy (default: %(default)s)",
    )
    group.add_argument("--top-beams", type=int, metavar="N", help="print the best so many translations, with scores")
    group.add_argument(
        "--alpha",
        "--length-penalty",
        dest="length_penalty",
        type=float,
        default=default.length_penalty,
        help="higher prefers longer ones (default: %(default)s)",
    )
    group.add_argument(
        "--penalty",
        choices=PENALTIES,
        default=default.penalty,
        help="log-probabilities are divided by ((5 + length) / 6)^alpha, or by length^alpha (default: %(default)s)",
    )
    group.add_argument(
        "--patience",
        type=float,
        help="stop with beam size × patience finished hypotheses (default: "
        "where none alive can beat the finished ones)",
    )
    group.add_argument(
        "--min-length", type=int, default=default.min_length, metavar="N", help="of a translation, in subwords"
    )
    group.add_argument(
        "--max-length", type=int, metavar="N", help=f"(default: the source's and {default.max_length_beyond_source})"
    )
    group.add_argument(
        "--no-repeat-ngram-size",
        type=int,
        default=default.no_repeat_ngram_size,
        metavar="N",
        help="so many subwords in a row never come twice in a translation",
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--samples", type=int, default=0, dest="num_samples", metavar="N", help="draw so many translations of each line"
    )
    group.add_argument("--temperature", type=float, default=1.0, help="below 1: likelier ones (default: %(default)s)")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="from the likeliest N subwords alone")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="from the likeliest that have probability P together"
    )
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def search_options(options: argparse.Namespace) -> SearchOptions:
    """What the command line asks the search for.

    Raises:
        ValueError: an option is out of its range, or has no effect beside the others.
    """
    named = {field.name for field in fields(SearchOptions)} & {*vars(options)}
    given = {name: getattr(options, name) for name in named}
    return SearchOptions(**given | {"top_beams": 1 if options.top_beams is None else options.top_beams})


def _best(number: int, translations: list[Translation]) -> Iterator[str]:
    yield translations[0].text


def _ranked(number: int, translations: list[Translation]) -> Iterator[str]:
    for one in translations:
        yield f"{number} ||| {one.text} ||| {one.score:.4f}"


def _json(number: int, translations: list[Translation]) -> Iterator[str]:
    found = []
    for one in translations:
        values = one._asdict()
        del values["attention"]  # weights are for pictures
        # -inf, the score of a translation that the options forbid, is no JSON.
        found.append(values | {"score": one.score if one.score > float("-inf") else None})
    yield json.dumps({"line": number, "translations": found}, ensure_ascii=False)


FORMATS: dict[str, Callable[[int, list[Translation]], Iterator[str]]] = {"text": _best, "nbest": _ranked, "json": _json}
