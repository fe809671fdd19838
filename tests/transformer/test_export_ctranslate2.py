"""CTranslate2 computes what the exported model computes: log-probabilities to 1e-4, the same greedy tokens."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from fused_transformer import beam_search, export, greedy
from fused_transformer.extra_parts import add_final_norm, add_logits_bias
from fused_transformer.tokenizer import Tokenizer
from tests.transformer.changed_cases import CHANGES, FOLLOWED, changed
from tests.transformer.models import VARIANTS, tiny
from tests.transformer.texts import parallel_lines

ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

EOS, BOS = 2, 1
SOURCES = [[5, 9, 3, 7, 6], [4, 8], [30, 3, 3, 12], [17]]
TARGETS = [[11, 12, 13, 4], [14, 5], [6, 30, 8], [9, 9, 9, 9, 9, 9]]
SIZES = {  # d_model, num_heads, d_feedforward
    "odd": (15, 3, 13),
    "one_head": (15, 1, 8),
    "heads_of_one": (7, 7, 5),
    "one": (1, 1, 1),
    "wide_heads": (64, 2, 96),
}


def texts(rows: list[list[int]]) -> list[list[str]]:
    return [[str(token) for token in row] for row in rows]


def load(folder, **options):
    return ctranslate2.Translator(str(folder), device="cpu", intra_threads=1, **options)


@torch.no_grad()
def log_probabilities(model, source: list[int], target: list[int]) -> Tensor:
    """(L + 1,) of the target's tokens and of eos, from the model in float64."""
    logits = model(torch.tensor([[*source, EOS]]), torch.tensor([[BOS, *target]]))[0]
    return logits.log_softmax(-1).gather(1, torch.tensor([*target, EOS])[:, None])[:, 0]


def assert_scores_equal(model, folder, sources=SOURCES, targets=TARGETS):
    scores = load(folder).score_batch(texts(sources), texts(targets))
    exact = model.double().eval()
    for source, target, score in zip(sources, targets, scores, strict=True):
        expected = log_probabilities(exact, source, target)
        torch.testing.assert_close(torch.tensor(score.log_probs).double(), expected, atol=1e-4, rtol=0)


def without_padding(model):
    """The same model with a projection of its own that makes padding too unlikely to be generated."""
    with torch.no_grad():
        add_logits_bias(model)
        model.output_projection.bias[0] = -1e4
    return model


def random_parts(model):
    """With the parts of other libraries' models, and random weights in them."""
    for stack in ("encoder", "decoder"):
        add_final_norm(model, stack)
        nn.init.normal_(getattr(model, stack).norm.weight, 1.0, 0.3)
        nn.init.normal_(getattr(model, stack).norm.bias, 0.0, 0.3)
    if model.output_projection is not None:
        add_logits_bias(model)
        nn.init.normal_(model.output_projection.bias)
    return model


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "no_layers"])
def test_scores_are_equal(tmp_path, variant):
    model = tiny(**VARIANTS[variant])
    assert export.ctranslate2(model, tmp_path / "model", longest=16) == tmp_path / "model"
    assert_scores_equal(model, tmp_path / "model")


@pytest.mark.parametrize("positions", ["interleaved", "concat_t2t", "concat_paper", None])
@pytest.mark.parametrize("size", SIZES)
def test_scores_are_equal_at_other_sizes_and_positions(tmp_path, size, positions):
    d_model, num_heads, d_feedforward = SIZES[size]
    model = tiny(d_model=d_model, num_heads=num_heads, d_feedforward=d_feedforward, positions=positions)
    export.ctranslate2(model, tmp_path / "model", longest=16)
    assert_scores_equal(model, tmp_path / "model")


def test_scores_of_long_sentences(tmp_path):
    """Where tables of positions differ the most."""
    model = tiny(positions="concat_t2t")
    source, target = torch.randint(3, 31, (2, 199)).tolist()
    export.ctranslate2(model, tmp_path / "model", longest=200)
    assert_scores_equal(model, tmp_path / "model", [source], [target])
    with pytest.raises(RuntimeError, match="position"):
        load(tmp_path / "model").score_batch(texts([[*source, 3]]), texts([[4]]))


@pytest.mark.parametrize("tie", ["shared", "separate"])
def test_parts_beyond_the_configuration(tmp_path, tie):
    model = random_parts(tiny(tie_embeddings=tie))
    export.ctranslate2(model, tmp_path / "model", longest=16)
    assert_scores_equal(model, tmp_path / "model")


def test_another_eps(tmp_path):
    model = tiny(layer_norm_eps=0.3)
    export.ctranslate2(model, tmp_path / "model", longest=16)
    assert_scores_equal(model, tmp_path / "model")


