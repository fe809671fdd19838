"""The page of attention heads as text: one file, of no more than it needs, that no token can break out of."""

from __future__ import annotations

import base64
import html
import json
import re
import sys
from html.parser import HTMLParser

import numpy
import pytest
import torch

from fused_transformer import AttentionMaps, show
from tests.transformer.show_cases import ENGLISH, FRENCH, ODD, made_up


class Elements(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_the_weights_labels_and_view():
    maps = made_up()
    data = data_of(show.heads(maps, attention="Input - Output", layer=-2, heads=[2, 0], token="ne").html)
    assert tuple(data["source"]) == ENGLISH and tuple(data["target"]) == FRENCH
    assert data["view"] == {"kind": "encoder_decoder", "layer": 0, "heads": [0, 2], "token": 2}
    assert [*data["kinds"]] == ["encoder_self", "encoder_decoder", "decoder_self"]
    for kind, held in data["kinds"].items():
        shape = [held[axis] for axis in ("layers", "heads", "rows", "columns")]
        levels = numpy.frombuffer(base64.b64decode(held["weights"]), dtype=numpy.uint8).reshape(shape)
        exact = maps.weights(kind)
        assert list(exact.shape) == shape
        assert (torch.tensor(levels / 255.0) - exact).abs().max() <= 0.5 / 255 + 1e-6


def test_a_page_of_twenty_tokens_is_small_and_refers_to_nothing():
    maps = made_up([f"▁token{i}" for i in range(20)], ["<s>", *(f"▁jeton{i}" for i in range(20))], layers=6, heads=8)
    page = show.heads(maps).html
    assert len(page.encode()) < 150_000
    elements = Elements(page)
    for tag, attributes in elements.tags:
        assert not {"src", "srcset", "action", "data"} & attributes.keys(), tag
        assert attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in page, "the browser itself would refuse"


def test_no_token_breaks_out_of_the_page():
    plain, odd = (Elements(show.heads(made_up(labels, ("<s>", *labels))).html) for labels in (ENGLISH, ODD))
    kinds = [[(tag, attributes.keys()) for tag, attributes in page.tags] for page in (plain, odd)]
    assert kinds[0] == kinds[1], "tokens make no elements"
    page = show.heads(made_up(ODD, ("<s>", *ODD))).html
    assert tuple(data_of(page)["source"]) == ODD
    assert data_of(page)["source"][0].startswith("<script>") and page.count("<script>") == 1
    title = show.heads(made_up(), title="</title><script>$data").html
    assert "<title>&lt;/title&gt;&lt;script&gt;$data</title>" in title


def test_jupyter_gets_a_frame_with_the_page(tmp_path):
    heads = show.heads(made_up(ODD, ("<s>", *ODD)))
    ((tag, attributes),) = Elements(heads._repr_html_()).tags
    assert tag == "iframe" and attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == heads.html
    assert heads.save(tmp_path / "odd.html") == tmp_path / "odd.html"
    written = (tmp_path / "odd.html").read_text(encoding="utf-8")
    assert written == heads.html and html.escape(ODD[0]) in written


def test_the_page_needs_no_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    heads = show.heads(made_up())
    heads.save(tmp_path / "heads.html")
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib.*pip install 'fused-transformer\[show\]'"):
        heads.save(tmp_path / "heads.png")


def test_maps_of_an_encoder_alone_have_no_menu_of_the_rest():
    maps = made_up()
    alone = show.heads(AttentionMaps(ENGLISH, encoder_self=maps.encoder_self))
    assert [*data_of(alone.html)["kinds"]] == ["encoder_self"]
    decoder = show.heads(AttentionMaps(target=FRENCH, decoder_self=maps.decoder_self), token=1)
    assert decoder.kind == "decoder_self" and data_of(decoder.html)["view"]["token"] == 1


def test_what_is_not_there_cannot_be_shown_first():
    maps = made_up()
    for options, message in (
        ({"attention": "output"}, "attention must be one of 'encoder_self', 'encoder_decoder', 'decoder_self', 'all'"),
        ({"layer": 2}, "layer must be between 0 and 1, or negative to count from the last, got 2"),
        ({"heads": [0, 3]}, r"heads must be different numbers between 0 and 2, got \[0, 3\]"),
        ({"heads": []}, r"heads must be different numbers between 0 and 2, got \[\]"),
        ({"token": "dog"}, "there is no token 'dog' among the queries: The animal"),
        ({"token": 6}, "token must be between 0 and 5, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            show.heads(maps, **options)
    with pytest.raises(TypeError, match=r"of a list take one: show.heads\(maps\[0\]\)"):
        show.heads([maps])
    with pytest.raises(ValueError, match="attention must be one of 'encoder_self', got 'all'"):
        show.heads(AttentionMaps(ENGLISH, encoder_self=maps.encoder_self), attention="all")
    assert show.heads(made_up(ODD, FRENCH), token="it").token == ODD.index("▁it")
    assert show.heads(maps, attention="ALL", token="l'a").token == len(ENGLISH) + 3
