"""The two engines that `bench.ctranslate2` compares, behind one face: token numbers in, token numbers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch

from fused_transformer import PackedTransformer, SearchOptions, generate
from fused_transformer.checkpoint import load_model

Tokens = list[int]
# In the folder that both are loaded from; of the second one for each kind of weights.
MODEL_FILE, EXPORTED = "model.safetensors", "ctranslate2-"


class Engine(ABC):
    """A loaded model. `weights` names how its weights are kept, `threads` how many it uses."""

    @abstractmethod
    def __init__(self, folder: Path, weights: str, threads: int) -> None: ...

    @abstractmethod
    def translate(self, sources: Sequence[Tokens], beam_size: int, length: int) -> list[Tokens]:
        """The best translation of each source (given without eos) of a batch, at most `length` tokens."""


class CTranslate2(Engine):
    """CTranslate2's Translator, told to rank by log-probability alone."""

    def __init__(self, folder: Path, weights: str, threads: int) -> None:
        import ctranslate2

        self.translator = ctranslate2.Translator(
            str(folder / f"{EXPORTED}{weights}"),
            device="cpu",
            compute_type=weights,
            inter_threads=1,
            intra_threads=threads,
        )

    def translate(self, sources: Sequence[Tokens], beam_size: int, length: int) -> list[Tokens]:
        results = self.translator.translate_batch(
            [[str(token) for token in source] for source in sources],
            beam_size=beam_size,
            max_decoding_length=length,
            length_penalty=0,
        )
        return [[int(token) for token in result.hypotheses[0]] for result in results]


class Fused(Engine):
    """This package."""

    look_ahead = True

    def __init__(self, folder: Path, weights: str, threads: int) -> None:
        self.threads = threads
        self.model = PackedTransformer(load_model(folder / MODEL_FILE), weights=weights, look_ahead=self.look_ahead)

    def translate(self, sources: Sequence[Tokens], beam_size: int, length: int) -> list[Tokens]:
        torch.set_num_threads(self.threads)
        config = self.model.config
        lengths = torch.tensor([len(source) + 1 for source in sources])
        padded = torch.full((len(sources), int(lengths.max())), config.padding_idx)
        for row, source in enumerate(sources):
            padded[row, : len(source) + 1] = torch.tensor([*source, config.eos_idx])
        greedy = beam_size == 1  # CTranslate2's return_scores is False too unless it is asked for
        options = SearchOptions(beam_size=beam_size, length_penalty=0.0, max_length=length, scores=not greedy)
        limits = torch.full_like(lengths, length)
        found = generate(self.model, padded, lengths, options, max_lengths=limits)
        return [hypotheses[0] for hypotheses in found.tolist()]


class OneByOne(Fused):
    """This package, which computes a token at a time even where it need not."""

    look_ahead = False


ENGINES: dict[str, type[Engine]] = {"ctranslate2": CTranslate2, "fused": Fused, "one_by_one": OneByOne}
