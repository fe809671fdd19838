"""decoder_step: the native step against the ops it is made of, over orders of norms, beams, histories and memories."""

from __future__ import annotations

import time
from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from fused_transformer.kernels import use_backend
from fused_transformer.kernels.decoder_step import Memory, Norm, PackedDecoder, PackedLayer, decoder_step, memory_of
from fused_transformer.kernels.linear import PackedLinear
from tests.inputs import normal, running_on, threads
from tests.oracle import assert_equal

pytestmark = pytest.mark.every_isa

HEADS, DEPTH, ROOM, SOURCES, LONGEST = 3, 2, 9, 4, 7


def make_decoder(width=24, hidden=40, bias=True, weights="float32", final_norm=False, **options) -> PackedDecoder:
    def packed(n, k):
        return PackedLinear(torch.randn(n, k) * k**-0.5, torch.randn(n) if bias else None, weights=weights)

    def norm():
        return Norm(1.0 + 0.2 * torch.randn(width), 0.2 * torch.randn(width) if bias else None)

    layers = [
        PackedLayer(
            qkv=packed(3 * width, width),
            self_out=packed(width, width),
            query=packed(width, width),
            memory_out=packed(width, width),
            up=packed(hidden, width),
            down=packed(width, hidden),
            norms=(norm(), norm(), norm()),
        )
        for _ in range(DEPTH)
    ]
    return PackedDecoder(layers, HEADS, final_norm=norm() if final_norm else None, **options)


def make_arguments(decoder: PackedDecoder, beams=2, sequences=3, length=5, longest=LONGEST) -> dict:
    """A step in the middle of a search: beams that changed places, sequences that ended, memories of other lengths."""
    rows, cached_rows, width = beams * sequences, beams * SOURCES, decoder.width // HEADS
    room = max(ROOM, length + 1)
    cache = torch.randn(DEPTH, 2, cached_rows, HEADS, room, width)
    both = torch.randn(DEPTH, 2, SOURCES, HEADS, longest, width)
    ancestors = torch.randint(cached_rows, (rows, room), dtype=torch.int32)
    ancestors[:, length] = torch.arange(rows)
    lengths = torch.randint(1, longest + 1, (sequences,), dtype=torch.int32)
    sources = torch.randperm(SOURCES)[:sequences]
    # What no query sees: it must not be read.
    cache[:, :, :, :, length:] = torch.nan
    for source, real in zip(sources.tolist(), lengths.tolist(), strict=True):
        both[:, :, source, :, real:] = torch.nan
    return {
        "x": torch.randn(rows, decoder.width),
        "cache": cache,
        "length": length,
        "memory": [tuple(pair) for pair in both],
        "ancestors": ancestors,
        "memory_lengths": lengths,
        "sources": sources,
        "beams": beams,
    }


