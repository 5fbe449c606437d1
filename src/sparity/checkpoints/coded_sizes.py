"""What the Huffman codes of a packed checkpoint save."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from sparity.checkpoints.packed_file import CODED
from sparity.checkpoints.source import CheckpointSource, read_header


@dataclass(frozen=True)
class CodedSizes:
    """Of the matrices under a code.

    Attributes:
        layouts: how many of them are in each layout, see `coded_matrix`.
        stored: bytes of their tensors in the files: codebooks, lengths, sizes of chunks and streams, and the scales of
            an encoding.
        dense: bytes of the dense tensors that they stand for.
    """

    layouts: Mapping[str, int] = field(default_factory=dict)
    stored: int = 0
    dense: int = 0


def coded_sizes(source: CheckpointSource) -> CodedSizes:
    """The sizes, from the headers of a checkpoint's files alone; nothing but zeros where no matrix is under a code."""
    found = [matrix for matrix in source.matrices.values() if CODED in matrix.entry]
    sizes = {
        name: prod(shape) * dtype.itemsize
        for path in {matrix.path for matrix in found}
        for name, shape, dtype in read_header(path)
    }
    return CodedSizes(
        layouts=dict(Counter(matrix.entry[CODED]["layout"] for matrix in found)),
        stored=sum(sizes[part] for matrix in found for part in matrix.parts),
        dense=sum(prod(matrix.shape) * matrix.dtype.itemsize for matrix in found),
    )
