"""ADMM: the weights and their sparse copy are drawn together in turns (Boža 2024, arXiv:2401.02938)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.solvers.base import Choose, Solver, never_worse

TINY = 1e-8  # added to the norm of a channel


@register("prune.solver", "admm")
@dataclass(frozen=True)
class ADMM(Solver):
    """Alternating directions on inputs of norm 1, for all rows at once.

    In each of the first `rounds` iterations the mask is chosen anew, ever more of what it takes away is really taken
    (1 - (1 - t / rounds)^3 of it in iteration t); the rest of the `iterations` only move weights. With `rounds: 0` the
    mask is chosen once, before; with `at_once` all of what a mask takes away is taken from the first iteration on, as
    the published code does where all weights of a layer compete. `damping` is the share of the mean diagonal that is
    added to the Gram matrix. A row whose output zeroing alone leaves closer is only zeroed.
    """

    damping: float = 0.1
    iterations: int = 20
    rounds: int = 15
    at_once: bool = False

    needs: ClassVar[tuple[str, ...]] = ("gram",)
    own_score: ClassVar[str | None] = "wanda"
    compare_within: ClassVar[CompareWithin | None] = "layer"

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise InvalidInput(f"damping {self.damping}: it must lie in (0, 1]")
        if self.iterations < 1 or not 0 <= self.rounds <= self.iterations:
            raise InvalidInput(
                f"admm: rounds {self.rounds} of iterations {self.iterations}: give 0 <= rounds <= iterations"
            )

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        gram = statistics.gram
        norms = gram.diagonal().sqrt() + TINY  # [in]
        dense = weight.float() * norms
        normal = gram / norms / norms[:, None]
        normal.diagonal().add_(self.damping * normal.diagonal().mean())
        target = dense @ normal
        normal.diagonal().add_(1.0)  # the penalty
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(normal))
        everything = slice(0, weight.shape[1])
        keep = choose(dense.square(), everything)
        current, multiplier, mask = dense, torch.zeros_like(dense), keep
        for iteration in range(self.iterations):
            wanted = current + multiplier
            if iteration < self.rounds and not choose.fixed:
                keep = choose(wanted.square(), everything)
                share = 1.0 if self.at_once else 1 - (1 - (iteration + 1) / self.rounds) ** 3
                mask = gradual(keep, wanted, share)
            elif iteration >= self.rounds:
                mask = keep
            sparse = torch.where(mask, wanted, 0.0)
            multiplier = wanted - sparse
            current = (target + sparse - multiplier) @ inverse
        return never_worse(weight.float(), (current + multiplier) / norms, keep, gram), keep


def gradual(keep: Tensor, weight: Tensor, share: float) -> Tensor:
    """A mask that takes away only `share` of what `keep` does, the smallest of `weight`; all are `[out, in]`."""
    pruned = (~keep).flatten().nonzero().flatten()
    count = int(len(pruned) * share)
    order = weight.abs().flatten()[pruned].argsort(stable=True)
    mask = torch.ones_like(keep).flatten()
    mask[pruned[order[:count]]] = False
    return mask.view(keep.shape)
