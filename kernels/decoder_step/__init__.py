"""One decoding step through all layers of a Transformer's decoder, its weights packed. For inference alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels.decoder_step.checks import checked
from fused_transformer.kernels.decoder_step.memory import Memory, memory_of
from fused_transformer.kernels.decoder_step.packed import Norm, PackedDecoder, PackedLayer
from fused_transformer.kernels.decoder_step.tokens import TokenTable

__all__ = ["Memory", "Norm", "PackedDecoder", "PackedLayer", "TokenTable", "decoder_step", "memory_of", "op"]

op = Op(__name__, order=("cpu", "reference"))


def decoder_step(
    x: Tensor,
    decoder: PackedDecoder,
    cache: Tensor,
    length: int,
    memory: Sequence[tuple[Tensor, Tensor]],
    *,
    ancestors: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    sources: Tensor | None = None,
    beams: int = 1,
    positions: Tensor | None = None,
    slots: Tensor | None = None,
    table: TokenTable | None = None,
) -> Tensor:
    """All layers on the newest position of R hypotheses, `beams` of each sequence side by side.

        post-norm   x = norm(x + sublayer(x))             pre-norm   x = x + sublayer(norm(x)), and a norm at the end
        sublayers   attention over the cache and the new position, attention over memory, feed-forward

    A step reads every weight once, and of the cache and memory what there is of each hypothesis: at a batch of one the
    weights bound it. On the CPU it is one native call: from Python, what surrounds its dozen small kernels a layer
    takes as long as they do.

    Args:
        x: (R, E) float32, the embedded tokens; with a table (R,) int64 or int32, the tokens.
        decoder: the layers.
        cache: (layers, 2, R₀, H, room, D) float32 keys and values; position `length` is written, for row i in row i,
            R <= R₀, or where positions and slots say.
        length: positions that there are.
        memory: for each layer, keys and values of the encoder's output, (B₀, H, S, D) float32, all with the same
            strides: a `Memory`, as `memory_of` makes it, or pairs, which are checked with every step.
        ancestors: (R, room) int32, in which row of the cache position j of row i's history is; None: in row i.
        memory_lengths: (R / beams,) int32, the real positions of each sequence's memory; None: S.
        sources: (R / beams,) int64, which row of memory each sequence reads; None: the one of its number.
        beams: rows of a sequence; R is a multiple of it.
        positions, slots: (R,) int64, given together: row i's new position is positions[i], at most length, and is
            written in row slots[i] of the cache, where ancestors must send what reads it. No two rows may be written in
            one place. In each layer all are written before any is read: rows can be each other's history, which a
            decoder that looks several tokens ahead wants.
        table: embeds the tokens: a row is that of its position, `length` or positions[i].

    Returns:
        (R, E) float32, the hidden states of the new position.

    Raises:
        IndexError: a token is outside the vocabulary.
        ValueError: shapes, dtypes or devices do not fit, or there is no room for another position.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: as `linear`, `decode_attention` and `layer_norm` one after the other, from which it is made.
    """
    arguments = checked(
        x, decoder, cache, length, memory, ancestors, memory_lengths, sources, beams, positions, slots, table
    )
    return op.pick(*arguments).forward(*arguments)
