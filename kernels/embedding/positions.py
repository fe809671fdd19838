"""The three tables of sinusoidal positions, and which row of them each token gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fused_transformer.kernels._checks import FLOATS, has_numbers, require

Layout = Literal["interleaved", "concat_t2t", "concat_paper"]
LAYOUTS = ("interleaved", "concat_t2t", "concat_paper")

# A table is kept and reused up to this size: 131,072 positions of width 512. Rows beyond are computed when asked for.
_LARGEST_TABLE_BYTES = 2**28
_SMALLEST_TABLE_ROWS = 512
_FARTHEST = 2**53  # up to here float64, in which angles are computed, has every integer

TABLES: dict[tuple[str, int, torch.device], Tensor] = {}


def frequencies(layout: str, width: int, device: torch.device) -> Tensor:
    """float64, the frequency of each sine; the cosines have the same, but the last where there is one sine more."""
    float64: dict[str, Any] = {"dtype": torch.float64, "device": device}
    if layout == "concat_t2t":
        half = width // 2
        return torch.exp(torch.arange(half, **float64) * (-math.log(10000.0) / max(half - 1, 1)))
    pairs = (width + 1) // 2  # an odd width has one more sine than cosines
    return 10000.0 ** (torch.arange(pairs, **float64) * (-2.0 / max(width, 1)))


def sinusoids(positions: Tensor, width: int, layout: str) -> Tensor:
    """(..., width) float64: the rows at integer `positions` (...). Formulas in `sinusoidal_positions`."""
    positions = positions.to(torch.float64)[..., None]
    angles = positions * frequencies(layout, width, positions.device)
    if layout == "concat_t2t":
        zero = positions.new_zeros(*positions.shape[:-1], width % 2)
        return torch.cat([angles.sin(), angles.cos(), zero], -1)
    if layout == "interleaved":
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :width]
    return torch.cat([angles.sin(), angles.cos()[..., : width // 2]], -1)


def column_waves(layout: str, width: int, device: torch.device) -> Tensor:
    """(2, width) float64: of each column of `sinusoids` the frequency, and 1 where it is a cosine, 0 where a sine."""
    each = frequencies(layout, width, device)
    waves = torch.stack([each, torch.zeros_like(each)]), torch.stack([each, torch.ones_like(each)])
    if layout == "interleaved":
        return torch.stack(waves, -1).flatten(-2)[:, :width].contiguous()
    zero = each.new_zeros(2, width % 2 if layout == "concat_t2t" else 0)
    return torch.cat([waves[0], waves[1][:, : width // 2], zero], -1).contiguous()


@dataclass(frozen=True, slots=True)
class Positions:
    """The position of each token of one call: `ids` where given, else start or starts[b], plus the place in its row."""

    layout: str
    start: int
    starts: Tensor | None  # tokens' shape without the last axis, int64
    ids: Tensor | None  # tokens' shape, int64
    end: int | None  # all positions are below; None: not known without waiting for the device

    def of(self, tokens: Tensor) -> Tensor:
        """int64, of tokens' shape."""
        if self.ids is not None:
            return self.ids
        places = torch.arange(tokens.shape[-1] if tokens.dim() else 1, device=tokens.device)
        first = self.start if self.starts is None else self.starts[..., None]
        return (first + places).expand(*tokens.shape[:-1], places.shape[0]).reshape(tokens.shape)

    def rows(self, tokens: Tensor, width: int) -> tuple[Tensor, Positions]:
        """A float32 (P, width) contiguous table, and the positions as numbers of its rows. Needs `end`."""
        assert self.end is not None
        table = cached_table(self.layout, width, self.end, tokens.device)
        if table is not None:
            return table, self
        if self.ids is None and self.starts is None:
            wanted = torch.arange(self.start, self.end, device=tokens.device)
            return sinusoids(wanted, width, self.layout).float(), Positions(self.layout, 0, None, None, len(wanted))
        wanted, ids = torch.unique(self.of(tokens), return_inverse=True)
        return sinusoids(wanted, width, self.layout).float(), Positions(self.layout, 0, None, ids, len(wanted))


def cached_table(layout: str, width: int, rows: int, device: torch.device) -> Tensor | None:
    """A float32 table of at least `rows` rows, doubled as it is outgrown; None where it would be too large to keep."""
    key = (layout, width, device)
    table = TABLES.get(key)
    if table is None or len(table) < rows:
        grown = 1 << (max(rows, _SMALLEST_TABLE_ROWS) - 1).bit_length()
        if 4 * grown * width > _LARGEST_TABLE_BYTES:
            return None
        with torch.inference_mode(False):
            table = sinusoids(torch.arange(grown, device=device), width, layout).float()
        TABLES[key] = table
    return table


