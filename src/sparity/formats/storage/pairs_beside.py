"""Two of four in half bytes, sixteen rows side by side: what a shuffle of the inputs needs instead of masks."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparity.formats.storage import tiles
from sparity.formats.storage.side_by_side import SideBySide, beside, by_row

_FOURS = tiles.COLUMNS // 4  # of a group of columns
_FIRST = torch.tensor([0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0], dtype=torch.uint8)  # the lowest bit set
_LAST = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3], dtype=torch.uint8)
_SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]  # of the places of four fours in a byte
_BEYOND = 0b1100  # what the format keeps where there is nothing


class PairsSideBySide(SideBySide):
    """A matrix that is two of four; of every four columns the first kept weight, and the second.

    In memory, `masks` is uint8 `[tiles, columns / 16, 16, 2]`: the places (0 to 3) of the first ones in four fours, two
    bits each from the lowest on, and those of the second ones. `values` is uint8 `[tiles, columns / 8, 16, 2]`: the
    first one's code and the second one's, each plus its zero point or 8; those of the next four columns in the upper
    halves.
    """

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Self:
        """Lay the tensors of a matrix `[rows, columns]` side by side; its columns are a multiple of 32."""
        masks, values = (_rows(tensors[name], rows) for name in ("masks", "values"))
        masks = _halves(masks)[:, : columns // 4].long()
        codes = values[:, : columns // 4]
        places = torch.stack((_FIRST[masks], _LAST[masks]), -1)
        zeros = _added(tensors, columns // 4)
        whole = torch.stack(((codes & 15) + zeros & 15, (codes >> 4) + zeros & 15), -1)
        fours = places.view(rows, -1, 4, 2)
        eights = whole.view(rows, -1, 2, 2)
        laid = {
            "masks": beside((fours << _SHIFTS).sum(2, dtype=torch.uint8).flatten(1), 2),
            "values": beside((eights[:, :, 0] | eights[:, :, 1] << 4).flatten(1), 2),
        }
        return cls(rows, {name: laid[name] if name in laid else beside(part, 1) for name, part in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        """See `SideBySide.__getitem__`."""
        part = by_row(self.laid[name], self.rows)
        if name == "masks":
            places = part.view(self.rows, -1, 1, 2) >> _SHIFTS & 3
            masks = (1 << places).sum(-1, dtype=torch.uint8).flatten(1)
            whole = _bytes(pad(masks, (0, -masks.shape[1] % _FOURS), value=_BEYOND))
            return _tiles(whole, tiles.COLUMNS // 8, _BEYOND * 17)
        if name == "values":
            eights = part.view(self.rows, -1, 1, 2)
            whole = torch.cat((eights & 15, eights >> 4), 2).flatten(1, 2)  # [rows, fours, 2]
            codes = whole - self._zeros(whole.shape[1])[..., None] & 15
            stored = codes[..., 0] | codes[..., 1] << 4
            return _tiles(pad(stored, (0, -stored.shape[1] % _FOURS)), _FOURS, 0)
        return part

    def _zeros(self, fours: int) -> Tensor:
        return _added({name: self[name] for name in self.laid if name == "zeros"}, fours)


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """`[tiles, groups, 4, bytes]` -> `[rows, groups * bytes]`."""
    return tensor.transpose(1, 2).reshape(len(tensor) * tiles.ROWS, -1)[:rows]


def _tiles(matrix: Tensor, width: int, beyond: int) -> Tensor:
    """The inverse of `_rows`, with `width` bytes for a group of columns; `beyond` fills rows beyond the matrix."""
    whole = pad(matrix, (0, 0, 0, -len(matrix) % tiles.ROWS), value=beyond)
    return whole.view(-1, tiles.ROWS, whole.shape[1] // width, width).transpose(1, 2).contiguous()


def _halves(packed: Tensor) -> Tensor:
    """Two half bytes of every byte, the lower one first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _bytes(halves: Tensor) -> Tensor:
    """The inverse of `_halves`."""
    return halves[..., 0::2] | halves[..., 1::2] << 4


def _added(sides: Mapping[str, Tensor], fours: int) -> Tensor:
    """What is added to a code, for every four columns: uint8 `[rows, fours]`, or one 8."""
    if "zeros" not in sides:
        return torch.tensor([[8]], dtype=torch.uint8)
    zeros = sides["zeros"]
    return zeros.repeat_interleave(fours // zeros.shape[1], 1)
