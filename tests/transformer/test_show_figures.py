"""Figures: what is in them, that they are files of their kind, and what they say of themselves in words."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import pytest
import torch

from fused_transformer import show
from fused_transformer.kernels import sinusoidal_positions
from tests.transformer.models import SOURCE, TARGET, tiny
from tests.transformer.show_cases import ENGLISH, FRENCH, ODD, made_up

pytest.importorskip("matplotlib")


def texts(picture) -> list[str]:
    """Every text of its SVG; that it is well-formed XML is checked on the way."""
    root = ElementTree.fromstring(picture.to_bytes("svg"))
    return ["".join(x.itertext()).strip() for x in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("heads", [[1], [0, 2], [0, 1, 2]], ids=str)
def test_links_of_heads_as_a_figure(heads):
    maps = made_up()
    one = show.heads(maps, attention="encoder_decoder", layer=0, heads=heads)
    (axes,) = one.figure().figure.axes
    strong = (maps.encoder_decoder[0, heads] >= 0.02).nonzero().tolist()
    assert len(axes.lines) == len(strong)
    drawn = sorted((round(-line.get_ydata()[0]), round(-line.get_ydata()[1])) for line in axes.lines)
    assert drawn == sorted((row, column) for _, row, column in strong)
    alphas = sorted(line.get_alpha() for line in axes.lines)
    assert alphas == pytest.approx(sorted(float(maps.encoder_decoder[0, heads][tuple(place)]) for place in strong))
    found = texts(one.figure())
    assert [label for label in found if label in FRENCH + ENGLISH] == [*FRENCH[1:], *ENGLISH]
    assert set(map(str, heads)) <= set(found)
    assert (
        show.heads(maps, attention="encoder_decoder", heads=heads, layer=0, token="ne")
        .figure()
        .alternative.count("most to")
        == 1
    )


def test_a_token_alone_has_bands():
    maps = made_up()
    (axes,) = show.heads(maps, layer=1, token="it").figure().figure.axes
    strong = (maps.encoder_self[1, :, 4] >= 0.02).sum()
    assert len(axes.lines) == strong and len(axes.patches) == strong + maps.encoder_self.shape[1]
    assert {round(-line.get_ydata()[0]) for line in axes.lines} == {4}


def test_heads_that_link_are_found_and_drawn_side_by_side():
    tired, wide = made_up(layers=2, heads=4), made_up(layers=2, heads=4)
    for maps, key, weights in ((tired, 1, (0.9, 0.8, 0.2)), (wide, 3, (0.1, 0.7, 0.6))):
        maps.encoder_self[:, :, 4, key] = 0.05
        for (layer, head), weight in zip(((0, 0), (1, 2), (0, 3)), weights, strict=True):
            maps.encoder_self[layer, head, 4, key] = weight
    best, second, *rest = show.linking_heads([(tired, "it", "animal"), (wide, 4, 3)])
    assert best[:2] == (1, 2) and best.weights == pytest.approx((0.8, 0.7))
    assert second[:2] == (0, 3) and second.weights == pytest.approx((0.2, 0.6)) and len(rest) == 6
    assert best.margins == best.weights
    tired.encoder_self[:, :, 4, 3], wide.encoder_self[:, :, 4, 1] = 0.01, 0.02
    tired.encoder_self[1, 2, 4, 3] = 0.7  # a rival beside the right one
    first, *_ = show.linking_heads(
        [show.Link(tired, "it", "animal", "cross"), show.Link(wide, "it", "cross", "animal")]
    )
    assert first[:2] == (0, 3) and first.weights == pytest.approx((0.2, 0.6))
    assert first.margins == pytest.approx((0.19, 0.58))
    one = show.heads(tired, layer=best.layer, heads=[best.head], token="it")
    both = show.side_by_side(one, show.heads(wide, layer=best.layer, heads=[best.head], token="it"))
    assert len(both.figure.axes) == 2
    assert both.alternative.count("Input - Input, layer 1, head 2: it most to ") == 2
    assert texts(both).count("animal") == 4 and texts(one.figure()).count("animal") == 2
    for links, message in (
        ([], "needs one link at least"),
        ([(tired, "it", "street")], "there is no token 'street' among the keys: The animal"),
        ([(tired, 0, 0), (made_up(), 0, 0)], r"maps of one model have as many .* got \[\(2, 4\), \(2, 3\)\]"),
    ):
        with pytest.raises(ValueError, match=message):
            show.linking_heads(links)
    with pytest.raises(ValueError, match=r"attention must be one of .* got 'all'"):
        show.linking_heads([(tired, 0, 0)], attention="all")
    with pytest.raises(ValueError, match="the heads of one sentence at least"):
        show.side_by_side()


def test_a_grid_has_a_map_for_each_layer_and_head():
    maps = made_up(layers=2, heads=3)
    picture = show.heads(maps, attention="decoder_self", heads=[0, 2]).grid()
    images = [axes.images[0].get_array() for axes in picture.figure.axes]
    expected = maps.decoder_self[:, [0, 2]].flatten(0, 1)
    assert len(images) == 4
    for image, weights in zip(images, expected, strict=True):
        torch.testing.assert_close(torch.tensor(image.tolist()), weights)
    assert {"head 0", "head 2", "layer 0", "layer 1", "l'a"} <= set(texts(picture)) and "head 1" not in texts(picture)


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf", ".html", ".SVG"])
def test_odd_tokens_can_be_drawn_and_saved(tmp_path, ending):
    heads = show.heads(made_up(ODD, ("<s>", *ODD)), attention="encoder_self", heads=[0], layer=0)
    path = heads.figure().save(tmp_path / f"odd{ending}")
    data = path.read_bytes()
    kinds = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF", ".html": b"<!doctype html>"}
    assert data.startswith(kinds[ending.lower()]) and data == heads.figure().save(path).read_bytes()
    if ending == ".svg":
        found = texts(heads.figure())
        assert {"<script>alert(1)</script>"[:23] + "…", "&amp;", "$\\alpha$", "(empty)", "␣␣", "🦊"} <= set(found)
    if ending == ".html":
        assert b"<script>" not in data and b"default-src 'none'" in data
        assert not re.search(rb'(?:href|src)="(?!#|data:)', data), "nothing from elsewhere"


def test_files_have_an_ending_that_says_what_they_are(tmp_path):
    with pytest.raises(ValueError, match=r"it\.gif must end with \.html, \.svg, \.png or \.pdf"):
        show.positions(length=2, width=4).save(tmp_path / "it.gif")
    assert show.positions(length=2, width=4)._repr_png_().startswith(b"\x89PNG")


def test_positions_are_the_tables():
    picture = show.positions()
    images = [torch.tensor(axes.images[0].get_array().tolist()) for axes in picture.figure.axes if axes.images]
    torch.testing.assert_close(images[0], sinusoidal_positions(20, 512, layout="concat_t2t"))
    torch.testing.assert_close(images[1], sinusoidal_positions(10, 64, layout="interleaved"))
    model = tiny(positions="concat_paper")
    (axes, _) = show.positions(model, length=7).figure.axes
    expected = sinusoidal_positions(7, 24, layout="concat_paper")
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().tolist()), expected)
    table = torch.randn(3, 5)
    (axes, _) = show.positions(table).figure.axes
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().tolist()), table)
    for arguments, options, message in (
        ((), {"layouts": "learned"}, "layouts must be of 'interleaved', 'concat_t2t', 'concat_paper', got 'learned'"),
        ((), {"length": 0}, "length must be at least 1, got 0"),
        ((tiny(positions=None),), {}, "the model has no positions to draw"),
        ((torch.zeros(3),), {}, r"must be \(L, E\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            show.positions(*arguments, **options)


@torch.no_grad()
def test_distributions_are_the_models(one_thread):
    model, target = tiny(dropout=0.5), torch.tensor([1, 11, 12, 11, 2])
    output = show.output_distributions(model, SOURCE[1, :3], target)
    expected = model.eval()(SOURCE[1:2], target[None, :-1])[0].softmax(-1)
    torch.testing.assert_close(output, expected)
    picture = show.distributions({"model": output, "even": torch.full_like(output, 1 / 31)}, target[1:], most=6)
    wanted, ours, even = picture.figure.axes
    columns = [text.get_text() for text in ours.get_xticklabels()]
    assert columns[:3] == ["11", "12", "2"] and len(columns) == 6
    cells = torch.tensor(ours.images[0].get_array().tolist())
    torch.testing.assert_close(cells, output[:, [int(column) for column in columns]])
    ones = torch.tensor(wanted.images[0].get_array().tolist())
    assert ones.tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert even.images[0].get_array().ravel().tolist() == pytest.approx([1 / 31] * 24)
    assert texts(picture).count("12") == 4, "a column in each panel, and a row in the first"
    assert not {"(empty)", "␣"} & set(texts(picture))
    named = show.distributions(output, target[1:], labels=[f"<{i}>" for i in range(31)], tokens=[11, 30])
    assert {"<11>", "<30>", "<12>", "<2>"} <= set(texts(named)) and "even gives" not in named.alternative
    with pytest.raises(ValueError, match=r"output must be \(3, V\) for a target of 3 tokens, got \(4, 31\)"):
        show.distributions(output, target[2:])
    with pytest.raises(ValueError, match="there is no token 31 in a vocabulary of 31"):
        show.distributions(output, target[1:], tokens=[31])
    with pytest.raises(ValueError, match=r"one sentence each, .* got \(3, 6\) and \(3, 5\)"):
        show.output_distributions(model, SOURCE, TARGET)


def naive_mask(length, keys, causal=False, window=None, lengths=None, keep=None):
    """By the words of attention's docstring, one pair at a time."""
    sequences = lengths or [keys]
    mask = torch.zeros(len(sequences), 1, length, keys, dtype=torch.bool)
    for b, n in enumerate(sequences):
        for query in range(length):
            at = query + (n - length if causal == "bottom_right" else 0)
            for key in range(n):
                seen = not causal or key <= at
                if window is not None:
                    left, right = window
                    seen &= (left < 0 or key - at >= -left) and (right < 0 or key - at <= right)
                mask[b, 0, query, key] = seen and (keep is None or bool(keep[query, key]))
    return mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": "top_left"},
        {"causal": "bottom_right", "lengths": [7, 3, 0]},
        {"window": (2, 1)},
        {"window": (2, 0), "causal": "bottom_right", "lengths": [7, 5]},
        {"lengths": [4, 7, 0], "causal": "top_left", "window": (-1, 0)},
    ],
    ids=str,
)
def test_masks_let_through_what_the_op_attends_to(options):
    for keep in (None, torch.rand(5, 7) > 0.3):
        expected = naive_mask(5, 7, **options, keep=keep)
        lengths = {"k_lengths": torch.tensor(options["lengths"])} if "lengths" in options else {}
        rest = {name: value for name, value in options.items() if name != "lengths"}
        assert torch.equal(show.allowed(5, 7, keep=keep, **rest, **lengths), expected)