@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True, "activation": "gelu", "positions": "concat_t2t"}, {"activation": "silu"}]
)
def test_translations_are_equal(tmp_path, options):
    model = without_padding(tiny(tie_embeddings="separate", **options))
    export.ctranslate2(model, tmp_path / "model")
    sources = [torch.randint(3, 31, (length,)).tolist() for length in (1, 2, 3, 5, 8, 13, 21, 34)]
    translator = load(tmp_path / "model")
    theirs = translator.translate_batch(
        texts(sources), beam_size=1, max_decoding_length=20, min_decoding_length=0, return_scores=True
    )
    for source, result in zip(sources, theirs, strict=True):
        ours = greedy(model, torch.tensor([[*source, EOS]]), max_lengths=torch.tensor([20]))
        assert texts(ours.tolist()[0]) == result.hypotheses
        assert abs(ours.scores.item() - _total(result, bool(ours.finished))) < 1e-3


def _total(result, finished: bool) -> float:
    # CTranslate2 divides by the length, eos counted where there is one
    return result.scores[0] * (len(result.hypotheses[0]) + finished)


def test_beam_search_finds_the_same_where_nothing_ends_early(tmp_path):
    """With eos out of reach both follow the likeliest beams to the end; how they stop otherwise differs."""
    model = without_padding(tiny(tie_embeddings="separate"))
    with torch.no_grad():
        model.output_projection.bias[EOS] = -1e4
    export.ctranslate2(model, tmp_path / "model")
    theirs = load(tmp_path / "model").translate_batch(
        texts(SOURCES), beam_size=4, max_decoding_length=12, length_penalty=0
    )
    for source, result in zip(SOURCES, theirs, strict=True):
        ours = beam_search(model, torch.tensor([[*source, EOS]]), max_lengths=torch.tensor([12]), length_penalty=0.0)
        assert texts(ours.tolist()[0]) == result.hypotheses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes(tmp_path, dtype):
    model = tiny().to(dtype)
    export.ctranslate2(model, tmp_path / "model", longest=16)
    assert_scores_equal(model, tmp_path / "model")


@pytest.mark.parametrize("quantization", ["float16", "bfloat16", "int16", "int8", "int8_float32"])
def test_quantised_weights(tmp_path, quantization):
    model = tiny(d_model=32, num_heads=4)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    whole = export.ctranslate2(model, tmp_path / "whole", longest=16)
    small = export.ctranslate2(model, tmp_path / "small", longest=16, quantization=quantization)
    assert (small / "model.bin").stat().st_size < (whole / "model.bin").stat().st_size
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items()), "export changed the model"
    expected = log_probabilities(model.eval(), SOURCES[0], TARGETS[0])
    # What is in the file. Multiplied in 8 bits it can be far off: on processors without VNNI CTranslate2's is.
    (score,) = load(small, compute_type="float32").score_batch(texts(SOURCES[:1]), texts(TARGETS[:1]))
    torch.testing.assert_close(torch.tensor(score.log_probs), expected, atol=0.3, rtol=0)
    (score,) = load(small).score_batch(texts(SOURCES[:1]), texts(TARGETS[:1]))
    assert torch.tensor(score.log_probs).isfinite().all()


# ------------------------------------------------------------------------------------------------ vocabularies


def test_a_tokenizer_is_the_vocabulary(tmp_path):
    tokenizer = Tokenizer.learn(parallel_lines(30)[0], 290)
    model = tiny(source_vocab_size=len(tokenizer))
    folder = export.ctranslate2(model, tmp_path / "model", tokenizer=tokenizer)
    vocabulary = json.loads((folder / "shared_vocabulary.json").read_text())
    assert vocabulary[:4] == ["<pad>", "<s>", "</s>", "<unk>"] and len(vocabulary) == len(tokenizer)
    settings = json.loads((folder / "config.json").read_text())
    names = ("unk_token", "bos_token", "eos_token", "decoder_start_token")
    assert [settings[name] for name in names] == ["<unk>", "<s>", "</s>", "<s>"]

    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    line = "un petit chien voit"
    (score,) = load(folder).score_batch([processor.encode(line, out_type=str)], [[vocabulary[7], vocabulary[9]]])
    expected = log_probabilities(model.eval(), tokenizer.encode([line])[0], [7, 9])
    torch.testing.assert_close(torch.tensor(score.log_probs), expected, atol=1e-4, rtol=0)


