"""Half bytes in the order in which kernels read them: sixteen rows side by side.

What belongs to some columns of one row is followed by the same of the next, so that one vector holds it of sixteen
rows; a group's scales, and zero points, of sixteen rows follow each other too. Rows beyond the matrix are zeros.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Self

from torch import Tensor
from torch.nn.functional import pad

ROWS = 16  # of a tile
BYTES = 4  # of a row, one after another


class SideBySide(Mapping[str, Tensor]):
    """The tensors of a matrix as its format has them, made anew whenever one is asked for.

    Args:
        rows: of the matrix.
        laid: what lies in memory, by name: scales and zero points `[tiles, groups, 16]`, others as the class says.
    """

    def __init__(self, rows: int, laid: Mapping[str, Tensor]) -> None:
        self.rows, self.laid = rows, dict(laid)

    def moved(self, laid: Mapping[str, Tensor]) -> Self:
        """The same matrix in other memory."""
        return type(self)(self.rows, laid)

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """One tensor, in the order of its format."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.laid)

    def __len__(self) -> int:
        return len(self.laid)


class DenseSideBySide(SideBySide):
    """A dense matrix: of eight columns the four bytes of each row; `values` is uint8 `[tiles, columns / 8, 16, 4]`."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Lay tensors `[rows, ...]` side by side; the columns of `values` are a multiple of 8."""
        laid = {name: beside(part, BYTES if name == "values" else 1) for name, part in tensors.items()}
        return cls(len(tensors["values"]), laid)

    def chosen(self, ids: Tensor) -> dict[str, Tensor]:
        """The rows `ids` [count] of every tensor.

        Raises:
            IndexError: one is not there.
        """
        if bool(((ids < 0) | (ids >= self.rows)).any()):
            raise IndexError(f"rows are 0 to {self.rows - 1}")
        tiles, places = ids // ROWS, ids % ROWS
        return {name: part[tiles, :, places].flatten(1) for name, part in self.laid.items()}

    def __getitem__(self, name: str) -> Tensor:
        """See `SideBySide.__getitem__`."""
        return by_row(self.laid[name], self.rows)


def beside(tensor: Tensor, together: int) -> Tensor:
    """`[rows, count]` -> `[tiles, count / together, 16, together]`, without the last dimension where it is 1."""
    whole = pad(tensor, (0, 0, 0, -len(tensor) % ROWS))
    laid = whole.view(len(whole) // ROWS, ROWS, -1, together).transpose(1, 2).contiguous()
    return laid.squeeze(-1) if together == 1 else laid


def by_row(laid: Tensor, rows: int) -> Tensor:
    """The inverse of `beside`."""
    return laid.transpose(1, 2).reshape(len(laid) * ROWS, -1)[:rows].contiguous()
