"""Attention over the slots of a cache by the compiled kernels; see `reference`.

All tensors are contiguous and on the CPU, which is not checked here; `declines` says what the library does not take.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.engine.kernels import native
from sparity.errors import InvalidInput

TYPES = {torch.float32: 0, torch.bfloat16: 2}  # SPARITY_FLOAT32, SPARITY_BFLOAT16
MOST_WIDTH, MOST_PAGE = 512, 1024
LANES = 8  # of the narrowest vectors


class _Slots(ctypes.Structure):
    """`SparitySlots` of csrc/sparity_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "starts", "lengths", "places", "added")),
        *((name, ctypes.c_void_p) for name in ("chosen", "chosen_ends")),
        ("page", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("bits", "type")),
        *((name, ctypes.c_void_p) for name in ("key_steps", "key_minima", "value_steps", "value_minima")),
        *((name, ctypes.c_void_p) for name in ("group_starts", "group_lengths", "group_counts")),
        ("channels", ctypes.c_int64),
    )


class _Reading(ctypes.Structure):
    """`SparityReading` of csrc/sparity_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "kv_heads", "group", "fresh", "width", "value_width")),
        *((name, ctypes.c_int64) for name in ("length", "window")),
        *((name, ctypes.c_void_p) for name in ("visible", "drains")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
        *((name, ctypes.c_int32) for name in ("type", "count")),
        ("parts", ctypes.c_void_p),
    )


class _Judging(ctypes.Structure):
    """`SparityJudging` of csrc/sparity_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("pairs", "group", "width")),
        *((name, ctypes.c_void_p) for name in ("queries", "low", "high", "starts", "lengths")),
        *((name, ctypes.c_int32) for name in ("type", "mean")),
        ("levels", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("leading", "trailing", "wanted")),
    )


@dataclass(frozen=True)
class Chosen:
    """Pages that are read.

    Attributes:
        pages: int32, of one head after another, counted within it and rising.
        ends: int64 `[rows * kv_heads]`, how many there are up to the end of each head's.
    """

    pages: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Codes:
    """What codes stand for: `code * step + minimum`.

    Attributes:
        bits: of a code, 2, 4 or 8.
        key_steps: `[groups, width]`, of each channel of a group of tokens; `key_minima` likewise.
        value_steps: `[slots, value_width / channels]`, of each token; `value_minima` likewise.
        starts: int64 `[rows * kv_heads]`, each head's first group; `lengths`, how many are its own.
        counts: int32 `[groups]`, slots of each.
        channels: of a value that share a step.
    """

    bits: int
    key_steps: Tensor
    key_minima: Tensor
    value_steps: Tensor
    value_minima: Tensor
    starts: Tensor
    lengths: Tensor
    counts: Tensor
    channels: int


@dataclass(frozen=True)
class Slots:
    """Tokens that a layer's cache holds, of each row and head as many as there are: `SparitySlots`.

    Attributes:
        keys: `[slots, width]`, float32 or bfloat16; or codes, uint8 `[slots, width * bits / 8]`.
        values: likewise.
        starts: int64 `[rows * kv_heads]`, each head's first slot; `lengths`, how many are its own.
        places: int32 `[slots]`, of tokens in the text, -1 = hidden; None: all are seen by all queries.
        added: float32 `[slots]`, to logits; None = nothing.
        page: slots of a page, or the most that a group of codes holds.
        chosen: pages that are read; None = all.
        codes: what numbers stand for; None = themselves.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    lengths: Tensor
    places: Tensor | None = None
    added: Tensor | None = None
    page: int = 1
    chosen: Chosen | None = None
    codes: Codes | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of numbers, or of steps and minima."""
        return self.keys.dtype if self.codes is None else self.codes.key_steps.dtype

    def _fill(self, out: _Slots) -> None:
        out.keys, out.values = self.keys.data_ptr(), self.values.data_ptr()
        out.starts, out.lengths = self.starts.data_ptr(), self.lengths.data_ptr()
        out.places = None if self.places is None else self.places.data_ptr()
        out.added = None if self.added is None else self.added.data_ptr()
        out.page, out.type = self.page, TYPES[self.dtype]
        if self.chosen is not None:
            out.chosen, out.chosen_ends = self.chosen.pages.data_ptr(), self.chosen.ends.data_ptr()
        if (codes := self.codes) is None:
            return
        out.bits, out.channels = codes.bits, codes.channels
        out.key_steps, out.key_minima = codes.key_steps.data_ptr(), codes.key_minima.data_ptr()
        out.value_steps, out.value_minima = codes.value_steps.data_ptr(), codes.value_minima.data_ptr()
        out.group_starts, out.group_lengths = codes.starts.data_ptr(), codes.lengths.data_ptr()
        out.group_counts = codes.counts.data_ptr()


