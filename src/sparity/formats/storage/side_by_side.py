"""Half bytes of a dense matrix in the order in which kernels read them: sixteen rows side by side.

Of eight columns the four bytes of one row are followed by those of the next, so that one vector holds them of sixteen
rows; a group's scales, and zero points, of sixteen rows follow each other too. Rows beyond the matrix are zeros.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.nn.functional import pad

ROWS = 16  # of a tile
BYTES = 4  # of a row, one after another


class SideBySide(Mapping[str, Tensor]):
    """The tensors of a matrix, `[rows, ...]` as its format has them, made anew whenever one is asked for.

    Args:
        rows: of the matrix.
        laid: what lies in memory, by name: `values` uint8 `[tiles, columns / 8, 16, 4]`, others `[tiles, groups, 16]`.
    """

    def __init__(self, rows: int, laid: Mapping[str, Tensor]) -> None:
        self.rows, self.laid = rows, dict(laid)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "SideBySide":
        """Lay tensors `[rows, ...]` side by side; the columns of `values` are a multiple of 8."""
        return cls(len(tensors["values"]), {name: _lay(name, tensor) for name, tensor in tensors.items()})

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
        part = self.laid[name]
        by_row = part.transpose(1, 2)  # [tiles, 16, ...]
        return by_row.reshape(len(part) * ROWS, -1)[: self.rows].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.laid)

    def __len__(self) -> int:
        return len(self.laid)


def _lay(name: str, tensor: Tensor) -> Tensor:
    whole = pad(tensor, (0, 0, 0, -len(tensor) % ROWS))
    by_tile = whole.view(-1, ROWS, tensor.shape[1])
    if name == "values":
        by_tile = by_tile.view(*by_tile.shape[:2], -1, BYTES)
    return by_tile.transpose(1, 2).contiguous()
