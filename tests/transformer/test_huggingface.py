"""attn_implementation="fused_transformer" in Hugging Face's models: eager's numbers, and the fused op really ran.

Tiny models with random weights, made from their configurations: nothing is downloaded.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import pytest
import torch
from torch import Tensor, nn

from fused_transformer.integrations import huggingface
from fused_transformer.kernels import observe
from tests.inputs import normal
from tests.oracle import assert_equal, assert_matches

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers' own: torch.jit.script where it is imported, and deprecations among its modules
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

V, E, LAYERS, HEADS = 53, 32, 2, 4
B, L, TARGET = 3, 9, 6
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = SPECIAL | {
    "vocab_size": V,
    "d_model": E,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
LLAMA = SPECIAL | {
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}


def bert():
    sizes = {"hidden_size": E, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=V, **sizes, **off))


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ))


def marian():
    return transformers.MarianMTModel(transformers.MarianConfig(**SEQ2SEQ))


def t5():
    sizes = {"d_model": E, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": HEADS, "dropout_rate": 0.0}
    config = transformers.T5Config(vocab_size=V, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def gpt2():
    sizes = {"n_positions": 40, "n_embd": E, "n_layer": LAYERS, "n_head": HEADS}
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, **sizes, **off, **SPECIAL))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def mistral():  # a window of the last 4 keys
    return transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=4))


def gpt_oss():  # attention sinks
    config = transformers.GptOssConfig(
        **LLAMA, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4
    )
    return transformers.GptOssForCausalLM(config)


ENCODER_DECODERS = (bart, marian, t5)
DECODERS = (gpt2, llama, mistral)
MODELS = (bert, *ENCODER_DECODERS, *DECODERS)
PADDINGS = ("none", "right", "left")


def built(make: Callable[[], nn.Module], attention: str) -> nn.Module:
    """The model with weights large enough that what it attends to matters."""
    torch.manual_seed(20170612)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "shared" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "sinks" in name:
                parameter.normal_()
    huggingface.register()
    model.set_attn_implementation(attention)
    return model


def tokens_and_mask(padded: str) -> tuple[Tensor, Tensor]:
    tokens, mask = torch.randint(3, V, (B, L)), torch.ones(B, L, dtype=torch.int64)
    for row, missing in enumerate((0, 3, 6)):
        if padded == "right":
            mask[row, L - missing :] = 0
        elif padded == "left":
            mask[row, :missing] = 0
    return tokens * mask, mask


def inputs_of(make: Callable, padded: str) -> tuple[dict[str, Tensor], Tensor]:
    """A call's arguments, and which positions of its output are real."""
    tokens, mask = tokens_and_mask(padded)
    arguments = {"input_ids": tokens, "attention_mask": mask}
    if make in ENCODER_DECODERS:
        arguments["decoder_input_ids"] = torch.randint(3, V, (B, TARGET))
        return arguments, torch.ones(B, TARGET, dtype=torch.bool)
    return arguments, mask.bool()


@contextmanager
def counted():
    """The names of the ops called in the block."""
    calls: list[str] = []
    with observe(lambda op, backend, arguments: calls.append(op.name)):
        yield calls


