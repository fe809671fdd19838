"""What `python -m bench` runs: rows by --op, --shape and --quick, alternatives by --peers; unknown names are errors."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import backends, baselines, packages, peers, selection, shapes
from bench.agreement import agree
from bench.timing import context_of
from fused_transformer.kernels import layer_norm
from fused_transformer.kernels._dispatch import forced_backend

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
ROOT = Path(__file__).parents[1]


class Keeper:
    """What pytest would run."""

    def __init__(self):
        self.rows: list[tuple[str, str, str]] = []

    def pytest_collection_finish(self, session):
        self.rows += [(x.path.name, selection.benchmark_of(x), selection.row_name(x)) for x in session.items]


def collected(*options: str) -> tuple[int, list[tuple[str, str, str]]]:
    """The exit status, and file, benchmark and name of the rows that would run; nothing runs."""
    keeper = Keeper()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest-benchmark's, under xdist, that it will not time: nor shall it
        code = pytest.main(command.pytest_arguments(["--collect-only", "-qq", *options]), plugins=[keeper])
    return int(code), keeper.rows


def test_quick_leaves_out_no_benchmark():
    code, rows = collected("--quick")
    assert code == 0
    assert {benchmark for _, benchmark, _ in rows} == {x for names in selection.groups().values() for x in names}

    def names(wanted: str) -> list[str]:
        return [name for _, benchmark, name in rows if benchmark == wanted]

    assert names("add_layer_norm") == ["transformer-base M4096 E512"]  # of four shapes
    assert len(names("encoder_layer")) == 2  # forward, and forward with backward
    assert names("linear_cross_entropy_forward_backward") == ["transformer-small N2048 E256 V8000"]  # not the first


def test_op_and_shape_together():
    code, rows = collected("--op", "attention,add_layer_norm", "--shape", "WMT")
    assert code == 0 and len(rows) == 2
    assert all(file == "bench_attention.py" and "wmt" in name for file, _, name in rows)


def test_a_shape_that_no_row_has_is_refused_with_those_there_are(capsys):
    code, _ = collected("--op", "layer_norm", "--shape", "nosuchshape")
    said = "".join(capsys.readouterr())
    assert code != 0 and "no row has 'nosuchshape' in its name; there are transformer-base M4096 E512; " in said
    assert "bert" not in said.partition("no row has")[2]  # of the op that was asked for


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--op", "attention,atention"], ["no benchmark is named atention;", "decode_attention", "training_step"]),
        (["--peers", "sdpa,sdpd"], ["no alternative is named sdpd;", "flash-attn", "sdpa cudnn"]),
        (["--op", "layer-norm"], ["no benchmark is named layer-norm", "layer_norm"]),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(options, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command.pytest_arguments(options)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--op", value) for value in ("", ",", " ")),
        *(("--peers", value) for value in ("", ",")),
        ("--shape", ""),
        *(("--row-seconds", value) for value in ("-1", "0", "nan", "inf", "soon", "")),
    ],
)
def test_values_that_would_run_nothing_or_for_no_time_are_refused(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        command.pytest_arguments([option, value])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and f"argument {option}: must be " in told and f"got {value!r}" in told
    bare = [*command.PYTEST, "--collect-only", option, value, str(command.HERE)]  # pytest alone, without -m bench
    assert pytest.main(bare) == pytest.ExitCode.USAGE_ERROR


def test_part_of_the_suite_writes_only_where_it_is_told():
    def folder(*options: str) -> str | None:
        made = command.pytest_arguments(options)
        return made[made.index("--results") + 1] if "--results" in made else None

    assert folder() == str(ROOT / "bench" / "results")
    assert folder("--row-seconds", "1") == str(ROOT / "bench" / "results")
    parts = (["--quick"], ["--op", "model"], ["--shape", "wmt"], ["--peers", "sdpa"], ["-k", "causal"], ["-kcausal"])
    for part in (*parts, ["bench/bench_model.py"]):
        assert folder(*part) is None, part
        assert folder(*part, "--results", "there") == "there"


def test_what_is_not_ours_goes_to_pytest():
    made = command.pytest_arguments(["-k", "attention and causal", "-x", "--quick"])
    assert made[-3:] == ["-k", "attention and causal", "-x"] and "--quick" in made[:-3]


def test_a_word_asks_for_all_of_its_kind():
    labels = [peer.label for peer in peers.PEERS]
    asked = [label for label in labels if peers.wanted(label, ["sdpa", "flex"], quick=True)]
    assert asked == ["sdpa", "sdpa flash", "sdpa math", "sdpa efficient", "sdpa cudnn", "flex"]
    assert [label for label in labels if peers.wanted(label, ["sdpa math"], quick=False)] == ["sdpa math"]
    assert "compile" in [label for label in labels if peers.wanted(label, None, quick=False)]
    unasked = {label for label in labels if not peers.wanted(label, None, quick=True)}
    assert unasked == {"compile", "flex"}  # a compiler would take most of the two minutes
    assert peers.unknown(["SDPA", "torch.nn"]) == [] and peers.unknown(["sd", ""]) == ["sd", ""]


def test_what_is_not_installed_is_listed_with_its_pip_line(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    lines = peers.absent("cuda")
    for package in ("flash-attn", "xformers", "liger-kernel", "ctranslate2"):
        assert any(line.startswith(f"not installed: {package} ") and line.endswith(f"pip install {package}")
                   for line in lines)  # fmt: skip
    assert not any("sdpa" in line for line in lines)
    assert [line.split()[2] for line in peers.absent("cuda", ["xformers"])] == ["xformers"]
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert not any("pip install" in line for line in peers.absent("cuda"))
    assert "not on this device: flash-attn runs on a GPU alone" in peers.absent("cpu")
    assert peers.runs("flash-attn", "cuda") and not peers.runs("flash-attn", "cpu") and peers.runs("naive", "cpu")


def test_packages_are_baselines_where_they_are_installed_and_run(monkeypatch):
    """None of them can run here: what is asked is which rows they would be in, and that a failing one only refuses."""

    def plain(function):
        return function

    makes = {
        "flash-attn": lambda device: packages.attention(device, plain, causal=True),
        "xformers": lambda device: packages.attention(device, plain, causal=False),
        "liger-kernel": lambda device: packages.add_layer_norm(device),
        "liger-kernel ": lambda device: packages.linear_cross_entropy(device, plain, label_smoothing=0.1),
    }
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    for label, make in makes.items():
        assert make("cpu") == {} and label.strip() in make("cuda")
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        packages.attention("cuda", plain, causal=True)["flash-attn"](*torch.randn(3, 1, 2, 4, 8))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert all(make("cuda") == {} for make in makes.values())


def test_whatever_a_package_raises_is_its_refusal():
    def broken(x):
        raise TypeError("takes half precision")

    with pytest.raises(RuntimeError, match="TypeError: takes half precision"):
        peers.guarded(broken)(1)
    assert peers.guarded(abs)(-1) == 1


def test_ours_on_each_backend_that_it_did_not_choose(monkeypatch):
    """On a GPU that is Triton beside CUDA; here, with the reference in its place, what it is made of."""
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    assert backends.others(layer_norm, {"cpu"}, "fused", "cpu") == {}
    monkeypatch.setitem(backends.COMPILED, "cpu", ("cpu", "reference", "cuda"))
    found = backends.others(layer_norm, {"cpu"}, "fused", "cpu")
    assert list(found) == ["fused reference", "fused cuda"]
    with context_of(found["fused reference"]):
        assert forced_backend() == "reference"
    assert forced_backend() is None
    refused: dict[str, str] = {}
    found |= {"naive": lambda x, w, b: torch.nn.functional.layer_norm(x, (8,), w, b), "fused": layer_norm}
    assert agree(found, (x, weight, bias), None, None, "fused", refused) == {"cpu"}
    assert "fused reference" in found and "fused cuda" not in found
    assert refused["fused cuda"].startswith("cuda: ")


def test_lengths_of_wmt():
    lengths = baselines.sentence_lengths(shapes.WMT.batch, shapes.WMT.keys, mix="wmt")
    assert lengths.max() == shapes.WMT.keys and lengths.min() >= 1
    assert lengths.double().mean() == pytest.approx(30, abs=1)
    assert lengths.double().median() < lengths.double().mean() - 3  # a long tail, so that padding is most of a batch
    even = baselines.sentence_lengths(64, 100)
    assert even.double().mean() == pytest.approx(60, abs=1) and even.max() == 100
