"""Exchanges of a kept and a pruned weight that bring the mean of a row's output closer: the steps of DSnoT."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.static.prune.solvers.base import zeroed


@dataclass
class Exchanges:
    """All rows of a matrix while their masks are refined; the options are those of the solver.

    Attributes:
        shares: what each weight adds to the mean of its output, `[rows, in]`.
        keep: the mask `[rows, in]`, changed.
        growth: the columns of each row `[rows, in]`, from the one to revive first where the error is negative to the
            one to revive first where it is positive.
        scores: Wanda's, `[rows, in]`.
        width: an exchange stays within so many neighbours.
    """

    cycles: int
    threshold: float
    same_sign: bool
    reference: bool
    shares: Tensor
    keep: Tensor
    growth: Tensor
    scores: Tensor
    width: int

    def refined(self) -> Tensor:
        """`keep` after all steps."""
        first, columns = self.keep.clone(), self.keep.shape[1]
        error = zeroed(self.shares, ~first).sum(1)
        turned, active = error.sign(), torch.ones(len(error), dtype=torch.bool)
        grown = torch.zeros(2, len(error), dtype=torch.int64)  # how many were taken from either end of `growth`
        dropped, order = torch.zeros_like(grown), self._drops(first)
        scores = self.scores.masked_fill(~first, torch.inf)
        for _ in range(self.cycles):
            side = (error > 0).long()
            place = torch.where(side > 0, columns - 1 - grown[1], grown[0])
            revived = _at(self.growth, place)
            if self.width == columns:
                taken = torch.where(error < 0, columns - 1 - dropped[1], dropped[0])
                pruned = _at(order, taken)
                dropped[(error < 0).long(), torch.arange(len(error))] += 1
            else:
                pruned = self._lowest_beside(revived, scores)
                scores.scatter_(1, pruned[:, None], torch.inf)
            grown[side, torch.arange(len(error))] += 1
            after = error + _at(self.shares, pruned) - _at(self.shares, revived)
            active &= (error.abs() > self.threshold) & self._allowed(first, revived, pruned, error, after, turned)
            active &= (place >= 0) & (place < columns)
            if not bool(active.any()):
                break
            rows = active.nonzero().flatten()
            self.keep[rows, pruned[rows]] = False
            self.keep[rows, revived[rows]] = True
            error = torch.where(active, after, error)
        return self.keep

    def _allowed(
        self, first: Tensor, revived: Tensor, pruned: Tensor, error: Tensor, after: Tensor, turned: Tensor
    ) -> Tensor:
        """`[rows]`: whether a row takes the step."""
        whole = self.width == first.shape[1]
        same = after.sign() == turned
        if self.reference:
            return same if self.same_sign or not whole else torch.ones_like(same)
        closer = (after.abs() < error.abs()) & ~_at(first, revived) & _at(first, pruned) & _at(self.keep, pruned)
        helps = _at(self.shares, pruned) * error <= 0
        return closer & (helps | (not whole)) & (same | (not self.same_sign))

    def _drops(self, first: Tensor) -> Tensor:
        """`[rows, in]`: kept columns by their score, from the front those of negative shares, from the back the others.

        What is neither, such as a weight that adds nothing, is the kept column of the lowest score: the middle of the
        list is not meant to be reached.
        """
        columns = first.shape[1]
        ranked = self.scores.masked_fill(~first, torch.inf).sort(dim=1, stable=True).indices
        shares = zeroed(self.shares, first).gather(1, ranked)
        places = torch.arange(columns).expand_as(ranked)
        front = torch.where(shares < 0, places, columns).sort(1).values
        back = torch.where(shares > 0, places, columns).sort(1).values.flip(1)
        return ranked.gather(1, torch.where(front < columns, front, torch.where(back < columns, back, 0)))

    def _lowest_beside(self, revived: Tensor, scores: Tensor) -> Tensor:
        """`[rows]`: the column of the lowest score in the group of each revived one."""
        start = revived - revived % self.width
        group = start[:, None] + torch.arange(self.width)
        lowest = scores.gather(1, group.clamp(max=scores.shape[1] - 1)).argmin(1)
        return (start + lowest).clamp(max=scores.shape[1] - 1)


def _at(values: Tensor, columns: Tensor) -> Tensor:
    """The value `[rows]` of each row `[rows, in]` in a column, those beyond the ends read as the last."""
    return values.gather(1, columns.clamp(0, values.shape[1] - 1)[:, None])[:, 0]
