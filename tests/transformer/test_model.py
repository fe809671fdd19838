"""The Transformer against the paper's formulas written out in float64, and what must hold whatever the weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fused_transformer import Transformer, TransformerConfig
from fused_transformer.packing import Packing, packing_if_worth_it
from tests.oracle import assert_equal
from tests.transformer.models import LENGTHS, PAD, SOURCE, TARGET, TINY, VARIANTS, VOCAB, tiny

# ------------------------------------------------------------------ the paper, in plain float64


def paper_positions(length: int, config: TransformerConfig) -> Tensor:
    if config.positions is None:
        return torch.zeros(length, config.d_model, dtype=torch.float64)
    half = config.d_model // 2
    p, k = torch.arange(length, dtype=torch.float64)[:, None], torch.arange(half, dtype=torch.float64)
    rate = 10000.0 ** -(k / (half - 1) if config.positions == "concat_t2t" else 2 * k / config.d_model)
    sin, cos = torch.sin(p * rate), torch.cos(p * rate)
    if config.positions == "interleaved":
        return torch.stack([sin, cos], dim=-1).reshape(length, config.d_model)
    return torch.cat([sin, cos], dim=1)


def paper_attention(w: dict, name: str, x: Tensor, keys: Tensor, heads: int, causal: bool) -> Tensor:
    """One sequence: x (L, E), keys (S, E)."""
    wq, wk, wv = w[f"{name}.in_proj_weight"].chunk(3)
    bq, bk, bv = w[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = x @ wq.T + bq, keys @ wk.T + bk, keys @ wv.T + bv
    width = q.shape[1] // heads
    outputs = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        if causal:
            future = torch.ones_like(scores).triu(1).bool()
            scores = scores.masked_fill(future, -torch.inf)
        outputs.append(scores.softmax(-1) @ v[:, part])
    return torch.cat(outputs, dim=1) @ w[f"{name}.out_proj.weight"].T + w[f"{name}.out_proj.bias"]


def paper_norm(w: dict, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def paper_feed_forward(w: dict, name: str, x: Tensor, activation: str) -> Tensor:
    hidden = x @ w[f"{name}.linear1.weight"].T + w[f"{name}.linear1.bias"]
    half_erf = 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    hidden = hidden.clamp(min=0) if activation == "relu" else hidden * half_erf
    return hidden @ w[f"{name}.linear2.weight"].T + w[f"{name}.linear2.bias"]


def paper_stack(w: dict, name: str, x: Tensor, config: TransformerConfig, memory: Tensor | None) -> Tensor:
    def block(x: Tensor, norm: str, sublayer) -> Tensor:
        if config.norm_first:
            return x + sublayer(paper_norm(w, norm, x))
        return paper_norm(w, norm, x + sublayer(x))

    def attend(layer: str):
        return lambda y: paper_attention(w, f"{layer}.self_attn", y, y, config.num_heads, memory is not None)

    def attend_to_memory(layer: str):
        return lambda y: paper_attention(w, f"{layer}.multihead_attn", y, memory, config.num_heads, False)

    def feed_forward(layer: str):
        return lambda y: paper_feed_forward(w, f"{layer}.feed_forward", y, config.activation)

    depth = config.num_encoder_layers if memory is None else config.num_decoder_layers
    for index in range(depth):
        layer = f"{name}.layers.{index}"
        sublayers = [attend, feed_forward] if memory is None else [attend, attend_to_memory, feed_forward]
        for number, sublayer in enumerate(sublayers, start=1):
            x = block(x, f"{layer}.norm{number}", sublayer(layer))
    return paper_norm(w, f"{name}.norm", x) if config.norm_first else x


def paper_logits(w: dict, source: Tensor, target: Tensor, config: TransformerConfig) -> Tensor:
    """One sentence pair without padding: source (S,), target (L,) to (L, V)."""
    source_table = w["source_embedding.weight"]
    target_table = w.get("target_embedding.weight", source_table)
    scale = math.sqrt(config.d_model)
    x = source_table[source] * scale + paper_positions(len(source), config)
    memory = paper_stack(w, "encoder", x, config, None)
    y = target_table[target] * scale + paper_positions(len(target), config)
    hidden = paper_stack(w, "decoder", y, config, memory)
    return hidden @ w.get("output_projection.weight", target_table).T


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_the_papers_formula(variant):
    model = tiny(**VARIANTS[variant])
    exact_weights = {name: x.detach().double().requires_grad_() for name, x in model.state_dict().items()}
    logits = model(SOURCE, TARGET)
    real = TARGET != PAD
    upstream = torch.randn(logits.shape) * real[..., None]
    logits.backward(upstream)
    for row in range(len(SOURCE)):
        source, target = SOURCE[row][SOURCE[row] != PAD], TARGET[row][real[row]]
        expected = paper_logits(exact_weights, source, target, model.config)
        torch.testing.assert_close(logits[row, : len(target)].double(), expected, atol=2e-5, rtol=2e-5)
        expected.backward(upstream[row, : len(target)].double())
    for name, parameter in model.named_parameters():
        expected = exact_weights[name].grad
        error = (parameter.grad.double() - expected).abs().max()
        assert error <= 2e-5 * max(1.0, expected.abs().max()), f"{name}: {error}"


def test_every_weight_gets_a_gradient():
    model = Transformer(TransformerConfig(**TINY, tie_embeddings="separate", norm_first=True))
    model(SOURCE, TARGET).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# ------------------------------------------------------------------ what must hold


@pytest.mark.parametrize("variant", ["post_norm", "pre_norm"])
def test_padding_changes_nothing(variant):
    model = tiny(**VARIANTS[variant])
    memory = model.encode(SOURCE)
    logits = model(SOURCE, TARGET)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model.encode(SOURCE[row : row + 1, :length])
        torch.testing.assert_close(memory[row, :length], alone[0])
    wider = nn.functional.pad(SOURCE, (0, 5))
    torch.testing.assert_close(model.encode(wider)[:, :6], memory)
    real = TARGET != PAD
    longer = nn.functional.pad(TARGET, (0, 3))
    torch.testing.assert_close(model(wider, longer)[:, :5][real], logits[real])
    assert_equal(model(SOURCE, TARGET, LENGTHS), logits)
    with_lengths = model(SOURCE, TARGET, target_lengths=real.sum(-1))
    torch.testing.assert_close(with_lengths[real], logits[real])


def test_source_lengths_hide_what_lies_beyond():
    model = tiny()
    noise = torch.where(torch.arange(6) < LENGTHS[:, None], SOURCE, 17)
    hidden = torch.arange(6) >= LENGTHS[:, None]
    expected, got = model.encode(SOURCE), model.encode(noise, LENGTHS)
    assert_equal(got[~hidden], expected[~hidden])
    assert_equal(model.decode(TARGET, got, LENGTHS), model.decode(TARGET, expected, LENGTHS))


@pytest.mark.parametrize("variant", ["post_norm", "pre_norm"])
def test_no_position_sees_the_future(variant):
    model = tiny(**VARIANTS[variant])
    target = torch.randint(3, VOCAB, (3, 5))
    expected = model(SOURCE, target)
    for position in range(1, 5):
        changed = target.clone()
        changed[:, position:] = 3 + (changed[:, position:] - 2) % (VOCAB - 3)
        got = model(SOURCE, changed)
        assert_equal(got[:, :position], expected[:, :position])
        assert ((got[:, position:] - expected[:, position:]).abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("variant", ["post_norm", "pre_norm"])
def test_work_spared_on_padding_changes_no_real_token(variant, monkeypatch):
    model = tiny(**VARIANTS[variant])
    real, upstream = (TARGET != PAD), torch.randn(3, 5, VOCAB)

    def run():
        model.zero_grad()
        logits = model(SOURCE, TARGET)[real]
        logits.backward(upstream[real])
        return {"logits": logits.detach()} | {name: x.grad.clone() for name, x in model.named_parameters()}

    seen = []
    model.encoder.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
    model.decoder.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
    packed = run()
    assert seen == [(14, 24), (12, 24)]
    monkeypatch.setattr("fused_transformer.model.packing_if_worth_it", lambda *_: None)
    padded = run()
    assert seen[2:] == [(3, 6, 24), (3, 5, 24)]
    for name in packed:
        torch.testing.assert_close(packed[name], padded[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_packing_takes_the_real_tokens_and_puts_them_back():
    x = torch.randn(3, 6, 4)
    packing = Packing.of(LENGTHS, (3, 6))
    assert_equal(packing.offsets, torch.tensor([0, 6, 9, 14]))
    packed = packing.pack(x)
    assert_equal(packed, torch.cat([x[0], x[1, :3], x[2, :5]]))
    assert_equal(packing.unpack(packed), torch.where(torch.arange(6) < LENGTHS[:, None], 1.0, 0.0)[..., None] * x)
    assert packing_if_worth_it(torch.tensor([6, 6, 6]), x) is None
    assert packing_if_worth_it(torch.tensor([0, 0, 0]), x) is None
    for lengths in ([6, 7, 1], [6, -1, 2], [6, 3], [6.0, 3.0, 5.0]):
        with pytest.raises(ValueError, match="lengths must be"):
            Packing.of(torch.tensor(lengths), (3, 6))
    with pytest.raises(ValueError, match=r"lengths must be between 0 and 6, got 1 ... 7"):
        tiny().encode(SOURCE, torch.tensor([1, 7, 1]))


def test_the_decoder_sees_all_of_the_source():
    model = tiny()
    expected = model(SOURCE, TARGET)
    for position in range(6):
        changed = SOURCE.clone()
        changed[0, position] = 20
        got = model(changed, TARGET)
        assert (got[0] - expected[0]).abs().amax(-1).min() > 1e-5
        assert_equal(got[1:], expected[1:])


def test_dropout_is_off_in_eval_and_follows_the_generator_in_training():
    model = tiny(dropout=0.2, attention_dropout=0.2, activation_dropout=0.2)
    expected = model.eval()(SOURCE, TARGET)
    with torch.no_grad():
        assert_equal(model(SOURCE, TARGET), expected)
    model.train()

    def run(seed):
        torch.manual_seed(seed)
        return model(SOURCE, TARGET)

    assert_equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))
    assert not torch.allclose(run(1), expected)


def test_lengths_count_what_is_not_padding():
    model = tiny()
    assert_equal(model.lengths(SOURCE), LENGTHS)
    assert_equal(model.lengths(torch.zeros(2, 3, dtype=torch.int64)), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"row 1 has padding \(token 0\) ahead of a token"):
        model.encode(torch.tensor([[3, 4, 2], [0, 4, 2]]))


def test_tokens_of_the_wrong_shape_are_named():
    model = tiny()
    with pytest.raises(ValueError, match="source and target must have one batch size, got 3 and 2"):
        model(SOURCE, TARGET[:2])
    with pytest.raises(ValueError, match=r"source_tokens must have shape \(B, L\)"):
        model(SOURCE[0], TARGET)
    with pytest.raises(ValueError, match=r"target_tokens must have shape \(B, L\)"):
        model(SOURCE, TARGET[0], LENGTHS)
    with pytest.raises(ValueError, match=r"source_tokens must have shape \(B, L\)"):
        model.encode(SOURCE[0], LENGTHS)


def test_padding_ahead_of_a_token_of_the_target_is_an_error():
    model, source = tiny().eval(), torch.tensor([[5, 6, 2], [7, 2, 0]])
    target = torch.tensor([[1, 6, 7], [1, 0, 7]])
    with pytest.raises(ValueError, match=r"row 1 has padding \(token 0\) ahead of a token"):
        model(source, target)
    assert model(source, target, target_lengths=torch.tensor([3, 3])).shape[:2] == (2, 3), "the lengths are given"


def test_a_source_of_padding_alone_gives_finite_numbers():
    model = tiny()
    source = torch.tensor([[5, 6, 2], [0, 0, 0]])
    logits = model(source, TARGET[:2])
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_log_probabilities():
    model = tiny().bfloat16()
    hidden = model.decode(TARGET, model.encode(SOURCE), LENGTHS)
    got = model.log_probabilities(hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(3, 5))
    torch.testing.assert_close(got, model.project(hidden).float().log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = tiny()
    expected = model(SOURCE, TARGET)
    got = copy.deepcopy(model).to(dtype)(SOURCE, TARGET)
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.15
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at all locals
def test_compiled_equals_eager():
    model = tiny(num_encoder_layers=1, num_decoder_layers=0)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(SOURCE, TARGET), model(SOURCE, TARGET))