def test_vocabularies_of_two_languages(tmp_path):
    model = tiny(tie_embeddings="separate", target_vocab_size=29)
    source = ["<blank>", "<s>", "</s>", "?", *(f"s{i}" for i in range(27))]
    target = ["<blank>", "<s>", "</s>", "?", *(f"t{i}" for i in range(25))]
    folder = export.ctranslate2(
        model, tmp_path / "model", source_vocabulary=source, target_vocabulary=target, unknown_idx=3
    )
    assert json.loads((folder / "source_vocabulary.json").read_text()) == source
    assert json.loads((folder / "target_vocabulary.json").read_text()) == target
    (score,) = load(folder).score_batch([["s0", "nowhere"]], [["t4", "t5"]])
    expected = log_probabilities(model.eval(), [4, 3], [8, 9])
    torch.testing.assert_close(torch.tensor(score.log_probs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_vocabulary": ["a", "b"]}, "the source vocabulary has 2 tokens, the model 31"),
        ({"source_vocabulary": ["a"] * 31}, "the source vocabulary has 'a' more than once"),
        ({"target_vocabulary": ["a"] * 31}, "target_vocabulary needs source_vocabulary"),
        ({"unknown_idx": 31}, "unknown_idx must be a token of both vocabularies, got 31"),
        ({"quantization": "int4"}, "quantization must be one of .*, got 'int4'"),
        ({"longest": 0}, "longest must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export.ctranslate2(tiny(), tmp_path / "model", **options)
    assert list(tmp_path.iterdir()) == []


def test_special_tokens_have_one_name(tmp_path):
    source, target = [str(i) for i in range(31)], [f"t{i}" for i in range(31)]
    with pytest.raises(ValueError, match="one name for eos, got '2' in the source vocabulary and 't2'"):
        export.ctranslate2(
            tiny(tie_embeddings="separate"), tmp_path / "model", source_vocabulary=source, target_vocabulary=target
        )


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (VARIANTS["no_layers"], None, r"a stack without layers \(num_encoder_layers=0\)"),
        ({"num_decoder_layers": 0}, None, r"a stack without layers \(num_decoder_layers=0\)"),
        *CHANGES.values(),
        (
            {"tie_embeddings": "separate"},
            lambda model: setattr(model.target_embedding, "positions", None),
            r"embeddings that differ in positions \('interleaved' and None\)",
        ),
        ({}, lambda model: add_final_norm(model, "encoder"), "a final norm in one stack and none in the other"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, options, change, message):
    model = tiny(**options)
    if change is not None:
        changed(model, change)
    with pytest.raises(ValueError, match=f"CTranslate2 can't express {message}"):
        export.ctranslate2(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_the_weights_tell_is_exported(tmp_path, name):
    model = changed(tiny(), FOLLOWED[name])
    export.ctranslate2(model, tmp_path / "model", longest=16)
    assert_scores_equal(model, tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantization", ["float32", "int8", "int8_float16"])
def test_weights_that_are_not_finite_are_refused(tmp_path, quantization, value):
    model = tiny()
    with torch.no_grad():
        model.decoder.layers[1].feed_forward.linear1.weight[3, 4] = value
    with pytest.raises(
        ValueError, match=r"decoder\.layers\.1\.feed_forward\.linear1\.weight, of which not all is finite"
    ):
        export.ctranslate2(model, tmp_path / "model", quantization=quantization)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["encoder.layers.0.linear1.weight", "decoder.layers.1.norm3.bias"])
@pytest.mark.parametrize("quantization", ["float16", "int8_float16"])
def test_weights_beyond_float16_are_refused(tmp_path, quantization, name):
    model = tiny()
    name = name.replace("linear1", "feed_forward.linear1")
    with torch.no_grad():
        model.get_parameter(name).flatten()[5] = -65519.0  # which is rounded to the largest
        export.ctranslate2(model, tmp_path / "model", quantization=quantization, longest=4)
        model.get_parameter(name).flatten()[5] = -65520.0
    message = f"{name} with quantization '{quantization}': 6.552e\\+04 is beyond float16's largest number, 65504"
    with pytest.raises(ValueError, match=message):
        export.ctranslate2(model, tmp_path / "other", quantization=quantization, longest=4)
    export.ctranslate2(model, tmp_path / "other", quantization="bfloat16", longest=4)


def test_numbers_beyond_float32_are_refused(tmp_path):
    model = tiny().double()
    with torch.no_grad():
        model.source_embedding.weight[4, 4] = 1e300
    with pytest.raises(
        ValueError, match=r"source_embedding\.weight with quantization 'int8': 1e\+300 is beyond float32"
    ):
        export.ctranslate2(model, tmp_path / "model", quantization="int8")


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a fused_transformer\.Transformer, got Transformer"):
        export.ctranslate2(nn.Transformer(8, 2, 1, 1, 8, batch_first=True), tmp_path / "model")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    export.ctranslate2(tiny(), tmp_path / "model", longest=4)
    before = (tmp_path / "model" / "model.bin").read_bytes()
    with pytest.raises(FileExistsError, match=r"there is something at .*model already"):
        export.ctranslate2(tiny(), tmp_path / "model", longest=4)
    assert (tmp_path / "model" / "model.bin").read_bytes() == before


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left on device"):
        export.ctranslate2(tiny(), tmp_path / "model", longest=4)
    assert list(tmp_path.iterdir()) == []
