"""Text to subword numbers and back."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence

import sentencepiece

PADDING, BOS, EOS, UNKNOWN = 0, 1, 2, 3
ALGORITHMS = ("bpe", "unigram", "word")

_SPACE = "\u2581"
_BYTES = 256  # pieces that spell what the vocabulary lacks


class Tokenizer:
    """A subword vocabulary, shared by source and target, learned with sentencepiece.

    What the vocabulary lacks is spelled in UTF-8 bytes, so every character survives the round trip; only white space
    at the ends is dropped, and runs of it become one space. Tokens 0 to 3 are padding, bos, eos and unknown.

    Args:
        model: a serialised sentencepiece model, as `learn` makes it and `to_bytes` returns it.

    Raises:
        ValueError: the bytes are not such a model.

    Source: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Kudo 2018, arXiv:1804.10959 (unigram).
    """

    def __init__(self, model: bytes) -> None:
        self._model = bytes(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except Exception as error:  # its own classes differ between versions
            raise ValueError(f"not a sentencepiece model: {error}") from None
        special = tuple(getattr(self._processor, name)() for name in ("pad_id", "bos_id", "eos_id", "unk_id"))
        if special != (PADDING, BOS, EOS, UNKNOWN):
            raise ValueError(f"the sentencepiece model must have pad, bos, eos, unk = 0, 1, 2, 3, got {special}")

    @classmethod
    def learn(
        cls,
        lines: Iterable[str],
        vocab_size: int = 8000,
        *,
        algorithm: str = "bpe",
        character_coverage: float = 0.9999,
    ) -> Tokenizer:
        """Learn a vocabulary of at most vocab_size pieces from lines of text (source and target together).

        Args:
            lines: the text; sentencepiece passes over lines of more than 4192 bytes.
            vocab_size: 4 special tokens, 256 bytes, and the pieces; fewer where the text has no more to offer.
            algorithm: "bpe", "unigram", or "word" for whole words as they are between spaces.
            character_coverage: the share of the text's characters that get pieces of their own.

        Raises:
            ValueError: there is no text, or vocab_size can't hold its characters.
        """
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(map(repr, ALGORITHMS))}, got {algorithm!r}")
        if not 0.0 < character_coverage <= 1.0:
            raise ValueError(f"character_coverage must be above 0 and at most 1, got {character_coverage}")
        written = (line for line in lines if line.strip())
        first = next(written, None)
        if first is None:
            raise ValueError("a vocabulary can't be learned from text without a word")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], written),
                model_writer=model,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                model_type=algorithm,
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                pad_id=PADDING,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNKNOWN,
                minloglevel=2,
            )
        except RuntimeError as error:
            if "smaller than required_chars" not in str(error):
                raise ValueError(f"sentencepiece could not learn a vocabulary: {error}") from error
            raise ValueError(
                f"vocab_size {vocab_size} is too small: the 4 special tokens, {_BYTES} bytes and the text's characters "
                "need more; raise it or lower character_coverage"
            ) from None
        return cls(model.getvalue())

    def to_bytes(self) -> bytes:
        """The serialised model, for a checkpoint."""
        return self._model

    def __len__(self) -> int:
        """V, the number of tokens."""
        return self._processor.get_piece_size()

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """The token numbers of each line, without bos and eos."""
        return self._processor.encode(list(lines))

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """How the vocabulary writes each token: "▁" begins a word, "<0x41>" is a byte, "<s>" bos, "</s>" eos."""
        return [self._processor.id_to_piece(token) for token in tokens]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence of token numbers; padding, bos and eos have none, unknown is ⁇.

        Bytes that are no UTF-8 become U+FFFD.
        """
        # With whole words, the space ahead of an unknown one is spelled in bytes too, as sentencepiece's sign for it.
        return [self._processor.decode(list(row)).removeprefix(_SPACE).replace(_SPACE, " ") for row in tokens]
