"""`python -m fused_transformer show`: pictures of a trained model at work on a sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fused_transformer import show
from fused_transformer.decoding import generate
from fused_transformer.maps import AttentionMaps, attention_maps, targets_of
from fused_transformer.search_options import SearchOptions
from fused_transformer.show.position_tables import NAMES as LAYOUTS

if TYPE_CHECKING:
    from fused_transformer.model import Transformer
    from fused_transformer.tokenizer import Tokenizer

_EPILOG = """\
The output's ending says what is written: .html is one page that needs no network, .svg, .png and .pdf are figures.
Layers and heads are numbered from 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; 0 if done, 1 with a message on standard error if something is wrong."""
    options = parser().parse_args(arguments)
    try:
        picture = options.draw(options)
        print(picture.save(options.output or f"{options.picture}{options.suffix}"))
    except (OSError, ValueError) as error:
        print(f"show: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_transformer show",
        description="Draw what a model does with a sentence.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="picture")
    _add_heads(_add(pictures, "heads", _heads, "attention heads, as a page to click through", suffix=".html"))
    _add_beam(_add(pictures, "beam", _beam, "the tree of a beam search"))
    one = _add(pictures, "distributions", _distributions, "what the model says the next token is, step by step")
    one.add_argument("--compare", metavar="PATH", help="another checkpoint with the same vocabulary, drawn beside it")
    _add_positions(_add(pictures, "positions", _positions, "the table of positions", sentence=False))
    _add_masks(_add(pictures, "masks", _masks, "what masks let through", sentence=False))
    return parser


def _add(pictures: Any, name: str, draw: Any, what: str, *, suffix: str = ".svg", sentence: bool = True) -> Any:
    one = pictures.add_parser(name, help=what, description=f"Draw {what}.", epilog=_EPILOG)
    one.set_defaults(draw=draw, suffix=suffix)
    one.add_argument("-o", "--output", metavar="FILE", help=f"default: {name}{suffix}")
    if sentence:
        one.add_argument("--model", required=True, metavar="PATH", help="a checkpoint, or the folder that train wrote")
        one.add_argument("sentence", help="to translate")
        if name != "beam":
            one.add_argument("--target", metavar="TEXT", help="its translation (default: the model's, by beam search)")
    return one


def _add_heads(one: argparse.ArgumentParser) -> None:
    one.add_argument("--attention", help="encoder_self, encoder_decoder, decoder_self or all; or Input - Input ...")
    one.add_argument("--layer", type=int, default=-1, help="shown first (default: the last)")
    one.add_argument("--heads", type=_numbers, metavar="N,N", help="shown first (default: all)")
    one.add_argument("--token", help="whose links alone are shown first")
    one.add_argument("--grid", action="store_true", help="heat maps of all layers and heads instead, as a figure")


def _add_beam(one: argparse.ArgumentParser) -> None:
    default = SearchOptions()
    one.add_argument("--beam-size", type=int, default=default.beam_size, metavar="N", help="(default: %(default)s)")
    one.add_argument(
        "--alpha", type=float, default=default.length_penalty, help="length penalty (default: %(default)s)"
    )
    one.add_argument("--max-length", type=int, metavar="N", help="of a translation, in subwords")
    one.add_argument("--without-dropped", action="store_true", help="draw what was kept and what finished alone")


def _add_positions(one: argparse.ArgumentParser) -> None:
    one.add_argument("--model", metavar="PATH", help="draw this model's table (default: both usual layouts)")
    one.add_argument("--layout", choices=LAYOUTS, action="append", help="can be given several times")
    one.add_argument("--length", type=int, help="positions")
    one.add_argument("--width", type=int, help="dimensions")


def _add_masks(one: argparse.ArgumentParser) -> None:
    one.add_argument("--length", type=int, default=8, help="queries (default: %(default)s)")
    one.add_argument("--keys", type=int, help="(default: as many as queries)")
    one.add_argument("--causal", choices=("top_left", "bottom_right"))
    one.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="keys seen each way; -1: no limit")
    one.add_argument("--lengths", type=_numbers, metavar="N,N", help="real keys of each sequence of a batch")


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 0,3") from None


# ---------------------------------------------------------------- what each draws


def _heads(options: argparse.Namespace) -> show.Heads | show.Picture:
    model, tokenizer = _load(options.model)
    source, target = _tokens(model, tokenizer, options)
    maps = attention_maps(model, source, target, labels=tokenizer.pieces)
    assert isinstance(maps, AttentionMaps)
    heads = show.heads(
        maps,
        attention=options.attention,
        layer=options.layer,
        heads=options.heads,
        token=options.token,
        title=options.sentence,
    )
    return heads.grid() if options.grid else heads


def _beam(options: argparse.Namespace) -> show.Picture:
    model, tokenizer = _load(options.model)
    search = SearchOptions(beam_size=options.beam_size, length_penalty=options.alpha, max_length=options.max_length)
    (tree,) = show.trace_beams(model, _source(model, tokenizer, options.sentence)[None], search)
    return show.beam(tree, labels=tokenizer.pieces, dropped=not options.without_dropped)


def _distributions(options: argparse.Namespace) -> show.Picture:
    model, tokenizer = _load(options.model)
    source, target = _tokens(model, tokenizer, options)
    outputs = {Path(options.model).name or "model": show.output_distributions(model, source, target)}
    if options.compare is not None:
        other, others = _load(options.compare)
        if others.to_bytes() != tokenizer.to_bytes():
            raise ValueError(f"{options.compare} has another vocabulary than {options.model}")
        outputs = {Path(options.compare).name: show.output_distributions(other, source, target)} | outputs
    return show.distributions(outputs, target[1:], labels=tokenizer.pieces(range(len(tokenizer))))


def _positions(options: argparse.Namespace) -> show.Picture:
    sizes = {"length": options.length, "width": options.width}
    if options.model is not None:
        if options.layout or options.width:
            raise ValueError("--layout and --width are the model's own: leave them out beside --model")
        return show.positions(_load(options.model)[0], **sizes)
    return show.positions(**sizes, **({"layouts": options.layout} if options.layout else {}))


def _masks(options: argparse.Namespace) -> show.Picture:
    window = None if options.window is None else tuple(options.window)
    return show.masks(
        options.length, options.keys, causal=options.causal or False, window=window, k_lengths=options.lengths
    )


def _load(path: str) -> tuple[Transformer, Tokenizer]:
    from fused_transformer.checkpoint import find_checkpoint, load_checkpoint  # which need the libraries for text

    model, tokenizer, _, _ = load_checkpoint(find_checkpoint(path))
    return model.eval(), tokenizer


def _source(model: Transformer, tokenizer: Tokenizer, sentence: str) -> torch.Tensor:
    if not sentence.strip():
        raise ValueError("the sentence has no words")
    return torch.tensor([*tokenizer.encode([sentence])[0], model.config.eos_idx])


def _tokens(model: Transformer, tokenizer: Tokenizer, options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The sentence, and its translation from bos to eos: the one given, or the model's own."""
    source, config = _source(model, tokenizer, options.sentence), model.config
    if options.target is not None:
        return source, torch.tensor([config.bos_idx, *tokenizer.encode([options.target])[0], config.eos_idx])
    tokens, lengths = targets_of(generate(model, source[None]), config)
    return source, tokens[0, 0, : int(lengths[0, 0])]
