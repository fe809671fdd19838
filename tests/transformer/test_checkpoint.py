"""Checkpoints: what goes in comes out, whole or not at all, and damage is told."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from fused_transformer import Transformer, TransformerConfig, checkpoint
from fused_transformer.checkpoint import find_checkpoint, load_checkpoint, read_file, save_checkpoint, write_file
from fused_transformer.tokenizer import Tokenizer
from tests.transformer.texts import parallel_lines


@pytest.fixture(scope="module")
def tokenizer():
    source, target = parallel_lines(30)
    return Tokenizer.learn(source + target, 300)


@pytest.fixture
def model(tokenizer):
    return Transformer(
        TransformerConfig(
            source_vocab_size=len(tokenizer),
            d_model=8,
            num_heads=2,
            d_feedforward=16,
            num_encoder_layers=1,
            num_decoder_layers=1,
            norm_first=True,
        )
    )


@pytest.fixture
def path(tmp_path, model, tokenizer):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, tokenizer, {"step": 7}, {"extra": torch.arange(3)})
    return path


def test_everything_comes_back(path, model, tokenizer):
    loaded, loaded_tokenizer, state, tensors = load_checkpoint(path)
    assert loaded.config == model.config
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name
    assert loaded_tokenizer.to_bytes() == tokenizer.to_bytes()
    assert state == {"step": 7}
    assert list(tensors) == ["extra"] and tensors["extra"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64], ids=str)
def test_tensors_of_any_type_and_layout(tmp_path, dtype):
    x = torch.randint(0, 99, (4, 6)).to(dtype)
    write_file(tmp_path / "x", {"transposed": x.t(), "number": x[0, 0], "none": x[:0]}, {})
    tensors, _ = read_file(tmp_path / "x")
    assert torch.equal(tensors["transposed"], x.t())
    assert torch.equal(tensors["number"], x[0, 0])
    assert tensors["none"].shape == (0, 6)
    assert all(value.dtype == dtype for value in tensors.values())


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*nowhere"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither best\.safetensors nor last\.safetensors"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_told(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, or not a checkpoint"):
        load_checkpoint(path)


def test_one_changed_bit_anywhere_is_told(path):
    content = path.read_bytes()
    for place in range(8, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            load_checkpoint(path)


def test_other_files_are_told(tmp_path, path):
    other = tmp_path / "other"
    other.write_text("Some text, which is no checkpoint of anything.\n")
    with pytest.raises(ValueError, match="is damaged, or not a checkpoint"):
        load_checkpoint(other)
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="not a checkpoint of fused_transformer"):
        load_checkpoint(other)


def test_a_later_version_is_told(path, monkeypatch, model, tokenizer):
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    save_checkpoint(path, model, tokenizer)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has checkpoint version 2; this fused_transformer reads up to 1"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors, state: tensors.pop("tokenizer"), "it has no 'tokenizer'"),
        (lambda tensors, state: state.pop("config"), "it has no 'config'"),
        (lambda tensors, state: state["config"].update(d_model=16), "does not hold together.*size mismatch"),
        (lambda tensors, state: state["config"].update(colour="red"), "TransformerConfig has no colour"),
        (lambda tensors, state: state["config"].update(num_heads=3), "num_heads must divide d_model"),
        (lambda tensors, state: tensors.pop("model.source_embedding.weight"), "Missing key.*source_embedding.weight"),
        (lambda tensors, state: tensors.update(tokenizer=torch.zeros(9, dtype=torch.uint8)), "sentencepiece model"),
        (
            lambda tensors, state: tensors.update(tokenizer=torch.zeros(9, dtype=torch.bfloat16)),
            r"does not hold together: its tokenizer must be bytes, torch\.uint8, and is torch\.bfloat16",
        ),
    ],
)
def test_parts_that_do_not_fit_are_told(path, spoil, message):
    tensors, state = read_file(path)
    spoil(tensors, state)
    write_file(path, tensors, state)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_checkpoint(path)


def test_a_vocabulary_of_another_size_is_told(path, model):
    save_checkpoint(path, model, Tokenizer.learn(parallel_lines(30)[0], 290))
    with pytest.raises(ValueError, match=r"its vocabulary has \d+ tokens, its model 300"):
        load_checkpoint(path)


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(path, model, tokenizer, monkeypatch, moment):
    before = path.read_bytes()

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    if moment == "write":
        monkeypatch.setattr(checkpoint, "save", fail)
    else:
        monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(path, model, tokenizer, {"step": 8})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half-written stays"


def test_the_best_checkpoint_of_a_folder_is_found(tmp_path, path):
    assert find_checkpoint(path) == path
    (tmp_path / "last.safetensors").write_bytes(path.read_bytes())
    assert find_checkpoint(tmp_path).name == "last.safetensors"
    (tmp_path / "best.safetensors").write_bytes(path.read_bytes())
    assert find_checkpoint(tmp_path).name == "best.safetensors"


def test_the_state_is_readable_without_this_package(path):
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["state"])["step"] == 7
    assert header["model.source_embedding.weight"]["dtype"] == "F32"
