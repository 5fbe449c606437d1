"""A packed matrix: named tensors and what is needed to read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from sparity.formats.encodings.base import Encoding
from sparity.formats.encodings.same import Same
from sparity.formats.storage.side_by_side import DenseSideBySide, SideBySide


@dataclass(frozen=True)
class Packed:
    """One weight `[rows, columns]` in one format, its values in one encoding.

    Attributes:
        format: the name of the format, as in the registry.
        shape: rows (outputs) and columns (inputs) of the weight.
        dtype: the type that unpacking gives.
        tensors: what is stored, by name; on the CPU, contiguous; those of the format and those of the encoding. In
            memory they may lie in another order, `SideBySide`.
        options: the format's own numbers, such as the size of a block.
        encoding: what the stored values mean.
    """

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    options: Mapping[str, int] = field(default_factory=dict)
    encoding: Encoding = field(default_factory=Same)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not isinstance(self.tensors, SideBySide):
            object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def pair(self) -> tuple[str, str]:
        """Format and encoding by name: what a kernel takes or does not."""
        return self.format, self.encoding.name

    @property
    def words(self) -> str:
        """`the format block`, or `the format block with int8 values`."""
        return f"the format {self.format}{'' if self.encoding.exact else f' with {self.encoding.name} values'}"

    @property
    def quantized(self) -> bool:
        """Whether the values are not the weight's own."""
        return not self.encoding.exact

    @property
    def plain(self) -> bool:
        """Whether the tensor `values` is the weight itself."""
        return self.format == "dense" and self.encoding.exact

    @property
    def sides(self) -> dict[str, Tensor]:
        """The tensors of the encoding, by name."""
        return {name: self.tensors[name] for name in self.encoding.side_tensors(*self.shape)}

    def rows_of(self, ids: Tensor) -> dict[str, Tensor]:
        """Of a dense matrix the rows `ids` [count] of every tensor."""
        if isinstance(self.tensors, DenseSideBySide):
            return self.tensors.chosen(ids)
        return {name: tensor.index_select(0, ids) for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they lie in memory; after `pack` those of the file too, whose header comes on top."""
        lying = self.tensors.laid if isinstance(self.tensors, SideBySide) else self.tensors
        return sum(tensor.numel() * tensor.element_size() for tensor in lying.values())
