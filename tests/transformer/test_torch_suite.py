"""PyTorch's own samples as judge of our classes: torch.testing's module_db, which its test/test_modules.py runs.

The wheel ships the samples (constructor, inputs, reference function), not the test files. What those files ask of
nn.MultiheadAttention beside is asked in test_torch_multihead.py, in our words; test_torch_files.py runs the files
themselves where they are, and lists what is waived.

Of test/test_modules.py's tests there is none here of second derivatives (the ops have first ones) and none of memory
formats.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from fused_transformer import nn as ours_nn
from tests.oracle import assert_matches

pytest.importorskip("expecttest", reason="torch.testing's module_db needs expecttest")

KINDS = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
    "LayerNorm",
    "RMSNorm",
)
CONTAINERS = ("TransformerEncoder", "TransformerDecoder")
THEIR_DECODER = nn.TransformerDecoder
SAMPLES = {"MultiheadAttention": 64, "Transformer": 64}  # some of those known to be there

pytestmark = [
    pytest.mark.usefixtures("one_thread", "in_place"),
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.parametrize("training", [True, False], ids=["train", "eval"]),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),  # torch's own encoder, of its own samples
]


@pytest.fixture
def in_place(monkeypatch):
    """Samples that hold a module (TransformerEncoder's hold a layer) hold ours."""
    for kind in KINDS:
        monkeypatch.setattr(nn, kind, getattr(ours_nn, kind))


@pytest.fixture(scope="module")
def module_db():
    """torch.testing's table, imported without what that import would do to the tests after it."""
    freeze = torch.backends.disable_global_flags
    torch.backends.disable_global_flags = lambda: None
    try:
        table = importlib.import_module("torch.testing._internal.common_modules").module_db
    finally:
        torch.backends.disable_global_flags = freeze
    found = {info.module_cls.__name__: info for info in table if info.module_cls.__name__ in KINDS}
    layers = found["TransformerDecoderLayer"]
    assert "TransformerDecoder" not in found, "torch has samples of its own now"
    found["TransformerDecoder"] = SimpleNamespace(
        module_cls=THEIR_DECODER, module_inputs_func=lambda *args, **options: in_a_stack(layers, *args, **options)
    )
    return found


def in_a_stack(layers, _info, *, device: str, dtype: torch.dtype, **options) -> list:
    """Samples of nn.TransformerDecoder, of which torch has none, made of the layer's as nn.TransformerEncoder's are."""
    samples = layers.module_inputs_func(layers, device=device, dtype=dtype, **options)
    for sample in samples:
        constructor = sample.constructor_input
        layer = nn.TransformerDecoderLayer(*constructor.args, **constructor.kwargs, device=device, dtype=dtype)
        constructor.args, constructor.kwargs = (layer, 2), {}
        sample.reference_fn = None  # it is a layer's
    return samples


class Samples:
    def __init__(self, info, kind: str, training: bool, dtype: torch.dtype):
        self.ours, self.theirs = getattr(ours_nn, kind), info.module_cls
        self.training, self.dtype = training, dtype
        self.found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
        assert len(self.found) >= SAMPLES.get(kind, 6)

    def __iter__(self) -> Iterator:
        for sample in self.found:
            with naming(sample):
                yield sample

    def module(self, sample, kind: type[nn.Module] | None = None, **factory) -> nn.Module:
        constructor = sample.constructor_input
        if self.ours.__name__ not in CONTAINERS:  # of a layer that has its dtype
            factory = {"device": "cpu", "dtype": self.dtype} | factory
        return (kind or self.ours)(*constructor.args, **constructor.kwargs, **factory).train(self.training)

    def call(self, module: nn.Module, sample, convert=lambda x: x) -> list[Tensor]:
        arguments = (sample.forward_input.args, sample.forward_input.kwargs)
        args, kwargs = tree_map_only(Tensor, convert, arguments)
        return tree_flatten(module(*args, **kwargs))[0]


@contextmanager
def naming(sample):
    """An error in the block says which sample it is about."""
    try:
        yield
    except AssertionError as error:
        arguments = (sample.constructor_input, sample.forward_input)
        said = [f"{x.args} {x.kwargs}" for x in arguments]
        raise AssertionError(
            f"{error}\nof the sample {sample.desc!r}: constructor {said[0]}, forward {said[1]}"
        ) from error


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def samples(request, module_db, kind, training) -> Samples:
    return Samples(module_db[kind], kind, training, request.param)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def results(samples: Samples, module: nn.Module, sample, convert=lambda x: x) -> list[Tensor]:
    """The outputs, then the gradients of inputs and parameters for the same random upstream gradients."""
    leaves: list[Tensor] = []

    def converted(x: Tensor) -> Tensor:
        x = convert(leaf(x)).detach().requires_grad_(x.requires_grad)
        leaves.append(x)
        return x

    outputs = samples.call(module, sample, converted)
    wanted = [x for x in leaves if x.requires_grad] + [p for _, p in sorted(module.named_parameters())]
    generator = torch.Generator().manual_seed(20170612)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    return [x.detach() for x in outputs] + [
        torch.zeros_like(x) if gradient is None else gradient
        for x, gradient in zip(wanted, torch.autograd.grad(outputs, wanted, upstream, allow_unused=True), strict=True)
    ]


def test_forward_is_the_reference_functions(samples):
    for sample in samples:
        module = samples.module(sample)
        got = samples.call(module, sample)
        if sample.reference_fn is not None:
            expected = sample.reference_fn(module, *sample.forward_input.args, **sample.forward_input.kwargs)
            torch.testing.assert_close(got, tree_flatten(expected)[0])
        str(module)


def test_torchs_class_with_the_same_state_dict_gives_the_same(samples):
    for sample in samples:
        theirs, ours = samples.module(sample, samples.theirs), samples.module(sample)
        assert type(ours) is not type(theirs) and isinstance(ours, samples.theirs)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.2)  # inputs go up to 9: scores in the hundreds would be told apart by ulps
        ours.load_state_dict(theirs.state_dict())
        expected = results(samples, theirs, sample)
        for parameter in theirs.parameters():
            nn.init.zeros_(parameter)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(results(samples, theirs, sample), expected, rtol=0, atol=0)
        got = results(samples, ours, sample)
        if samples.dtype == torch.float64:
            torch.testing.assert_close(got, expected)
            continue
        exact = results(samples, theirs.double(), sample, lambda x: x.double() if x.is_floating_point() else x)
        # All numbers together: of the few in one of these tensors, torch's largest error may happen to be small. Room
        # as in test_nn_properties.py: weights made again from lse carry its rounding, and there are many samples.
        together = [torch.cat([x.flatten() for x in each]) for each in (got, exact, expected)]
        assert_matches(*together, factor=8, ulps=64)


