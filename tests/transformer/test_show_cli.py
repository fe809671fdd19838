"""`show` on the command line, with a model that train's own checkpoint holds."""

from __future__ import annotations

import json
import re
import sys

import pytest

from fused_transformer import __main__, cli_show
from fused_transformer.checkpoint import save_checkpoint
from fused_transformer.tokenizer import Tokenizer
from tests.transformer.models import tiny
from tests.transformer.texts import parallel_lines

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    source, target = parallel_lines(60)
    tokenizer = Tokenizer.learn([*source, *target], 400)
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    save_checkpoint(path, tiny(source_vocab_size=len(tokenizer)), tokenizer)
    return path


@pytest.fixture
def drawn(tmp_path, capsys, monkeypatch):
    """Runs `show ...` in a folder of its own; what was written."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = __main__.main(["show", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (status, err) == (0, ""), err
        return (tmp_path / out.strip()).read_text(encoding="utf-8")

    return run


def test_heads_of_a_sentence(checkpoint, drawn):
    page = drawn("heads", "--model", checkpoint.parent, "un chien voit", "--target", "dog sees", "-o", "it.html",
                 "--layer", "0", "--heads", "2,0", "--attention", "Output - Output", "--token", "dog")  # fmt: skip
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["source"] == ["▁un", "▁chien", "▁voit", "</s>"] and data["target"] == ["<s>", "▁dog", "▁sees", "</s>"]
    assert data["view"] == {"kind": "decoder_self", "layer": 0, "heads": [0, 2], "token": 0}
    assert "<title>un chien voit</title>" in page
    own = drawn("heads", "--model", checkpoint, "un chien")
    assert json.loads(re.search(r'id="data">(.*?)</script>', own)[1])["target"][0] == "<s>"


def test_every_picture_can_be_drawn(checkpoint, drawn):
    pytest.importorskip("matplotlib")
    model = ("--model", checkpoint)
    assert ">▁chien<" in drawn("heads", *model, "un chien", "--target", "dog", "--grid", "-o", "grid.svg")
    tree = drawn("beam", *model, "un chien", "--beam-size", "2", "--max-length", "3")
    assert ">dropped<" in tree and tree.count("<text") > 12
    both = drawn("distributions", *model, "un chien", "--target", "dog", "--compare", checkpoint)
    assert ">▁dog<" in both and ">target<" in both and ">best.safetensors<" in both
    assert "interleaved: sines" in drawn("positions", *model, "--length", "5")
    assert "concat_paper: all" in drawn("positions", "--layout", "concat_paper", "--width", "6", "-o", "p.html")
    masks = drawn("masks", "--causal", "top_left", "--window", "2", "0", "--lengths", "8,3", "--length", "8")
    assert ">all together<" in masks and ">sequence 1, query<" in masks


def test_what_is_wrong_is_said_in_a_line(checkpoint, capsys, tmp_path):
    model = ("--model", str(checkpoint), "-o", str(tmp_path / "x.html"))
    for arguments, message in (
        (("heads", *model, "un", "--layer", "9"), "layer must be between 0 and 1"),
        (("heads", *model, " "), "the sentence has no words"),
        (("heads", "--model", str(tmp_path / "none"), "un"), "there is no checkpoint at"),
        (("beam", *model, "un", "--beam-size", "1"), "beam_size must be above 1"),
        (("positions", *model, "--layout", "interleaved"), "leave them out beside --model"),
        (("masks", "--length", "0"), "length and keys must be at least 1"),
        (("masks", "-o", str(tmp_path / "x.jpeg")), "must end with .html"),
    ):
        assert cli_show.main(arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("show: ") and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        cli_show.main(["heads", *model, "un", "--heads", "all"])
    assert "'all' is no list of numbers like 0,3" in capsys.readouterr().err


def test_without_matplotlib_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert __main__.main(["show", "positions"]) == 1
    assert "pip install 'fused-transformer[show]'" in capsys.readouterr().err
