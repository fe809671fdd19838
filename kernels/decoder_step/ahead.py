"""Hypotheses and guesses of what follows them, computed side by side by one step of a decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels._dispatch import undisturbed
from fused_transformer.kernels.decoder_step import decoder_step, native
from fused_transformer.kernels.decoder_step.checks import check_ahead
from fused_transformer.kernels.decoder_step.memory import Memory
from fused_transformer.kernels.decoder_step.packed import PackedDecoder
from fused_transformer.kernels.decoder_step.tokens import TokenTable
from fused_transformer.kernels.linear import PackedLinear, linear
from fused_transformer.kernels.log_softmax_top_k import log_softmax_top_k


class Histories(NamedTuple):
    """Rows (R,) of ancestors (·, room) int32: in which row of the cache each position of a hypothesis is."""

    ancestors: Tensor
    rows: list[int]


class Ahead(NamedTuple):
    """What came out; R = B · (n + levels · width): of a sentence the hypotheses and then the guesses, level by level.

    hidden: (R, E) float32.
    ancestors: (R, room) int32, see `Histories`.
    guesses: (B · levels · width) numbers, V · (which of its sentence in the level before it extends) + token.
    """

    hidden: Tensor
    ancestors: Tensor
    guesses: list[int]


def step_ahead(
    tokens: list[int],
    table: TokenTable,
    decoder: PackedDecoder,
    cache: Tensor,
    length: int,
    memory: Memory,
    *,
    batch: int,
    slots: int,
    draft: tuple[PackedDecoder, PackedLinear],
    levels: int,
    width: int,
    histories: Histories | None = None,
    scores: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    sources: Tensor | None = None,
) -> Ahead:
    """n hypotheses of each of B sentences, and of these the likeliest extensions in a draft's opinion, in one step.

        level 0     the hypotheses
        level d     a sentence's `width` likeliest that extend those of level d - 1, see `log_softmax_top_k`

    The draft sees the keys and values that the decoder wrote for earlier positions, and its own of the levels, which
    the decoder then writes over. What is computed is `embedding`, `decoder_step`, `linear` and `log_softmax_top_k` one
    after the other, with the same bits; on the CPU in one native call.

    Args:
        tokens: (B · n), the last token of each hypothesis.
        table: of the tokens.
        decoder, cache, memory, memory_lengths, sources: see `decoder_step`; for B sentences.
        length: positions there are ahead of level 0, whose tokens are at this one; the cache has room for the levels.
        batch, slots: B, and rows of the cache for each sentence, at least n and width: row i of a level is written in
            row slots · b + i.
        draft: what guesses: a decoder of the same shape, and its projection (V, E) to logits.
        levels, width: of guesses.
        histories: of the hypotheses, among rows of a former result; None: length is 0.
        scores: (B, n or more) float64, their log-probabilities, a sentence's numbers side by side; None: all equal.

    Raises:
        IndexError: a token is outside the vocabulary.
        ValueError: sizes do not fit.
    """
    guesser, output = draft
    size, room = len(tokens) // max(batch, 1), cache.shape[4]
    if batch < 1 or size < 1 or size * batch != len(tokens):
        raise ValueError(f"there must be as many tokens of each of {batch} sentences, got {len(tokens)}")
    if length + levels >= room:
        raise ValueError(f"cache has room for {room} positions, and {length + levels + 1} are wanted")
    check_ahead(table, decoder, memory, memory_lengths, sources, histories, scores, batch, size, length)
    compiled = guesser.native is not None and output.native is not None
    if decoder.native is None or not compiled or not undisturbed():
        return _plain(
            *(tokens, table, decoder, cache, length, memory, batch, slots, draft, levels, width),
            *(histories, scores, memory_lengths, sources),
        )
    rows = batch * (size + levels * width)
    hidden, ancestors = cache.new_empty(rows, decoder.width), cache.new_empty(rows, room, dtype=torch.int32)
    former = None if histories is None else histories.ancestors
    looked_up, positions = table.native(length + levels + 1)  # which lie there as long as this holds them
    bad, guesses = decoder.native.step_ahead(
        (guesser.native, output.native, _native.ptr(output.bias)),
        (batch, size, levels, width, slots, length),
        looked_up,
        tokens,
        (0, 0) if scores is None else (scores.data_ptr(), scores.stride(0)),
        native.of_cache(cache),
        room,
        (0, 0) if former is None else (former.data_ptr(), former.stride(0)),
        [] if histories is None else histories.rows,
        memory.native(),
        (_native.ptr(memory_lengths), _native.ptr(sources)),
        native.seconds(),
        hidden.data_ptr(),
        ancestors.data_ptr(),
    )
    del positions
    if bad >= 0:
        table.embed(torch.tensor(tokens, device="cpu"), length)  # which says so
    return Ahead(hidden, ancestors, guesses)


def _plain(
    tokens,
    table,
    decoder,
    cache,
    length,
    memory,
    batch,
    slots,
    draft,
    levels,
    width,
    histories,
    scores,
    memory_lengths,
    sources,
) -> Ahead:
    """The same out of the ops that it is made of."""
    guesser, output = draft
    sentences, vocabulary = torch.arange(batch, device="cpu"), output.out_features
    chosen = torch.tensor(tokens, device="cpu")
    ancestors = torch.zeros(len(chosen), cache.shape[4], dtype=torch.int32, device="cpu")
    if histories is not None:
        ancestors[:, :length] = histories.ancestors[histories.rows, :length]
    known = torch.zeros(len(chosen), device="cpu")
    if scores is not None:
        known = (scores - scores[:, :1])[:, : len(chosen) // batch].float().flatten()

    def step(one: PackedDecoder, last: int, x: Tensor, table: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        own = {"ancestors": table, "positions": positions, "slots": places, "beams": len(x) // batch}
        return decoder_step(x, one, cache, last, memory, memory_lengths=memory_lengths, sources=sources, **own)

    parts: list[list[Tensor]] = []  # of each: what its rows are in a step, (B, its size, ...)
    guesses: list[Tensor] = []
    for position in range(length, length + levels + 1):
        size = len(chosen) // batch
        places = (sentences[:, None] * slots + torch.arange(size, device="cpu")).flatten()
        ancestors[:, position] = places.int()
        level = [table.embed(chosen, position), ancestors, torch.full_like(chosen, position), places]
        parts.append([part.unflatten(0, (batch, size)) for part in level])
        if len(guesses) == levels:
            break
        logits = linear(step(guesser, position, *level), output)
        best, keys = log_softmax_top_k(logits, width, beams=size, addend=known)
        guesses.append(keys)
        known, chosen = best.flatten(), (keys % vocabulary).flatten()
        ancestors = ancestors[(keys // vocabulary + sentences[:, None] * size).flatten()]
    every = [torch.cat(each, 1).flatten(0, 1) for each in zip(*parts, strict=True)]
    hidden = step(decoder, length + levels, *every)
    return Ahead(hidden, every[1], torch.stack(guesses, 1).flatten().tolist() if guesses else [])
