"""Hugging Face's Marian models in ours: the same logits, the same greedy translations. Nothing is downloaded."""

from __future__ import annotations

import itertools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import pytest
import torch

from fused_transformer import greedy
from fused_transformer.checkpoint import load_model, save_model
from fused_transformer.integrations.marian import from_marian
from fused_transformer.kernels import sinusoidal_positions

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers' own: torch.jit.script where it is imported, and deprecations among its modules
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

V, PAD, EOS = 41, 40, 0
SETTINGS = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
    "eos_token_id": EOS,
    "forced_eos_token_id": None,
    "activation_function": "swish",  # as in OPUS-MT, and the next
    "scale_embedding": True,
}
SOURCE = torch.tensor([[5, 9, 3, 7, 6, EOS], [4, 8, EOS, PAD, PAD, PAD], [30, 3, 3, 12, EOS, PAD]])
TARGET = torch.tensor([[11, 12, 13, 4], [14, 5, 6, 7], [6, 30, 8, 39]])
VARIANTS = {
    "opus": {},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "not_scaled": {"scale_embedding": False},
    "two_vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 47},
    "own_projection": {"tie_word_embeddings": False, "share_encoder_decoder_embeddings": False},
    "nothing_tied": {"tie_word_embeddings": False},  # where share_encoder_decoder_embeddings says what is not so
    "own_start": {"decoder_start_token_id": 1},
}


def make(**options):
    """A model of theirs, every weight of it random: biases, norms, and the bias of the logits."""
    model = transformers.MarianMTModel(transformers.MarianConfig(**SETTINGS | options)).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "embed_positions" not in name:
                centre = float("norm" in name and "weight" in name)
                x.normal_(centre, 0.3 if x.dim() == 1 else x.shape[-1] ** -0.5)
        model.final_logits_bias.normal_()
        if not model.config.share_encoder_decoder_embeddings:
            model.lm_head.weight.copy_(model.model.decoder.embed_tokens.weight)
        if not model.config.tie_word_embeddings:
            model.lm_head.weight.normal_(0, 0.2)
    return model


def start_with(token):
    return torch.cat([torch.full((3, 1), token), TARGET], 1)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_equal(variant):
    theirs = make(**VARIANTS[variant])
    ours = from_marian(theirs.config, theirs.state_dict())
    start = theirs.config.decoder_start_token_id
    expected = theirs(input_ids=SOURCE, attention_mask=SOURCE != PAD, decoder_input_ids=start_with(start)).logits
    got = ours(SOURCE, start_with(ours.config.bos_idx))
    size = expected.shape[-1]
    kept = [token for token in range(size) if token not in (PAD, start)]
    torch.testing.assert_close(got[..., kept], expected[..., kept], atol=2e-5, rtol=1e-5)
    never = got[..., [PAD, ours.config.bos_idx]]
    assert (never < -9e3).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_translations_are_equal(variant):
    theirs = make(**VARIANTS[variant])
    ours = from_marian(theirs.config, theirs.state_dict())
    never = sorted({PAD, theirs.config.decoder_start_token_id})
    found = greedy(ours, SOURCE, max_lengths=torch.tensor([20, 20, 20]))
    expected = theirs.generate(
        SOURCE, attention_mask=SOURCE != PAD, max_new_tokens=20, num_beams=1, do_sample=False, suppress_tokens=never
    )
    for row, tokens in zip(expected.tolist(), found.tolist(), strict=True):
        words = row[1:]
        end = words.index(EOS) if EOS in words else len(words)
        assert tokens[0] == words[:end]


def test_a_configuration_as_json_and_tied_weights_once():
    theirs = make()
    state = {name: x for name, x in theirs.state_dict().items() if "embed_" not in name and "lm_head" not in name}
    whole, once = from_marian(theirs.config, theirs.state_dict()), from_marian(theirs.config.to_dict(), state)
    for name, x in whole.state_dict().items():
        assert torch.equal(once.state_dict()[name], x), name
    assert not once.training


@torch.no_grad()
def test_tables_that_differ_are_the_ones_that_are_read(tmp_path):
    """Of a checkpoint whose configuration ties what it has with different numbers: theirs is not tied then either."""
    made = make(tie_word_embeddings=False)
    made.config.tie_word_embeddings = True
    made.save_pretrained(tmp_path)
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path).eval()
    tables = [theirs.model.shared, theirs.model.encoder.embed_tokens, theirs.model.decoder.embed_tokens, theirs.lm_head]
    assert not any(torch.equal(x.weight, y.weight) for x, y in itertools.combinations(tables, 2))
    ours = from_marian(theirs.config, theirs.state_dict())
    expected = theirs(input_ids=SOURCE, attention_mask=SOURCE != PAD, decoder_input_ids=start_with(PAD)).logits
    got = ours(SOURCE, start_with(ours.config.bos_idx))
    torch.testing.assert_close(got[..., :PAD], expected[..., :PAD], atol=2e-5, rtol=1e-5)


def test_weights_are_copies():
    theirs = make()
    ours = from_marian(theirs.config, theirs.state_dict())
    before = {name: x.clone() for name, x in theirs.state_dict().items()}
    with torch.no_grad():
        for x in ours.parameters():
            x.zero_()
    assert all(torch.equal(x, before[name]) for name, x in theirs.state_dict().items())


