"""The configuration, and the weights a model of it begins with."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from fused_transformer import Transformer, TransformerConfig
from tests.oracle import assert_equal
from tests.transformer.models import SOURCE, TARGET, TINY, VOCAB, tiny


def test_base_has_the_papers_number_of_parameters():
    config = TransformerConfig(source_vocab_size=37_000)
    with torch.device("meta"):
        model = Transformer(config)
    e, f, v = 512, 2048, 37_000
    attention, feed_forward, norm = 4 * e * e + 4 * e, 2 * e * f + f + e, 2 * e
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    # nn.Transformer's known 44,140,544, less its two final norms, which the paper does not have
    assert 6 * (encoder + decoder) == 44_140_544 - 2 * norm
    # "65 · 10⁶" in the paper's table 3
    assert sum(p.numel() for p in model.parameters()) == 6 * (encoder + decoder) + v * e == 63_082_496


@pytest.mark.parametrize(("ties", "tables"), [("shared", 1), (True, 1), ("target", 2), ("separate", 3), (False, 3)])
def test_ties_decide_the_number_of_tables(ties, tables):
    model = Transformer(TransformerConfig(**TINY, tie_embeddings=ties))
    assert sum(parameter.shape == (VOCAB, 24) for parameter in model.parameters()) == tables
    assert sum(parameter.shape == (VOCAB, 24) for parameter in model.state_dict().values()) == tables


def test_no_two_layers_begin_alike():
    model = Transformer(TransformerConfig(**TINY))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    for i, one in enumerate(matrices):
        assert not any(one.shape == other.shape and torch.equal(one, other) for other in matrices[:i])


def test_embeddings_begin_with_unit_variance():
    model = Transformer(TransformerConfig(source_vocab_size=2000, num_encoder_layers=0, num_decoder_layers=0))
    assert abs(model.source_embedding.weight.std() * math.sqrt(512) - 1) < 0.01


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(duplicate):
    model = tiny().eval()
    assert_equal(duplicate(model)(SOURCE, TARGET), model(SOURCE, TARGET))
    again = Transformer(model.config)
    again.load_state_dict(model.state_dict())
    assert_equal(again.eval()(SOURCE, TARGET), model(SOURCE, TARGET))


def test_config_goes_through_json():
    config = TransformerConfig(**TINY, tie_embeddings=False, positions=None, norm_first=True)
    again = TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.target_vocab_size == VOCAB
    assert again.tie_embeddings == "separate"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3
    with pytest.raises(ValueError, match="TransformerConfig has no depth, width"):
        TransformerConfig.from_dict({"source_vocab_size": 9, "width": 1, "depth": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide d_model, got 5 and 24"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"num_encoder_layers": -1}, "num_encoder_layers must be at least 0, got -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be at least 0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive"),
        ({"layer_norm_eps": math.inf}, "layer_norm_eps must be positive and finite, got inf"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps must be positive and finite, got nan"),
        ({"positions": "learned"}, "positions must be one of 'interleaved', 'concat_t2t', 'concat_paper', None"),
        ({"activation": "tanh"}, "activation must be one of 'relu', 'gelu', 'silu', got 'tanh'"),
        ({"tie_embeddings": "all"}, "tie_embeddings must be one of 'shared', 'target', 'separate', got 'all'"),
        ({"target_vocab_size": 30}, 'tie_embeddings="shared" needs one vocabulary'),
        ({"eos_idx": 1}, r"must be three tokens, got \[0, 1, 1\]"),
        ({"padding_idx": 31}, r"must be tokens of the vocabulary, got \[31, 1, 2\]"),
    ],
)
def test_a_wrong_configuration_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**TINY | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 24.0}, "d_model must be an int, got float"),
        ({"norm_first": 1}, "norm_first must be a bool, got int"),
        ({"norm_first": "False"}, "norm_first must be a bool, got str"),
        ({"dropout": "0.1"}, "dropout must be a number, got str"),
        ({"attention_dropout": None}, "attention_dropout must be a number, got NoneType"),
        ({"activation_dropout": torch.zeros(2)}, "activation_dropout must be a number, got Tensor"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps must be a number, got str"),
    ],
)
def test_a_wrong_type_in_a_configuration_is_an_error(changes, message):
    with pytest.raises(TypeError, match=message):
        TransformerConfig(**TINY | changes)


def test_numbers_of_other_libraries_become_pythons():
    config = TransformerConfig(
        **TINY
        | {
            "dropout": torch.tensor(0.25),
            "attention_dropout": np.float32(0.5),
            "activation_dropout": 0,
            "layer_norm_eps": np.float64(1e-6),
        }
    )
    numbers = (config.dropout, config.attention_dropout, config.activation_dropout, config.layer_norm_eps)
    assert numbers == (0.25, 0.5, 0.0, 1e-6) and {type(x) for x in numbers} == {float}
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_importing_the_package_needs_no_library_for_text():
    program = (
        "import sys\n"
        "for name in ('sentencepiece', 'sacrebleu', 'safetensors', 'tqdm', 'matplotlib', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import fused_transformer\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "print(fused_transformer.__version__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".") == 2
