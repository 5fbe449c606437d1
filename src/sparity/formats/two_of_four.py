"""Two of four: of every four neighbours in a row at most two are kept (Mishra et al. 2021, arXiv:2104.08378)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparity.errors import CorruptFile
from sparity.formats.base import Format, Layout
from sparity.formats.storage import tiles
from sparity.formats.storage.kept import gather, scatter
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.values import bits, nonzero
from sparity.registry import register

KEPT = tiles.COLUMNS // 2


def _filled(nibble: int) -> int:
    """A group's mask with exactly two bits: empty places are added as NVIDIA's converter does."""
    wanted = {0b0000: 0b1100, 0b0001: 0b0101, 0b0010: 0b0110, 0b0100: 0b1100, 0b1000: 0b1100}
    return wanted.get(nibble, nibble)


_FITS = np.array([(byte & 15).bit_count() <= 2 and (byte >> 4).bit_count() <= 2 for byte in range(256)])
_TWO = np.array([(byte & 15).bit_count() == 2 and (byte >> 4).bit_count() == 2 for byte in range(256)])
_FILLED = np.array([_filled(byte & 15) | _filled(byte >> 4) << 4 for byte in range(256)], dtype=np.uint8)


@register("format", "two_of_four")
@dataclass(frozen=True)
class TwoOfFour(Format):
    """Store two values of every four, and which two.

    A group with fewer than two kept weights stores zeros, so that every value has its place without counting. The
    mask of a group takes four bits, as many as NVIDIA's two indices; `conversions.nvidia` turns one into the other.
    """

    def layout(self, rows: int, columns: int, stored: torch.dtype) -> Layout:
        """See `Format.layout`."""
        count, groups = tiles.grid(rows, columns)
        return {
            "masks": (torch.uint8, (count, groups, tiles.ROWS, tiles.COLUMNS // 8)),
            "values": (stored, (count, groups, tiles.ROWS, KEPT)),
        }

    def matches(self, weight: Tensor) -> bool:
        """At most two kept weights in each group of four columns; the last group may be narrower."""
        return bool(_FITS[_row_masks(weight)].all())

    def refusal(self, weight: Tensor) -> str:
        """See `Format.refusal`."""
        bad = (~_FITS[_row_masks(weight)]).nonzero()
        return (
            f"two_of_four: row {bad[0][0]} keeps more than two of four weights near column {8 * bad[1][0]}, and "
            f"{len(set(bad[0].tolist()))} of {len(weight)} rows do; prune with the pattern 2:4, or use bitmask"
        )

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        ordered = tiles.to_tiles(bits(values))
        masks = torch.from_numpy(_FILLED[tiles.to_masks(ordered != 0).numpy()])
        kept = gather(ordered, tiles.from_masks(masks))
        return {"masks": masks, "values": kept.view(values.dtype).view(*masks.shape[:3], KEPT)}

    def decode(self, packed: Packed) -> Tensor:
        """See `Format.decode`."""
        ordered = _expand(packed.tensors["masks"], packed.tensors["values"])
        return tiles.from_tiles(ordered, *packed.shape).view(packed.tensors["values"].dtype)

    def check_content(self, packed: Packed) -> None:
        """See `Format.check_content`."""
        masks, values = packed.tensors["masks"], packed.tensors["values"]
        if not _TWO[masks.numpy()].all():
            raise CorruptFile("two_of_four: a mask does not keep exactly two of four")
        last_rows = packed.shape[0] - (len(masks) - 1) * tiles.ROWS
        last_columns = packed.shape[1] - (masks.shape[1] - 1) * tiles.COLUMNS
        below = bits(values)[-1, :, last_rows:].any()
        beside = _expand(masks[:, -1:].contiguous(), values[:, -1:].contiguous())[..., last_columns:].any()
        if bool(below) or bool(beside):
            raise CorruptFile(f"two_of_four: a value lies outside {packed.shape[0]} x {packed.shape[1]}")


def _expand(masks: Tensor, values: Tensor) -> Tensor:
    return scatter(bits(values).reshape(-1), tiles.from_masks(masks))


def _row_masks(weight: Tensor) -> np.ndarray:
    """uint8 `[rows, ceil(columns / 8)]`: two groups of four per byte."""
    return np.packbits(nonzero(weight).cpu().numpy(), axis=1, bitorder="little")
