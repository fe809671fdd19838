"""From lines of text to lines of text: streams of any length, text as it comes, prefixes, what a translation tells."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_transformer import Transformer, TransformerConfig
from fused_transformer.inference import PackedTransformer
from fused_transformer.prefixes import PrefixTooLong
from fused_transformer.search_options import SearchOptions
from fused_transformer.text_stream import NewText, TextStream
from fused_transformer.tokenizer import EOS
from fused_transformer.translation import Translation, Translator, with_weights
from tests.transformer.texts import parallel_lines
from tests.transformer.untrained import untrained

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = ["un chien voit un chat", "", "chat", "   ", "日本 🦊", "deux hommes", "un chat noir", "grand"]
SHORT = SearchOptions(max_length=9)


@pytest.fixture(scope="module")
def translator() -> Translator:
    return untrained()


@pytest.mark.parametrize("buffer", [1, 3, 8, 100])
@pytest.mark.parametrize("options", [SHORT, SearchOptions(max_length=9, beam_size=1), SearchOptions(num_samples=2)])
def test_a_stream_gives_what_a_list_gives(translator, buffer, options):
    whole = translator.translate(LINES, options)
    streamed = list(translator.translate_stream(iter(LINES), options, buffer=buffer, max_tokens=12))
    assert [[one.tokens for one in beams] for beams in streamed] == [[one.tokens for one in beams] for beams in whole]


def test_a_stream_reads_no_further_than_it_must(translator):
    read = []

    def endless():
        while True:
            read.append("un chat")
            yield "un chat"

    first = list(islice(translator.translate_stream(endless(), SHORT, buffer=4), 6))
    assert len(first) == 6 and len(read) == 8
    read.clear()
    stream = translator.translate_stream(endless(), SHORT, buffer=1)
    for count in (1, 2, 3):
        next(stream)
        assert len(read) == count, "line by line"


def test_memory_does_not_grow_with_the_stream(translator):
    def peak(lines: int) -> int:
        stream = translator.translate_stream(("un chat" for _ in range(lines)), SHORT, buffer=20, beam_size=1)
        tracemalloc.start()
        for _ in stream:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(40)  # what is made once
    assert peak(800) < 2 * peak(40)


def test_what_the_lines_raise_comes_behind_what_came_before(translator):
    def broken():
        yield from ["un chat", "deux chats", "grand"]
        raise ValueError("the file ends here")

    for buffer in (1, 2, 3, 10):
        stream, got = translator.translate_stream(broken(), SHORT, buffer=buffer), []
        with pytest.raises(ValueError, match="the file ends here"):
            for beams in stream:
                got.append(beams[0].text)
        assert got == [beams[0].text for beams in translator.translate(["un chat", "deux chats", "grand"], SHORT)]


@pytest.mark.parametrize("options", [SHORT, SearchOptions(max_length=9, beam_size=1)], ids=["beams", "greedy"])
def test_text_as_it_comes_adds_up_to_the_translation(translator, options):
    news: list[NewText] = []
    found = translator.translate(LINES, options, max_tokens=14, on_text=news.append)
    for line, beams in enumerate(found):
        own = [new for new in news if new.line == line]
        assert "".join(new.text for new in own) == beams[0].text
        assert tuple(new.token for new in own) == (*beams[0].tokens, None)
    if options.beam_size == 1:
        order = [new.line for new in news if new.token is not None]
        assert order != sorted(order), "lines of a batch come side by side"


@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.integers(0, 319), max_size=12))
def test_streamed_text_is_the_text_of_all_tokens(translator, tokens):
    """Whatever the tokens spell: bytes of broken characters, bos in the middle, spaces at the ends."""
    tokenizer = translator.tokenizer
    tokens = [token for token in tokens if token < len(tokenizer)]
    stream = TextStream(lambda row: tokenizer.decode([row])[0])
    text = "".join([*map(stream.push, tokens), stream.finish()])
    assert text == tokenizer.decode([tokens])[0]


def test_a_character_in_bytes_comes_when_it_is_whole(translator):
    tokenizer = translator.tokenizer
    tokens = tokenizer.encode(["a 日"])[0]
    assert len(tokens) >= 4, "the vocabulary has no 日"
    stream = TextStream(lambda row: tokenizer.decode([row])[0])
    parts = [*map(stream.push, tokens)]
    assert "".join(parts) == "a 日" and parts[-1] == "日" and parts[-2] == parts[-3] == ""


def test_translations_tell_their_tokens_and_log_probabilities(translator):
    options = SearchOptions(top_beams=3, length_penalty=1.0, penalty="power")
    for beams in translator.translate(["un chien voit", "日本"], options):
        assert len(beams) == 3
        for one in beams:
            assert one.text == translator.tokenizer.decode([one.tokens])[0].replace("\n", " ").replace("\r", " ")
            assert len(one.log_probs) - len(one.tokens) in (0, 1) and EOS not in one.tokens
            if len(one.log_probs) > len(one.tokens):
                assert one.score == pytest.approx(sum(one.log_probs) / len(one.log_probs), rel=1e-4)


def test_translations_begin_as_they_are_told(translator):
    prefixes = ["one dog", "red", "", "", "two", "", "", "black"]
    found = translator.translate(LINES, SHORT, prefixes=prefixes)
    for line, prefix, beams in zip(LINES, prefixes, found, strict=True):
        assert beams[0].text.startswith(prefix) if line.strip() else beams == [Translation("", 0.0)]
        if line.strip() and prefix:
            count = len(translator.tokenizer.encode([prefix])[0])
            assert beams[0].tokens[:count] == tuple(translator.tokenizer.encode([prefix])[0])
            assert beams[0].log_probs[:count] == (0.0,) * count
    free = translator.translate([LINES[2]], SHORT)
    assert [one.tokens for one in found[2]] == [one.tokens for one in free[0]]
    streamed = list(translator.translate_stream(LINES, SHORT, prefixes=iter(prefixes), buffer=3))
    assert [beams[0].tokens for beams in streamed] == [beams[0].tokens for beams in found]


def test_a_forbidden_translation_keeps_its_line(translator):
    everything = tuple(range(len(translator.tokenizer)))
    found = translator.translate(["un chat", ""], suppress_tokens=everything)
    assert found == [[Translation("", -torch.inf)], [Translation("", 0.0)]]


def test_refused_calls(translator):
    with pytest.raises(TypeError, match=r"lines must be lines of text, got one str: \['un chat'\] is one line"):
        translator.translate("un chat")
    with pytest.raises(TypeError, match="prefixes must be lines of text"):
        translator.translate_stream(["un"], prefixes="one")
    with pytest.raises(PrefixTooLong, match=r"the prefix of line 3 has .* may have 9, eos counted") as refused:
        translator.translate(["un", "un chat noir voit", "chat"], SHORT, prefixes=["", "", "two black dogs, one cat"])
    assert refused.value.line == 2
    with pytest.raises(ValueError, match="a prefix for each of 2 lines, got 1"):
        translator.translate(["un", "deux"], prefixes=["one"])
    with pytest.raises(ValueError, match="buffer must be at least 1, got 0"):
        translator.translate_stream(["un"], buffer=0)
    with pytest.raises(ValueError, match="top_beams must be between 1 and beam_size"):
        translator.translate_stream(["un"], top_beams=9)
    with pytest.raises(ValueError, match="there must be a line for each prefix, but there are only 1"):
        list(translator.translate_stream(["un"], SHORT, prefixes=["one", "two"]))
    with pytest.raises(TypeError, match="beams"):
        translator.translate(["un"], beams=2)


def test_weights_are_packed_on_a_cpu(translator):
    packed = with_weights(translator.model, "int8")
    assert isinstance(packed, PackedTransformer) and packed.weights == "int8"
    assert with_weights(translator.model, "float32").weights == "float32"
    with pytest.raises(ValueError, match="weights 'int8' can't be had: packed weights are for the CPU"):
        with_weights(copy.deepcopy(translator.model).to("meta"), "int8")
    with pytest.raises(ValueError, match="CUDA graphs are for a CUDA device, and the model is on cpu"):
        with_weights(translator.model, "float32", cuda_graphs=True)
    with pytest.raises(ValueError, match="CUDA graphs run the model's own weights, and weights 'int8' are for a CPU"):
        with_weights(translator.model, "int8", cuda_graphs=True)
    with pytest.raises(ValueError, match="weights must be one of 'float32', 'bfloat16', 'int8', got 'int4'"):
        with_weights(translator.model, "int4")


def test_what_cannot_be_packed_translates_as_it_is(translator):
    vocabulary = len(translator.tokenizer)
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "d_feedforward": 16}
    wide = Transformer(TransformerConfig(source_vocab_size=vocabulary, d_model=300, num_heads=1, **layers)).eval()
    assert with_weights(wide, "float32") is wide
    assert Translator(wide, translator.tokenizer).translate(["un chat"], SHORT)[0][0].tokens
    with pytest.raises(ValueError, match="can't be had: heads can be up to 256 wide"):
        with_weights(wide, "int8")


def test_options_by_name_change_those_given(translator):
    by_name = translator.translate(LINES, SHORT, beam_size=1)
    assert by_name == translator.translate(LINES, SearchOptions(max_length=9, beam_size=1))
    source = parallel_lines(5)[0]
    assert translator.translate(source) == translator.translate(source, SearchOptions())


def test_a_prefix_without_room_says_so_out_of_another_process():
    error = PrefixTooLong(2, 7, 5).of_line(9)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "the prefix of line 9 has 7 tokens, and its translation may have 5, eos counted"
    assert again.line == 2
