"""Checkpoints: one safetensors file with weights, configuration, vocabulary and, to go on training, everything else.

    save_model("model.safetensors", model)                        weights and configuration; tokenizer= adds one
    model = load_model("model.safetensors")                       from there, or from what `train` wrote

    tensors    "model.<parameter>", "tokenizer" (the sentencepiece model's bytes), further tensors of the training state
    metadata   "format" and "version", "state" (JSON: the configuration, and what the training state adds), "sha256"

A file is written beside its destination and renamed into place, so that a crash leaves the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fused_transformer.config import TransformerConfig
from fused_transformer.extra_parts import with_weights
from fused_transformer.model import Transformer

if TYPE_CHECKING:  # sentencepiece, which a model alone does not need
    from fused_transformer.tokenizer import Tokenizer

FORMAT, VERSION = "fused_transformer checkpoint", 1
BEST, LAST = "best.safetensors", "last.safetensors"
UNFINISHED = ".*.unfinished"  # what a process that is killed amid writing leaves; nothing reads it

State = dict[str, Any]


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as those of layers tied by hand do: safetensors does not write such."""
    taken: set[int] = set()
    for name, x in tensors.items():
        tensors[name] = x.clone() if x.untyped_storage().data_ptr() in taken else x
        taken.add(x.untyped_storage().data_ptr())
    return tensors


def write_file(path: str | Path, tensors: dict[str, Tensor], state: State) -> None:
    """Write tensors and a JSON-ready state to `path`, whole or not at all.

    Raises:
        OSError: the folder can't be written to, or is full; a file that was at `path` is still there.
    """
    path = Path(path)
    tensors = _apart({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    text = json.dumps(state)
    metadata = {"format": FORMAT, "version": str(VERSION), "state": text, "sha256": _digest(tensors, text)}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(save(tensors, metadata=metadata))
            file.flush()
            os.fsync(file.fileno())  # ahead of the rename, or a power cut could leave an empty file under the name
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that the caller knows
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # and now the name itself is on the disk
    finally:
        os.close(folder)


def read_file(path: str | Path) -> tuple[dict[str, Tensor], State]:
    """The tensors and the state that `write_file` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a checkpoint of this package, or of a later version of it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a checkpoint: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of fused_transformer")
    if not metadata.get("version", "").isdecimal() or int(metadata["version"]) > VERSION:
        raise ValueError(
            f"{path} has checkpoint version {metadata.get('version')}; this fused_transformer reads up to {VERSION}"
        )
    state = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, state):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum")
    return tensors, json.loads(state)


def save_model(path: str | Path, model: Transformer, tokenizer: Tokenizer | None = None) -> None:
    """Write a model to one safetensors file: weights in their dtypes, configuration, and the tokenizer if given.

    Any program that reads safetensors can read it: the weights are "model.<name in the state_dict>", the configuration
    is JSON under "state" of the metadata. What is tied by hand, such as one layer in two places, is written as copies:
    the loaded model computes the same and is not tied.

    Raises:
        OSError: it could not be written; a file that was at `path` is still there, whole.
    """
    save_checkpoint(path, model, tokenizer)


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model that `save_model` or `train` wrote, in evaluation mode.

    Args:
        path: a file, or a folder that `train` wrote (its best checkpoint).
        device: where its parameters go.
        dtype: theirs; None: the ones that were saved.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is damaged, not a checkpoint, or of a later version; or weights and configuration do not
            fit together.
    """
    path = find_checkpoint(path)
    tensors, state = read_file(path)
    return _build(path, tensors, state).to(device=device, dtype=dtype).eval()


def save_checkpoint(
    path: str | Path,
    model: Transformer,
    tokenizer: Tokenizer | None,
    state: State | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write a model with its vocabulary, and whatever else belongs to it.

    Args:
        state: further values, JSON-ready.
        tensors: further tensors.

    Raises:
        OSError: it could not be written; a file that was at `path` is still there.
    """
    everything = {f"model.{name}": x for name, x in model.state_dict().items()}
    if tokenizer is not None:
        everything["tokenizer"] = torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8)
    write_file(path, {**(tensors or {}), **everything}, {**(state or {}), "config": model.config.to_dict()})


def load_checkpoint(path: str | Path) -> tuple[Transformer, Tokenizer, State, dict[str, Tensor]]:
    """The model (on the CPU, in training mode), its tokenizer, and the further state and tensors.

    Raises:
        FileNotFoundError, ValueError: as `read_file`; ValueError also where weights, configuration and vocabulary do
            not fit together, or there is no vocabulary.
    """
    from fused_transformer.tokenizer import Tokenizer

    tensors, state = read_file(path)
    if "tokenizer" not in tensors:
        raise _not_whole(path, "tokenizer")
    content = tensors.pop("tokenizer")
    if content.dtype != torch.uint8:
        raise _not_together(path, f"its tokenizer must be bytes, torch.uint8, and is {content.dtype}")
    try:
        tokenizer = Tokenizer(content.numpy().tobytes())
    except ValueError as error:
        raise _not_together(path, error) from None
    model = _build(path, tensors, state)
    if len(tokenizer) != model.config.source_vocab_size:
        raise _not_together(
            path, f"its vocabulary has {len(tokenizer)} tokens, its model {model.config.source_vocab_size}"
        )
    return model, tokenizer, state, tensors


def _build(path: str | Path, tensors: dict[str, Tensor], state: State) -> Transformer:
    """The model of a checkpoint's contents, which its weights and configuration are taken out of."""
    names = [name for name in tensors if name.startswith("model.")]
    # Tensors of a file share its memory; copied, they do not keep the others alive.
    weights = {name.removeprefix("model."): tensors.pop(name).clone() for name in names}
    try:
        config = TransformerConfig.from_dict(state.pop("config"))
        return with_weights(config, weights)
    except KeyError as error:
        raise _not_whole(path, error.args[0]) from None
    except (RuntimeError, TypeError, ValueError) as error:
        raise _not_together(path, error) from None


def _not_whole(path: str | Path, name: str) -> ValueError:
    return ValueError(f"{path} is not a whole checkpoint: it has no {name!r}")


def _not_together(path: str | Path, why: object) -> ValueError:
    return ValueError(f"{path} does not hold together: {why}")


def find_checkpoint(path: str | Path) -> Path:
    """The file itself, or the best checkpoint of a folder that `train` wrote.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"there is no checkpoint at {path}")
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"there is no checkpoint in {path}: neither {BEST} nor {LAST}")