def test_weights_in_half_precision():
    theirs = make()
    halved = from_marian(theirs.config, {name: x.half() for name, x in theirs.state_dict().items()})
    assert {x.dtype for x in halved.parameters()} == {torch.float32}
    whole = from_marian(theirs.config, theirs.state_dict()).state_dict()
    assert all(
        torch.allclose(x, whole[name], atol=1e-2) for name, x in halved.state_dict().items() if "bias" not in name
    )


def test_it_saves_and_loads(tmp_path):
    theirs = make()
    ours = from_marian(theirs.config, theirs.state_dict())
    save_model(tmp_path / "model", ours)
    loaded = load_model(tmp_path / "model")
    limit = torch.tensor([12, 12, 12])
    assert greedy(loaded, SOURCE, max_lengths=limit).tolist() == greedy(ours, SOURCE, max_lengths=limit).tolist()


def test_it_goes_to_ctranslate2(tmp_path):
    """Silu, a bias of the logits, two vocabularies that differ in one token."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    from fused_transformer import export

    theirs = make()
    ours = from_marian(theirs.config, theirs.state_dict())
    export.ctranslate2(ours, tmp_path / "model")
    translator = ctranslate2.Translator(str(tmp_path / "model"), intra_threads=1)
    words = [[str(token) for token in row if token not in (EOS, PAD)] for row in SOURCE.tolist()]
    results = translator.translate_batch(words, beam_size=1, max_decoding_length=20, min_decoding_length=0)
    found = greedy(ours, SOURCE, max_lengths=torch.tensor([20, 20, 20]))
    assert [result.hypotheses for result in results] == [
        [[str(token) for token in tokens] for tokens in beams] for beams in found.tolist()
    ]


def test_positions_beyond_their_table():
    """Theirs ends at max_position_embeddings, ours goes on."""
    theirs = make(max_position_embeddings=6)
    ours = from_marian(theirs.config, theirs.state_dict())
    longer = make(max_position_embeddings=64)
    longer.load_state_dict({k: x for k, x in theirs.state_dict().items() if "embed_positions" not in k}, strict=False)
    source = torch.randint(1, PAD, (1, 40))
    got = ours(source, torch.tensor([[ours.config.bos_idx, 7]]))[..., :PAD]
    expected = longer(input_ids=source, decoder_input_ids=torch.tensor([[PAD, 7]])).logits[..., :PAD]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu_new"}, "activation_function must be one of .*, got 'gelu_new'"),
        ({"decoder_ffn_dim": 40}, "encoder_ffn_dim and decoder_ffn_dim must be equal, got 48 and 40"),
        (
            {"decoder_attention_heads": 2},
            "encoder_attention_heads and decoder_attention_heads must be equal, got 4 and 2",
        ),
        ({"model_type": "bart"}, "model_type must be 'marian', got 'bart'"),
        ({"eos_token_id": [0, 1]}, r"eos_token_id must be one token, got \[0, 1\]"),
        ({"eos_token_id": ["0"]}, "eos_token_id must be a token of the vocabulary, 0 ... 40, got '0'"),
        ({"eos_token_id": 41}, "eos_token_id must be a token of the vocabulary, 0 ... 40, got 41"),
        ({"pad_token_id": 41}, "pad_token_id must be a token of the vocabulary, 0 ... 40, got 41"),
        ({"pad_token_id": -1}, "pad_token_id must be a token of the vocabulary, 0 ... 40, got -1"),
        ({"decoder_start_token_id": 99}, "decoder_start_token_id must be a token of the vocabulary, .*got 99"),
        ({"decoder_start_token_id": "40"}, "decoder_start_token_id must be a token of the vocabulary, .*got '40'"),
        ({"d_model": "32"}, "d_model must be an int, got '32'"),
        ({"d_model": None, "vocab_size": None}, "the configuration has no d_model, vocab_size"),
        ({"vocab_size": 50}, r"model.encoder.embed_tokens.weight must be \(50, 32\), got \(41, 32\)"),
        ({"encoder_layers": 3}, r"the state_dict has no model.encoder.layers.2.self_attn"),
        ({"encoder_layers": 1}, r"has weights that Marian's model has not: model.encoder.layers.1.fc1.bias"),
        ({"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}, "not those of this configuration: .*size mismatch"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    theirs = make()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_marian(theirs.config.to_dict() | change, theirs.state_dict())


def test_other_tables_of_positions_are_refused():
    theirs = make()
    state = theirs.state_dict()
    state["model.decoder.embed_positions.weight"] = sinusoidal_positions(64, 32, layout="concat_t2t")
    with pytest.raises(ValueError, match=r"model\.decoder\.embed_positions\.weight is not Marian's sinusoidal table"):
        from_marian(theirs.config, state)


def test_a_bias_of_another_size_is_told():
    theirs = make()
    state = theirs.state_dict() | {"final_logits_bias": torch.zeros(1, 7)}
    with pytest.raises(ValueError, match="final_logits_bias must have 41 numbers, one a token, got 7"):
        from_marian(theirs.config, state)


def test_a_missing_table_is_told():
    theirs = make()
    state = {
        name: x for name, x in theirs.state_dict().items() if name not in ("model.shared.weight", "lm_head.weight")
    }
    state = {name: x for name, x in state.items() if "embed_tokens" not in name}
    with pytest.raises(ValueError, match=r"the state_dict has no model\.encoder\.embed_tokens\.weight"):
        from_marian(theirs.config, state)
