"""The page of attention heads in a real browser: what clicks, menus, the mouse and the keyboard do."""

from __future__ import annotations

import pytest

from fused_transformer import show
from tests.browser import browser
from tests.transformer.show_cases import ENGLISH, FRENCH, ODD, made_up

FAINTEST = 5 / 255  # links below it are not drawn


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture
def watched(chromium):
    """Makes pages; afterwards there must have been no complaint, and no request but for the pages themselves."""
    complaints, requests, addresses = [], [], []

    def new_page(address=None, **options):
        page = chromium.new_page(**options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append("a dialog"))
        page.on("request", lambda request: requests.append(request.url))
        if address is not None:
            addresses.append(address)
            page.goto(address)
        return page

    yield new_page
    for context in chromium.contexts:
        context.close()
    assert complaints == []
    assert requests == addresses


@pytest.fixture
def opened(watched, tmp_path):
    """Opens the page of some heads."""
    return lambda heads, **options: watched(heads.save(tmp_path / "heads.html").as_uri(), **options)


def links(page) -> set[tuple[int, int, int]]:
    """(head, row, column) of every link that is drawn."""
    read = "all => all.map(x => [x.dataset.head, x.dataset.row, x.dataset.column].map(Number))"
    return set(map(tuple, page.eval_on_selector_all("#links line", read)))


def expected(maps, kind, layer, heads=(0, 1, 2), row=None, column=None) -> set[tuple[int, int, int]]:
    weights = maps.weights(kind)[layer]
    strong = (weights * 255).round() / 255 >= FAINTEST
    found = {tuple(place) for place in strong.nonzero().tolist()}
    return {(h, r, c) for h, r, c in found if h in heads and row in (None, r) and column in (None, c)}


def token(page, side, index):
    return page.locator(f"#{side} button").nth(index)


def test_clicks_toggle_heads_and_menus_change_what_is_drawn(opened):
    maps = made_up()
    page = opened(show.heads(maps, layer=0))
    assert links(page) == expected(maps, "encoder_self", 0)
    page.click("[data-head='1']")
    assert links(page) == expected(maps, "encoder_self", 0, (0, 2))
    assert page.get_attribute("[data-head='1']", "aria-pressed") == "false"
    page.select_option("#layer", "1")
    assert links(page) == expected(maps, "encoder_self", 1, (0, 2)), "a layer's menu leaves the heads alone"
    page.dblclick("[data-head='2']")
    assert links(page) == expected(maps, "encoder_self", 1, (2,)), "a double click leaves one head"
    page.click("[data-head='2']")
    assert links(page) == set() and "No head is shown" in page.inner_text("#status")
    page.click("#every")
    for kind, name in (("encoder_decoder", "Input - Output"), ("decoder_self", "Output - Output")):
        page.select_option("#kind", label=name)
        assert links(page) == expected(maps, kind, 1)
        assert page.locator("#left button").all_inner_texts() == list(maps.rows(kind))
        assert page.locator("#right button").all_inner_texts() == list(maps.columns(kind))
    assert page.eval_on_selector_all("#kind option", "all => all.map(x => x.label)") == [
        "All", "Input - Input", "Input - Output", "Output - Output",
    ]  # fmt: skip
    page.select_option("#kind", label="All")
    source = len(ENGLISH)
    both = expected(maps, "encoder_self", 1)
    both |= {(h, r + source, c) for h, r, c in expected(maps, "encoder_decoder", 1)}
    both |= {(h, r + source, c + source) for h, r, c in expected(maps, "decoder_self", 1)}
    assert links(page) == both


def test_pointing_at_a_token_shows_its_links_alone(opened):
    maps = made_up()
    page = opened(show.heads(maps, attention="encoder_decoder"))
    token(page, "left", 2).hover()
    assert links(page) == expected(maps, "encoder_decoder", 1, row=2)
    means = (maps.encoder_decoder[1, :, 2].mean(0) * 100).tolist()
    best = max(range(len(means)), key=means.__getitem__)
    said = page.inner_text("#status").replace("\u2068", "").replace("\u2069", "")
    assert (
        said.startswith(f"{FRENCH[3]} attends to {ENGLISH[best]} ")
        and abs(int(said.split("%")[0].split()[-1]) - means[best]) <= 1
    )
    bands = page.eval_on_selector_all(
        "#right button", "all => all.map(b => [...b.querySelectorAll('i')].map(i => Number(i.style.opacity)))"
    )
    for column, opacities in enumerate(bands):
        assert opacities == pytest.approx(maps.encoder_decoder[1, :, 2, column].tolist(), abs=0.003)
    token(page, "right", 4).hover()
    assert links(page) == expected(maps, "encoder_decoder", 1, column=4)
    token(page, "right", 4).click()
    page.mouse.move(1, 1)
    assert links(page) == expected(maps, "encoder_decoder", 1, column=4), "a click holds it"
    page.keyboard.press("Escape")
    assert links(page) == expected(maps, "encoder_decoder", 1)


