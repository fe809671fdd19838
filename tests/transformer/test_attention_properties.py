"""Random MultiheadAttentions, calls, masks and dtypes: torch.nn's results where torch is right, the formula's always.

The formula in float64 is the judge; where every query has a key to attend to, torch.nn in float64 must agree with it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_transformer import MultiheadAttention
from tests.oracle import assert_equal, assert_matches
from tests.transformer.attention_cases import as_float, padding

SETTINGS = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ROOM = {"factor": 8.0, "ulps": 64.0}  # tensors of a few numbers: torch's largest error of so few may be small by chance
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """One call: the inputs batch first, what goes to `forward`, and what all masks together say."""

    inputs: dict[str, Tensor]  # query, key and value; or query alone, or query and key: the others are the same tensor
    batched: bool
    options: dict
    allowed: Tensor  # (N, H, L, S + added keys)
    bias: Tensor  # likewise, float64: what float masks add

    def arguments(self, leaves: dict[str, Tensor], batch_first: bool) -> list[Tensor]:
        laid_out = {}
        for name, x in leaves.items():
            laid_out[name] = x[0] if not self.batched else x if batch_first else x.transpose(0, 1)
        query = laid_out["query"]
        key = laid_out.get("key", query)
        return [query, key, laid_out.get("value", key)]


@st.composite
def modules(draw) -> MultiheadAttention:
    heads = draw(st.sampled_from([1, 2, 3]))
    width = heads * draw(st.sampled_from([1, 3, 8, 16]))
    other = draw(st.booleans())
    module = MultiheadAttention(
        width,
        heads,
        dropout=draw(st.sampled_from([0.0, 0.4])),
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        kdim=draw(st.sampled_from([None, 5])) if other else None,
        vdim=draw(st.sampled_from([None, 5])) if other else None,
        batch_first=draw(st.booleans()),
    )
    torch.manual_seed(draw(st.integers(0, 999)))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.to(draw(st.sampled_from(DTYPES))).train(draw(st.booleans()) and module.dropout == 0.0)


@st.composite
def calls(draw, module: MultiheadAttention) -> Call:
    dtype, heads = module.out_proj.weight.dtype, module.num_heads
    batched = draw(st.booleans())
    batch = draw(st.integers(1, 3)) if batched else 1
    length, size = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    widths = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}
    given_tensors = ["query", "key", "value"]
    if module.kdim == module.vdim and draw(st.booleans()):
        given_tensors.remove("value")
        if module.kdim == module.embed_dim and draw(st.booleans()):
            given_tensors.remove("key")
            size = length
    lengths = {"query": length, "key": size, "value": size}
    inputs = {name: torch.randn(batch, lengths[name], widths[name]).to(dtype) for name in given_tensors}

    allowed = torch.ones(batch, heads, length, size, dtype=torch.bool)
    bias = torch.zeros(batch, heads, length, size, dtype=torch.float64)
    options: dict = {
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
        "is_causal": draw(st.booleans()),
    }
    if options["is_causal"]:
        allowed = allowed & torch.ones(length, size, dtype=torch.bool).tril()

    def take(name: str, mask: Tensor, full: Tensor, form: str) -> None:
        """`mask`, True = ignore, and `full`, its view that broadcasts to all pairs, as `form` has it."""
        nonlocal allowed, bias
        allowed = allowed & ~full
        if form == "bool":
            options[name] = mask
            return
        soft = torch.randn(mask.shape).to(dtype) if form == "soft" else torch.zeros(mask.shape, dtype=dtype)
        bias = bias + soft.double().view(full.shape)
        options[name] = soft.masked_fill(mask, -torch.inf)

    forms = st.sampled_from(["none", "bool", "hard", "soft"])
    rows = batch * heads
    shape = draw(
        st.sampled_from([(length, size), (rows, length, size), (1, heads, length, size), (batch, 1, length, size)])
    )
    if (form := draw(forms)) != "none":
        mask = torch.rand(shape) < draw(st.sampled_from([0.0, 0.3, 0.8]))
        take("attn_mask", mask, mask.view(batch, heads, length, size) if len(shape) == 3 else mask, form)
    if (form := draw(forms)) != "none":
        right = draw(st.booleans())
        mask = padding(*torch.randint(0, size + 1, (batch,)), size=size) if right else torch.rand(batch, size) < 0.4
        take("key_padding_mask", mask if batched else mask[0], mask[:, None, None], form)
    if batched and draw(st.booleans()):
        options["key_lengths"] = torch.randint(0, size + 1, (batch,))
        allowed = allowed & ~padding(*options["key_lengths"], size=size)[:, None, None]

    added = (module.bias_k is not None) + module.add_zero_attn
    allowed = nn.functional.pad(allowed, (0, added), value=True)
    return Call(inputs, batched, options, allowed, nn.functional.pad(bias, (0, added)))


def formula(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor):
    """Batch first: the output and each head's weights, in the dtype of the inputs; 0 where nothing is allowed."""
    heads = module.num_heads
    weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.chunk(3))
    offsets = [0.0] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.chunk(3))
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, offsets, strict=True))
    if module.bias_k is not None:
        k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT / math.sqrt(module.head_dim) + bias.to(q.dtype)).masked_fill(~allowed, -torch.inf)
    empty = ~allowed.any(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    out = (probabilities @ v).transpose(1, 2).flatten(2) @ module.out_proj.weight.T
    return out if module.out_proj.bias is None else out + module.out_proj.bias, probabilities


def with_gradients(module: nn.Module, call: Call, dtype: torch.dtype, attend) -> dict[str, Tensor]:
    """attend(module, leaves) with module and inputs in `dtype`: out, weights if wanted, the gradients; batch first."""
    module = copy.deepcopy(module).to(dtype)
    leaves = {name: x.to(dtype).requires_grad_() for name, x in call.inputs.items()}
    outputs = {name: x for name, x in attend(module, leaves).items() if x is not None}
    wanted = leaves | dict(module.named_parameters())
    generator = torch.Generator().manual_seed(20170612)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), upstream, allow_unused=True)
    return {name: x.detach() for name, x in outputs.items()} | {
        "d" + name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(wanted.items(), gradients, strict=True)
    }


