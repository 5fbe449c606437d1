"""CSR: the kept weights of each row and their columns; what sparse libraries exchange."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.errors import CorruptFile
from sparity.formats.base import Format, Layout, check_offsets, check_sorted
from sparity.formats.storage.kept import columns_of, gather, place
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.values import bits, nonzero
from sparity.registry import register


@register("format", "csr")
@dataclass(frozen=True)
class Csr(Format):
    """Store a 4-byte column beside each kept weight: smaller than bitmask only when very little is kept."""

    def layout(self, rows: int, columns: int, stored: torch.dtype) -> Layout:
        """See `Format.layout`."""
        return {
            "columns": (torch.int32, (None,)),
            "offsets": (torch.int64, (rows + 1,)),
            "values": (stored, (None,)),
        }

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        keep = nonzero(values)
        return {
            "columns": columns_of(keep),
            "offsets": torch.cat((torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0))),
            "values": gather(bits(values), keep).view(values.dtype),
        }

    def decode(self, packed: Packed) -> Tensor:
        """See `Format.decode`."""
        values, offsets = packed.tensors["values"], packed.tensors["offsets"]
        rows = torch.repeat_interleave(torch.arange(packed.shape[0]), offsets.diff())
        return place(bits(values), rows, packed.tensors["columns"], packed.shape).view(values.dtype)

    def listed(self, packed: Packed) -> int:
        """See `Format.listed`."""
        return int(packed.tensors["offsets"][-1])

    def check_content(self, packed: Packed) -> None:
        """See `Format.check_content`."""
        columns, offsets, values = (packed.tensors[name] for name in ("columns", "offsets", "values"))
        if len(columns) != len(values):
            raise CorruptFile(f"csr: {len(columns)} columns for {len(values)} values")
        check_offsets("csr", offsets, len(values))
        check_sorted("csr", columns, row_starts(offsets), packed.shape[1])


def row_starts(offsets: Tensor) -> Tensor:
    """bool `[kept]`: True where a row begins; `offsets` [rows + 1] rise from 0 to kept."""
    starts = torch.zeros(int(offsets[-1]) + 1, dtype=torch.bool)
    starts[offsets] = True
    return starts[:-1]
