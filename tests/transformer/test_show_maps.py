"""Attention maps: against torch.nn's own weights in float64, sentence by sentence, and who gives them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_transformer import AttentionMaps, PackedTransformer, SearchOptions, attention_maps, generate
from fused_transformer.kernels import use_backend
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.translation import Translator
from tests.transformer.models import LENGTHS, SOURCE, TARGET, tiny
from tests.transformer.texts import parallel_lines

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET_LENGTHS = (5, 3, 4)


def naive(model, source, target):
    """Weights of one sentence, by torch.nn.MultiheadAttention and what else torch has, in float64."""
    model = copy.deepcopy(model).double().eval()
    first, found = model.config.norm_first, {"encoder_self": [], "encoder_decoder": [], "decoder_self": []}

    def attend(kind, ours, query, key, mask=None):
        theirs = nn.MultiheadAttention(ours.embed_dim, ours.num_heads, batch_first=True).double()
        theirs.load_state_dict(ours.state_dict())
        out, weights = theirs(query, key, key, attn_mask=mask, average_attn_weights=False)
        found[kind].append(weights[0])
        return out

    def sublayer(x, norm, run):
        def normed(x):
            return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

        return x + run(normed(x)) if first else normed(x + run(x))

    x = model.source_embedding(source[None])
    for layer in model.encoder.layers:
        x = sublayer(x, layer.norm1, lambda y, layer=layer: attend("encoder_self", layer.self_attn, y, y))
        x = sublayer(x, layer.norm2, layer.feed_forward)
    final = model.encoder.norm
    memory = x if final is None else F.layer_norm(x, x.shape[-1:], final.weight, final.bias, final.eps)
    x = model._embed_target(target[None, :-1])
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    for layer in model.decoder.layers:
        x = sublayer(x, layer.norm1, lambda y, layer=layer: attend("decoder_self", layer.self_attn, y, y, later))
        x = sublayer(x, layer.norm2, lambda y, layer=layer: attend("encoder_decoder", layer.multihead_attn, y, memory))
        x = sublayer(x, layer.norm3, layer.feed_forward)
    return {kind: torch.stack(layers) for kind, layers in found.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["model", "packed"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"num_decoder_layers": 1}], ids=str)
@torch.no_grad()
def test_maps_are_torchs_weights_whatever_else_is_in_the_batch(options, packed):
    model = tiny(dropout=0.3, **options)  # in training mode, and left there
    maps = attention_maps(PackedTransformer(model) if packed else model, SOURCE, TARGET)
    assert model.training and len(maps) == 3
    for one, source, s, target, t in zip(maps, SOURCE, LENGTHS, TARGET, TARGET_LENGTHS, strict=True):
        expected = naive(model, source[:s], target[:t])
        assert one.source == tuple(map(str, source[:s].tolist()))
        assert one.target == tuple(map(str, target[:t].tolist()))
        assert one.kinds == tuple(expected)
        for kind, weights in expected.items():
            torch.testing.assert_close(one.weights(kind), weights.float(), rtol=1e-4, atol=1e-6)
    assert not any(m._forward_hooks or len(m._forward_pre_hooks) > 1 for m in model.modules()), "hooks are gone"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_maps_come_from_the_op(backend):
    model = tiny().eval()
    with use_backend(backend):
        maps = attention_maps(model, SOURCE, TARGET)
    torch.testing.assert_close(maps[0].encoder_self, attention_maps(model, SOURCE, TARGET)[0].encoder_self)


def test_one_sentence_is_one_maps():
    model = tiny().eval()
    one = attention_maps(model, SOURCE[0], TARGET[0])
    assert isinstance(one, AttentionMaps)
    torch.testing.assert_close(one.decoder_self, attention_maps(model, SOURCE, TARGET)[0].decoder_self)
    named = attention_maps(model, SOURCE[0], TARGET[0], labels=lambda tokens: [f"<{token}>" for token in tokens])
    assert named.source == ("<5>", "<9>", "<3>", "<7>", "<6>", "<2>") and named.rows("decoder_self")[0] == "<11>"
    assert named.columns("decoder_self")[0] == "<1>" and named.columns("encoder_decoder") == named.source


@pytest.mark.parametrize("max_length", [4, 60], ids=["cut", "finished"])
def test_maps_of_hypotheses_are_of_the_best_one(max_length):
    model = tiny().eval()
    with torch.no_grad():
        model.source_embedding.weight[2] *= 1.5  # eos is a likely end
        model.source_embedding.weight[0] *= 2.0  # and padding a likely token, which must not be taken for one
    options = SearchOptions(max_length=max_length, length_penalty=0.0)
    found = generate(model, SOURCE, options=options)
    for row, maps in enumerate(attention_maps(model, SOURCE, found)):
        tokens = [1, *found.tolist()[row][0], *([2] if found.finished[row, 0] else [])]
        assert maps.target == tuple(map(str, tokens))
        alone = attention_maps(
            model, SOURCE[row, : LENGTHS[row]], torch.tensor(tokens), target_lengths=torch.tensor([len(tokens)])
        )
        torch.testing.assert_close(maps.encoder_decoder, alone.encoder_decoder, rtol=1e-4, atol=1e-6)
    if max_length == 60:
        default = attention_maps(model, SOURCE)
        best = generate(model, SOURCE)
        assert [len(maps.target) for maps in default] == (best.lengths[:, 0] + best.finished[:, 0] + 1).tolist()


def test_translate_returns_the_attention_of_each_translation():
    source, target = parallel_lines(60)
    tokenizer = Tokenizer.learn([*source, *target], 320)
    model = tiny(source_vocab_size=len(tokenizer)).eval()
    lines = [source[0], " ", source[1]]
    options = {"beam_size": 3, "top_beams": 2, "max_length": 9}
    for translator in (Translator(model, tokenizer), Translator(PackedTransformer(model), tokenizer)):
        plain = translator.translate(lines, **options)
        found = translator.translate(lines, return_attention=True, **options)
        assert [[one._replace(attention=None) for one in beams] for beams in found] == plain
        assert found[1][0].attention is None and len(found[0]) == 2
        for line, beams in zip(lines, found, strict=True):
            for one in beams if line.strip() else []:
                assert one.attention.source == (*tokenizer.pieces(tokenizer.encode([line])[0]), "</s>")
                assert one.attention.target[0] == "<s>"
                assert one.attention.target[1 : len(one.tokens) + 1] == tuple(tokenizer.pieces(one.tokens))
                assert len(one.attention.target) == len(one.log_probs) + 1
                sums = one.attention.encoder_decoder.sum(-1)
                torch.testing.assert_close(sums, torch.ones_like(sums))


def test_bertviz_gets_its_arguments():
    maps = attention_maps(tiny(), SOURCE[2, :5], TARGET[2, :4])
    arguments = maps.to_bertviz()
    shapes = {
        name: [tuple(x.shape) for x in arguments[f"{name}_attention"]] for name in ("encoder", "cross", "decoder")
    }
    assert shapes == {"encoder": [(1, 3, 5, 5)] * 2, "cross": [(1, 3, 3, 5)] * 2, "decoder": [(1, 3, 3, 3)] * 2}
    assert arguments["encoder_tokens"] == ["30", "3", "3", "12", "2"]
    assert arguments["decoder_tokens"] == ["1", "6", "30"]
    alone = AttentionMaps(source=maps.source, encoder_self=maps.encoder_self).to_bertviz()
    assert alone.keys() == {"attention", "tokens"} and alone["tokens"] == list(maps.source)


def test_what_does_not_fit_is_an_error():
    model = tiny()
    with pytest.raises(ValueError, match=r"encoder_self must be \(layers, heads, 2, 2\) for 2 source and 0 target"):
        AttentionMaps("ab", encoder_self=torch.rand(1, 1, 2, 3))
    with pytest.raises(ValueError, match="need the weights of one kind at least"):
        AttentionMaps("ab")
    with pytest.raises(ValueError, match="attention must be one of 'encoder_self', got 'decoder_self'"):
        AttentionMaps("a", encoder_self=torch.ones(1, 1, 1, 1)).weights("decoder_self")
    with pytest.raises(TypeError, match=r"source must be a torch\.Tensor of token numbers, got list"):
        attention_maps(model, [5, 6])
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, Hypotheses or None, got str"):
        attention_maps(model, SOURCE, "un chat")
    with pytest.raises(ValueError, match=r"both be one sentence, got \(6,\) and \(3, 5\)"):
        attention_maps(model, SOURCE[0], TARGET)
    with pytest.raises(ValueError, match="a target for each of 3 sources, got 2"):
        attention_maps(model, SOURCE, TARGET[:2])
    with pytest.raises(ValueError, match=r"target 0 must begin with bos \(1\), got 11"):
        attention_maps(model, SOURCE[0], TARGET[0, 1:])
    with pytest.raises(ValueError, match="target 1 must have bos and a token at least, got 1 tokens"):
        attention_maps(model, SOURCE[:2], torch.tensor([[1, 5], [1, 0]]))
    with pytest.raises(ValueError, match="source 1 has no tokens"):
        attention_maps(model, torch.tensor([[5, 2], [0, 0]]), TARGET[:2])
