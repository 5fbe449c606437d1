"""Exchanges of a kept and a pruned weight that bring a row's output closest: the steps of SparseSwaps."""

import torch
from torch import Tensor

from sparity.static.prune.solvers.base import zeroed

LARGEST_TABLE = 1 << 24  # pairs looked at together
GAIN = 1e-6  # of the row's error: a smaller one may be rounding


class Exchanges:
    """The masks of some rows while weights change places within `width` neighbours.

    Pruning a kept i and reviving a pruned j changes a row's error d G dT, where d holds the pruned weights, by
    2 w_i c_i + w_i^2 G_ii - 2 w_j c_j + w_j^2 G_jj - 2 w_i w_j G_ij, with c = d G.
    """

    def __init__(self, weight: Tensor, keep: Tensor, gram: Tensor, width: int) -> None:
        self.weight, self.keep, self.gram, self.width = weight, keep, gram, width  # [rows, in], changed; [in, in]
        self.lost = zeroed(weight, ~keep)  # d
        self.pull = self.lost @ gram  # c
        self.whole = weight.shape[1] - weight.shape[1] % width  # columns in whole groups
        starts = range(0, self.whole, width)
        self.squares = torch.stack([gram[start : start + width, start : start + width] for start in starts])

    def improve(self, swaps: int, candidates: int) -> None:
        """Make up to `swaps` exchanges in every row."""
        left = torch.full((len(self.weight),), swaps)
        while len(active := (left > 0).nonzero().flatten()):
            gained = self._exchange(active, candidates)
            rest = active[~gained]
            if len(rest) and candidates < self.width:
                gained[~gained] = self._exchange(rest, self.width)
            left[active] = torch.where(gained, left[active] - 1, 0)

    def _exchange(self, rows: Tensor, candidates: int) -> Tensor:
        """The best exchange of each of `rows`, made where it gains: bool like them."""
        pruned, revived, change = self._best(rows, candidates)
        error = (self.lost[rows] * self.pull[rows]).sum(1).clamp(min=0)
        gains = change < -GAIN * error - torch.finfo(torch.float32).tiny
        rows, pruned, revived = rows[gains], pruned[gains], revived[gains]
        out, back = self.weight[rows, pruned], self.weight[rows, revived]
        self.keep[rows, pruned], self.keep[rows, revived] = False, True
        self.lost[rows, pruned], self.lost[rows, revived] = out, 0.0
        self.pull[rows] += out[:, None] * self.gram[pruned] - back[:, None] * self.gram[revived]
        return gains

    def _best(self, rows: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of each row's best exchange, and by how much it changes the error."""
        weight, kept, pull = (each[rows][:, : self.whole] for each in (self.weight, self.keep, self.pull))
        own = weight.square() * self.gram.diagonal()[: self.whole]
        shape = (len(rows), -1, self.width)
        costs = torch.where(kept, own + 2 * weight * pull, torch.inf).view(shape)
        returns = torch.where(kept, torch.inf, own - 2 * weight * pull).view(shape)
        if candidates >= self.width:
            return self._best_of_all(weight.view(shape), costs, returns)
        count, row = candidates, torch.arange(len(rows))
        out, back = (each.topk(count, dim=2, largest=False) for each in (costs, returns))
        starts = torch.arange(0, self.whole, self.width)[:, None]
        i, j = out.indices + starts, back.indices + starts  # [rows, groups, count]
        both = self.gram[i[..., :, None], j[..., None, :]]
        w_i, w_j = (weight.gather(1, each.flatten(1)).view(each.shape) for each in (i, j))
        changes = (
            out.values[..., :, None] + back.values[..., None, :] - 2 * w_i[..., :, None] * w_j[..., None, :] * both
        )
        least, place = changes.flatten(1).min(1)
        group, pair = place // (count * count), place % (count * count)
        return i[row, group, pair // count], j[row, group, pair % count], least

    def _best_of_all(self, weight: Tensor, costs: Tensor, returns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same among all pairs, for rows cut into groups `[rows, groups, width]`: nothing to look for."""
        rows, width = len(weight), self.width
        least, pruned = torch.full((rows,), torch.inf), torch.zeros(rows, dtype=torch.int64)
        revived, step = pruned.clone(), max(LARGEST_TABLE // max(weight.numel(), 1), 1)
        for start in range(0, width, step):
            some = slice(start, min(start + step, width))
            changes = weight[..., some, None] * weight[..., None, :]
            changes.mul_(self.squares[:, some]).mul_(-2).add_(costs[..., some, None]).add_(returns[..., None, :])
            change, place = changes.flatten(1).min(1)
            group, pair = place // (changes.shape[2] * width), place % (changes.shape[2] * width)
            better = change < least
            least = torch.where(better, change, least)
            pruned = torch.where(better, group * width + start + pair // width, pruned)
            revived = torch.where(better, group * width + pair % width, revived)
        return pruned, revived, least