def run(backend: str, decoder: PackedDecoder, arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states, and the cache afterwards."""
    cache = arguments["cache"].clone()
    with running_on(backend):
        out = decoder_step(**arguments | {"cache": cache}, decoder=decoder)
    return out, cache


def assert_agree(decoder: PackedDecoder, arguments: dict, tolerance: float = 2e-5) -> None:
    (got, got_cache), (want, want_cache) = (run(backend, decoder, arguments) for backend in ("cpu", "reference"))
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got_cache, want_cache, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert got.isfinite().all()


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "final_norm": True}, {"bias": False}], ids=str)
def test_the_native_step_is_the_ops_one_after_the_other(options, beams):
    decoder = make_decoder(**options)
    assert_agree(decoder, make_arguments(decoder, beams))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_activations(activation):
    decoder = make_decoder(activation=activation)
    assert_agree(decoder, make_arguments(decoder))


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rounded_weights(weights):
    decoder = make_decoder(weights=weights)
    assert_agree(decoder, make_arguments(decoder), tolerance=0.1 if weights == "bfloat16" else 0.05)


def test_rows_that_never_moved_need_no_tables():
    decoder = make_decoder()
    arguments = make_arguments(decoder, beams=1, sequences=SOURCES)
    plain = arguments | {"ancestors": None, "sources": None}
    named = arguments | {
        "ancestors": torch.arange(SOURCES, dtype=torch.int32)[:, None].expand(-1, ROOM).contiguous(),
        "sources": torch.arange(SOURCES),
    }
    for pair in plain["memory"]:
        for part in pair:
            part.nan_to_num_()
    assert_equal(run("cpu", decoder, plain)[0], run("cpu", decoder, named)[0])
    assert_agree(decoder, plain | {"memory_lengths": None})


def test_long_histories_and_memories_are_cut_and_merged():
    decoder = make_decoder()
    assert_agree(decoder, make_arguments(decoder, length=600, longest=700))


def test_the_first_position():
    decoder = make_decoder()
    assert_agree(decoder, make_arguments(decoder, length=0))


def test_no_rows():
    decoder = make_decoder()
    arguments = make_arguments(decoder) | {
        "x": torch.zeros(0, decoder.width),
        "ancestors": None,
        "memory_lengths": None,
        "sources": None,
    }
    assert run("cpu", decoder, arguments)[0].shape == (0, decoder.width)


def test_the_same_bits_with_any_threads_and_other_rows():
    decoder = make_decoder(width=96, hidden=200)
    arguments = make_arguments(decoder, beams=2, sequences=4)
    with threads(1):
        alone = run("cpu", decoder, arguments)
    with threads(3):
        assert_equal(run("cpu", decoder, arguments)[0], alone[0])
    part = arguments | {"x": arguments["x"][:4], "ancestors": arguments["ancestors"][:4]}
    part |= {"memory_lengths": arguments["memory_lengths"][:2], "sources": arguments["sources"][:2]}
    assert_equal(run("cpu", decoder, part)[0], alone[0][:4])


def test_a_decoder_keeps_what_it_needs():
    """Nothing but the PackedDecoder refers to its layers' biases and norms."""
    import gc

    decoder = make_decoder()
    arguments = make_arguments(decoder)
    before = run("cpu", decoder, arguments)[0]
    gc.collect()
    rubbish = [torch.full((24,), torch.nan) for _ in range(200)]
    assert_equal(run("cpu", decoder, arguments)[0], before)
    assert len(rubbish) == 200


WRONG = (
    ("x must have shape (R, 24)", {"x": torch.zeros(6, 23)}),
    ("x must be torch.float32", {"x": torch.zeros(6, 24, dtype=torch.float64)}),
    ("the rows must be a multiple of beams, got 6 and 4", {"beams": 4}),
    ("cache must have shape (2, 2, R, 3, room, 8) with R >= 6", {"cache": torch.zeros(2, 2, 5, 3, ROOM, 8)}),
    ("cache has room for 9 positions, and there are 9", {"length": 9}),
    ("memory must have keys and values for 2 layers, got 1", {"memory": [(torch.zeros(4, 3, 7, 8),) * 2]}),
    ("memory must have shapes (B, 3, S, 8)", {"memory": [(torch.zeros(4, 3, 7, 9),) * 2] * 2}),
    ("ancestors must be torch.int32", {"ancestors": torch.zeros(6, ROOM, dtype=torch.int64)}),
    ("ancestors must be (6, more than 5)", {"ancestors": torch.zeros(6, 5, dtype=torch.int32)}),
    ("sources must have shape (3,)", {"sources": torch.zeros(6, dtype=torch.int64)}),
    ("rows must be between 0 and 7, got 8", {"ancestors": torch.full((6, ROOM), 8, dtype=torch.int32)}),
    ("lengths must be between 0 and 7, got 8", {"memory_lengths": torch.full((3,), 8, dtype=torch.int32)}),
    ("has no gradient, and x requires one", {"x": torch.zeros(6, 24, requires_grad=True)}),
    (
        "has no gradient, and memory requires one",
        {"memory": [(torch.zeros(4, 3, 7, 8, requires_grad=True), torch.zeros(4, 3, 7, 8))] * 2},
    ),
)


@pytest.mark.parametrize(("message", "change"), WRONG, ids=[message for message, _ in WRONG])
def test_wrong_arguments_are_named(message, change):
    decoder = make_decoder()
    with pytest.raises(ValueError) as error:
        decoder_step(**make_arguments(decoder) | change, decoder=decoder)
    assert message in str(error.value)


def test_wrong_decoders_are_named():
    with pytest.raises(ValueError, match="at least one layer"):
        PackedDecoder([], 3)
    with pytest.raises(ValueError, match="activation must be one of"):
        make_decoder(activation="tanh")
    with pytest.raises(ValueError, match="num_heads must divide the width, got 3 and 25"):
        make_decoder(width=25)
    with pytest.raises(TypeError, match="decoder must be a PackedDecoder"):
        decoder_step(**make_arguments(make_decoder()), decoder=None)


def test_without_the_extension_the_reference_serves(monkeypatch):
    decoder = make_decoder()
    arguments = make_arguments(decoder)
    want = run("reference", decoder, arguments)[0]
    decoder.native = None
    torch.testing.assert_close(decoder_step(**arguments, decoder=decoder), want, atol=2e-5, rtol=2e-5)
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="packed without the compiled extension"):
        decoder_step(**arguments, decoder=decoder)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layers,heads,width", [(1, 2, 8), (3, 4, 20)])
