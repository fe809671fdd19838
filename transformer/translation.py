"""Translates lines of text with a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from fused_transformer.batches import Ragged, cut_by_tokens
from fused_transformer.checkpoint import find_checkpoint, load_checkpoint
from fused_transformer.decoding import generate, length_limits
from fused_transformer.graphed import GraphedTransformer
from fused_transformer.hypotheses import NEVER, Hypotheses, NewTokens
from fused_transformer.inference import PackedTransformer
from fused_transformer.inference import why_not as why_not_packed
from fused_transformer.maps import AttentionMaps, attention_maps, targets_of
from fused_transformer.model import Transformer
from fused_transformer.prefixes import Pair, PrefixTooLong, check_room, pairs_of
from fused_transformer.search_options import SearchOptions
from fused_transformer.text_stream import NewText, TextStream
from fused_transformer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fused_transformer.decoding import Model

WEIGHTS = ("float32", "bfloat16", "int8")


class Translation(NamedTuple):
    """One translation of a line, and the score that ranked it (higher is better).

    tokens: their numbers, without eos.
    log_probs: of each token, and behind the last one of eos where the translation ended with it.
    attention: what the model attended to, where it was asked for and there is a translation.
    """

    text: str
    score: float
    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    attention: AttentionMaps | None = None


def with_weights(model: Transformer, weights: str, *, cuda_graphs: bool = False) -> Model:
    """What decodes for `model` with its weights kept as `weights`: packed for translation where it is on a CPU and
    can be (`inference.why_not`), else the model itself.

    cuda_graphs: steps replay CUDA graphs, see `GraphedTransformer`.

    Raises:
        ValueError: there is no such way to keep them; weights other than the model's own are asked for elsewhere, or
            CUDA graphs where there is no CUDA device.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}")
    if cuda_graphs:
        if weights != "float32":
            raise ValueError(f"CUDA graphs run the model's own weights, and weights {weights!r} are for a CPU")
        return GraphedTransformer(model)
    reason = why_not_packed(model)
    if reason is None:
        return PackedTransformer(model, weights=weights)
    if weights != "float32":
        raise ValueError(f"weights {weights!r} can't be had: {reason}")
    return model


