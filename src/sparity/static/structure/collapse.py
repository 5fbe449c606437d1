"""Blocks merged into one, tried on a loaded model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparity.models import Block
from sparity.static.structure.forward import Forward

Weights = dict[str, Tensor]  # of one block, by name within it


@dataclass(frozen=True)
class MergedBlock:
    """A block as it now is: the number of the first that it was made of, and of how many."""

    index: int
    weights: Mapping[str, Tensor] = field(repr=False)
    count: int = 1


class Merging:
    """Tries mergers on the loaded blocks, which are what they were afterwards."""

    def __init__(self, passes: Forward, reference: bool) -> None:
        self._passes, self._reference = passes, reference
        self.start = [MergedBlock(block.index, _weights(block)) for block in passes.blocks]
        self._dense = passes.normed(passes.run(passes.first, range(len(passes.blocks))))

    def merged(self, left: list[MergedBlock], place: int, count: int) -> list[MergedBlock]:
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
        one = MergedBlock(group[0].index, weights, sum(each.count for each in group))
        return [*left[:place], one, *left[place + count :]]

    def similarity(self, left: list[MergedBlock]) -> float:
        """The cosine of the last hidden states, a sequence's as one vector, with the dense model's; their mean."""
        hidden = self._passes.first
        for each in left:
            block = self._passes.blocks[each.index]
            write_block(block, each.weights)
            hidden = self._passes.run(hidden, [each.index])
            write_block(block, self.start[each.index].weights)
        last = self._passes.normed(hidden)
        return float(cosine_similarity(last.flatten(1), self._dense.flatten(1), dim=-1).mean())


def _weights(block: Block) -> Weights:
    """Copies of a block's projections and their biases, by their names within the block."""
    found = {}
    for name, parameter in _parameters(block):
        found[name] = parameter.detach().clone()
    return found


def write_block(block: Block, weights: Mapping[str, Tensor]) -> None:
    """Put weights in the place of a block's own."""
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
