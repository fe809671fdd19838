"""Which backend runs, and what is said where none or another does. The ops here are made up, on disk."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import NamedTuple

import pytest
import torch

from fused_transformer.kernels import _cuda, _dispatch
from fused_transformer.kernels._dispatch import BACKENDS, OPS, Op, use_backend

TAKES_ALL = "def refuses(*args):\n    return None\n"
REFUSES = "def refuses(*args):\n    return 'x must be on a CUDA device, got cpu'\n"
REFUSES_NEGATIVE = "def refuses(x):\n    return 'x must not be negative' if x < 0 else None\n"
COUNTS_IMPORTS = "import builtins\nbuiltins.tries_of_a_backend += 1\nimport a_library_that_nobody_has\n"
_names = itertools.count()


@pytest.fixture
def make_op(tmp_path, monkeypatch):
    """make_op(cuda=text, ...) -> an Op whose backends are modules with those texts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_dispatch, "OPS", dict(OPS))  # the made-up ones are forgotten again

    def make(order=BACKENDS, **modules):
        package = f"made_up_op_{next(_names)}"
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        for backend, text in modules.items():
            (tmp_path / package / f"{backend}.py").write_text(text)
        return Op(package, order)

    yield make
    for name in [name for name in sys.modules if name.startswith("made_up_op_")]:
        del sys.modules[name]


def chosen(op, *args):
    return op.pick(*args).__name__.rpartition(".")[2]


def test_the_first_that_does_not_refuse_is_taken(make_op):
    assert chosen(make_op(cuda=TAKES_ALL, triton=TAKES_ALL, cpu=TAKES_ALL, reference=TAKES_ALL)) == "cuda"
    assert chosen(make_op(cuda=REFUSES, triton=REFUSES, cpu=TAKES_ALL, reference=TAKES_ALL)) == "cpu"
    assert chosen(make_op(reference=TAKES_ALL)) == "reference"


def test_the_order_is_the_ops_own(make_op):
    op = make_op(("triton", "cuda", "reference"), cuda=TAKES_ALL, triton=TAKES_ALL, reference=TAKES_ALL)
    assert chosen(op) == "triton"


def test_arguments_may_call_for_another_first(make_op):
    op = make_op(cuda=TAKES_ALL, triton=REFUSES_NEGATIVE, reference=TAKES_ALL)
    op.first = lambda x: "triton" if x % 2 else None
    assert [chosen(op, x) for x in (1, 2, -1)] == ["triton", "cuda", "cuda"]
    with use_backend("cuda"):
        assert chosen(op, 1) == "cuda"


def test_decode_attention_on_hopper_is_tritons_in_16_bits(monkeypatch):
    class OnAGpu(NamedTuple):
        dtype: torch.dtype
        is_cuda: bool = True
        device: torch.device = torch.device("cuda", 0)

    for capability, dtype, expected in (
        ((9, 0), torch.bfloat16, "triton"),
        ((9, 0), torch.float16, "triton"),
        ((9, 0), torch.float32, None),
        ((8, 0), torch.bfloat16, None),
    ):
        monkeypatch.setattr(_cuda, "capability", lambda device, capability=capability: capability)
        assert OPS["decode_attention"].first(OnAGpu(dtype)) == expected
    assert OPS["decode_attention"].first(torch.zeros(2, dtype=torch.bfloat16)) is None


def test_serves_tells_a_kernel_from_the_reference(make_op):
    op = make_op(("cuda", "cpu", "reference"), cpu=REFUSES_NEGATIVE, reference=TAKES_ALL)
    assert op.serves(1) and not op.serves(-1)
    for backend, expected in (("cpu", True), ("cuda", False), ("reference", True), ("triton", False)):
        with use_backend(backend):
            assert op.serves(1) == expected


def test_each_call_is_judged_by_its_own_arguments(make_op):
    op = make_op(cpu=REFUSES_NEGATIVE, reference=TAKES_ALL)
    assert [chosen(op, x) for x in (1, -1, 1)] == ["cpu", "reference", "cpu"]


def test_a_forced_backend_runs_even_if_another_comes_first(make_op):
    op = make_op(cuda=TAKES_ALL, cpu=TAKES_ALL, reference=TAKES_ALL)
    for name in ("cuda", "cpu", "reference"):
        with use_backend(name):
            assert chosen(op) == name
    assert chosen(op) == "cuda"


