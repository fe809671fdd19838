"""The Transformer against the paper's formulas written out in float64, and what must hold whatever the weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fused_transformer import Transformer, TransformerConfig
from fused_transformer.packing import Packing, packing_if_worth_it
from tests.oracle import assert_equal

VOCAB, PAD = 31, 0
TINY = {
    "source_vocab_size": VOCAB,
    "d_model": 24,
    "num_heads": 3,
    "d_feedforward": 40,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}
SOURCE = torch.tensor([[5, 9, 3, 7, 6, 2], [4, 8, 2, 0, 0, 0], [30, 3, 3, 12, 2, 0]])
TARGET = torch.tensor([[1, 11, 12, 13, 4], [1, 14, 5, 0, 0], [1, 6, 30, 8, 0]])
LENGTHS = torch.tensor([6, 3, 5])
VARIANTS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "concat_t2t": {"positions": "concat_t2t", "tie_embeddings": "target", "target_vocab_size": 37},
    "concat_paper": {"positions": "concat_paper", "tie_embeddings": "separate", "target_vocab_size": 37},
    "gelu_pre_norm_separate": {"activation": "gelu", "norm_first": True, "tie_embeddings": "separate"},
    "no_positions": {"positions": None},
    "uneven_depth": {"num_encoder_layers": 3, "num_decoder_layers": 1},
    "no_layers": {"num_encoder_layers": 0, "num_decoder_layers": 0},
}


def tiny(dropout: float = 0.0, **options) -> Transformer:
    """A small model whose biases and norms are random too."""
    model = Transformer(TransformerConfig(**TINY | {"dropout": dropout} | options))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model


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


# ------------------------------------------------------------------ one token at a time


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_decoding_all_at_once(variant):
    model = tiny(**VARIANTS[variant]).eval()
    length = 40 if variant == "post_norm" else 4  # 40: beyond the state's first capacity
    target = torch.randint(3, VOCAB, (3, length))
    memory = model.encode(SOURCE)
    state = model.start(memory, LENGTHS)
    got = torch.stack([model.step(target[:, i], state) for i in range(length)], dim=1)
    torch.testing.assert_close(got, model.decode(target, memory, LENGTHS), atol=1e-5, rtol=1e-5)
    without_lengths = model.start(memory)
    torch.testing.assert_close(model.step(target[:, 0], without_lengths), model.decode(target[:, :1], memory)[:, 0])


def test_reordered_and_selected_rows_go_on_from_their_own_history():
    model = tiny().eval()
    memory, beams = model.encode(SOURCE), 2
    tokens = torch.randint(3, VOCAB, (6, 40))
    state = model.start(memory, LENGTHS, beam_size=beams)
    rows, kept, kept_rows = torch.tensor([1, 0, 2, 2, 5, 5]), torch.tensor([0, 2]), torch.tensor([0, 1, 4, 5])
    for i in range(40):
        if i in (5, 6, 34):
            state.reorder(rows)
            tokens = torch.cat([tokens[rows, :i], tokens[:, i:]], dim=1)
        if i == 36:
            state.select(kept)
            tokens = tokens[kept_rows]
        hidden = model.step(tokens[:, i], state)
    expected = model.decode(tokens, memory[kept].repeat_interleave(beams, 0), LENGTHS[kept].repeat_interleave(beams, 0))
    torch.testing.assert_close(hidden, expected[:, -1], atol=1e-5, rtol=1e-5)


def test_wrong_uses_of_the_state_are_errors():
    model = tiny()
    memory = model.encode(SOURCE)
    with pytest.raises(ValueError, match="call eval"):
        model.start(memory)
    model.eval()
    with pytest.raises(ValueError, match="beam_size must be at least 1, got 0"):
        model.start(memory, beam_size=0)
    with pytest.raises(ValueError, match=r"rows must have shape \(6,\)"):
        model.start(memory, beam_size=2).reorder(torch.tensor([0, 1]))


# ------------------------------------------------------------------ weights and configuration


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
        ({"positions": "learned"}, "positions must be one of 'interleaved', 'concat_t2t', 'concat_paper', None"),
        ({"activation": "tanh"}, "activation must be one of 'relu', 'gelu', got 'tanh'"),
        ({"tie_embeddings": "all"}, "tie_embeddings must be one of 'shared', 'target', 'separate', got 'all'"),
        ({"target_vocab_size": 30}, 'tie_embeddings="shared" needs one vocabulary'),
        ({"eos_idx": 1}, r"must be three tokens, got \[0, 1, 1\]"),
        ({"padding_idx": 31}, r"must be tokens of the vocabulary, got \[31, 1, 2\]"),
    ],
)
def test_a_wrong_configuration_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**TINY | changes)


def test_a_wrong_type_in_a_configuration_is_an_error():
    with pytest.raises(TypeError, match="d_model must be an int, got float"):
        TransformerConfig(**TINY | {"d_model": 24.0})


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
