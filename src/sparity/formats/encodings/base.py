"""What an encoding is: a matrix of weights -> a matrix of stored values, and a few tensors beside them."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparity import registry
from sparity.formats.storage.values import dtype_name

SideTensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Encoding(ABC):
    """A way to store the value of a weight; a frozen dataclass whose fields are the encoding's options.

    The law: `decode(encode(weight))` differs from the weight by at most `largest_error`. A weight of +0 is stored as
    the bits 0, which formats leave out, and comes back as +0.

    Attributes:
        exact: whether every bit comes back.
        integer_products: whether the stored values are whole numbers with one float32 scale per row, `scales` [rows],
            which the processor multiplies by inputs that are quantised per token.
        half_bytes: whether stored values, between -8 and 7, lie two in a byte.
        keeps_grids: whether weights that are on a grid already can be stored by its scales, see `on_grid`.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    integer_products: ClassVar[bool] = False
    half_bytes: ClassVar[bool] = False
    keeps_grids: ClassVar[bool] = False

    # ---- what each encoding writes

    @abstractmethod
    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """The type of a stored value of a weight in `dtype`."""

    @abstractmethod
    def side_tensors(self, rows: int, columns: int) -> SideTensors:
        """Name -> type and shape of each tensor that is stored beside the values of a weight `[rows, columns]`."""

    @abstractmethod
    def encode(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`weight` [rows, columns] in float32, float16 or bfloat16 -> values `[rows, columns]` and the side tensors.

        Raises:
            InvalidInput: numbers that it cannot express.
        """

    @abstractmethod
    def decode(self, values: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The inverse of `encode`: values `[rows, columns]` and side tensors -> the weight in `dtype`."""

    @abstractmethod
    def largest_error(self, weight: Tensor) -> Tensor:
        """`weight` [rows, columns] -> by how much each weight may differ when it comes back, float32."""

    @abstractmethod
    def check(self, what: str, values: Tensor, sides: Mapping[str, Tensor]) -> None:
        """Raise `CorruptFile`, whose message begins with `what`, for contents that `encode` does not write.

        `values` are those that a format keeps, in any shape; types and shapes are checked before.
        """

    # ---- what all share

    def on_grid(
        self, weight: Tensor, recorded: Mapping[str, Tensor]
    ) -> "tuple[Encoding, Tensor, dict[str, Tensor]] | None":
        """`weight` [rows, columns] by the scales that a stage recorded for it, so that every bit of it comes back.

        Args:
            recorded: `scales` and, where there are any, `zeros`, `[rows, groups]`.

        Returns:
            The encoding, with the grid's own group and types, values and side tensors; None where the weight is not
            on a grid of such scales.
        """
        return None

    def bits(self, dtype: torch.dtype) -> int:
        """Bits that a stored value of a weight in `dtype` takes, in memory and in the file."""
        return 4 if self.half_bytes else 8 * self.stored(dtype).itemsize

    @property
    def options(self) -> dict[str, Any]:
        """The encoding's own numbers, by name."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @property
    def spec(self) -> "str | dict[str, dict[str, Any]]":
        """What a recipe says: the name, or name and options."""
        return {self.name: self.options} if self.options else self.name

    def words(self, dtype: torch.dtype) -> str:
        """What tables and remembered timings call the values of a weight in `dtype`: `bfloat16`, or `int8`."""
        if self.exact:
            return dtype_name(dtype)
        return " ".join((self.name, *(f"{option} {value}" for option, value in self.options.items())))


EncodingSpec = str | Mapping[str, Any] | Encoding


def build_encoding(spec: EncodingSpec) -> Encoding:
    """An encoding from its name, from name and options, `{NAME: {OPTION: VALUE}}`, or as it is given.

    Raises:
        InvalidInput: no such encoding or option.
    """
    if isinstance(spec, Encoding):
        return spec
    found: Encoding = registry.build("encoding", spec)
    return found


def unnamed_encoding(tensors: Collection[str]) -> Encoding:
    """The encoding of a stored matrix that names none, told from the names of its tensors."""
    return build_encoding("int8" if "scales" in tensors else "same")
