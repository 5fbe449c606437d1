"""Columns of a weight settled one after the other, what each loses made up for by those behind it.

The loop of optimal brain surgeon with one inverse Hessian for all rows, as SparseGPT and GPTQ share it.
"""

from typing import Protocol

import torch
from torch import Tensor

from sparity.calibration.mapped import release

STRIP = 16


class Settle(Protocol):
    """How a column gets the values that it ends with; both methods may look at all columns as they are by then."""

    def begin(self, block: slice) -> None:
        """All columns before `block` are settled, and their errors have reached every column."""

    def column(self, place: int) -> Tensor:
        """The final values `[out]` of the column at `place`; errors of all columns before it have reached it."""


def settle_columns(columns: Tensor, factor: Tensor, settle: Settle, width: int, step: int | None = None) -> None:
    """Settle `columns` [in, out] in place, from the first to the last.

    A block of `width` columns is cut into strips of a few, for the same reason that cuts the matrix into blocks: a
    column's error goes to the rest of its strip at once, and to the columns behind the strip together with those of
    its neighbours.

    Args:
        columns: the weight's columns, `[in, out]`, float32.
        factor: the upper factor of the inverse damped Hessian, `[in, in]`.
        settle: what becomes of each.
        width: of a block; the errors of its columns reach those behind it when the block is done.
        step: so many neighbours, counted from the start of a block, lie in one strip; None where none need to.
    """
    for start in range(0, len(columns), width):
        block = slice(start, min(start + width, len(columns)))
        settle.begin(block)
        errors = _settle_block(columns[block], factor[block, block], settle, start, step)
        columns[block.stop :] -= factor[block, block.stop :].T @ errors
        release(factor[block])


def _settle_block(columns: Tensor, factor: Tensor, settle: Settle, start: int, step: int | None) -> Tensor:
    """Settle a block of columns `[width, out]` in place; the scaled errors [width, out] are for those behind it."""
    width = len(columns)
    diagonal = factor.diagonal()[:, None]
    strip = STRIP if step is None else max(STRIP // step, 1) * step
    errors = torch.zeros_like(columns)
    for first in range(0, width, strip):
        last = min(first + strip, width)
        for column in range(first, last):
            settled = settle.column(start + column)
            errors[column] = (columns[column] - settled) / diagonal[column]
            columns[column] = settled
            columns[column + 1 : last].addr_(factor[column, column + 1 : last], errors[column], alpha=-1)
        columns[last:] -= factor[first:last, last:].T @ errors[first:last]
    return errors