def test_the_keyboard_does_what_the_mouse_does(opened):
    maps = made_up()
    page = opened(show.heads(maps, token="cross"))
    assert links(page) == expected(maps, "encoder_self", 1, row=3), "held from the beginning"
    page.keyboard.press("Escape")
    for _ in range(3):  # two menus, then the first head
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert links(page) == expected(maps, "encoder_self", 1, (1, 2))
    page.keyboard.press("Shift+Enter")
    assert links(page) == expected(maps, "encoder_self", 1, (0,))
    for _ in range(4):  # two heads, the button for all, and the first token
        page.keyboard.press("Tab")
    assert links(page) == expected(maps, "encoder_self", 1, (0,), row=0)
    page.keyboard.press("ArrowDown")
    assert links(page) == expected(maps, "encoder_self", 1, (0,), row=1)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    assert links(page) == expected(maps, "encoder_self", 1, (0,), column=len(ENGLISH) - 1)
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    assert links(page) == expected(maps, "encoder_self", 1, (0,), row=1), "one stop a column: where it was left"
    names = page.eval_on_selector_all(
        "button, select", "all => all.map(x => x.ariaLabel || x.textContent || x.labels[0].textContent)"
    )
    assert all(name.strip() for name in names), "each has a name to be read out"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(opened, scheme):
    page = opened(
        show.heads(made_up([f"▁long-token-{i}" for i in range(12)], heads=16)),
        viewport={"width": 360, "height": 640},
        color_scheme=scheme,
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    paper, ink = page.eval_on_selector("body", "b => [getComputedStyle(b).backgroundColor, getComputedStyle(b).color]")
    assert (paper, ink) == {
        "light": ("rgb(255, 255, 255)", "rgb(28, 35, 48)"),
        "dark": ("rgb(20, 23, 28)", "rgb(231, 234, 240)"),
    }[scheme]
    boxes = page.eval_on_selector_all("#heads button", "all => all.map(x => x.getBoundingClientRect().right)")
    assert max(boxes) <= 360
    frame = page.eval_on_selector("#links", "x => x.getBoundingClientRect().width")
    assert frame >= 60, "the links keep room beside long tokens"
    page.set_viewport_size({"width": 900, "height": 640})
    ends = "x => [Number(x.querySelector('line').getAttribute('x2')) + 4, x.getBoundingClientRect().width]"
    for _ in range(100):  # not wait_for_function, whose eval the page's policy forbids
        end, width = page.eval_on_selector("#links", ends)
        if width > 300 and abs(end - width) < 1:
            break
        page.wait_for_timeout(20)
    else:
        pytest.fail(f"links end at {end} of {width}")


def test_odd_tokens_are_text(opened):
    page = opened(show.heads(made_up(ODD, ("<s>", *ODD))))
    shown = page.eval_on_selector_all("#left bdi", "all => all.map(x => x.textContent)")
    same = [label for label in ODD if label.strip(" \n\x00\ud83d")]
    assert [label for label in shown if label in same] == same
    assert {"(empty)", "␣␣", "␊", "␀"} <= set(shown) and len(shown) == len(ODD)
    assert page.locator("script").count() == 2 and page.locator("img").count() == 0
    token(page, "left", 0).hover()
    assert page.inner_text("#status").startswith("\u2068<script>alert(1)</script>\u2069 attends to")


def test_three_hundred_tokens(opened):
    labels = [f"t{i}" for i in range(300)]
    page = opened(show.heads(made_up(labels, ["<s>", *labels], layers=1, heads=8)))
    assert page.locator("#links line").count() == 4000
    assert page.inner_text("#status").startswith("Input - Input, layer 0, all heads. The strongest 4000 of ")
    token(page, "left", 200).hover()
    assert 0 < page.locator("#links line").count() < 300
    top = page.eval_on_selector("#status", "x => x.getBoundingClientRect().top")
    assert 0 <= top < 200, "the menus and the words stay in sight"


def test_the_frame_in_a_notebook_works(watched):
    maps = made_up()
    page = watched()
    page.set_content(f"<style>button {{ display: none }}</style>{show.heads(maps)._repr_html_()}")
    frame = page.frames[1]
    frame.wait_for_selector("#links line", state="attached")
    frame.click("[data-head='0']")
    assert links(frame) == expected(maps, "encoder_self", 1, (1, 2))