def in_formula(call: Call):
    def attend(module, leaves):
        query = leaves["query"]
        key = leaves.get("key", query)
        out, each = formula(module, query, key, leaves.get("value", key), call.allowed, call.bias)
        weights = each.mean(1) if call.options["average_attn_weights"] else each
        return {"out": out, "weights": weights if call.options["need_weights"] else None}

    return attend


def in_module(call: Call, **options):
    def attend(module, leaves):
        out, weights = module(*call.arguments(leaves, module.batch_first), **{**call.options, **options})
        if not call.batched:
            out, weights = out[None], None if weights is None else weights[None]
        elif not module.batch_first:
            out = out.transpose(0, 1)
        return {"out": out, "weights": weights}

    return attend


def together(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients as one tensor: of the few numbers in one, torch's largest error may be 0 by chance."""
    gradients = torch.cat([x.flatten() for name, x in results.items() if name.startswith("d")])
    return {name: x for name, x in results.items() if not name.startswith("d")} | {"gradients": gradients}


def in_torch(module: MultiheadAttention, call: Call) -> dict[str, Tensor]:
    """torch.nn's class with the same weights in float64, every mask in one float mask."""
    merged = (as_float(~call.allowed).double() + call.bias)[
        ..., : call.inputs.get("key", call.inputs["query"]).shape[1]
    ]
    theirs = copy.deepcopy(module).double()
    theirs.__class__ = nn.MultiheadAttention
    masks = {"attn_mask": merged.flatten(0, 1), "key_padding_mask": None, "is_causal": False}

    def attend(module, leaves):
        kept = {name: call.options[name] for name in ("need_weights", "average_attn_weights")}
        return in_module(Call(call.inputs, call.batched, kept, call.allowed, call.bias), **masks)(module, leaves)

    return with_gradients(theirs, call, torch.float64, attend)


@pytest.mark.slow
@SETTINGS
@given(st.data())
def test_any_module_and_call_gives_the_formulas_result(data):
    module = data.draw(modules())
    call = data.draw(calls(module))
    dtype = module.out_proj.weight.dtype
    exact = with_gradients(module, call, torch.float64, in_formula(call))
    if call.allowed.any(-1).all():
        torch.testing.assert_close(in_torch(module, call), exact)
    got = with_gradients(module, call, dtype, in_module(call))
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact)
    else:
        naive = with_gradients(module, call, dtype, in_formula(call))
        assert_matches(*map(together, (got, exact, naive)), **ROOM)
    with torch.no_grad():
        inference = in_module(call)(module, call.inputs)
    for name in ("out", "weights"):
        if name in got:
            assert_equal(inference[name], got[name])
        else:
            assert inference[name] is None


@pytest.mark.parametrize("option", ["bias", "add_bias_kv", "add_zero_attn", "batch_first"])
def test_the_examples_have_every_option_both_ways(option):
    seen = set()

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(modules())
    def look(module):
        seen.add(
            {
                "bias": module.in_proj_bias is not None,
                "add_bias_kv": module.bias_k is not None,
                "add_zero_attn": module.add_zero_attn,
                "batch_first": module.batch_first,
            }[option]
        )

    look()
    assert seen == {False, True}