def test_a_forced_backend_that_refuses_raises_and_nothing_else_runs(make_op):
    op = make_op(cuda=REFUSES, reference=TAKES_ALL)
    with use_backend("cuda"), pytest.raises(NotImplementedError) as error:
        op.pick()
    assert op.name in str(error.value)
    assert "cuda: x must be on a CUDA device, got cpu" in str(error.value)
    assert "reference" not in str(error.value)


def test_where_all_refuse_each_reason_is_told(make_op):
    op = make_op(("cuda", "cpu"), cuda=REFUSES, cpu=REFUSES_NEGATIVE)
    with pytest.raises(NotImplementedError) as error:
        op.pick(-1)
    assert str(error.value).splitlines()[1:] == [
        "  cuda: x must be on a CUDA device, got cpu",
        "  cpu: x must not be negative",
    ]


def test_why_not_tells(make_op):
    op = make_op(("cuda", "cpu", "reference"), cuda="import a_library_that_nobody_has\n", reference=TAKES_ALL)
    assert op.why_not("reference") is None
    assert op.why_not("cpu") == "not written yet"
    assert op.why_not("cuda") == "not importable here: No module named 'a_library_that_nobody_has'"
    assert op.why_not("triton") == f"{op.name} has no backend of that name"


def test_a_failed_import_is_tried_once_and_remembered(make_op, monkeypatch):
    monkeypatch.setattr("builtins.tries_of_a_backend", 0, raising=False)
    op = make_op(cuda=COUNTS_IMPORTS, reference=TAKES_ALL)
    import builtins

    for _ in range(3):
        assert chosen(op) == "reference"
    assert builtins.tries_of_a_backend == 1
    with use_backend("cuda"), pytest.raises(NotImplementedError, match="a_library_that_nobody_has"):
        op.pick()
    assert builtins.tries_of_a_backend == 1


def test_an_error_that_is_no_failed_import_is_not_hidden(make_op):
    op = make_op(cuda="raise RuntimeError('the driver is on fire')\n", reference=TAKES_ALL)
    with pytest.raises(RuntimeError, match="on fire"):
        op.pick()


def test_an_unknown_backend_is_refused_at_once():
    refusal = pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, reference or None, got 'gpu'")
    with refusal, use_backend("gpu"):
        pytest.fail("the block must not run")


def test_blocks_nest_and_None_gives_the_choice_back(make_op):
    op = make_op(cuda=TAKES_ALL, cpu=TAKES_ALL, reference=TAKES_ALL)
    with use_backend("reference"):
        with use_backend("cpu"):
            assert chosen(op) == "cpu"
            with use_backend(None):
                assert chosen(op) == "cuda"
            assert chosen(op) == "cpu"
        assert chosen(op) == "reference"
    assert chosen(op) == "cuda"


def test_an_exception_ends_the_block(make_op):
    op = make_op(cuda=TAKES_ALL, cpu=TAKES_ALL)
    with pytest.raises(ZeroDivisionError), use_backend("cpu"):
        raise ZeroDivisionError
    assert chosen(op) == "cuda"


def test_another_thread_chooses_for_itself(make_op):
    op = make_op(cuda=TAKES_ALL, cpu=TAKES_ALL)
    seen = []
    with use_backend("cpu"):
        thread = threading.Thread(target=lambda: seen.append(chosen(op)))
        thread.start()
        thread.join()
        assert chosen(op) == "cpu"
    assert seen == ["cuda"]


@pytest.mark.parametrize("name", OPS)
def test_every_op_ends_with_a_reference_that_refuses_nothing(name):
    op = OPS[name]
    assert set(op.order) <= set(BACKENDS)
    assert op.order[-1] == "reference"
    assert op.why_not("reference", *[None] * 20) is None


@pytest.mark.parametrize(("name", "backend"), [(name, backend) for name in OPS for backend in OPS[name].order])
def test_every_backend_has_the_contracts_three_names(name, backend):
    module = OPS[name].module(backend)
    if isinstance(module, str):
        pytest.skip(module)
    assert callable(module.forward) and callable(module.refuses)
    assert callable(getattr(module, "backward", module.forward))  # absent where the backend is for inference only
