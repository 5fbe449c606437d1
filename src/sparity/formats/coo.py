"""COO: row, column and value of each kept weight; the plainest thing to exchange."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.errors import CorruptFile
from sparity.formats.base import Format, Layout, check_sorted
from sparity.formats.storage.kept import columns_of, gather, place
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.values import bits, nonzero
from sparity.registry import register


@register("format", "coo")
@dataclass(frozen=True)
class Coo(Format):
    """Store 4-byte row and column beside each kept weight, sorted by row, then column."""

    def layout(self, rows: int, columns: int, stored: torch.dtype) -> Layout:
        """See `Format.layout`."""
        return {"rows": (torch.int32, (None,)), "columns": (torch.int32, (None,)), "values": (stored, (None,))}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        keep = nonzero(values)
        return {
            "rows": torch.repeat_interleave(torch.arange(len(keep), dtype=torch.int32), keep.sum(1)),
            "columns": columns_of(keep),
            "values": gather(bits(values), keep).view(values.dtype),
        }

    def decode(self, packed: Packed) -> Tensor:
        """See `Format.decode`."""
        values = packed.tensors["values"]
        rows, columns = packed.tensors["rows"], packed.tensors["columns"]
        return place(bits(values), rows, columns, packed.shape).view(values.dtype)

    def listed(self, packed: Packed) -> int:
        """See `Format.listed`."""
        return len(packed.tensors["rows"])

    def check_content(self, packed: Packed) -> None:
        """See `Format.check_content`."""
        rows, columns, values = (packed.tensors[name] for name in ("rows", "columns", "values"))
        if not len(rows) == len(columns) == len(values):
            raise CorruptFile(f"coo: {len(rows)} rows and {len(columns)} columns for {len(values)} values")
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= packed.shape[0]):
            raise CorruptFile(f"coo: a row lies outside 0..{packed.shape[0] - 1}")
        if bool((rows[1:] < rows[:-1]).any()):
            raise CorruptFile("coo: the rows must not fall")
        starts = torch.ones(len(rows), dtype=torch.bool)
        starts[1:] = rows[1:] != rows[:-1]
        check_sorted("coo", columns, starts, packed.shape[1])