def attentions_of(make: Callable) -> int:
    return LAYERS * (3 if make in ENCODER_DECODERS else 1)


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("make", MODELS)
def test_logits_and_gradients_are_eagers(make, padded):
    arguments, real = inputs_of(make, padded)
    upstream = normal(*real.shape, V) * real[..., None]

    def run(attention, dtype):
        model = built(make, attention).to(dtype)
        logits = model(**arguments).logits
        logits.backward(upstream.to(dtype))
        # padded queries attend to whatever each implementation makes of a row without keys; they are nobody's result
        results = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        return results | {"logits": logits.detach()[real]}

    with counted() as calls:
        got = run("fused_transformer", torch.float32)
    assert calls.count("attention") == attentions_of(make)
    with counted() as calls:
        # In float64 transformers' eager attention is no judge: its softmax is float32 still, and NaN for a row without
        # keys, which then spreads.
        exact, naive = run("sdpa", torch.float64), run("eager", torch.float32)
    assert calls == []
    # Softmax does not see what is added to all keys: the gradient of such a bias is what rounding leaves of 0, in each
    # implementation by chance more or less.
    for name in [name for name, x in exact.items() if x.abs().max() < 1e-12]:
        del exact[name], naive[name]
        assert got.pop(name).abs().max() < 2e-6
    assert_matches(got, exact, naive, factor=4, ulps=16)


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("make", [*MODELS, gpt_oss])
def test_attentions_are_eagers_and_come_from_the_fused_path(make, padded):
    arguments, real = inputs_of(make, padded)

    def run(attention):
        with torch.no_grad():
            out = built(make, attention)(**arguments, output_attentions=True)
        names = [name for name in out if "attentions" in name and out[name]]
        return {f"{name} {layer}": x for name in names for layer, x in enumerate(out[name])}, out.logits[real]

    with counted() as calls:
        got, logits = run("fused_transformer")
    assert calls.count("attention") == 2 * attentions_of(make)  # the output, and its weights
    expected, expected_logits = run("eager")
    assert got.keys() == expected.keys() and len(got) == attentions_of(make)
    torch.testing.assert_close(logits, expected_logits, atol=2e-5, rtol=1e-5)
    for name, weights in got.items():
        asked = arguments["attention_mask"].bool() if weights.shape[2] == L else real
        rows, expected_rows = (x.transpose(1, 2)[asked] for x in (weights, expected[name]))  # of real queries
        torch.testing.assert_close(rows, expected_rows, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("make", [*ENCODER_DECODERS, *DECODERS, gpt_oss])
def test_generation_with_a_cache_gives_the_same_tokens(make, options):
    tokens, mask = tokens_and_mask("right" if make in ENCODER_DECODERS else "left")
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True} | options

    def run(attention):
        return built(make, attention).generate(tokens, attention_mask=mask, **options)

    with counted() as calls:
        got = run("fused_transformer")
    assert calls.count("attention") >= 5 * LAYERS
    assert_equal(got, run("eager"))


def test_generation_with_a_static_cache_and_without_padding():
    tokens = torch.randint(3, V, (2, 5))  # then the mask of the first step is None, and its keys more than its queries
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    got = built(llama, "fused_transformer").generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    expected = built(llama, "eager").generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert_equal(got, expected)


def test_generation_returns_attentions():
    tokens, mask = tokens_and_mask("left")
    options = {"max_new_tokens": 3, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    for make in (gpt2, llama):
        got, expected = (
            built(make, attention).generate(tokens, attention_mask=mask, **options).attentions
            for attention in ("fused_transformer", "eager")
        )
        assert [[x.shape for x in step] for step in got] == [[x.shape for x in step] for step in expected]
        for step, other in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(step, other)


def test_packed_sequences_told_by_positions_do_not_see_each_other():
    model, tokens = built(llama, "fused_transformer"), torch.randint(3, V, (1, 9))
    with torch.no_grad():
        together = model(tokens, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False).logits
        apart = [model(part).logits for part in tokens.split([4, 5], dim=1)]
    torch.testing.assert_close(together, torch.cat(apart, dim=1))


@pytest.mark.parametrize("make", [llama, mistral])
def test_packed_sequences_told_by_their_lengths_alone(make, monkeypatch):
    model, tokens, offsets = built(make, "fused_transformer"), torch.randint(3, V, (1, 15)), torch.tensor([0, 6, 15])
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    with torch.no_grad():
        expected = model(tokens, position_ids=positions, use_cache=False).logits
        # as in transformers' continuous batching, which makes masks for its own attentions alone
        monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "fused_transformer", lambda **_: None)
        lengths = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
        got = model(tokens, position_ids=positions, use_cache=False, **lengths).logits
    torch.testing.assert_close(got, expected)


def test_dropout_in_training_is_reproducible_and_the_weights_are_the_dropped_ones():
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=E, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=48
    )
    config.attention_probs_dropout_prob, config.hidden_dropout_prob = 0.5, 0.0
    model = built(lambda: transformers.BertModel(config), "fused_transformer").train()
    tokens = torch.randint(3, V, (16, 20))

    def run(seed):
        torch.manual_seed(seed)
        out = model(tokens, output_attentions=True)
        return out.last_hidden_state, out.attentions[0]

    assert_equal(run(1), run(1))
    assert not torch.equal(run(1)[0], run(2)[0])
    weights = run(1)[1]
    assert abs((weights == 0).double().mean() - 0.5) < 0.02  # 25,600 draws: 6 standard deviations
    undropped = run_eval_weights(model, tokens)
    torch.testing.assert_close(weights[weights != 0], 2 * undropped[weights != 0])


