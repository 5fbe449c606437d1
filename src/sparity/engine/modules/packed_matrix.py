"""A module that stands for one with a single matrix, which is packed."""

from typing import Self

import torch
from torch import Tensor

from sparity.engine.kernels.prepared import Prepared, prepare
from sparity.engine.modules.packed_module import HoldsPacked
from sparity.formats import Packed, unpack


class HoldsMatrix(HoldsPacked):
    """Holds one packed weight, which is no parameter: it cannot be trained, moved to another device or cast.

    A `state_dict` has it dense.

    Args:
        matrix: the name under which the checkpoint keeps the weight.
        rows: of the weight, as are `columns`.

    Attributes:
        matrix: see above.
    """

    weights = ("weight",)

    def __init__(self, matrix: str, rows: int, columns: int) -> None:
        super().__init__()
        self.matrix, self._shape = matrix, (rows, columns)
        self._prepared: Prepared | None = None

    def give(self, packed: Packed) -> None:
        """Set the weight.

        Raises:
            CorruptFile: it contradicts itself.
        """
        self._prepared = prepare(packed)

    def share(self, other: "HoldsMatrix") -> Self:
        """Hold the weight of another module too: it stays in memory once."""
        self._prepared = other._prepared
        return self

    @property
    def prepared(self) -> Prepared:
        """The weight with what multiplies it."""
        assert self._prepared is not None, "a packed checkpoint is loaded as a whole"
        return self._prepared

    @property
    def packed(self) -> Packed:
        """The weight as it lies in memory, once."""
        return self.prepared.packed

    @property
    def weight(self) -> Tensor:
        """The dense weight `[rows, columns]`, unpacked anew each time; while a model is loaded, one without memory."""
        return torch.empty(self._shape, device="meta") if self._prepared is None else unpack(self.packed)

    def dense(self) -> dict[str, Tensor]:
        """The weight as the module that it stands for keeps it; nothing while a model is loaded."""
        return {} if self._prepared is None else {"weight": self.weight}

    def held(self) -> str:
        """What `print(model)` shows of the weight."""
        return "no weight yet" if self._prepared is None else f"{self.packed.words}, {self.packed.nbytes:,} bytes"
