"""ALPS: ADMM with a growing penalty, then the best weights of its mask (Meng et al. 2024, arXiv:2406.07831)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.solvers.base import Choose, Solver, never_worse, zeroed

TINY = 1e-8  # added to the norm of a channel
FIRST_PENALTY, LAST_PENALTY = 0.1, 1e6
CHECKED = 3  # iterations from one look at the mask to the next
EARLIEST = 30  # iterations before a mask that hardly changes ends the search
SETTLED = 3e-4
GROWTH = ((0.1, 1.3), (0.005, 1.2))  # share of the kept weights that changed -> factor of the penalty


@register("prune.solver", "alps")
@dataclass(frozen=True)
class ALPS(Solver):
    """Search the mask by ADMM on inputs of norm 1, then solve for its weights by conjugate gradients.

    The penalty grows by 1.3, 1.2 or 1.1 as more or fewer weights enter and leave the mask; the search ends when none
    does, or after `iterations`. `damping` is the share of the Gram matrix's mean diagonal that is added to it,
    `refinements` the number of steps of the second part. A mask that another score has chosen is only solved for. A row
    whose output zeroing alone leaves closer is only zeroed.
    """

    damping: float = DAMPING
    iterations: int = 300
    refinements: int = 10

    needs: ClassVar[tuple[str, ...]] = ("gram",)
    own_score: ClassVar[str | None] = "wanda"
    compare_within: ClassVar[CompareWithin | None] = "layer"

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise InvalidInput(f"damping {self.damping}: it must lie in (0, 1]")
        if self.iterations < 1 or self.refinements < 0:
            raise InvalidInput("alps: it takes at least 1 of iterations, and not fewer than 0 refinements")

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        gram = statistics.gram
        damped = gram.clone()
        damped.diagonal().add_(self.damping * damped.diagonal().mean())
        norms = damped.diagonal().sqrt() + TINY  # [in]
        normal, dense = damped / norms / norms[:, None], weight.float() * norms
        target, everything = dense @ normal, slice(0, weight.shape[1])
        keep = choose(dense.square(), everything)
        found = dense
        if not choose.fixed:
            found = self._searched(dense, normal, target, choose)
            keep = choose(found.square(), everything)
        solved = refined(zeroed(found, keep), normal, target, keep, self.refinements)
        return never_worse(weight.float(), solved / norms, keep, gram), keep

    def _searched(self, dense: Tensor, normal: Tensor, target: Tensor, choose: Choose) -> Tensor:
        """Weights `[out, in]` whose largest make the mask."""
        values, vectors = torch.linalg.eigh(normal.double())
        everything = slice(0, dense.shape[1])
        start = choose(dense.square(), everything)
        count = max(int(start.sum()), 1)
        penalty, grown = FIRST_PENALTY, False
        inverse = _inverse(values, vectors, penalty)
        weight, sparse, multiplier, before = dense, zeroed(dense, start), torch.zeros_like(dense), start
        for iteration in range(1, self.iterations + 1):
            weight = (target - multiplier + penalty * sparse) @ inverse
            wanted = weight + multiplier / penalty
            keep = choose(wanted.square(), everything)
            sparse = zeroed(wanted, keep)
            multiplier = multiplier + penalty * (weight - sparse)
            if iteration % CHECKED:
                continue
            changed = int((keep != before).sum())
            factor = next((factor for share, factor in GROWTH if changed / count > share), 1.1)
            if changed / count > GROWTH[-1][0] or (changed and grown):
                penalty, grown = min(penalty * factor, LAST_PENALTY), True
            elif changed:  # too strong from the start: begin again with less
                penalty /= 5
                weight, sparse, multiplier = dense, zeroed(dense, start), torch.zeros_like(dense)
            elif grown:
                break
            else:
                penalty /= 5
            before, inverse = keep, _inverse(values, vectors, penalty)
            if iteration > EARLIEST and changed / count < SETTLED:
                break
        return weight


def refined(weight: Tensor, normal: Tensor, target: Tensor, keep: Tensor, steps: int) -> Tensor:
    """Steps of conjugate gradients towards the weights `[out, in]` within `keep` with `weight @ normal = target`.

    A row is done when float32 knows no better: steps on what rounding has left would lead away from there.
    """
    residual = zeroed(target - weight @ normal, keep)
    direction, length = residual, residual.square().sum(1, keepdim=True)
    least = length * torch.finfo(length.dtype).eps ** 2
    for _ in range(steps):
        image = direction @ normal
        energy = (direction * image).sum(1, keepdim=True)
        step = torch.where((energy > 0) & (length > least), length / energy, 0.0)
        weight = weight + step * direction
        residual = zeroed(residual - step * image, keep)
        shorter = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(length > 0, shorter / length, 0.0) * direction
        length = shorter
    return weight


def _inverse(values: Tensor, vectors: Tensor, penalty: float) -> Tensor:
    return ((vectors / (values + penalty)) @ vectors.T).float()