def test_memory_of_all_layers(packed, layers, heads, width):
    torch.manual_seed(0)
    batch, length = 4, 7
    lengths = [7, 0, 3, 5] if packed else [length] * batch
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rows, weight, bias = normal(sum(lengths), width), normal(2 * layers * width, width), normal(2 * layers * width)
    projection = PackedLinear(weight, bias)
    got = memory_of(rows, projection, heads, batch, length, offsets if packed else None)
    with use_backend("reference"):
        plain = memory_of(rows, projection, heads, batch, length, offsets if packed else None)
    assert len(got) == layers
    for layer, (pair, others) in enumerate(zip(got, plain, strict=True)):
        for part, (x, other) in enumerate(zip(pair, others, strict=True)):
            assert x.shape == (batch, heads, length, width // heads)
            own = slice((2 * layer + part) * width, (2 * layer + part + 1) * width)
            for b, tokens in enumerate(lengths):
                source = rows[offsets[b] : offsets[b] + tokens]
                wanted = (source @ weight[own].T + bias[own]).view(tokens, heads, width // heads).transpose(0, 1)
                assert_close(x[b, :, :tokens], wanted, rtol=1e-5, atol=1e-5)
                assert_close(other[b, :, :tokens], wanted, rtol=1e-5, atol=1e-5)


def test_a_memory_is_checked_where_it_is_made():
    keys = torch.zeros(2, 3, 5, 4)
    made = Memory([(keys, keys + 1), (keys + 2, keys + 3)])
    assert len(made) == 2 and made[0][0] is keys
    copy = deepcopy(made)
    assert type(copy) is Memory and copy[0][0] is not keys
    assert_equal([x for pair in copy for x in pair], [x for pair in made for x in pair])
    assert not made.requires_grad and Memory([(keys, keys.clone().requires_grad_())]).requires_grad
    wrong = (
        ("one layer or more", []),
        ("must have shapes (B, H, S, D), got (3, 5, 4)", [(keys[0], keys[0])]),
        ("one shape and the same strides", [(keys, keys[:, :, :4])]),
        ("memory must be torch.float32, got torch.float64", [(keys.double(), keys.double())]),
        ("memory must be on the CPU", [(keys.to("meta"), keys.to("meta"))]),
        ("the last axis of memory must be contiguous", [(keys.transpose(2, 3), keys.transpose(2, 3))]),
    )
    for message, pairs in wrong:
        with pytest.raises(ValueError) as error:
            Memory(pairs)
        assert message in str(error.value)


def test_memory_of_nothing():
    projection = PackedLinear(normal(16, 8), None)
    for backend in ("reference", None):
        with use_backend(backend):
            assert memory_of(normal(0, 8), projection, 2, 2, 0, None)[0][0].shape == (2, 2, 0, 4)


def test_it_tells_where_its_time_went():
    from fused_transformer.kernels.decoder_step import native

    decoder = make_decoder()
    arguments = make_arguments(decoder)
    expected = decoder_step(decoder=decoder, **arguments)
    with native.timing() as seconds:
        assert_equal(decoder_step(decoder=decoder, **arguments), expected)
        once = seconds.clone()
        start = time.perf_counter()
        for _ in range(20):
            decoder_step(decoder=decoder, **arguments)
        took = time.perf_counter() - start
    assert (once > 0).all() and (seconds > once).all()
    assert float((seconds - once).sum()) < took
    told = seconds.clone()
    decoder_step(decoder=decoder, **arguments)  # nobody asks any more
    assert_equal(seconds, told)
