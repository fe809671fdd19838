"""One training step after another, and all that is needed to go on with them later exactly as if nothing happened."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fused_transformer.batches import Batch, Corpus, TokenBatches
from fused_transformer.decoding import evaluating
from fused_transformer.loss import smoothed_cross_entropy
from fused_transformer.model import Transformer
from fused_transformer.schedule import NoamLR


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What decides the course of a training, beside model and text; the defaults are the paper's.

    Args:
        max_tokens: of a batch on each side, padding included.
        warmup_steps, learning_rate_factor: of the schedule, see `NoamLR`.
        label_smoothing: ε, in torch's convention, see `smoothed_cross_entropy`.
        clip_norm: the gradient's norm is cut to this; 0 leaves it.
        pool_size: sentences sorted by length together, see `TokenBatches`.
        seed: of weights, dropout and the order of the batches.

    Raises:
        ValueError: a number out of range.
    """

    max_tokens: int = 25000
    warmup_steps: int = 4000
    learning_rate_factor: float = 1.0
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    pool_size: int = 8192
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("max_tokens", "warmup_steps", "learning_rate_factor", "pool_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        if not self.clip_norm >= 0.0:
            raise ValueError(f"clip_norm must not be negative, got {self.clip_norm}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: TrainingOptions) -> list[str]:
        """ "name: mine, theirs" for each option that differs."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [f"{name}: {mine}, {theirs}" for name, mine, theirs in pairs if mine != theirs]


def batch_loss(model: Transformer, batch: Batch, label_smoothing: float) -> Tensor:
    """Mean loss over the batch's target tokens; hidden states of padding are left out ahead of the projection."""
    memory = model.encode(batch.source, batch.source_lengths)
    hidden = model.decode(batch.target[:, :-1], memory, batch.source_lengths, batch.target_lengths)
    expected = batch.target[:, 1:]
    padding_idx = model.config.padding_idx
    real = expected != padding_idx
    return smoothed_cross_entropy(
        model.project(hidden[real]), expected[real], label_smoothing=label_smoothing, padding_idx=padding_idx
    )


@torch.no_grad()
def mean_loss(model: Transformer, corpus: Corpus, batches: list[Tensor], label_smoothing: float = 0.0) -> float:
    """Loss per target token over `batches` of a corpus, without dropout; exp of it is the perplexity."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for rows in batches:
            count = int((corpus.target.lengths[rows] - 1).sum())
            total += batch_loss(model, corpus.batch(rows).to(device), label_smoothing).item() * count
            tokens += count
    return total / max(tokens, 1)


class Trainer:
    """Model, optimizer, schedule and batches, one `train_step` at a time.

    Adam with β = (0.9, 0.98), ε = 1e-9 and `NoamLR`, as the paper; the gradient's norm is clipped.

    Args:
        model: trained in place, on the device it is on.
        corpus: the sentence pairs.
        options: see `TrainingOptions`.

    Source: Vaswani et al. 2017, section 5.
    """

    def __init__(self, model: Transformer, corpus: Corpus, options: TrainingOptions) -> None:
        self.model, self.corpus, self.options = model, corpus, options
        self.step = 0
        self.tokens = 0  # of the target, seen so far
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
        self.schedule = NoamLR(self.optimizer, model.config.d_model, options.warmup_steps, options.learning_rate_factor)
        self.batches = TokenBatches(corpus, options.max_tokens, pool_size=options.pool_size, seed=options.seed)

    def train_step(self) -> float:
        """One batch, one step of the optimizer; the loss ahead of it.

        Raises:
            FloatingPointError: the loss is not finite; the weights are as they were.
        """
        self.model.train()
        batch = self.corpus.batch(next(self.batches)).to(self.device)
        loss = batch_loss(self.model, batch, self.options.label_smoothing)
        value = loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            raise FloatingPointError(f"the loss became {value} at step {self.step + 1}; try a lower learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.options.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.tokens += int(batch.target_lengths.sum())
        return value

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What, with the model's weights, decides every later step: JSON-ready values, and tensors."""
        optimizer = self.optimizer.state_dict()
        names = [name for name, _ in self.model.named_parameters()]
        tensors = {
            f"optimizer.{names[i]}.{key}": value
            for i, entries in optimizer["state"].items()
            for key, value in entries.items()
        }
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "options": self.options.to_dict(),
            "batches": self.batches.state_dict(),
            "schedule": self.schedule.state_dict(),
            "groups": optimizer["param_groups"],
        }
        return values, tensors

    def load_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` returned; the model's weights are loaded apart, and the options must be the same.

        Raises:
            ValueError: the state is not whole, or the options differ.
        """
        differences = self.options.differences(TrainingOptions(**values["options"]))
        if differences:
            raise ValueError(f"training was begun with other options (now, then): {'; '.join(differences)}")
        try:
            entries = (
                {
                    i: {key: tensors[f"optimizer.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                    for i, (name, _) in enumerate(self.model.named_parameters())
                }
                if values["step"]
                else {}
            )
            self.optimizer.load_state_dict({"state": entries, "param_groups": values["groups"]})
            self.schedule.load_state_dict(values["schedule"])
            self.batches.load_state_dict(values["batches"])
            self.step, self.tokens = int(values["step"]), int(values["tokens"])
            torch.set_rng_state(tensors["random.cpu"])
            if self.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        except KeyError as error:
            raise ValueError(f"the training state is not whole: it has no {error.args[0]!r}") from None
