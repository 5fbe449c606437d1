"""SLEB: block by block, the one without which the loss is lowest goes (Song et al. 2024, arXiv:2402.09025)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.models.dimensions import DEPTH
from sparity.registry import register
from sparity.static.structure.depth import DepthMethod, removed_count
from sparity.static.structure.forward import Forward, forward
from sparity.static.structure.methods.base import Choice
from sparity.static.structure.subject import Subject


@register("structure.method", "sleb")
@dataclass(frozen=True)
class SLEB(DepthMethod):
    """Remove greedily, in each round the block whose absence leaves the lowest loss on the text.

    A block's score is that loss of the whole model without it. The first and last `keep_first` and `keep_last` blocks
    never go and score infinity. Blocks x rounds forward passes.
    """

    keep_first: int = 1
    keep_last: int = 1

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        with forward(subject) as passes:
            losses = self._losses(passes, list(range(subject.depth)))
        return {DEPTH: torch.tensor([losses.get(index, math.inf) for index in range(subject.depth)])}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        left = list(range(subject.depth))
        candidates = max(subject.depth - self.keep_first - self.keep_last, 0)
        count = removed_count(subject.depth, sparsity, candidates, "sleb")
        with forward(subject) as passes:
            for _ in range(count):
                losses = self._losses(passes, left)
                left.remove(min(losses, key=lambda index: losses[index]))
        return {DEPTH: left}

    def _losses(self, passes: Forward, left: list[int]) -> dict[int, float]:
        """Each block that may go -> the loss of those left without it."""
        found, hidden, total = {}, passes.first, len(passes.blocks)
        for place, index in enumerate(left):
            if self.keep_first <= index < total - self.keep_last:
                found[index] = passes.loss(passes.run(hidden, left[place + 1 :]))
            hidden = passes.run(hidden, [index])
        return found
