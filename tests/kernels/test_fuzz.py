"""Random calls of the row-wise ops and the products; attention's are in files of their own. See tests/fuzz.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fused_transformer.kernels import bias_act, cross_entropy, embedding, linear_cross_entropy
from fused_transformer.kernels.bias_act import ACTIVATIONS
from fused_transformer.kernels.linear import WEIGHTS, PackedLinear, linear
from fused_transformer.kernels.linear_argmax import ScreenedLinear
from tests import fuzz
from tests.inputs import LAYOUTS, running_on
from tests.kernels import test_layer_norm as norms
from tests.kernels import test_linear as products
from tests.kernels import test_linear_argmax as largest
from tests.kernels import test_log_softmax_top_k as top_k
from tests.oracle import assert_matches

BACKENDS = ("cuda", "triton", "cpu")
EXAMPLES = {"cpu": 60, "triton": 5, "cuda": 3}  # the interpreter and the emulator take a second where cpu takes 1 ms

rows = st.sampled_from([1, 2, 3, 7, 16, 33, 70])
columns = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 31, 64, 65, 100, 128, 257, 512, 1025])
dtypes = st.sampled_from(["float32", "float32", "bfloat16", "float16"])
layouts = st.sampled_from([*LAYOUTS])
common = {"seed": st.integers(0, 2**31), "dtype": dtypes, "layout": layouts}


def any_backend(test):
    return fuzz.fuzz(pytest.mark.parametrize("backend", BACKENDS)(test))


def draw(call: dict, *shape: int, mean: float = 0.0, std: float = 1.0, salt: int = 0) -> torch.Tensor:
    """Normal numbers in the call's dtype and layout, on the grid of eighths where a row has one element: there nearly
    all of a norm's gradient cancels, and what is left would be the rounding of a sum."""
    generator = torch.Generator().manual_seed(call["seed"] + salt)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
    if shape and shape[-1] == 1:
        x = (x * 8).round() / 8
    return LAYOUTS[call["layout"]](x.to(getattr(torch, call["dtype"])))


@any_backend
def test_layer_norm(backend):
    functions = {function.__name__: function for function in norms.FUNCTIONS}

    def check(call):
        function, shape = functions[call["function"]], (call["rows"], call["columns"])
        takes = [name for name in norms.TAKES[function] if name not in call["absent"]]
        tensors = {}
        for salt, name in enumerate(takes):
            if name in ("x", "residual"):
                tensors[name] = draw(call, *shape, mean=call["mean"] if name == "x" else 0.0, salt=salt)
            else:
                tensors[name] = draw({**call, "layout": "dense"}, call["columns"], salt=salt)
        options = {"eps": call["eps"]}
        if "residual" in takes and call["dropout_p"]:
            options |= {"dropout_p": call["dropout_p"], "seed": torch.tensor([call["seed"] * 2**20])}
        fuzz.assert_call_matches(function, backend, tensors, **options)

    calls = st.fixed_dictionaries(
        {
            **common,
            "function": st.sampled_from([*functions]),
            "rows": rows,
            # Of two or three columns nearly all of the gradient cancels; those have cases of their own.
            "columns": columns.filter(lambda n: n >= 8),
            "mean": st.sampled_from([0.0, 0.0, 5.0, 100.0]),
            "absent": st.sets(st.sampled_from(["weight", "bias", "x_bias"]), max_size=3),
            "eps": st.sampled_from([1e-5, 1e-6, 1e-3]),
            "dropout_p": st.sampled_from([0.0, 0.0, 0.4]),
        }
    )
    fuzz.run(calls, check, EXAMPLES[backend])


@any_backend
def test_embedding(backend):
    def check(call):
        generator = torch.Generator().manual_seed(call["seed"])
        shape, vocabulary = call["shape"], call["vocabulary"]
        tokens = torch.randint(0, vocabulary, shape, generator=generator).to(getattr(torch, call["tokens"]))
        table = draw(call, vocabulary, call["columns"])
        start = call["start"] if call["positions"] else 0
        options = {"positions": call["positions"], "start": start, "scale": call["scale"]}
        if call["padding"]:
            options["padding_idx"] = call["seed"] % vocabulary
        if call["dropout_p"]:
            options |= {"dropout_p": call["dropout_p"], "seed": torch.tensor([call["seed"] * 2**20])}
        fuzz.assert_call_matches(embedding, backend, {"tokens": tokens, "table": table}, **options)

    calls = st.fixed_dictionaries(
        {
            **common,
            "shape": st.sampled_from([(1, 1), (3, 5), (2, 17), (7, 11), (9,), (2, 3, 4), (40, 3)]),
            "columns": columns,
            "vocabulary": st.sampled_from([1, 2, 7, 50, 300]),
            "tokens": st.sampled_from(["int32", "int64"]),
            "positions": st.sampled_from([None, "interleaved", "concat_t2t", "concat_paper"]),
            "start": st.sampled_from([0, 0, 1, 513]),
            "scale": st.sampled_from([None, 0.37]),
            "padding": st.booleans(),
            "dropout_p": st.sampled_from([0.0, 0.0, 0.3]),
        }
    )
    fuzz.run(calls, check, EXAMPLES[backend])


