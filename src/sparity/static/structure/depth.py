"""What methods that take out whole blocks share."""

from dataclasses import dataclass

from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.dimensions import DEPTH
from sparity.static.structure.methods.base import Method
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import blocks_left


@dataclass(frozen=True)
class DepthMethod(Method):
    """A method that leaves fewer blocks of the same shape: all but the share `sparsity`, rounded to whole blocks."""

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        return {DEPTH: blocks_left(len(decoder), sparsity)}


def hidden_states(subject: Subject) -> list[Tensor]:
    """The hidden states before each block and after the last, `[samples, tokens, hidden]` each."""
    found = []
    for visit in subject.visits():
        found.append(visit.hidden.clone())
        visit.finish()
    return [*found, visit.hidden.clone()]


def run_of_blocks(first: int, count: int, depth: int) -> list[int]:
    """The blocks that stay when `count` from `first` on go."""
    return [index for index in range(depth) if not first <= index < first + count]


def removed_count(depth: int, sparsity: float, candidates: int, method: str) -> int:
    """How many blocks go; raises `InvalidInput` when a method may not take so many."""
    count = depth - blocks_left(depth, sparsity)
    if count > candidates:
        raise InvalidInput(
            f"{method} may remove {candidates} of the {depth} blocks, but a sparsity of {sparsity:g} means {count}: "
            "lower it"
        )
    return count
