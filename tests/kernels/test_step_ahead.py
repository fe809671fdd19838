"""step_ahead: one native call against the ops that it is made of, to the bit; and steps that look up their tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from fused_transformer.kernels import use_backend
from fused_transformer.kernels.decoder_step import Memory, TokenTable, ahead, decoder_step
from fused_transformer.kernels.decoder_step.ahead import Histories, step_ahead
from fused_transformer.kernels.embedding import embedding
from fused_transformer.kernels.linear import PackedLinear
from tests.inputs import running_on
from tests.kernels.test_decoder_step import DEPTH, HEADS, make_arguments, make_decoder
from tests.oracle import assert_equal

pytestmark = pytest.mark.every_isa

VOCABULARY, LONGEST, SLOTS = 50, 7, 6


def make_table(width: int, positions="interleaved", padding_idx=0) -> TokenTable:
    return TokenTable(torch.randn(VOCABULARY, width) * width**-0.5, positions, padding_idx)


class Rounds:
    """A draft and a decoder that go on from what they computed last, as a search does."""

    def __init__(self, batch: int, width=3, weights="int8", table: TokenTable | None = None, **options) -> None:
        self.decoder = make_decoder(**options)
        self.batch, self.width, self.room = batch, width, 16
        self.draft = self.decoder.rounded(weights)
        self.output = PackedLinear(torch.randn(VOCABULARY, self.decoder.width), torch.randn(VOCABULARY), weights="int8")
        self.table = table or make_table(self.decoder.width)
        head = self.decoder.width // HEADS
        self.cache = torch.randn(DEPTH, 2, batch * SLOTS, HEADS, self.room, head)
        self.memory = Memory(tuple(pair) for pair in torch.randn(DEPTH, 2, batch, HEADS, LONGEST, head))
        self.memory_lengths = torch.randint(1, LONGEST + 1, (batch,), dtype=torch.int32)
        self.sources = torch.randperm(batch)

    def ask(self, run, tokens: list[int], length=0, levels=2, **options):
        """What `run` gives, and the cache afterwards."""
        cache = self.cache.clone()
        found = run(
            tokens,
            self.table,
            self.decoder,
            cache,
            length,
            self.memory,
            batch=self.batch,
            slots=SLOTS,
            draft=(self.draft, self.output),
            levels=levels,
            width=self.width,
            **{"histories": None, "scores": None} | options,
            memory_lengths=self.memory_lengths,
            sources=self.sources,
        )
        return found, cache

    def check(self, tokens: list[int], **options):
        """Both ways, to the bit; what came out is where the next round begins."""
        plain, native = (self.ask(run, tokens, **options) for run in (ahead._plain, step_ahead))
        assert_equal(native, plain)
        self.cache = native[1]
        assert native[0].hidden.isfinite().all()
        return native[0]


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_the_ops_one_after_the_other(batch, size, levels):
    rounds = Rounds(batch, norm_first=size == 4)
    first = rounds.check([7] * batch, levels=levels)
    assert len(first.guesses) == batch * levels * rounds.width and len(first.hidden) == batch * (1 + levels * 3)
    rows = [b * (1 + levels * 3) for b in range(batch) for _ in range(size)]
    tokens = torch.randint(1, VOCABULARY, (batch * size,)).tolist()
    scores = torch.randn(batch, 2 * size, dtype=torch.float64).sort(1, descending=True).values[:, :size]
    scores[:, -1] = -torch.inf
    again = rounds.check(
        tokens, length=1, levels=levels, histories=Histories(first.ancestors, rows), scores=scores if size > 1 else None
    )
    each = size + levels * 3
    assert len(again.hidden) == batch * each
    own = again.ancestors.view(batch, each, -1)[:, :size, 1]
    assert own.tolist() == [[b * SLOTS + i for i in range(size)] for b in range(batch)]


@pytest.mark.parametrize("positions", [None, "concat_t2t", "concat_paper"])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_tables(positions, padding_idx):
    rounds = Rounds(2)
    rounds.table = make_table(rounds.decoder.width, positions, padding_idx)
    rounds.check([3, VOCABULARY - 1], levels=1)


def test_what_the_draft_wrote_is_written_over():
    """Drafts of other numbers that guess the same tokens leave the same cache."""
    rounds = Rounds(1, width=1)
    rounds.output = rounds.output.with_bias(torch.arange(VOCABULARY) * 1e3)
    found = []
    for weights in ("float32", "int8"):
        rounds.draft = rounds.decoder.rounded(weights)
        found.append(rounds.ask(step_ahead, [5], levels=3))
    assert found[0][0].guesses == [VOCABULARY - 1] * 3
    assert_equal(*found)


def test_a_cache_that_grew():
    rounds = Rounds(2)
    first = rounds.check([4, 9], levels=2)
    wider = torch.randn(*rounds.cache.shape[:4], 40, rounds.cache.shape[5])
    wider[..., : rounds.room, :] = rounds.cache
    rounds.cache = wider
    found = rounds.check([4, 9, 9, 4], length=3, histories=Histories(first.ancestors, [6, 5, 12, 13]), levels=3)
    assert found.ancestors.shape[1] == 40


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_token_outside_the_vocabulary(token):
    rounds = Rounds(2)
    for run in (step_ahead, ahead._plain):
        with pytest.raises(IndexError, match=rf"tokens holds {token} at index \[1, 0\], outside the vocabulary of 50"):
            rounds.ask(run, [3, token])


def test_sizes_that_do_not_fit():
    rounds = Rounds(2)
    with pytest.raises(ValueError, match="as many tokens of each of 2 sentences, got 3"):
        rounds.ask(step_ahead, [1, 2, 3])
    with pytest.raises(ValueError, match="cache has room for 16 positions, and 17 are wanted"):
        rounds.ask(step_ahead, [1, 2], length=14, levels=2)
    with pytest.raises(ValueError, match="the cache has 12 rows, for 2 sentences of 7"):
        rounds.ask(step_ahead, [1] * 14)
    with pytest.raises(ValueError, match="there must be 2 histories, got 1"):
        rounds.ask(step_ahead, [1, 2], length=1, histories=Histories(torch.zeros(2, 16, dtype=torch.int32), [0]))


def test_a_forced_backend_is_asked():
    rounds = Rounds(2)
    expected, _ = rounds.ask(step_ahead, [4, 9], levels=0)
    with use_backend("reference"):
        found, _ = rounds.ask(step_ahead, [4, 9], levels=0)
    assert_close(found.hidden, expected.hidden, atol=2e-5, rtol=2e-5)


# ------------------------------------------------------------------------------- steps that look up their tokens


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("positions", [None, "interleaved"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_step_embeds_its_tokens(backend, positions, dtype):
    decoder = make_decoder()
    table, arguments = make_table(decoder.width, positions), make_arguments(decoder)
    tokens = torch.randint(VOCABULARY, (2 * len(arguments["x"]),), dtype=dtype)[::2]
    tokens[1] = 0
    start = {"positions": positions, "start": 5 if positions else 0}
    with running_on(backend):
        x = embedding(tokens[:, None], table.weight, **start, padding_idx=0).squeeze(1)
        expected = decoder_step(**arguments | {"x": x}, decoder=decoder)
        assert_equal(decoder_step(**arguments | {"x": tokens}, table=table, decoder=decoder), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tokens_at_positions_of_their_own(backend):
    decoder = make_decoder()
    table, arguments = make_table(decoder.width), make_arguments(decoder, beams=1, sequences=3)
    arguments["cache"] = torch.randn_like(arguments["cache"])
    places = {"positions": torch.tensor([2, 5, 0]), "slots": torch.tensor([2, 0, 1])}
    tokens = torch.tensor([7, 7, 0])
    with running_on(backend):
        at = places["positions"][:, None]
        x = embedding(tokens[:, None], table.weight, position_ids=at, padding_idx=0).squeeze(1)
        expected = decoder_step(**arguments | {"x": x}, **places, decoder=decoder)
        assert_equal(decoder_step(**arguments | {"x": tokens}, **places, table=table, decoder=decoder), expected)


def test_positions_beyond_the_table_make_it_longer():
    decoder = make_decoder()
    table = make_table(decoder.width)
    arguments = make_arguments(decoder, length=1000)
    tokens = torch.randint(VOCABULARY, (len(arguments["x"]),))
    x = embedding(tokens[:, None], table.weight, start=1000, padding_idx=0).squeeze(1)
    expected = decoder_step(**arguments | {"x": x}, decoder=decoder)
    assert_equal(decoder_step(**arguments | {"x": tokens}, table=table, decoder=decoder), expected)


def test_wrong_tokens_and_tables():
    decoder = make_decoder()
    table, arguments = make_table(decoder.width), make_arguments(decoder)
    right = {"decoder": decoder, "table": table} | arguments | {"x": torch.ones(6, dtype=torch.int64)}
    cases = (
        ({"x": torch.ones(6)}, ValueError, "tokens must be int32 or int64, got torch.float32"),
        ({"x": right["x"][:, None]}, ValueError, r"tokens must have shape \(R,\), got \(6, 1\)"),
        ({"x": right["x"] * VOCABULARY}, IndexError, "outside the vocabulary of 50"),
        ({"table": table.weight}, TypeError, "table must be a TokenTable, got Tensor"),
        ({"table": make_table(8)}, ValueError, "table must be 24 wide, got 8"),
    )
    for change, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            decoder_step(**right | change)
    for weight in (torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 5).T, torch.randn(5, 4, requires_grad=True)):
        with pytest.raises(ValueError, match="a step's table must be"):
            TokenTable(weight, None, None)


def test_tensors_that_can_not_be_read_as_they_lie():
    rounds = Rounds(2)
    first, _ = rounds.ask(step_ahead, [4, 9], levels=0)
    history = {"length": 1, "histories": Histories(first.ancestors, [0, 1])}
    cases = (
        ({"histories": Histories(first.ancestors, [0, 2])}, "histories must be rows of"),
        ({"histories": Histories(first.ancestors[:, :0], [0, 1])}, r"got \(2, 0\)"),
        ({"histories": Histories(first.ancestors.long(), [0, 1])}, "ancestors must be torch.int32"),
        ({"scores": torch.zeros(2, 1)}, "scores must be torch.float64"),
        ({"scores": torch.zeros(3, 1, dtype=torch.float64)}, r"scores must have shape \(2, 1 or more\), got \(3, 1\)"),
        ({"scores": torch.zeros(2, 0, dtype=torch.float64)}, r"got \(2, 0\)"),
        ({"scores": torch.zeros(4, 2, dtype=torch.float64).t()[:, ::2]}, "the last axis of scores must be contiguous"),
    )
    for change, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            rounds.ask(step_ahead, [4, 9], **history | change)
    rounds.memory_lengths = torch.ones(2, 2, dtype=torch.int32)[:, 0]
    with pytest.raises(ValueError, match="the last axis of memory_lengths must be contiguous"):
        rounds.ask(step_ahead, [4, 9])
    rounds.memory_lengths, rounds.sources = None, torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"sources must have shape \(2,\), got \(3,\)"):
        rounds.ask(step_ahead, [4, 9])


def test_copies_of_memory_after_a_step_read_their_own():
    rounds = Rounds(1)
    expected, _ = rounds.ask(step_ahead, [4])
    for copied in (copy.deepcopy(rounds.memory), pickle.loads(pickle.dumps(rounds.memory))):
        assert type(copied) is Memory
        rounds.memory = copied
        assert_equal(rounds.ask(step_ahead, [4])[0], expected)
    copied[0][1].zero_()  # the values
    assert not torch.equal(rounds.ask(step_ahead, [4])[0].hidden, expected.hidden)


def test_positions_outlive_a_table_that_another_thread_makes_longer():
    table = make_table(8)
    looked_up, held = table.native(3)
    longer, _ = table.native(5000)
    assert held is not None and looked_up[0][2:4] == (held.data_ptr(), 512) and longer[0][3] == 8192
    assert_equal(table.native(3)[0], longer)