losses = {
    "label_smoothing": st.sampled_from([0.0, 0.1, 0.7]),
    "smoothing": st.sampled_from(["uniform", "others"]),
    "z_loss": st.sampled_from([0.0, 0.0, 0.01]),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
}


def loss_options(call: dict) -> dict:
    return {name: call[name] for name in losses}


def targets_of(call: dict, count: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(call["seed"] + 99)
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    return targets.masked_fill(torch.rand(count, generator=generator) < call["ignored"], -100)


@any_backend
def test_cross_entropy(backend):
    def check(call):
        tensors = {"logits": draw(call, call["rows"], call["columns"], std=call["std"])}
        tensors["targets"] = targets_of(call, call["rows"], call["columns"])
        fuzz.assert_call_matches(cross_entropy, backend, tensors, logarithm="out", **loss_options(call))

    calls = {
        **common,
        **losses,
        "rows": rows,
        "columns": st.one_of(columns, st.sampled_from([2047, 4099, 9000])).filter(lambda n: n >= 8),
        "std": st.sampled_from([0.1, 3.0, 40.0]),
        "ignored": st.sampled_from([0.0, 0.3]),
    }
    fuzz.run(st.fixed_dictionaries(calls), check, EXAMPLES[backend])


@fuzz.fuzz
@pytest.mark.parametrize("backend", ["cpu"])
def test_linear_cross_entropy(backend):
    def check(call):
        width = call["width"]
        tensors = {
            "hidden": draw(call, call["rows"], width),
            "weight": draw(call, call["columns"], width, std=width**-0.5, salt=1),
            "bias": draw({**call, "layout": "dense"}, call["columns"], salt=2) if call["bias"] else None,
            "targets": targets_of(call, call["rows"], call["columns"]),
        }
        fuzz.assert_call_matches(linear_cross_entropy, backend, tensors, logarithm="out", **loss_options(call))

    calls = {
        **common,
        **losses,
        "rows": rows.filter(lambda n: n >= 3),
        "columns": columns.filter(lambda n: n >= 8),
        # One gradient alone may come out exact in plain torch by chance.
        "width": st.sampled_from([5, 16, 33]),
        "bias": st.booleans(),
        "ignored": st.sampled_from([0.0, 0.3]),
    }
    fuzz.run(st.fixed_dictionaries(calls), check, EXAMPLES[backend])


@any_backend
def test_bias_act(backend):
    def check(call):
        tensors = {"x": draw(call, call["rows"], call["columns"], std=call["std"])}
        tensors["bias"] = draw({**call, "layout": "dense"}, call["columns"], salt=1) if call["bias"] else None
        options = {"activation": call["activation"]}
        if call["dropout_p"]:
            options |= {"dropout_p": call["dropout_p"], "seed": torch.tensor([call["seed"] * 2**20])}
        fuzz.assert_call_matches(bias_act, backend, tensors, **options)

    calls = {
        **common,
        "rows": rows,
        "columns": columns,
        "std": st.sampled_from([0.1, 2.0, 50.0]),
        "bias": st.booleans(),
        "activation": st.sampled_from([*ACTIVATIONS]),
        "dropout_p": st.sampled_from([0.0, 0.0, 0.3]),
    }
    fuzz.run(st.fixed_dictionaries(calls), check, EXAMPLES[backend])


@fuzz.fuzz
@pytest.mark.parametrize("backend", ["cpu"])
def test_linear(backend):
    """Every multiplier that the processor has."""

    def check(call):
        m, n, k, weights = call["rows"], call["n"], call["k"], call["weights"]
        plain = {**call, "dtype": "float32"}
        x, residual = draw(plain, m, k), draw(plain, m, n, salt=1) if call["residual"] else None
        zero = torch.rand(k, generator=torch.Generator().manual_seed(call["seed"])) < call["zeros"]
        x = LAYOUTS[call["layout"]](x.masked_fill(zero, 0.0))
        w = draw({**plain, "layout": "dense"}, n, k, std=k**-0.5, salt=2)
        b = draw({**plain, "layout": "dense"}, n, salt=3) if call["bias"] else None
        layer = PackedLinear(w, b, weights=weights)
        exact = products.exact(x, layer, call["activation"], residual, weights)
        # What the terms of a sum are rounded to, however much of them cancels; K of them one after another, at random.
        terms = F.linear(x.abs(), layer.matrix().abs(), None if b is None else b.abs()).max()
        off = terms * (2.0**-9 if weights == "bfloat16" else 2.0**-24 * (2 + k**0.5 / 4))
        if weights == "int8":  # a level halfway between two may be either
            off += x.abs().max() / 127 * layer.matrix().abs().max()
        naive = exact.float() + off
        with running_on(backend):
            got = linear(x, layer, activation=call["activation"], residual=residual)
        assert_matches(got, exact, naive)

    calls = {
        **common,
        "rows": st.sampled_from([1, 2, 3, 5, 6, 7, 12, 16, 17, 31, 32, 33, 48, 64, 95, 96, 97, 100, 390]),
        "n": st.sampled_from([1, 3, 16, 63, 64, 65, 130, 200]),
        "k": st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 200, 321]),
        "zeros": st.sampled_from([0.0, 0.0, 0.3, 0.6, 0.95]),  # columns of them
        "weights": st.sampled_from([*WEIGHTS]),
        "activation": st.sampled_from([*products.ACTIVATIONS]),
        "residual": st.booleans(),
        "bias": st.booleans(),
    }
    fuzz.run(st.fixed_dictionaries(calls), check, 2 * EXAMPLES[backend])


