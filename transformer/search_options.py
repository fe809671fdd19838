"""What a search is to look for, as one frozen table that is checked where it is made."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

PENALTIES = ("gnmt", "power")

# What each option is; strings and suppress_tokens are looked at by themselves.
INTEGERS = (
    *("beam_size", "top_beams", "min_length", "max_length", "max_length_beyond_source", "no_repeat_ngram_size"),
    *("num_samples", "top_k", "seed"),
)
NUMBERS = ("length_penalty", "patience", "temperature", "top_p")
SWITCHES = ("stop_early", "scores")
MAY_BE_NONE = ("max_length", "patience", "stop_early")


@dataclass(frozen=True)
class SearchOptions:
    """How translations are searched for. The defaults are the paper's: tensor2tensor's beam search, 4 beams, alpha 0.6.

        score(y) = log p(y | x) / penalty(|y|)                              |y| counts eos
        penalty(n) = ((5 + n) / 6) ** length_penalty   "gnmt"        n ** length_penalty   "power"

    Where an option forbids tokens (min_length, no_repeat_ngram_size, suppress_tokens, a forced prefix), probabilities
    are over the tokens that are left: the logits of the others become -inf ahead of the softmax, as in CTranslate2 and
    tensor2tensor. A forced token so has probability 1. A hypothesis all of whose next tokens are forbidden is dropped.

    Attributes:
        beam_size: hypotheses followed at once; 1 is greedy, unless stop_early or patience asks for beam search, which
            may look past the first eos. Greedy scores are log-probabilities, whatever the penalty.
        top_beams: translations returned, best first; at most beam_size. (num_return_sequences in Hugging Face,
            num_hypotheses in CTranslate2.)
        length_penalty: the exponent, not negative; 0 ranks by log-probability, higher favours longer translations.
        penalty: "gnmt" is Wu et al.'s and tensor2tensor's; "power" that of Hugging Face, fairseq and
            CTranslate2.
        stop_early: when a sentence is done, tensor2tensor's rules: True, when no alive hypothesis can still beat the
            best finished one; False, the worst of a full list of finished ones. None: True where top_beams is 1.
        patience: instead of that, a sentence is done with its first round(beam_size · patience) finished hypotheses;
            1 is what Hugging Face (early_stopping=True) and CTranslate2 do.
        min_length: tokens that a translation has at least, eos not counted.
        max_length: tokens that it has at most, eos counted; None: max_length_beyond_source alone is the limit.
        max_length_beyond_source: how many tokens more than its source it may have, eos counted on both sides.
        no_repeat_ngram_size: so many tokens in a row never appear a second time in a translation; 0: they may.
        suppress_tokens: tokens that are never chosen.
        scores: False: greedy search does without log-probabilities, which it needs for nothing else; scores and
            log_probs are then 0. (return_scores in CTranslate2.)
        num_samples: so many translations are drawn at random instead, each token from its distribution; they are
            returned ordered by log-probability. 0: nothing is drawn.
        temperature: of the draws: logits are divided by it. Scores are the model's, without it.
        top_k: only the so many likeliest tokens are drawn; 0: all.
        top_p: of those only the likeliest, as many as it takes for their probabilities to reach top_p; 1: all.
        seed: of the draws. What a sentence gets depends on the seed and its own tokens, not on its batch.

    Raises:
        TypeError: an option is of another type: no whole number (numpy's are, True is not), number or bool.
        ValueError: an option is out of its range, or has no effect beside the others.

    Source: Wu et al. 2016, arXiv:1609.08144, eq. 14; tensor2tensor, utils/beam_search.py; Kasai et al. 2022,
    arXiv:2204.05424 (patience); Fan et al. 2018, arXiv:1805.04833 (top_k); Holtzman et al. 2020,
    arXiv:1904.09751 (top_p).
    """

    beam_size: int = 4
    top_beams: int = 1
    length_penalty: float = 0.6
    penalty: str = "gnmt"
    stop_early: bool | None = None
    patience: float | None = None
    min_length: int = 0
    max_length: int | None = None
    max_length_beyond_source: int = 50
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    scores: bool = True
    num_samples: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_beams()
        self._check_lengths()
        self._check_sampling()
        if any(token < 0 for token in self.suppress_tokens):
            raise ValueError(f"suppress_tokens must be token numbers, got {min(self.suppress_tokens)}")
        if not self.scores and not self.greedy:
            raise ValueError("beam search and samples are ranked by scores: scores=False is for beam_size 1")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size must not be negative, got {self.no_repeat_ngram_size}")

    @property
    def rows(self) -> int:
        """Hypotheses that a step extends, for each sentence."""
        return self.num_samples or self.beam_size

    @property
    def greedy(self) -> bool:
        """The likeliest token is all that is looked for."""
        return not self.num_samples and self.beam_size == 1 and self.patience is None and self.stop_early is None

    @property
    def returned(self) -> int:
        """N, the translations of each sentence."""
        return self.num_samples or self.top_beams

    @property
    def finished_capacity(self) -> int:
        """Finished hypotheses that beam search keeps of each sentence."""
        if self.patience is None:
            return self.beam_size
        return math.floor(self.beam_size * self.patience + 0.5)

    def penalise(self, length):
        """penalty(length), for a number or a tensor of them."""
        return (length if self.penalty == "power" else (5.0 + length) / 6.0) ** self.length_penalty

    def _check_types(self) -> None:
        """Each option becomes Python's own int, float or bool, or it is refused."""
        for names, checked in ((INTEGERS, _integer), (NUMBERS, _number), (SWITCHES, _switch)):
            for name in names:
                value = getattr(self, name)
                if value is not None or name not in MAY_BE_NONE:
                    object.__setattr__(self, name, checked(name, value))
        try:
            tokens = tuple(self.suppress_tokens)
        except TypeError:
            raise TypeError(f"suppress_tokens must be token numbers, got {self.suppress_tokens!r}") from None
        object.__setattr__(self, "suppress_tokens", tuple(_integer("a token of suppress_tokens", x) for x in tokens))

    def _check_beams(self) -> None:
        if not 1 <= self.top_beams <= self.beam_size:
            raise ValueError(f"top_beams must be between 1 and beam_size ({self.beam_size}), got {self.top_beams}")
        # A negative exponent would make the stopping rule unsound.
        if not 0 <= self.length_penalty < math.inf:
            raise ValueError(f"length_penalty must be finite and not negative, got {self.length_penalty}")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {', '.join(map(repr, PENALTIES))}, got {self.penalty!r}")
        if self.patience is None:
            return
        if not 0 < self.beam_size * self.patience < math.inf:
            raise ValueError(f"patience must be finite and positive, got {self.patience}")
        if self.stop_early is not None:
            raise ValueError("patience and stop_early are two rules for when to stop: give one of them")
        if self.finished_capacity < self.top_beams:
            raise ValueError(
                f"with patience {self.patience} and beam_size {self.beam_size} a search ends with "
                f"{self.finished_capacity} finished hypotheses, fewer than top_beams ({self.top_beams})"
            )

    def _check_lengths(self) -> None:
        for name in ("min_length", "max_length_beyond_source"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length <= self.min_length:
            raise ValueError(
                f"max_length must be above min_length ({self.min_length}), as it counts eos, got {self.max_length}"
            )

    def _check_sampling(self) -> None:
        if self.num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {self.num_samples}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and positive, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {self.seed}")
        if self.num_samples:
            if self.top_beams != 1 or self.patience is not None or self.stop_early is not None:
                raise ValueError(
                    "top_beams, patience and stop_early are of beam search, and num_samples is of sampling"
                )
        elif (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("temperature, top_k and top_p are of sampling: set num_samples too")


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):  # whose index is 0 or 1
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str, bytes)):  # of which float() would make numbers too
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        return math.inf  # which no option may be, nor what is as far below 0


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):  # numpy's, by version
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)