def test_masks_are_drawn_alone_and_together():
    keep = torch.rand(5, 7) > 0.3
    picture = show.masks(5, 7, keep=keep, causal="top_left", k_lengths=[7, 0])
    drawn = [torch.tensor(axes.images[0].get_array().tolist()) for axes in picture.figure.axes]
    causal, both = {"causal": "top_left"}, {"causal": "top_left", "lengths": [7, 0], "keep": keep}
    assert [axes.get_title(loc="left") for axes in picture.figure.axes[:4]] == [
        "keep", "causal='top_left'", "k_lengths", "all together",
    ]  # fmt: skip
    together = naive_mask(5, 7, **both)
    for row in range(2):
        forms = (keep, naive_mask(5, 7, **causal)[0, 0], naive_mask(5, 7, lengths=[7, 0])[row, 0], together[row, 0])
        for levels, mask in zip(drawn[4 * row : 4 * row + 4], forms, strict=True):
            assert torch.equal(levels == 1, mask)
            assert torch.equal(levels == 2, ~mask.any(-1, keepdim=True).expand(-1, 7)), "nothing to attend to: marked"
    assert f"{int(together.sum())} of 70 pairs" in picture.alternative
    assert len(show.masks(3).figure.axes) == len(show.masks(3, window=(1, 0)).figure.axes) == 1


def test_masks_that_do_not_fit_are_refused():
    bias = torch.tensor([[0.0, -torch.inf], [-1e9, 3.0]])
    assert show.allowed(2, 2, bias=bias).tolist() == [[[[True, False], [True, True]]]]
    by_head = torch.tensor([[[True, False]], [[False, True]]])
    image = show.masks(1, 2, keep=by_head, head=1).figure.axes[-1].images[0]
    assert image.get_array().tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="head must be between 0 and 1, got 2"):
        show.masks(1, 2, keep=by_head, head=2)
    with pytest.raises(ValueError, match="does not broadcast"):
        show.masks(3, 2, keep=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="key_labels must be 2, got 3"):
        show.masks(3, 2, key_labels="abc")
    with pytest.raises(ValueError, match="length and keys must be at least 1, got 0 and 0"):
        show.masks(0)


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (show.positions, lambda: show.masks(4, causal="top_left")):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'fused-transformer\[show\]'"):
            draw()
