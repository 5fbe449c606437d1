"""Unstructured: any weight may be zero."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.patterns.base import Pattern, check_scores, lowest, value_at_rank


@register("prune.pattern", "unstructured")
@dataclass(frozen=True)
class Unstructured(Pattern):
    """Prune the lowest scores of each row, or of the whole layer.

    Within a row exactly `int(in * sparsity)` weights go (Wanda's rule). Within a layer everything up to and including
    the score at rank `int(numel * sparsity)` goes (the rule of the magnitude, SparseGPT and RIA code: at least one
    more, and all ties). `count: exact` prunes `int(numel * sparsity)` weights of a layer instead.
    """

    count: Literal["reference", "exact"] = "reference"

    def keep(self, scores: Tensor, sparsity: float, compare_within: CompareWithin) -> Tensor:
        """See `Pattern.keep`."""
        check_scores(scores)
        if sparsity == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        if compare_within == "row":
            return ~lowest(scores, int(scores.shape[1] * sparsity))
        rank = int(scores.numel() * sparsity)
        if self.count == "exact":
            return ~lowest(scores.flatten()[None], rank).reshape(scores.shape)
        return scores > value_at_rank(scores.reshape(1, -1), rank)

    def sparsity_of(self, pruned: int, total: int) -> float:
        """See `Pattern.sparsity_of`; the reference rule prunes up to and including the score at that rank."""
        if self.count == "exact":
            return super().sparsity_of(pruned, total)
        return (pruned - 0.5) / total if pruned else 0.0

    def exchange_width(self, columns: int) -> int:
        """Anywhere in a row."""
        return columns

    @property
    def words(self) -> str:
        """See `Pattern.words`."""
        return "unstructured"

    def breaches(self, keep: Tensor) -> int:
        """Every mask is legal."""
        return 0
