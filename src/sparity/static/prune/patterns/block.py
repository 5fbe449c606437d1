"""Block: rectangles of weights are kept or pruned as one (Gray et al. 2017; Narang et al. 2017, arXiv:1711.02782)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.patterns.base import Pattern, check_scores, lowest


@register("prune.pattern", "block")
@dataclass(frozen=True)
class BlockPattern(Pattern):
    """Prune the blocks of `rows` x `columns` weights whose scores sum to the least.

    `int(blocks * sparsity)` blocks go, of each row of blocks or of the whole layer. A matrix that the block does not
    divide is refused, unless `tail: dense` leaves the last rows and columns as they are.
    """

    rows: int
    columns: int
    tail: Literal["refuse", "dense"] = "refuse"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise InvalidInput(f"pattern block:{self.rows}x{self.columns}: a block has at least one row and one column")

    def keep(self, scores: Tensor, sparsity: float, compare_within: CompareWithin) -> Tensor:
        """See `Pattern.keep`."""
        check_scores(scores)
        self.check_shape(scores.shape[0], scores.shape[1], "scores")
        keep = torch.ones_like(scores, dtype=torch.bool)
        blocks = self._sums(scores)  # [out / rows, in / columns]
        if compare_within == "row":
            pruned = lowest(blocks, int(blocks.shape[1] * sparsity))
        else:
            pruned = lowest(blocks.flatten()[None], int(blocks.numel() * sparsity)).reshape(blocks.shape)
        spread = pruned.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        keep[: spread.shape[0], : spread.shape[1]] = ~spread
        return keep

    def competing(self, scores: Tensor) -> Tensor:
        """See `Pattern.competing`: blocks by their sums."""
        return self._sums(scores)

    @property
    def words(self) -> str:
        """See `Pattern.words`."""
        return f"blocks of {self.rows} x {self.columns}"

    @property
    def column_multiple(self) -> int:
        """A solver's column block holds whole blocks."""
        return self.columns

    def check_shape(self, rows: int, columns: int, name: str) -> None:
        """See `Pattern.check_shape`."""
        if self.tail == "refuse" and (rows % self.rows or columns % self.columns):
            raise InvalidInput(
                f"{name}: blocks of {self.rows}x{self.columns} do not divide its shape {rows}x{columns}; choose "
                "another size, or set `tail: dense` to leave the rest dense"
            )

    def breaches(self, keep: Tensor) -> int:
        """Blocks that are neither whole nor empty."""
        kept = self._sums(keep.float())
        return int(((kept > 0) & (kept < self.rows * self.columns)).sum())

    def _sums(self, values: Tensor) -> Tensor:
        down, across = values.shape[0] // self.rows, values.shape[1] // self.columns
        inside = values[: down * self.rows, : across * self.columns]
        return inside.reshape(down, self.rows, across, self.columns).sum((1, 3))
