"""N:M: N weights kept of every M neighbours in a row (2:4: Mishra et al. 2021, arXiv:2104.08378)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.patterns.base import Pattern, check_scores, lowest


@register("prune.pattern", "n_of_m")
@dataclass(frozen=True)
class NOfM(Pattern):
    """Keep the `n` highest scores of each `m` consecutive inputs.

    `n` counts kept weights (the code of Wanda and SparseGPT counts pruned ones; equal for 2:4 and 4:8). Rows whose
    length `m` does not divide are refused, unless `tail: dense` leaves the last columns as they are.
    """

    n: int
    m: int
    tail: Literal["refuse", "dense"] = "refuse"

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise InvalidInput(f"pattern {self.n}:{self.m}: N weights are kept of M, so 1 <= N <= M")

    def keep(self, scores: Tensor, sparsity: float, compare_within: CompareWithin) -> Tensor:
        """See `Pattern.keep`; the group is always M neighbours and the sparsity always 1 - N/M."""
        check_scores(scores)
        rows, columns = scores.shape
        self.check_shape(rows, columns, "scores")
        if columns == self.m:  # one group per row, as a solver asks for: `scores` may be a transposed view
            return ~lowest(scores, self.m - self.n)
        whole = columns - columns % self.m
        keep = torch.ones_like(scores, dtype=torch.bool)
        groups = scores[:, :whole].reshape(-1, self.m)
        keep[:, :whole] = ~lowest(groups, self.m - self.n).reshape(rows, whole)
        return keep

    def exchange_width(self, columns: int) -> int:
        """Within a group of M."""
        return self.m

    @property
    def words(self) -> str:
        """See `Pattern.words`."""
        return f"{self.n} of {self.m} kept"

    @property
    def sparsity(self) -> float:
        """1 - N/M."""
        return 1 - self.n / self.m

    @property
    def column_step(self) -> int:
        """M columns are chosen together."""
        return self.m

    def check_shape(self, rows: int, columns: int, name: str) -> None:
        """See `Pattern.check_shape`."""
        if columns % self.m and self.tail == "refuse":
            raise InvalidInput(
                f"{name}: {self.m} does not divide its {columns} input columns, so {self.n}:{self.m} does not fit; "
                f'set `tail: dense` to leave the last {columns % self.m} dense (pattern: {{"{self.n}:{self.m}": '
                "{tail: dense}}) or list it under `dense:`"
            )

    def breaches(self, keep: Tensor) -> int:
        """Groups of M with more than N kept."""
        whole = keep.shape[1] - keep.shape[1] % self.m
        return int((keep[:, :whole].reshape(-1, self.m).sum(1) > self.n).sum())