def run_eval_weights(model: nn.Module, tokens: Tensor) -> Tensor:
    weights = model.eval()(tokens, output_attentions=True).attentions[0]
    model.train()
    return weights


# ------------------------------------------------------------------ the function itself


class Caller(nn.Module):
    def __init__(self, is_causal: bool = True):
        super().__init__()
        self.is_causal = is_causal


def heads(length: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, 4, length, 8), normal(2, 2, keys, 8), normal(2, 2, keys, 8)


def test_is_causal_counts_as_in_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = heads()
    module = Caller()
    module.num_key_value_groups = 2
    mask = torch.rand(2, 1, 5, 7) < 0.7
    mask[..., 0] = True
    for caller, attention_mask, is_causal in [
        (True, None, None),
        (False, None, None),
        (True, None, False),
        (False, None, True),
        (True, mask, None),
        (True, mask, True),
    ]:
        module.is_causal = caller
        expected, _ = sdpa_attention_forward(module, q, k, v, attention_mask, is_causal=is_causal)
        got, weights = huggingface.attention_forward(module, q, k, v, attention_mask, is_causal=is_causal)
        assert weights is None and got.is_contiguous()
        torch.testing.assert_close(got, expected)
    one = q[:, :, :1]
    expected, _ = sdpa_attention_forward(module, one, k, v, None, is_causal=True)
    torch.testing.assert_close(huggingface.attention_forward(module, one, k, v, None, is_causal=True)[0], expected)


def test_a_row_without_keys_is_zero():
    q, k, v = heads()
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[1, :, 2] = False
    out, weights = huggingface.attention_forward(Caller(), q, k, v, mask, output_attentions=True)
    assert_equal(out[1, 2], torch.zeros(4, 8))
    assert_equal(weights[1, :, 2], torch.zeros(4, 7))


def test_float_masks_and_position_biases_add_up_and_have_gradients():
    q, k, v = heads()
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    mask, bias = normal(2, 1, 5, 7), normal(1, 4, 5, 7).requires_grad_()
    got, _ = huggingface.attention_forward(Caller(), q, k, v, mask, position_bias=bias)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask + bias).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    upstream = normal(*got.shape)
    gradients = [torch.autograd.grad(out, bias, upstream)[0] for out in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_values_narrower_than_keys():
    q, k, v = heads()
    got, _ = huggingface.attention_forward(Caller(), q, k, v[..., :5], None)
    assert_equal(got, huggingface.attention_forward(Caller(), q, k, v, None)[0][..., :5])


def test_queries_shared_by_the_batch():
    q, k, v = heads()
    got, _ = huggingface.attention_forward(Caller(False), q[:1], k, v, None)
    expected, _ = huggingface.attention_forward(Caller(False), q[:1].repeat(2, 1, 1, 1), k, v, None)
    assert_equal(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({name: torch.zeros(1)}, what.split(",")[0]) for name, what in huggingface.UNSUPPORTED.items()]
    + [({"s_aux": torch.zeros(4, requires_grad=True)}, "attention sinks")]
    + [({"cu_seq_lens_q": torch.tensor([0, 5]), "output_attentions": True}, "weights, sinks")],
)
def test_what_is_not_supported_is_a_sentence(options, message):
    with pytest.raises(NotImplementedError, match=f'does not support {message}.* to "eager"'):
        huggingface.attention_forward(Caller(), *heads(), None, **options)


@pytest.mark.parametrize("mask", [torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 1, 5, 7, dtype=torch.int64)])
def test_masks_of_another_form_are_an_error(mask):
    with pytest.raises(ValueError, match="takes masks that are bool"):
        huggingface.attention_forward(Caller(), *heads(), mask)


def test_no_graph_break():
    torch._dynamo.reset()
    model, tokens = built(gpt2, "fused_transformer"), torch.randint(3, V, (2, 6))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)
