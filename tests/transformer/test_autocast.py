"""torch.autocast: the ops and modules give the dtypes that torch's give, and gradients in the parameters' dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_transformer as ours
from fused_transformer import kernels
from fused_transformer.kernels import use_backend
from tests.inputs import dtype_id, normal
from tests.oracle import assert_equal
from tests.transformer.models import SOURCE, TARGET, tiny

E, H = 16, 4
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)


@both_dtypes
@pytest.mark.parametrize("backend", [None, "reference"])
def test_attention_has_the_dtype_of_scaled_dot_product_attention(dtype, backend, device):
    for given in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        q = normal(1, 2, 3, 8, dtype=given, device=device).requires_grad_()
        bias = normal(3, 3, device=device)
        with torch.autocast(device, dtype=dtype), use_backend(backend):
            expected = F.scaled_dot_product_attention(q, q, q)
            out, lse = kernels.attention_with_lse(q, q, q, bias=bias)
            weights = kernels.attention_weights(q, q, lse, bias=bias)
        assert out.dtype == weights.dtype == expected.dtype == (given if given == torch.float64 else dtype)
        gradient, _ = torch.autograd.grad(out.sum() + weights.square().sum(), (q, q))
        assert gradient.dtype == given
        with use_backend(backend):
            assert_equal(out, kernels.attention(*(q.to(out.dtype),) * 3, bias=bias))


@both_dtypes
def test_keys_of_another_dtype_than_the_queries_are_cast_too(dtype, device):
    """As when q went through a linear, which autocast runs in 16 bits, and the keys did not."""
    q, k = normal(1, 2, 3, 8, dtype=dtype, device=device), normal(1, 2, 4, 8, device=device)
    with pytest.raises(ValueError, match="same dtype"):
        kernels.attention(q, k, k)
    with torch.autocast(device, dtype=dtype):
        assert kernels.attention(q, k, k).dtype == dtype
        assert kernels.decode_attention(q, k[:, :, :3], k[:, :, :3]).dtype == torch.float32  # the cache is not copied


@both_dtypes
def test_norms_on_a_cpu_keep_the_dtype_of_their_inputs_as_torchs_do(dtype):
    x, lower, weight = normal(3, E), normal(3, E, dtype=dtype), normal(E)
    with torch.autocast("cpu", dtype=dtype):
        for value in (x, lower):
            assert kernels.layer_norm(value, weight, weight).dtype == F.layer_norm(value, (E,), weight, weight).dtype
        for pair in ((x, x), (lower, x), (x, lower), (lower, lower)):
            total = pair[0] + pair[1]
            y, kept = kernels.add_layer_norm_with_total(*pair, weight)
            assert y.dtype == F.layer_norm(total, (E,), weight).dtype and kept.dtype == total.dtype


@both_dtypes
def test_norms_on_a_gpu_are_float32_as_torchs_are(dtype):
    """With fake tensors, which need no GPU to be on one."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with FakeTensorMode():
            lower, weight = torch.empty(3, E, dtype=dtype, device="cuda"), torch.empty(E, dtype=dtype, device="cuda")
            assert F.layer_norm(lower, (E,), weight).dtype == torch.float32
            assert kernels.layer_norm(lower, weight).dtype == torch.float32
            y, total = kernels.add_rms_norm_with_total(lower, lower, weight)
            assert y.dtype == total.dtype == torch.float32
            assert kernels.layer_norm(lower.double()).dtype == torch.float64
            assert kernels.attention(*(lower.float().view(1, 1, 3, E),) * 3).dtype == dtype
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)


@both_dtypes
def test_the_other_ops_keep_their_inputs_dtype(dtype, device):
    table, tokens = normal(7, E, device=device), torch.randint(7, (2, 3)).to(device)
    with torch.autocast(device, dtype=dtype):
        assert kernels.embedding(tokens, table).dtype == F.embedding(tokens, table).dtype == torch.float32
        for given in (dtype, torch.float32):
            assert kernels.bias_act(table.to(given), normal(E, device=device)).dtype == given
            loss = kernels.cross_entropy((table @ table.T).to(given), torch.arange(7, device=device))
            assert loss.dtype == torch.float32


@both_dtypes
def test_multihead_attention_has_the_dtypes_of_torchs(dtype):
    module, theirs = (
        ours.MultiheadAttention(E, H, batch_first=True),
        torch.nn.MultiheadAttention(E, H, batch_first=True),
    )
    x, padding = normal(2, 5, E), torch.tensor([[0.0] * 5, [0.0] * 3 + [-torch.inf] * 2])
    for weights in (True, False):
        with torch.autocast("cpu", dtype=dtype):
            got = module(x, x, x, key_padding_mask=padding, need_weights=weights)
            expected = theirs(x, x, x, key_padding_mask=padding, need_weights=weights)
        assert [y if y is None else y.dtype for y in got] == [y if y is None else y.dtype for y in expected]


@both_dtypes
def test_layers_keep_a_float32_stream_and_train(dtype, device):
    """Linears and attention in 16 bits; sums and norms, and with them what flows from layer to layer, in float32."""
    model = tiny().to(device)
    source, target = SOURCE.to(device), TARGET.to(device)
    with torch.autocast(device, dtype=dtype):
        memory = model.encode(source)
        logits = model(source, target)
        loss = ours.smoothed_cross_entropy(logits, target)
    assert (memory.dtype, logits.dtype, loss.dtype) == (torch.float32, dtype, torch.float32)
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits.float(), model(source, target), atol=0.2, rtol=0.1)


@both_dtypes
def test_decoding_runs_under_autocast(dtype):
    model = tiny().eval()
    with torch.autocast("cpu", dtype=dtype):
        state = model.start(model.encode(SOURCE))
        steps = torch.stack([model.step(tokens, state) for tokens in TARGET.T], dim=1)
        torch.testing.assert_close(steps, model.decode(TARGET, model.encode(SOURCE)), atol=0.1, rtol=0.1)


@both_dtypes
def test_a_compiled_model_gives_eagers_bits_under_autocast(dtype):
    torch._dynamo.reset()
    layer, x = ours.EncoderLayer(E, H, 32).eval(), normal(2, 5, E)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, layer):
        with torch.autocast("cpu", dtype=dtype):
            y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    assert_equal(*results)
    assert_equal(compiled(x), layer(x))  # and compiles again where autocast is off