@pytest.mark.parametrize("samples", [torch.float64], ids=["float64"], indirect=True)
def test_gradients_are_numerical_ones(samples):
    for sample in samples.found[::7]:
        with naming(sample):
            module = samples.module(sample)
            names = [name for name, _ in module.named_parameters()]
            arguments, spec = tree_flatten((sample.forward_input.args, sample.forward_input.kwargs))
            floats = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.requires_grad]

            def call(*leaves, module=module, names=names, arguments=arguments, spec=spec, floats=floats):
                filled = list(arguments)
                for index, x in zip(floats, leaves, strict=False):
                    filled[index] = x
                args, kwargs = torch.utils._pytree.tree_unflatten(filled, spec)
                parameters = dict(zip(names, leaves[len(floats) :], strict=True))
                out = torch.func.functional_call(module, parameters, args, kwargs)
                return tuple(tree_flatten(out)[0])

            leaves = [arguments[i].detach().requires_grad_() for i in floats] + list(module.parameters())
            assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("samples", [torch.float32], ids=["float32"], indirect=True)
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_copies_give_the_same(samples, way):
    def copied(module):
        if way == "deepcopy":
            return copy.deepcopy(module)
        if way == "pickle":
            return pickle.loads(pickle.dumps(module))
        file = io.BytesIO()
        torch.save(module, file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    for sample in samples.found[::3]:
        module = samples.module(sample)
        twin = copied(module)
        assert type(twin) is type(module) and not {*twin.parameters()} & {*module.parameters()}
        torch.testing.assert_close(samples.call(twin, sample), samples.call(module, sample), rtol=0, atol=0)


def test_inputs_that_are_not_contiguous_give_the_same(samples):
    def spread(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape, 2), True if x.dtype == torch.bool else torch.nan, dtype=x.dtype)
        wide[..., 1] = x
        assert x.numel() < 2 or not wide[..., 1].is_contiguous()
        return wide[..., 1]

    for sample in samples:
        module = samples.module(sample)
        torch.testing.assert_close(results(samples, module, sample, spread), results(samples, module, sample))


def test_train_and_eval_and_no_grad_give_the_same(samples):
    for sample in samples:
        module = samples.module(sample)
        expected = samples.call(module, sample)
        module.train(not samples.training)
        torch.testing.assert_close(samples.call(module, sample), expected, rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(samples.call(module, sample), expected)


@pytest.mark.parametrize("samples", [torch.float32], ids=["float32"], indirect=True)
def test_the_meta_device_and_dtypes_of_the_constructor(samples, kind):
    if kind in CONTAINERS:
        pytest.skip(f"nn.{kind}'s constructor takes neither device nor dtype")
    for sample in samples:
        real = samples.module(sample)
        module = samples.module(sample, device="meta")
        assert all(p.is_meta and p.dtype == samples.dtype for p in module.parameters())
        outputs = samples.call(module, sample, lambda x: x.detach().to("meta"))
        expected = samples.call(real, sample)
        assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in expected]
        assert all(x.is_meta for x in outputs)
        module.to_empty(device="cpu").load_state_dict(real.state_dict())
        torch.testing.assert_close(samples.call(module, sample), expected, rtol=0, atol=0)
