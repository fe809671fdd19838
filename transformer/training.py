"""One training step after another, and all that is needed to go on with them later exactly as if nothing happened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fused_transformer import layer_running
from fused_transformer.batches import Batch, Corpus, TokenBatches
from fused_transformer.decoding import evaluating
from fused_transformer.loss import projected_cross_entropy
from fused_transformer.model import Transformer
from fused_transformer.not_finite import NotFiniteError
from fused_transformer.processes import Processes
from fused_transformer.schedule import NoamLR
from fused_transformer.training_options import PRECISIONS, TrainingOptions

SMALLEST_SCALE = 2.0**-10  # of a float16 loss; gradients that overflow even so are not the scale's fault


def batch_loss(model: Transformer, batch: Batch, label_smoothing: float) -> Tensor:
    """Mean loss over the batch's target tokens; hidden states of padding are left out ahead of the projection."""
    memory = model.encode(batch.source, batch.source_lengths)
    hidden = model.decode(batch.target[:, :-1], memory, batch.source_lengths, batch.target_lengths)
    expected = batch.target[:, 1:]
    padding_idx = model.config.padding_idx
    real = expected != padding_idx
    return projected_cross_entropy(
        model, hidden[real], expected[real], label_smoothing=label_smoothing, padding_idx=padding_idx
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


class _Loss(nn.Module):
    """A batch to its loss, as a module of its own: what DistributedDataParallel can wrap."""

    def __init__(self, model: Transformer, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, *batch: Tensor) -> Tensor:
        return batch_loss(self.model, Batch(*batch), self.label_smoothing)


class Trainer:
    """Model, optimizer, schedule and batches, one `train_step` at a time.

    Adam with β = (0.9, 0.98), ε = 1e-9 and `NoamLR`, as the paper; the gradient's norm is clipped.

    Dropout's numbers follow from the seed and a batch's place in the order of all batches: torch's generators are left
    alone, and a resumed training, or one on another number of processes, draws the same.

    Args:
        model: trained in place, on the device it is on.
        corpus: the sentence pairs.
        options: see `TrainingOptions`.
        processes: those that share the batches of each step; default: this one alone.
        compile: the layers go through torch.compile.
        checkpoint_activations: the layers compute their activations twice instead of keeping them.

    Attributes:
        step, tokens: steps done, and the target tokens they saw.
        grad_norm: the gradient's norm in the last step, ahead of clipping.

    Raises:
        ValueError: precision "float16" on a CPU, or the corpus has other special tokens than the model.

    Source: Vaswani et al. 2017, section 5; the scaled loss: Micikevicius et al. 2018, arXiv:1710.03740.
    """

    def __init__(
        self,
        model: Transformer,
        corpus: Corpus,
        options: TrainingOptions,
        *,
        processes: Processes | None = None,
        compile: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        self.model, self.corpus, self.options = model, corpus, options
        self.processes = processes or Processes()
        self.step, self.tokens, self.grad_norm = 0, 0, 0.0
        self.device = next(model.parameters()).device
        _check_precision(options.precision, self.device)
        _check_special_tokens(model, corpus)
        self.optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
        self.schedule = NoamLR(self.optimizer, model.config.d_model, options.warmup_steps, options.learning_rate_factor)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "float16")
        self.batches = TokenBatches(corpus, options.max_tokens, pool_size=options.pool_size, seed=options.seed)
        layer_running.checkpoint_activations(model, checkpoint_activations)
        if compile:
            layer_running.compile_layers(model)
        self._loss = self.processes.replicated(_Loss(model, options.label_smoothing))

    def train_step(self) -> float:
        """`accumulate` batches, one step of the optimizer; the mean loss of their target tokens ahead of it.

        A float16 step whose scaled gradients overflow is left out, the scale is halved, and `step` stays what it was.

        Raises:
            NotFiniteError: the loss or its gradient is not finite; the weights are as they were.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        pieces = self.processes.pieces([next(self.batches) for _ in range(self.options.accumulate)])
        counts = [int((self.corpus.target.lengths[rows] - 1).sum()) for rows in pieces]
        value = self._accumulate(pieces, counts)
        if self._update(pieces):
            self.schedule.step()
            self.step += 1
            self.tokens += sum(counts)
        return value

    def _accumulate(self, pieces: list[Tensor], counts: list[int]) -> float:
        """The gradient of the mean loss over the target tokens of all pieces, `counts` of each; that mean."""
        own = [i for i in range(self.processes.rank, len(pieces), self.processes.world) if counts[i]]
        weights = [counts[i] / sum(counts) for i in own]
        if not own:  # the others' gradients wait for this process's: any piece will do, and counts nothing
            own, weights = [next(i for i, count in enumerate(counts) if count)], [0.0]
        losses = torch.stack(
            [self._backward(i, pieces[i], weight, last=i == own[-1]) for i, weight in zip(own, weights, strict=True)]
        ).tolist()  # the one time that the host waits for a GPU's losses
        (value,) = self.processes.sums([sum(loss * weight for loss, weight in zip(losses, weights, strict=True))])
        if not math.isfinite(value):
            found = [(pieces[i], loss) for i, loss in zip(own, losses, strict=True) if not math.isfinite(loss)]
            found = [pair for pairs in self.processes.gathered(found) for pair in pairs]
            raise self._not_finite(f"the loss became {found[0][1] if found else value}", [rows for rows, _ in found])
        return value

    def _backward(self, index: int, rows: Tensor, weight: float, last: bool) -> Tensor:
        """Add the gradient of the rows' mean loss times weight; that loss. Processes meet in their last."""
        batch = self.corpus.batch(rows).to(self.device)
        dtype = PRECISIONS[self.options.precision]
        alone: AbstractContextManager = nullcontext()
        if isinstance(self._loss, DistributedDataParallel):
            weight *= self.processes.world  # it takes the mean over the processes, and the sum is wanted
            if not last:
                alone = self._loss.no_sync()
        with self._drawing(index), alone:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = self._loss(*batch)
            self.scaler.scale(loss * weight).backward()
        return loss.detach()

    @contextmanager
    def _drawing(self, index: int) -> Iterator[None]:
        """Random numbers for piece `index` of this step, from its place; afterwards the generators are as before."""
        place = f"{self.options.seed} {self.batches.epoch} {self.batches.position} {index}"
        seed = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little")
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            yield

    def _update(self, pieces: list[Tensor]) -> bool:
        """One step of the optimizer by the gradient there is; False if float16's overflowed and it was left out."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        self.grad_norm = norm.item()
        scale = self.scaler.get_scale()
        if not math.isfinite(self.grad_norm) and (not self.scaler.is_enabled() or scale < SMALLEST_SCALE):
            raise self._not_finite(f"the gradient's norm became {self.grad_norm}", pieces)
        if self.options.clip_norm:
            clip_grads_with_norm_(self.model.parameters(), self.options.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def _not_finite(self, what: str, pieces: list[Tensor]) -> NotFiniteError:
        return NotFiniteError(what, self.step + 1, self.corpus.lines[torch.cat(pieces)].tolist())

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What, with the model's weights, decides every later step: JSON-ready values, and tensors.

        The state of the random numbers is the seed, among the options, and where in the order of the batches it is.
        """
        optimizer = self.optimizer.state_dict()
        names = [name for name, _ in self.model.named_parameters()]
        tensors = {
            f"optimizer.{names[i]}.{key}": value
            for i, entries in optimizer["state"].items()
            for key, value in entries.items()
        }
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "options": self.options.to_dict(),
            "batches": self.batches.state_dict(),
            "schedule": self.schedule.state_dict(),
            "groups": optimizer["param_groups"],
            "scaler": self.scaler.state_dict(),
        }
        return values, tensors

    def load_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` returned; the model's weights are loaded apart, and the options must be the same.

        Raises:
            ValueError: the state is not whole, or the options differ.
        """
        try:
            begun_with = TrainingOptions(**values.get("options", {}))
        except TypeError as error:
            raise ValueError(f"the training was begun with options unknown here: {error}") from None
        differences = self.options.differences(begun_with)
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
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(values["scaler"])
        except KeyError as error:
            raise ValueError(f"the training state is not whole: it has no {error.args[0]!r}") from None


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "float16" and device.type != "cuda":
        raise ValueError(f"precision float16 is for GPUs, and the model is on {device}: bfloat16 is for both")


def _check_special_tokens(model: Transformer, corpus: Corpus) -> None:
    """The loss would count padding, or the decoder begin with a token that generation never gives it."""
    if not len(corpus):
        return
    found = {
        "padding_idx": corpus.padding_idx,
        "bos_idx": int(corpus.target.tokens[0]),
        "eos_idx": int(corpus.source.tokens[-1]),
    }
    for name, value in found.items():
        if value != getattr(model.config, name):
            raise ValueError(f"the corpus has {name} {value}, and the model {getattr(model.config, name)}")
