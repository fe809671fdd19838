"""decoder_step with rows at positions of their own: several tokens ahead of what is known, in one step."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fused_transformer.kernels.decoder_step import decoder_step
from tests.inputs import running_on
from tests.kernels.test_decoder_step import assert_agree, make_arguments, make_decoder, run
from tests.oracle import assert_equal


def with_places(arguments: dict) -> dict:
    """Rows at positions of their own, in rows of the cache that are not theirs by number."""
    rows, length = len(arguments["x"]), arguments["length"]
    positions = torch.randint(length + 1, (rows,))
    positions[-1] = length
    slots = torch.randperm(arguments["cache"].shape[2])[:rows]
    ancestors = arguments["ancestors"].clone()
    ancestors[torch.arange(rows), positions] = slots.int()
    # What lies behind a row's own position is not read, even if nobody owns it.
    behind = torch.arange(ancestors.shape[1]) > positions[:, None]
    return arguments | {"positions": positions, "slots": slots, "ancestors": ancestors.masked_fill(behind, -1)}


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 5, 300])
def test_rows_at_positions_of_their_own(beams, length):
    decoder = make_decoder(norm_first=beams == 2)
    arguments = with_places(make_arguments(decoder, beams, length=length))
    arguments["cache"] = torch.randn_like(arguments["cache"])
    assert_agree(decoder, arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_positions_one_after_the_other_or_all_at_once(backend):
    """Two sequences, three new tokens each: rows that are the history of others are written before these read."""
    decoder = make_decoder()
    arguments = make_arguments(decoder, beams=1, sequences=2, length=4)
    cache, tokens = arguments["cache"], torch.randn(3, 2, decoder.width)
    ancestors = arguments["ancestors"].clone()
    ancestors[:, 4:7] = torch.tensor([[5], [3]], dtype=torch.int32)
    slots, apart, one_by_one = torch.tensor([5, 3]), [], cache.repeat(1, 1, 2, 1, 1, 1)
    together = one_by_one.clone()
    with running_on(backend):
        for i, x in enumerate(tokens):
            step = arguments | {"x": x, "cache": one_by_one, "length": 4 + i, "ancestors": ancestors}
            apart.append(decoder_step(**step, decoder=decoder, positions=torch.full((2,), 4 + i), slots=slots))
        # The rows of a sequence lie together.
        step = arguments | {"x": tokens.transpose(0, 1).flatten(0, 1), "cache": together, "length": 6, "beams": 3}
        step |= {"ancestors": ancestors.repeat_interleave(3, 0)}
        places = {"positions": torch.tensor([4, 5, 6] * 2), "slots": slots.repeat_interleave(3)}
        got = decoder_step(**step, **places, decoder=decoder)
    want = torch.stack(apart, 1).flatten(0, 1)
    if backend == "cpu":
        assert_equal([got, together], [want, one_by_one])
    assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_wrong_places_are_named():
    decoder = make_decoder()
    arguments = with_places(make_arguments(decoder))
    wrong = (
        ("positions and slots must be given together", {"slots": None}),
        ("positions must have shape (6,), got (5,)", {"positions": torch.zeros(5, dtype=torch.int64)}),
        ("slots must be torch.int64", {"slots": torch.zeros(6, dtype=torch.int32)}),
        ("positions must be between 0 and 5, got 6", {"positions": torch.full((6,), 6)}),
        ("slots must be between 0 and 7, got -1", {"slots": torch.full((6,), -1)}),
        ("need ancestors", {"ancestors": None}),
    )
    for message, change in wrong:
        for backend in ("cpu", "reference"):
            with pytest.raises(ValueError) as error:
                run(backend, decoder, arguments | change)
            assert message in str(error.value)
