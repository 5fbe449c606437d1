"""SparseSwaps: the best exchange of two weights, again and again (Zimmer et al. 2025, arXiv:2512.10922)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.solvers.base import Choose, Solver, zeroed

LARGEST_TABLE = 1 << 24  # pairs looked at together
GAIN = 1e-6  # of the row's error: a smaller one may be rounding


@register("prune.solver", "sparse_swaps")
@dataclass(frozen=True)
class SparseSwaps(Solver):
    """Refine a mask: in each row the kept and the pruned weight whose exchange brings the output closest change places.

    It starts from the mask of the score and keeps its count in every row, and in every group of an N:M pattern. Gains
    are exact, from the Gram matrix; weights stay as they are. Pairs are looked for among the `candidates` weights that
    are cheapest to prune and as many that are best to revive, and among all pairs once these gain nothing; a row is
    done when no pair does, or after `swaps`.
    """

    swaps: int = 100
    candidates: int = 32

    exchanges: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def __post_init__(self) -> None:
        if self.swaps < 1 or self.candidates < 1:
            raise InvalidInput("sparse_swaps: at least one of swaps, and at least one of candidates")

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        rows, columns = weight.shape
        keep = choose(weight.float(), slice(0, columns)).clone()
        width, gram = choose.exchange_width(columns), statistics.gram
        size = max(LARGEST_TABLE // (columns * min(width, columns)), 1)
        for start in range(0, rows, size):
            part = Exchanges(weight[start : start + size].float(), keep[start : start + size], gram, width)
            part.improve(self.swaps, self.candidates)
        return zeroed(weight.float(), keep), keep


class Exchanges:
    """The masks of some rows while weights change places within `width` neighbours.

    Pruning a kept i and reviving a pruned j changes a row's error d G dT, where d holds the pruned weights, by
    2 w_i c_i + w_i^2 G_ii - 2 w_j c_j + w_j^2 G_jj - 2 w_i w_j G_ij, with c = d G.
    """

    def __init__(self, weight: Tensor, keep: Tensor, gram: Tensor, width: int) -> None:
        self.weight, self.keep, self.gram, self.width = weight, keep, gram, width  # [rows, in], changed; [in, in]
        self.lost = zeroed(weight, ~keep)  # d
        self.pull = self.lost @ gram  # c

    def improve(self, swaps: int, candidates: int) -> None:
        """Make up to `swaps` exchanges in every row."""
        left = torch.full((len(self.weight),), swaps)
        while len(active := (left > 0).nonzero().flatten()):
            gained = self._exchange(active, candidates)
            rest = active[~gained]
            if len(rest):
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
        whole = self.weight.shape[1] - self.weight.shape[1] % self.width
        weight, kept, pull = (each[rows][:, :whole] for each in (self.weight, self.keep, self.pull))
        own = weight.square() * self.gram.diagonal()[:whole]
        shape = (len(rows), -1, self.width)
        costs = torch.where(kept, own + 2 * weight * pull, torch.inf).view(shape)
        returns = torch.where(kept, torch.inf, own - 2 * weight * pull).view(shape)
        count, row = min(candidates, self.width), torch.arange(len(rows))
        if count == self.width:  # all pairs: nothing to look for
            grouped = weight.view(shape)
            changes = grouped[..., :, None] * grouped[..., None, :]
            changes.mul_(self._squares(whole)).mul_(-2).add_(costs[..., :, None]).add_(returns[..., None, :])
            least, place = changes.flatten(1).min(1)
            group, pair = place // (count * count), place % (count * count)
            return group * count + pair // count, group * count + pair % count, least
        out, back = (each.topk(count, dim=2, largest=False) for each in (costs, returns))
        starts = torch.arange(0, whole, self.width)[:, None]
        i, j = out.indices + starts, back.indices + starts  # [rows, groups, count]
        both = self.gram[i[..., :, None], j[..., None, :]]
        w_i, w_j = (weight.gather(1, each.flatten(1)).view(each.shape) for each in (i, j))
        changes = (
            out.values[..., :, None] + back.values[..., None, :] - 2 * w_i[..., :, None] * w_j[..., None, :] * both
        )
        least, place = changes.flatten(1).min(1)
        group, pair = place // (count * count), place % (count * count)
        return i[row, group, pair // count], j[row, group, pair % count], least

    def _squares(self, whole: int) -> Tensor:
        """The squares of `width` along the diagonal of the Gram matrix, `[groups, width, width]`."""
        starts = range(0, whole, self.width)
        return torch.stack([self.gram[start : start + self.width, start : start + self.width] for start in starts])
