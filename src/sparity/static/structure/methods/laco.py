"""LaCo: later blocks are merged into an earlier one (Yang, Cao, Zhao 2024, arXiv:2402.11187)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparity.errors import InvalidInput
from sparity.models import Block
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import DEPTH
from sparity.registry import register
from sparity.static.structure.depth import DepthMethod, removed_count
from sparity.static.structure.forward import Forward, forward
from sparity.static.structure.methods.base import Choice, Restructured
from sparity.static.structure.subject import Subject

Weights = dict[str, Tensor]  # of one block, by name within it


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
            merging = _Merging(passes, self.reference)
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
                _write(block, merged.weights)
        return Restructured(smaller, kept)

    def _collapsed(self, subject: Subject, sparsity: float) -> list["_Merged"]:
        if self.merge < 2 or self.interval < 1:
            raise InvalidInput("laco merges at least 2 blocks, at intervals of at least 1")
        candidates = max(subject.depth - self.keep_first - 1, 0)
        wanted = removed_count(subject.depth, sparsity, candidates, "laco")
        with forward(subject) as passes:
            merging = _Merging(passes, self.reference)
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


@dataclass(frozen=True)
class _Merged:
    """A block as it now is: the number of the first that it was made of, and of how many."""

    index: int
    weights: Mapping[str, Tensor] = field(repr=False)
    count: int = 1


class _Merging:
    """Tries mergers on the loaded blocks, which are what they were afterwards."""

    def __init__(self, passes: Forward, reference: bool) -> None:
        self._passes, self._reference = passes, reference
        self.start = [_Merged(block.index, _weights(block)) for block in passes.blocks]
        self._dense = passes.normed(passes.run(passes.first, range(len(passes.blocks))))

    def merged(self, left: list[_Merged], place: int, count: int) -> list[_Merged]:
        """The blocks with `count` from `place` on made into one."""
        group = left[place : place + count]
        first = group[0].weights
        if self._reference:
            weights = dict(group[-1].weights)
        else:
            weights = {
                name: value.float() + sum(other.weights[name].float() - value.float() for other in group[1:])
                for name, value in first.items()
            }
        one = _Merged(group[0].index, weights, sum(each.count for each in group))
        return [*left[:place], one, *left[place + count :]]

    def similarity(self, left: list[_Merged]) -> float:
        """The cosine of the last hidden states, a sequence's as one vector, with the dense model's; their mean."""
        hidden = self._passes.first
        for each in left:
            block = self._passes.blocks[each.index]
            _write(block, each.weights)
            hidden = self._passes.run(hidden, [each.index])
            _write(block, self.start[each.index].weights)
        last = self._passes.normed(hidden)
        return float(cosine_similarity(last.flatten(1), self._dense.flatten(1), dim=-1).mean())


def _weights(block: Block) -> Weights:
    """Copies of a block's projections and their biases, by their names within the block."""
    found = {}
    for name, parameter in _parameters(block):
        found[name] = parameter.detach().clone()
    return found


def _write(block: Block, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in _parameters(block):
        parameter.data.copy_(weights[name])


def _parameters(block: Block) -> list[tuple[str, Tensor]]:
    holders = {projection.module for projection in block.projections}
    return [
        (f"{path}.{name}", parameter)
        for path, module in block.module.named_modules()
        if module in holders
        for name, parameter in module.named_parameters(recurse=False)
    ]
