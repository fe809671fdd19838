"""PackedTransformer decodes what the Transformer does that it was packed from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fused_transformer import SearchOptions, attention_maps, beam_search, generate, greedy, inference
from fused_transformer.extra_parts import add_final_norm, add_logits_bias
from fused_transformer.inference import PackedTransformer, why_not
from fused_transformer.kernels import use_backend
from tests.oracle import assert_equal
from tests.transformer.changed_cases import CHANGES, FOLLOWED, changed
from tests.transformer.models import LENGTHS, SOURCE, VARIANTS, VOCAB, tiny

PACKABLE = [name for name in VARIANTS if name != "no_layers"]


def assert_same_hypotheses(got, want) -> None:
    assert_equal([got.tokens, got.lengths, got.finished], [want.tokens, want.lengths, want.finished])
    torch.testing.assert_close(got.scores, want.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", PACKABLE)
def test_encoder_steps_and_logits_are_the_models(variant):
    model = tiny(**VARIANTS[variant]).eval()
    packed = PackedTransformer(model)
    length = 40 if variant == "post_norm" else 4  # 40: beyond the state's first capacity
    target = torch.randint(3, VOCAB, (3, length))
    memory = model.encode(SOURCE)
    real = torch.arange(SOURCE.shape[1]) < LENGTHS[:, None]
    torch.testing.assert_close(packed.encode(SOURCE)[real], memory[real], atol=1e-5, rtol=1e-5)
    state, expected = packed.start(memory, LENGTHS), model.start(memory, LENGTHS)
    for i in range(length):
        hidden, want = packed.step(target[:, i], state), model.step(target[:, i], expected)
        torch.testing.assert_close(hidden, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed.project(hidden), model.project(want), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", PACKABLE)
def test_searches_find_the_same(variant):
    model = tiny(**VARIANTS[variant]).eval()
    packed = PackedTransformer(model)
    assert_same_hypotheses(greedy(packed, SOURCE), greedy(model, SOURCE))
    options = {"beam_size": 3, "top_beams": 2}
    assert_same_hypotheses(beam_search(packed, SOURCE, **options), beam_search(model, SOURCE, **options))


def test_samples_are_the_same():
    model = tiny().eval()
    options = SearchOptions(num_samples=3, seed=5, temperature=0.7)
    assert_same_hypotheses(
        generate(PackedTransformer(model), SOURCE, options=options), generate(model, SOURCE, options=options)
    )


def test_parts_that_other_libraries_have():
    model = tiny(tie_embeddings="separate").eval()
    for stack in ("encoder", "decoder"):
        add_final_norm(model, stack)
        torch.nn.init.normal_(getattr(model, stack).norm.weight)
    add_logits_bias(model)
    torch.nn.init.normal_(model.output_projection.bias)
    model.eval()
    assert_same_hypotheses(greedy(PackedTransformer(model), SOURCE), greedy(model, SOURCE))


def test_a_batch_without_padding_and_one_sentence():
    model = tiny().eval()
    packed = PackedTransformer(model)
    for source in (SOURCE[:1], SOURCE[:1].expand(3, -1).contiguous()):
        torch.testing.assert_close(packed.encode(source), model.encode(source), atol=1e-5, rtol=1e-5)
        assert_same_hypotheses(beam_search(packed, source), beam_search(model, source))


@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 0.1), ("int8", 0.2)])
def test_rounded_weights_stay_near(weights, tolerance):
    model = tiny().eval()
    packed = PackedTransformer(model, weights=weights)
    memory = model.encode(SOURCE)
    tokens = torch.tensor([4, 5, 6])
    state, expected = packed.start(memory, LENGTHS), model.start(memory, LENGTHS)
    got, want = packed.step(tokens, state), model.step(tokens, expected)
    difference = (got - want).abs().max()
    assert 0 < difference < tolerance  # 0: the weights would not have been rounded
    assert packed.nbytes < PackedTransformer(model).nbytes


def test_it_is_a_copy_that_only_decodes():
    model = tiny().eval()
    packed = PackedTransformer(model)
    before = greedy(packed, SOURCE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    assert_same_hypotheses(greedy(packed, SOURCE), before)
    assert not packed.training and packed.eval() is packed and packed.train(False) is packed
    with pytest.raises(ValueError, match="read-only"):
        packed.train()
    assert all(parameter.dtype == torch.float32 for parameter in packed.parameters())


def test_other_dtypes_are_packed_from_float32():
    model = tiny().eval()
    half = PackedTransformer(tiny().eval().to(torch.float64))
    assert half.encode(SOURCE).dtype == torch.float32
    assert PackedTransformer(model.bfloat16(), weights="bfloat16").project(torch.zeros(1, 24)).dtype == torch.float32


def test_what_cannot_be_packed_is_named():
    with pytest.raises(TypeError, match="model must be a Transformer, got Linear"):
        PackedTransformer(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weights must be one of 'float32', 'bfloat16', 'int8', got 'int4'"):
        PackedTransformer(tiny(), weights="int4")
    with pytest.raises(ValueError, match="without decoder layers"):
        PackedTransformer(tiny(num_decoder_layers=0))
    with pytest.raises(ValueError, match="the model is on meta"):
        PackedTransformer(tiny().to("meta"))
    assert why_not(tiny()) is None


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_configuration_does_not_describe_is_not_packed(name):
    options, change, message = CHANGES[name]
    model = changed(tiny(**options), change)
    with pytest.raises(ValueError, match=f"packed as its configuration says, and this one has {message}"):
        PackedTransformer(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_the_weights_tell_is_packed(name):
    model = changed(tiny(), FOLLOWED[name])
    packed = PackedTransformer(model)
    real = torch.arange(SOURCE.shape[1]) < LENGTHS[:, None]
    torch.testing.assert_close(packed.encode(SOURCE)[real], model.encode(SOURCE)[real], atol=1e-5, rtol=1e-5)
    assert_same_hypotheses(beam_search(packed, SOURCE), beam_search(model, SOURCE))


def test_heads_too_wide_for_the_kernels_are_named():
    wide = {"num_heads": 1, "num_encoder_layers": 0, "num_decoder_layers": 1}
    greedy(PackedTransformer(tiny(d_model=256, **wide)), SOURCE, max_lengths=torch.tensor([2, 2, 2]))
    model = tiny(d_model=257, **wide)
    reason = r"heads can be up to 256 wide to be packed, and the model's are 257 \(d_model / num_heads\)"
    with pytest.raises(ValueError, match=reason):
        PackedTransformer(model)
    assert why_not(model) is not None


@pytest.mark.parametrize("backend", ["own", "reference"])
@pytest.mark.parametrize("options", [{"beam_size": 1}, {"beam_size": 3}, {"num_samples": 2, "seed": 3}], ids=str)
def test_autocast_changes_nothing(monkeypatch, options, backend):
    monkeypatch.setattr(inference, "LEAST_SCREENED", 1)  # what guesses ahead runs too
    packed = PackedTransformer(tiny().eval())
    options = SearchOptions(**options)

    def found():
        if backend == "own":
            return generate(packed, SOURCE, options=options)
        with use_backend(backend):
            return generate(packed, SOURCE, options=options)

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        got = found()
    assert_equal([got.tokens, got.scores, got.log_probs], [expected.tokens, expected.scores, expected.log_probs])


def test_autocast_changes_no_attention_map():
    packed = PackedTransformer(tiny().eval())
    expected = attention_maps(packed, SOURCE)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_maps(packed, SOURCE)
    for one, other in zip(got, expected, strict=True):
        for kind in other.kinds:
            assert_equal([one.weights(kind)], [other.weights(kind)])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_shares_the_weights(copied):
    packed = PackedTransformer(tiny().eval())
    other = copied({"model": packed})["model"] if copied is copy.deepcopy else copied(packed)
    assert type(other) is PackedTransformer and other is not packed and other._decoder is packed._decoder
    assert_same_hypotheses(beam_search(other, SOURCE), beam_search(packed, SOURCE))
    other.look_ahead = False
    assert packed.look_ahead


def test_it_is_not_pickled():
    with pytest.raises(TypeError, match="can't be pickled: save the Transformer, and pack it again"):
        pickle.dumps(PackedTransformer(tiny()))