class Translator:
    """A model and its tokenizer, from text to text.

    Args:
        model: a Transformer, translated with where it is, or one packed for translation.
        tokenizer: the model's.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        *,
        weights: str = "float32",
        cuda_graphs: bool = False,
    ) -> Translator:
        """From a checkpoint file, or from the folder that `train` wrote (its best checkpoint); see `with_weights`.

        Raises:
            FileNotFoundError, ValueError: there is no whole checkpoint, or `with_weights` refuses `weights`.
        """
        model, tokenizer, _, _ = load_checkpoint(find_checkpoint(path))
        return cls(with_weights(model.to(device).eval(), weights, cuda_graphs=cuda_graphs), tokenizer)

    def translate(
        self,
        lines: Sequence[str],
        options: SearchOptions | None = None,
        *,
        prefixes: Sequence[str] | None = None,
        max_tokens: int = 2048,
        on_batch: Callable[[int], object] = lambda sentences: None,
        on_text: Callable[[NewText], object] | None = None,
        return_attention: bool = False,
        **changes: Any,
    ) -> list[list[Translation]]:
        """The best translations of each line, best first, in the order of the lines.

        Sentences of similar length are translated together. A line without a word is its own translation.

        Args:
            lines: the text, a sentence each.
            options: None: beam search with the paper's options.
            prefixes: for each line the text that its translation begins with, "" for none.
            max_tokens: most source tokens of a batch, padding included and beams not counted; raised to the
                longest sentence.
            on_batch: called after each batch with its number of sentences.
            on_text: called for every token of the best translations as soon as it is certain, and once more when a
                line is done; lines of a batch come interleaved.
            return_attention: give each translation its `AttentionMaps`, from one more pass over it.
            changes: options by name: translate(lines, beam_size=1) is greedy.

        Returns:
            For each line its translations: fewer than asked for where the search found no more, and one without text
            and with the score -inf where the options forbid every translation.

        Raises:
            TypeError: lines or prefixes is a str, whose characters would be lines.
            ValueError: an option is out of its range, prefixes and lines differ in number, or a prefix is as long as
                its translation may be (`PrefixTooLong`, which names the line, from 1).
        """
        options = replace(options or SearchOptions(), **changes)
        _refuse_text(lines=lines, prefixes=prefixes)
        if prefixes is not None and len(prefixes) != len(lines):
            raise ValueError(f"there must be a prefix for each of {len(lines)} lines, got {len(prefixes)}")
        results: list[list[Translation]] = [[Translation("", 0.0)] for _ in lines]
        written = [i for i, line in enumerate(lines) if line.strip()]
        if on_text is not None:
            for line in sorted({*range(len(lines))} - {*written}):
                on_text(NewText(line, "", None))
        config = self.model.config
        source = Ragged([[*t, config.eos_idx] for t in self.tokenizer.encode([lines[i] for i in written])])
        forced = None if prefixes is None else Ragged(self.tokenizer.encode([prefixes[i] for i in written]))
        if forced is not None:
            check_room(forced.lengths, length_limits(source.lengths, options), written)
        limit = max(max_tokens, int(source.lengths.max()) if written else 0)
        order = source.lengths.argsort(descending=True, stable=True)  # what needs the most memory comes first
        device = next(self.model.parameters()).device
        for rows in cut_by_tokens(order, source.lengths[:, None], limit):
            numbers = [written[row] for row in rows.tolist()]
            tokens = source.padded(rows, config.padding_idx).to(device)
            found = generate(
                self.model,
                tokens,
                source.lengths[rows].to(device),
                options,
                prefixes=None if forced is None else forced.padded(rows, config.padding_idx).to(device),
                on_tokens=None if on_text is None else _TextStreams(self._text, numbers, on_text),
            )
            steps = (found.lengths + found.finished).tolist()
            maps = self._maps(tokens, found) if return_attention else [[None] * found.lengths.shape[1]] * len(rows)
            for number, *beams in zip(
                numbers, found.tolist(), found.scores.tolist(), steps, found.log_probs.tolist(), maps, strict=True
            ):
                ranked = [
                    Translation(self._text(tokens), score, tuple(tokens), tuple(log_probs[:count]), attention)
                    for tokens, score, count, log_probs, attention in zip(*beams, strict=True)
                ]
                results[number] = [one for one in ranked if one.score > NEVER] or ranked[:1]
            on_batch(len(rows))
        return results

    def translate_stream(
        self,
        lines: Iterable[str],
        options: SearchOptions | None = None,
        *,
        prefixes: Iterable[str] | None = None,
        buffer: int = 1000,
        max_tokens: int = 2048,
        **changes: Any,
    ) -> Iterator[list[Translation]]:
        """The translations of each line in turn, of any number of lines: `buffer` of them are in memory at a time.

        Args:
            lines: read as they are needed. What it raises is raised here, behind the translations of what came before;
                so is `PrefixTooLong`.
            options, prefixes, max_tokens, changes: as for `translate`.
            buffer: lines read, sorted by length and translated together.

        Raises:
            ValueError: buffer is below 1; while iterating, as `translate`.
        """
        _refuse_text(lines=lines, prefixes=prefixes)
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, got {buffer}")
        options = replace(options or SearchOptions(), **changes)
        if prefixes is None:
            pairs: Iterator[Pair] = ((line, None) for line in lines)
        else:
            pairs = pairs_of(lines, prefixes)
        return self._stream(pairs, options, prefixes is not None, buffer, max_tokens)

    def _stream(
        self,
        pairs: Iterator[Pair],
        options: SearchOptions,
        forced: bool,
        buffer: int,
        max_tokens: int,
    ) -> Iterator[list[Translation]]:
        failure: Exception | None = None
        done = 0
        while failure is None:
            chunk: list[str] = []
            prefixes: list[str] = []
            try:
                for line, prefix in islice(pairs, buffer):
                    chunk.append(line)
                    prefixes.append(prefix or "")
            except Exception as error:
                failure = error
            try:
                yield from self.translate(chunk, options, prefixes=prefixes if forced else None, max_tokens=max_tokens)
            except PrefixTooLong as error:
                failure, before = error.of_line(done + error.line + 1), slice(error.line)
                yield from self.translate(chunk[before], options, prefixes=prefixes[before], max_tokens=max_tokens)
            done += len(chunk)
            if failure is None and len(chunk) < buffer:
                return
        raise failure

    def _maps(self, source: Tensor, found: Hypotheses) -> list[list[AttentionMaps | None]]:
        """[sentence][rank]; None where there is no hypothesis."""
        sentence, rank = (found.scores > NEVER).nonzero(as_tuple=True)
        maps: list[list[AttentionMaps | None]] = [[None] * found.scores.shape[1] for _ in source]
        if len(sentence):
            target, lengths = (x[sentence, rank] for x in targets_of(found, self.model.config))
            made = attention_maps(
                self.model, source[sentence], target, target_lengths=lengths, labels=self.tokenizer.pieces
            )
            for i, j, one in zip(sentence.tolist(), rank.tolist(), cast("list[AttentionMaps]", made), strict=True):
                maps[i][j] = one
        return maps

    def _text(self, tokens: list[int]) -> str:
        (text,) = self.tokenizer.decode([tokens])
        return _one_line(text)


class _TextStreams:
    """Turns a search's new tokens into new text of the lines they are of."""

    def __init__(self, decode: Callable[[list[int]], str], lines: list[int], on_text: Callable[[NewText], object]):
        self.lines, self.on_text = lines, on_text
        self.streams = [TextStream(decode) for _ in lines]

    def __call__(self, new: NewTokens) -> None:
        for sentence, token in zip(new.sentences.tolist(), new.tokens.tolist(), strict=True):
            self.on_text(NewText(self.lines[sentence], self.streams[sentence].push(token), token))
        for sentence in new.done.tolist():
            self.on_text(NewText(self.lines[sentence], self.streams[sentence].finish(), None))


def _refuse_text(**arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, str):
            raise TypeError(f"{name} must be lines of text, got one str: [{value[:20]!r}] is one line")


def _one_line(text: str) -> str:
    # The vocabulary can spell any byte; a line break would shift every line after it.
    return text.replace("\r", " ").replace("\n", " ")