def make_positions(
    tokens: Tensor, layout: str | None, start: int | Tensor, position_ids: Tensor | None
) -> Positions | None:
    """Checks the position arguments of `embedding`; ValueError in the caller's words."""
    if layout is None:
        if position_ids is not None or isinstance(start, Tensor) or start != 0:
            raise ValueError("start and position_ids need positions: the name of a layout")
        return None
    if layout not in LAYOUTS:
        raise ValueError(f"positions must be one of {', '.join(LAYOUTS)} or None, got {layout!r}")
    if position_ids is not None:
        if isinstance(start, Tensor) or start != 0:
            raise ValueError("give start or position_ids, not both")
        ids = _integers("position_ids", position_ids, tokens)
        try:
            ids = ids.expand(tokens.shape).contiguous()
        except RuntimeError:
            shapes = f"position_ids of shape {tuple(ids.shape)} and tokens of shape {tuple(tokens.shape)}"
            raise ValueError(f"{shapes} do not fit: position_ids must broadcast to tokens") from None
        return Positions(layout, 0, None, ids, _end("position_ids", ids, 1))
    length = tokens.shape[-1] if tokens.dim() else 1
    if isinstance(start, Tensor):
        starts = _integers("start", start, tokens).contiguous()
        if starts.shape != tokens.shape[:-1]:
            wanted = tuple(tokens.shape[:-1])
            raise ValueError(f"start must be a number or have shape {wanted}, got {tuple(starts.shape)}")
        return Positions(layout, 0, starts, None, _end("start", starts, length))
    if isinstance(start, bool) or not isinstance(start, (int, torch.SymInt)):
        raise TypeError(f"start must be an int or an integer tensor, got {type(start).__name__}")
    if start < 0:
        raise ValueError(f"start must not be negative, got {start}")
    if isinstance(start, int):
        _require_exact("start", start)
    return Positions(layout, start, None, None, start + length)


def _integers(name: str, x: Tensor, tokens: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.device != tokens.device:
        raise ValueError(f"{name} must be on {tokens.device}, as tokens is, got {x.device}")
    return x.to(torch.int64)


def _end(name: str, first: Tensor, length: int) -> int | None:
    """One more than the last position; None on a device that would have to be waited for."""
    if first.device.type != "cpu" or not has_numbers(first):
        return None
    if first.numel() == 0:
        return length
    low, high = (int(x) for x in first.aminmax())
    if low < 0:
        raise ValueError(f"{name} must not be negative, got {low}")
    _require_exact(name, high)
    return high + length


def _require_exact(name: str, position: int) -> None:
    require(position <= _FARTHEST, f"{name} must be at most 2^53, got {position}")


def sinusoidal_positions(
    length: int,
    width: int,
    *,
    layout: Layout = "interleaved",
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The sinusoidal position table, rows start ... start + length - 1.

        interleaved    PE[p, 2i] = sin(p · w_i),  PE[p, 2i+1] = cos(p · w_i),  w_i = 10000^(-2i / width)
        concat_paper   PE[p] = [sin(p · w), cos(p · w)] with the same w
        concat_t2t     PE[p] = [sin(p · u), cos(p · u)],  u_k = exp(-k · ln(10000) / (width // 2 - 1)); an odd width
                       ends with a column of zeros

    The frequencies of the last differ from the others' (by 0.14 in the table at p = 100, width 512), so a
    checkpoint trained with one table is wrong under another. The first is the paper's and the Annotated
    Transformer's, the second Hugging Face Marian's, the third that of tensor2tensor, fairseq and Marian.

    Args:
        length, width: the table's shape; start: its first position. Whole numbers, not negative.
        dtype: float32, float16, bfloat16 or float64.

    Returns:
        (length, width) of `dtype` on `device` (default: torch's default device).

    Raises:
        ValueError: a negative number, or no such layout or dtype.

    Numerics: computed in float64 and rounded once; right to float32's last digit up to position 2^24.
    Source: Vaswani et al. 2017, section 3.5; tensor2tensor, common_attention.get_timing_signal_1d.
    """
    for name, number in (("length", length), ("width", width), ("start", start)):
        require(number >= 0, f"{name} must not be negative, got {number}")
    _require_exact("start", start)
    require(layout in LAYOUTS, f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    require(dtype in FLOATS, f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    return sinusoids(torch.arange(start, start + length, device=device), width, layout).to(dtype)
