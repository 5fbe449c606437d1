"""Products with slots, by the compiled kernels: the bits of `gemv` with the whole weight in its place."""

import ctypes

import torch
from torch import Tensor

from sparity.engine.kernels import native
from sparity.errors import InvalidInput

MOST_TOKENS = 16  # beyond, gathering what is multiplied pays
DENSE_FROM = 0.6  # of a range's rows: where more are asked for, all are multiplied, in one stream
DENSE, COLUMNS = 0, 4  # of csrc/sparity_kernels.h


def declines(part: Tensor, x: Tensor) -> str | None:
    """Why the compiled kernels do not take a product, or None when they do."""
    if reason := native.unavailable():
        return reason
    if part.dtype != torch.bfloat16 or x.dtype != torch.bfloat16:
        return "kernels take bfloat16"
    return f"kernels take at most {MOST_TOKENS} tokens" if len(x) > MOST_TOKENS else None


def slot_rows(part: Tensor, slots: Tensor, x: Tensor, prefix: tuple[int, int] = (0, 0)) -> Tensor:
    """See `reference.slot_rows`; slots from `prefix[0]` to `prefix[1]` are multiplied densely where most are asked for.

    Raises:
        InvalidInput: a slot outside the part, or shapes that do not fit.
    """
    _check(part, slots, x, part.shape[1])
    x = x.contiguous()
    begin, end = prefix
    inside = (slots >= begin) & (slots < end)
    if end == begin or int(inside.sum()) < DENSE_FROM * (end - begin):
        return _listed(part, slots, x)
    dense = torch.empty(len(x), end - begin, dtype=x.dtype)
    matrix = _matrix(part[begin:end], DENSE)
    _done(native.library().sparity_gemv(ctypes.addressof(matrix), *_call(x, dense)))
    out = torch.empty(len(x), len(slots), dtype=x.dtype)
    out[:, inside] = dense[:, slots[inside].long() - begin]
    out[:, ~inside] = _listed(part, slots[~inside], x)
    return out


def slot_columns(part: Tensor, slots: Tensor, units: Tensor, x: Tensor) -> Tensor:
    """See `reference.slot_columns`.

    Raises:
        InvalidInput: an input that is not 0 meets a channel that `units` does not name, or shapes do not fit.
    """
    _check(part, slots, x, x.shape[1])
    if len(units) != len(slots) or (len(units) and not 0 <= int(units.min()) <= int(units.max()) < x.shape[1]):
        raise InvalidInput(f"slots: {len(slots)} slots for {len(units)} units below {x.shape[1]}")
    places = torch.full((x.shape[1],), -1, dtype=torch.int32)
    places[units] = slots.int()
    x = x.contiguous()
    out = torch.empty(len(x), part.shape[1], dtype=x.dtype)
    matrix = _matrix(part, COLUMNS)
    matrix.rows, matrix.columns = part.shape[1], x.shape[1]
    if len(x):
        _done(native.library().sparity_gemv_slots(ctypes.addressof(matrix), places.data_ptr(), *_call(x, out)))
    return out


def _listed(part: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    out = torch.empty(len(x), len(part), dtype=x.dtype)  # of which the rows that are asked for are written
    rows, matrix = slots.int().contiguous(), _matrix(part, DENSE)
    if len(rows):
        _done(native.library().sparity_gemv_rows(ctypes.addressof(matrix), rows.data_ptr(), len(rows), *_call(x, out)))
    return out[:, slots.long()]


def _matrix(part: Tensor, form: int) -> native.Matrix:
    return native.Matrix(
        rows=len(part), columns=part.shape[1], values=part.data_ptr(), kept=part.numel(), format=form
    )  # fmt: skip


def _call(x: Tensor, out: Tensor) -> tuple[int, int, bool, int, int]:
    return x.data_ptr(), out.data_ptr(), False, len(x), native.threads()


def _done(status: int) -> None:
    if status:
        raise InvalidInput("slots: an input meets a channel that is not in memory, or there is no memory for it")


def _check(part: Tensor, slots: Tensor, x: Tensor, columns: int) -> None:
    outside = len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < len(part)
    if outside or x.dim() != 2 or x.shape[1] != columns or not part.is_contiguous():
        raise InvalidInput(
            f"slots: slots below {len(part)} and inputs [tokens, {columns}] are needed, got {list(x.shape)}"
        )
