"""What guesses the next tokens of a sentence, and how far ahead it pays to; see `lookahead.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_transformer.hypotheses import NEVER
from fused_transformer.kernels.decoder_step import PackedDecoder
from fused_transformer.kernels.linear import PackedLinear

# Rows of one step that cost little more than one of them, as long as weights come from memory: for all logits, and for
# the likeliest token alone. Where its log-probability is asked for later, `PackedTransformer.likeliest` takes no more
# than these: with 32,000 x 512 weights 4 rows take it 2.0 ms where all logits take 2.6, and 6 rows take longer than
# that with AVX-512. Elsewhere 8 rows take it 5.1 of 9.2 ms, and all logits of 64 rows later 4.2 for 8 of them.
MOST_ROWS, MOST_GREEDY_ROWS = 16, 4
MOST_LEVELS = 3
FIRST_PAUSE, LONGEST_PAUSE = 4, 64  # steps without guesses, once these were wrong


def levels_for(sentences: int, beam_size: int) -> int:
    """How many tokens ahead it pays to guess; 0: none."""
    most = MOST_GREEDY_ROWS if beam_size == 1 else MOST_ROWS
    ahead = (most - sentences * beam_size) // max(1, sentences * width_for(beam_size))
    return max(0, min(ahead, MOST_LEVELS))


def width_for(beam_size: int) -> int:
    """Guesses of each sentence and level: one more than needed, for two that are nearly as likely."""
    return 1 if beam_size == 1 else beam_size + 1


class Draft(NamedTuple):
    """What guesses: the model's decoder and its projection to logits, rounded."""

    decoder: PackedDecoder
    output: PackedLinear

    @classmethod
    def of(cls, decoder: PackedDecoder, output: PackedLinear, eos_idx: int) -> Draft:
        """Which never guesses eos: nothing follows it."""
        bias = torch.zeros(output.out_features, dtype=torch.float32, device="cpu")
        if output.bias is not None:
            bias += output.bias
        bias[eos_idx] = NEVER
        return cls(decoder, output.with_bias(bias))


class Pace:
    """How far ahead it pays to guess, from how it went so far.

    One further where all guesses of a round were used, one less where none was; and without any for a while where one
    ahead was too far: a wrong guess costs a draft's step, a third of the model's or so.
    """

    def __init__(self, most: int) -> None:
        self.most = self.ahead = most
        self.pause, self.left = FIRST_PAUSE, 0

    def learn(self, guessed: int, used: int) -> None:
        if self.most == 0:
            return
        if guessed == 0:
            self.left -= 1
            self.ahead = 1 if self.left <= 0 else 0
        elif used == guessed:
            self.ahead, self.pause = min(guessed + 1, self.most), FIRST_PAUSE
        elif used == 0:
            self.ahead = guessed - 1
            if self.ahead == 0:
                self.left, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