@any_backend
def test_linear_argmax(backend):
    def check(call):
        n, k = call["n"], call["k"]
        plain = {**call, "dtype": "float32"}
        dense = {**plain, "layout": "dense"}
        x, w = draw(plain, call["rows"], k), draw(dense, n, k, std=k**-0.5, salt=1)
        if call["tails"]:
            x, w = x * draw(dense, *x.shape, salt=2).mul(2).exp(), w * draw(dense, n, k, salt=3).mul(2).exp()
        if call["ties"]:
            w = w[:1] + call["ties"] * draw(dense, n, 1, salt=4) * w[:1]
        bias = draw(dense, n, salt=5) if call["bias"] else None
        with running_on(backend):
            largest.assert_found(x * call["size"], ScreenedLinear(PackedLinear(w, bias)))

    calls = {
        **common,
        "rows": st.sampled_from([1, 2, 3, 4, 5, 9]),
        "n": st.sampled_from([1, 3, 63, 64, 65, 130, 1000]),
        "k": st.sampled_from([1, 2, 15, 16, 17, 64, 65, 200, 600]),
        "tails": st.booleans(),
        "ties": st.sampled_from([0.0, 0.0, 1e-3, 1e-6, 1e-8]),
        "bias": st.booleans(),
        "size": st.sampled_from([1.0, 1.0, 1e-12, 1e12]),
    }
    fuzz.run(st.fixed_dictionaries(calls), check, EXAMPLES[backend])


@any_backend
def test_log_softmax_top_k(backend):
    def check(call):
        beams = call["beams"]
        k = min(call["k"], beams * call["columns"])
        logits = draw(call, beams * call["groups"], call["columns"], std=call["std"])
        # Without an addend the log-probability of a likely word is a small number, all of whose digits may cancel.
        addend = draw({**call, "dtype": "float32", "layout": "dense"}, len(logits), mean=-8.0)
        top_k.assert_right(backend, logits, k, beams=beams, addend=addend)

    calls = {
        **common,
        "groups": st.integers(1, 4),
        "beams": st.sampled_from([1, 1, 2, 4, 5]),
        "columns": st.one_of(columns, st.sampled_from([4097, 9000])),
        "k": st.sampled_from([1, 2, 5, 8, 17, 33]),
        "std": st.sampled_from([0.5, 2.0, 20.0]),
    }
    fuzz.run(st.fixed_dictionaries(calls), check, EXAMPLES[backend])
