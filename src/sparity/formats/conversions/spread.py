"""A bitmask of half bytes that lies dense in memory: for processors that read that faster."""

from collections.abc import Iterator
from typing import Self

from torch import Tensor

from sparity.formats.base import VALUES, build_format, format_of
from sparity.formats.storage.nibbles import narrow, widen
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.side_by_side import DenseSideBySide, SideBySide


class SpreadSideBySide(SideBySide):
    """The tensors of a matrix in the format bitmask; in memory, those of `DenseSideBySide`, zeros included."""

    @classmethod
    def of(cls, packed: Packed) -> Self:
        """Lay a matrix, whose columns are a multiple of 8."""
        stored = format_of(packed).stored(packed)
        dense = build_format("dense").wrap(stored, packed.sides, packed.dtype, packed.encoding)
        return cls(packed.shape[0], DenseSideBySide.of(dense.tensors).laid)

    def __getitem__(self, name: str) -> Tensor:
        """See `SideBySide.__getitem__`."""
        laid = DenseSideBySide(self.rows, self.laid)
        if name in self.laid and name != VALUES:
            return laid[name]
        codes = laid[VALUES]
        tensors = build_format("bitmask").encode(widen(codes, 2 * codes.shape[1]))
        return narrow(tensors[name]) if name == VALUES else tensors[name]

    def __iter__(self) -> Iterator[str]:
        yield from ("masks", "offsets", *self.laid)

    def __len__(self) -> int:
        return 2 + len(self.laid)
