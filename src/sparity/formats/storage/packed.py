"""A packed matrix: named tensors and what is needed to read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """One weight `[rows, columns]` in one format.

    Attributes:
        format: the name of the format, as in the registry.
        shape: rows (outputs) and columns (inputs) of the weight.
        dtype: the type that unpacking gives.
        tensors: what is stored, by name; on the CPU, contiguous. int8 values come with `scales`.
        options: the format's own numbers, such as the size of a block.
    """

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    options: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def quantized(self) -> bool:
        """Whether the values are int8 with a scale per row."""
        return "scales" in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, in memory and in the file (whose header comes on top)."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
