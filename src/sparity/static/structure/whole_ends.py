"""Methods that leave the first and last blocks whole and cut all others alike."""

from abc import abstractmethod
from dataclasses import dataclass, replace

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.dimensions import Dimension
from sparity.static.structure.methods.base import Method


@dataclass(frozen=True)
class WholeEnds(Method):
    """A method of which `keep_first` and `keep_last` say how many blocks at either end stay whole.

    None stands for as many as the authors leave, so that blocks differ.
    """

    keep_first: int | None = None
    keep_last: int | None = None

    @abstractmethod
    def usual(self, depth: int) -> tuple[int, int]:
        """How many of `depth` blocks the authors leave whole at either end."""

    @abstractmethod
    def left(self, dimension: Dimension, sparsity: float) -> int:
        """How many units of a dimension stay in a block that is cut."""

    def cut_blocks(self, depth: int) -> range:
        """The blocks that do not stay whole.

        Raises:
            InvalidInput: there are not so many blocks.
        """
        first, last = self.usual(depth)
        first = first if self.keep_first is None else self.keep_first
        last = last if self.keep_last is None else self.keep_last
        if first < 0 or last < 0 or first + last > depth:
            raise InvalidInput(f"{self.name} cannot spare {first} and {last} of {depth} blocks")
        return range(first, depth - last)

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        if len(self.cut_blocks(len(decoder))) < len(decoder):
            raise InvalidInput(
                f"{self.name} spares the first and last blocks, so that blocks differ, which no stock configuration "
                "can say: set `keep_first: 0` and `keep_last: 0`, or `shapes: ragged` of the stage"
            )
        return {each.name: self.left(each, sparsity) for each in decoder.dimensions(0)}

    def sizes_on_average(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes_on_average`."""
        return replace(self, keep_first=0, keep_last=0).sizes(decoder, sparsity)
