"""LaCo: later blocks are merged into an earlier one (Yang, Cao, Zhao 2024, arXiv:2402.11187)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import DEPTH
from sparity.registry import register
from sparity.static.structure.collapse import MergedBlock, Merging, write_block
from sparity.static.structure.depth import DepthMethod, removed_count
from sparity.static.structure.forward import forward
from sparity.static.structure.methods.base import Choice, Restructured
from sparity.static.structure.subject import Subject


@register("structure.method", "laco")
@dataclass(frozen=True)
class LaCo(DepthMethod):
    """From the last blocks towards the first, merge up to `merge` neighbours into one where the output hardly turns.

    The merged block has the weights of the first plus the differences of all others to it; norms stay the first's.
    A merger counts when the cosine of the last hidden states with the dense model's is above `threshold`. With
    `reference` the merged block has the last one's weights, as the authors' notebook computes it.
    """

    merge: int = 4
    interval: int = 2
    threshold: float = 0.65
    keep_first: int = 1
    reference: bool = False

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """One minus the cosine after merging each block with those that follow; infinity for the last."""
        found = torch.full((subject.depth,), math.inf)
        with forward(subject) as passes:
            merging = Merging(passes, self.reference)
            for index in range(subject.depth - 1):
                count = min(self.merge, subject.depth - index)
                found[index] = 1 - merging.similarity(merging.merged(merging.start, index, count))
        return {DEPTH: found}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return {DEPTH: [block.index for block in self._collapsed(subject, sparsity)]}

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """See `Method.restructure`."""
        left = self._collapsed(subject, sparsity)
        kept = {DEPTH: [block.index for block in left]}
        smaller = cut_model(subject.model, kept)
        for block, merged in zip(blocks_of(smaller, subject.family), left, strict=True):
            if merged.count > 1:
                write_block(block, merged.weights)
        return Restructured(smaller, kept)

    def _collapsed(self, subject: Subject, sparsity: float) -> list[MergedBlock]:
        if self.merge < 2 or self.interval < 1:
            raise InvalidInput("laco merges at least 2 blocks, at intervals of at least 1")
        candidates = max(subject.depth - self.keep_first - 1, 0)
        wanted = removed_count(subject.depth, sparsity, candidates, "laco")
        with forward(subject) as passes:
            merging = Merging(passes, self.reference)
            left, place = merging.start, max(subject.depth - 1 - self.merge, self.keep_first)
            while wanted and place >= self.keep_first:
                count = min(self.merge, len(left) - place, wanted + 1)
                tried = merging.merged(left, place, count) if count > 1 else left
                if count > 1 and merging.similarity(tried) > self.threshold:
                    left, wanted = tried, wanted - count + 1
                    place = place - self.interval if place - self.interval < len(left) else len(left) - 1 - self.merge
                    place = max(place, self.keep_first)
                else:
                    place -= 1
        if wanted:
            raise InvalidInput(
                f"laco: {wanted} of the blocks that should go turn the output too far (a cosine of {self.threshold:g} "
                "or less): lower `threshold` or the sparsity"
            )
        return left
