"""Block: rectangles of weights are stored whole or not at all, row of blocks after row of blocks (BSR)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.errors import CorruptFile, InvalidInput
from sparity.formats.base import Format, Layout, check_offsets, check_size, check_sorted
from sparity.formats.csr import row_starts
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.values import bits, nonzero
from sparity.registry import register

LARGEST_BLOCK = 4096


@register("format", "block")
@dataclass(frozen=True)
class BlockFormat(Format):
    """Store each block of `rows` x `columns` weights that holds a kept one, and its column.

    Blocks at the lower and right edge are filled up with zeros.
    """

    rows: int = 16
    columns: int = 16

    def __post_init__(self) -> None:
        if not (1 <= self.rows <= LARGEST_BLOCK and 1 <= self.columns <= LARGEST_BLOCK):
            raise InvalidInput(f"format block: sides between 1 and {LARGEST_BLOCK}, not {self.rows} x {self.columns}")

    def layout(self, rows: int, columns: int, stored: torch.dtype) -> Layout:
        """See `Format.layout`."""
        down, _ = self._grid(rows, columns)
        return {
            "columns": (torch.int32, (None,)),
            "offsets": (torch.int64, (down + 1,)),
            "values": (stored, (None, self.rows, self.columns)),
        }

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        blocks = self._blocks(bits(values))
        keep = blocks.flatten(2).any(2)
        return {
            "columns": keep.nonzero()[:, 1].to(torch.int32),
            "offsets": torch.cat((torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0))),
            "values": blocks[keep].view(values.dtype),
        }

    def decode(self, packed: Packed) -> Tensor:
        """See `Format.decode`."""
        values, offsets = packed.tensors["values"], packed.tensors["offsets"]
        down, across = self._grid(*packed.shape)
        blocks = torch.zeros(down, across, self.rows, self.columns, dtype=bits(values).dtype)
        block_rows = torch.repeat_interleave(torch.arange(down), offsets.diff())
        blocks[block_rows, packed.tensors["columns"].long()] = bits(values)
        padded = blocks.transpose(1, 2).reshape(down * self.rows, across * self.columns)
        return padded[: packed.shape[0], : packed.shape[1]].contiguous().view(values.dtype)

    def check_content(self, packed: Packed) -> None:
        """See `Format.check_content`."""
        columns, offsets, values = (packed.tensors[name] for name in ("columns", "offsets", "values"))
        down, across = self._grid(*packed.shape)
        check_size("block, with its blocks filled up", down * self.rows, across * self.columns)
        if len(columns) != len(values):
            raise CorruptFile(f"block: {len(columns)} columns for {len(values)} blocks")
        check_offsets("block", offsets, len(values))
        check_sorted("block", columns, row_starts(offsets), across)
        right, below = packed.shape[1] - (across - 1) * self.columns, packed.shape[0] - (down - 1) * self.rows
        beside = bits(values)[columns == across - 1][:, :, right:].any()
        if bool(beside) or bool(bits(values)[int(offsets[-2]) :][:, below:].any()):
            raise CorruptFile(f"block: a value lies outside {packed.shape[0]} x {packed.shape[1]}")

    def count(self, values: Tensor) -> int:
        """The blocks that are stored."""
        return int(self._blocks(nonzero(values)).flatten(2).any(2).sum())

    def _grid(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.rows), -(-columns // self.columns)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """`[rows, columns]` -> `[down, across, block rows, block columns]`, padded with zeros."""
        down, across = self._grid(*matrix.shape)
        if matrix.shape != (down * self.rows, across * self.columns):
            padded = matrix.new_zeros(down * self.rows, across * self.columns)
            padded[: matrix.shape[0], : matrix.shape[1]] = matrix
            matrix = padded
        return matrix.reshape(down, self.rows, across, self.columns).transpose(1, 2)