def declines(
    dtype: torch.dtype, width: int, value_width: int, page: int = 1, bits: int = 0, channels: int = 0
) -> str | None:
    """Why the library does not read such a cache, or None when it does.

    Args:
        dtype: of numbers, or of steps and minima.
        width: of keys.
        value_width: of values.
        page: slots of a page or of a group.
        bits: of a code; 0 = numbers as they are.
        channels: of a value that share a step.
    """
    if reason := native.unavailable():
        return reason
    if dtype not in TYPES:
        return f"the cache holds {str(dtype).removeprefix('torch.')}, not float32 or bfloat16"
    load = LANES * (8 // bits if bits else 1 if dtype == torch.float32 else 2)
    for size in (width, value_width):
        if size % load or size > MOST_WIDTH:
            return f"heads of {size} numbers are no multiple of {load} up to {MOST_WIDTH}"
    if bits and channels % load:
        return f"{channels} channels share a step, no multiple of {load}"
    return f"pages of {page} tokens are longer than {MOST_PAGE}" if page > MOST_PAGE else None


def attend_slots(
    q: Tensor,
    parts: Sequence[Slots],
    scale: float,
    length: int,
    *,
    window: int = 0,
    visible: Tensor | None = None,
    cap: float = 0.0,
    drains: Tensor | None = None,
) -> Tensor:
    """`q` [rows, heads, fresh, width], the last tokens of a text -> `[rows, heads, fresh, value_width]`, in its type.

    The result does not depend on the number of threads, and a row's not on the other rows.

    Args:
        q: in the type of all parts; query heads read the key and value heads in equal groups.
        parts: what is held, at most 4; softmax is over all together.
        scale: see `reference.attend_slots`, as are all others.
        length: see there.
        window: see there.
        visible: uint8 `[rows, length]`, 0 = not seen.
        cap: see there.
        drains: float32 `[heads]`.

    Raises:
        InvalidInput: the library takes no such cache; `declines` would have said so.
    """
    rows, heads, fresh, width = q.shape
    kv_heads = len(parts[0].lengths) // rows
    bits = None if parts[0].codes is None else parts[0].codes.bits
    value_width = parts[0].values.shape[-1] * (8 // bits if bits else 1)
    written = (_Slots * len(parts))()
    for part, into in zip(parts, written, strict=True):
        part._fill(into)
    reading = _Reading(
        rows=rows,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        fresh=fresh,
        width=width,
        value_width=value_width,
        length=length,
        window=window,
        visible=None if visible is None else visible.data_ptr(),
        drains=None if drains is None else drains.data_ptr(),
        scale=scale,
        cap=cap,
        type=TYPES[q.dtype],
        count=len(parts),
        parts=ctypes.addressof(written),
    )
    q = q.contiguous()
    out = q.new_empty(rows, heads, fresh, value_width)
    if native.library().sparity_attend_slots(ctypes.byref(reading), q.data_ptr(), out.data_ptr(), native.threads()):
        raise InvalidInput(f"attend_slots: the library refused heads of {width} and {value_width} in {q.dtype}")
    return out


def choose_pages(
    q: Tensor,
    low: Tensor,
    high: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    ends: tuple[Tensor, Tensor],
    wanted: Tensor,
    *,
    mean: bool = False,
    levels: int = 0,
) -> Chosen:
    """Pages that are worth most to a query: what its product with a key in it may be at most.

    Args:
        q: `[rows, kv_heads, group, width]`, contiguous, in the type of `low`.
        low: `[pages, width]`, of each channel the least of a page's keys; with `levels` the minimum of its codes; where
            `high` is None the mean.
        high: the greatest; with `levels` the step of codes.
        starts: int64 `[rows * kv_heads]`, each head's first page.
        lengths: how many are its own, likewise.
        ends: how many pages at the start and at the end come first, likewise.
        wanted: how many are chosen, likewise.
        mean: of the group's query heads the mean counts, not the largest.
        levels: the greatest code.

    Raises:
        InvalidInput: the library takes no such width; `declines` would have said so.
    """
    pairs = len(lengths)
    chosen = torch.empty(int(wanted.minimum(lengths).sum()), dtype=torch.int32)
    counts = torch.empty(pairs, dtype=torch.int64)
    judging = _Judging(
        pairs=pairs,
        group=q.numel() // (pairs * q.shape[-1]),
        width=q.shape[-1],
        queries=q.data_ptr(),
        low=low.data_ptr(),
        high=None if high is None else high.data_ptr(),
        starts=starts.data_ptr(),
        lengths=lengths.data_ptr(),
        type=TYPES[q.dtype],
        mean=int(mean),
        levels=float(levels),
        leading=ends[0].data_ptr(),
        trailing=ends[1].data_ptr(),
        wanted=wanted.data_ptr(),
    )
    if native.library().sparity_choose_pages(
        ctypes.byref(judging), chosen.data_ptr(), counts.data_ptr(), native.threads()
    ):
        raise InvalidInput(f"choose_pages: the library refused heads of {q.shape[-1]} in {q.dtype}")
    return Chosen(chosen, counts)
