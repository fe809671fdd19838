"""save_model and load_model: a model alone, to a file and back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from fused_transformer.checkpoint import load_model, save_checkpoint, save_model
from fused_transformer.extra_parts import add_final_norm, add_logits_bias
from fused_transformer.tokenizer import Tokenizer
from tests.transformer.models import SOURCE, TARGET, VARIANTS, tiny
from tests.transformer.texts import parallel_lines

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(loaded, model):
    assert loaded.config == model.config
    assert not loaded.training
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and torch.equal(ours[name], x), name
    assert all(x.requires_grad for x in loaded.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_comes_back(tmp_path, variant):
    model = tiny(**VARIANTS[variant])
    save_model(tmp_path / "model.safetensors", model)
    loaded = load_model(tmp_path / "model.safetensors")
    assert_same(loaded, model)
    assert torch.equal(loaded(SOURCE, TARGET), model.eval()(SOURCE, TARGET))


def test_dtypes_are_kept_or_chosen(tmp_path):
    model = tiny().bfloat16()
    model.encoder.layers[0].norm1.float()
    save_model(tmp_path / "model", model)
    assert_same(load_model(tmp_path / "model"), model)
    assert {x.dtype for x in load_model(tmp_path / "model", dtype=torch.float64).parameters()} == {torch.float64}
    assert {x.device.type for x in load_model(tmp_path / "model", device="meta").parameters()} == {"meta"}


def test_parts_beyond_the_configuration_come_back(tmp_path):
    model = tiny(tie_embeddings="separate")
    for stack in ("encoder", "decoder"):
        add_final_norm(model, stack)
    add_logits_bias(model)
    for x in (*model.encoder.norm.parameters(), *model.decoder.norm.parameters(), model.output_projection.bias):
        nn.init.normal_(x)
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model")
    assert_same(loaded, model)
    assert loaded.encoder.norm.eps == model.config.layer_norm_eps
    assert torch.equal(loaded(SOURCE, TARGET), model.eval()(SOURCE, TARGET))


def test_what_was_tied_by_hand_is_saved_in_copies(tmp_path):
    model = tiny(tie_embeddings="separate").eval()
    model.decoder.layers[1] = model.decoder.layers[0]
    model.output_projection.weight = model.source_embedding.weight
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model")
    assert_same(loaded, model)
    assert torch.equal(loaded(SOURCE, TARGET), model(SOURCE, TARGET))
    assert loaded.decoder.layers[1] is not loaded.decoder.layers[0]


def test_added_parts_change_nothing_twice():
    model = tiny(tie_embeddings="separate")
    add_final_norm(model, "encoder")
    add_logits_bias(model)
    norm, bias = model.encoder.norm, model.output_projection.bias
    add_final_norm(model, "encoder")
    add_logits_bias(model)
    assert model.encoder.norm is norm and model.output_projection.bias is bias
    assert model.decoder.norm is None
    with pytest.raises(ValueError, match='needs tie_embeddings="separate"'):
        add_logits_bias(tiny())


def test_what_train_wrote_loads_too(tmp_path):
    tokenizer = Tokenizer.learn(parallel_lines(30)[0], 290)
    model = tiny(source_vocab_size=len(tokenizer))
    save_checkpoint(tmp_path / "best.safetensors", model, tokenizer, {"step": 3}, {"adam": torch.ones(3)})
    assert_same(load_model(tmp_path), model)
    save_model(tmp_path / "other", model, tokenizer)
    assert_same(load_model(tmp_path / "other"), model)


def test_a_loaded_model_does_not_need_its_file(tmp_path):
    model = tiny()
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model")
    (tmp_path / "model").write_bytes(b"something else")
    assert_same(loaded, model)
    save_model(tmp_path / "model", loaded)
    assert_same(load_model(tmp_path / "model"), model)


def test_loading_draws_no_random_numbers(tmp_path):
    save_model(tmp_path / "model", tiny())
    state = torch.get_rng_state()
    load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


def run_with_model(program: str, path) -> str:
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True)
    return done.stdout


def test_sentencepiece_is_not_needed(tmp_path):
    save_model(tmp_path / "model", tiny())
    program = (
        "import sys; sys.modules['sentencepiece'] = None\n"
        "from fused_transformer.checkpoint import load_model\n"
        "print(load_model(sys.argv[1]).config.d_model)"
    )
    assert run_with_model(program, tmp_path / "model") == "24\n"


def test_torchs_compiler_is_not_loaded(tmp_path):
    """By drawing initial weights on the meta device, say: 2 seconds ahead of the first translation."""
    save_model(tmp_path / "model", tiny())
    program = (
        "import sys, torch\n"
        "from fused_transformer import PackedTransformer, generate\n"
        "from fused_transformer.checkpoint import load_model\n"
        "model = load_model(sys.argv[1])\n"
        "for one in (model, PackedTransformer(model)):\n"
        "    generate(one, torch.tensor([[4, 5, 2]]))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert run_with_model(program, tmp_path / "model") == "False\n"
