"""Which format stores a matrix in the fewest bytes."""

from torch import Tensor

from sparity.formats.base import Format, build_format
from sparity.formats.storage.values import Values

CANDIDATES = ("two_of_four", "bitmask", "dense")


def smallest_format(weight: Tensor, values: Values = "same") -> Format:
    """Of the formats that have kernels and can hold `weight` [rows, columns], the one that takes the fewest bytes."""
    shape = (weight.shape[0], weight.shape[1])

    def size(candidate: Format) -> int:
        return candidate.nbytes(shape, candidate.count(weight), weight.dtype, values)

    fitting = [found for name in CANDIDATES if (found := build_format(name)).matches(weight)]
    return min(fitting, key=size)
