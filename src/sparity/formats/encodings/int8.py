"""Int8: whole numbers between -127 and 127, with one scale per output channel (symmetric, round to nearest)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.errors import CorruptFile, InvalidInput
from sparity.formats.encodings.base import Encoding, SideTensors
from sparity.registry import register

LARGEST = 127  # symmetric: -128 is not used
ROWS_AT_ONCE = 32  # what is computed in float32 stays in the cache


@register("encoding", "int8")
@dataclass(frozen=True)
class Int8(Encoding):
    """Store each value in a byte, with a float32 scale per row.

    The scale is the row's largest magnitude / 127 (1 for a row of zeros, and at least the smallest normal float32); a
    value is `round(weight / scale)`, ties to even. The weight is `value * scale`, multiplied in float32. On the
    processor, products meet inputs that are quantised per token (W8A8).
    """

    integer_products: ClassVar[bool] = True
    keeps_grids: ClassVar[bool] = True

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """See `Encoding.stored`."""
        return torch.int8

    def side_tensors(self, rows: int, columns: int) -> SideTensors:
        """`scales`, one per row."""
        return {"scales": (torch.float32, (rows,))}

    def encode(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Encoding.encode`; refuses NaN and infinity."""
        largest = weight.abs().amax(1).float()
        if not bool(largest.isfinite().all()):
            raise InvalidInput(
                "int8 values cannot hold NaN or infinity; repair the weight or keep floating-point values"
            )
        scales = _scales(largest)
        values = torch.empty(weight.shape, dtype=torch.int8)
        for rows in _pieces(len(weight)):
            values[rows] = (weight[rows].float() / scales[rows, None]).round_().clamp_(-LARGEST, LARGEST)
        return values, {"scales": scales}

    def decode(self, values: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `Encoding.decode`."""
        weight = torch.empty(values.shape, dtype=dtype)
        for rows in _pieces(len(values)):
            weight[rows] = values[rows].float().mul_(sides["scales"][rows, None])
        return weight

    def on_grid(
        self, weight: Tensor, recorded: Mapping[str, Tensor]
    ) -> tuple[Encoding, Tensor, dict[str, Tensor]] | None:
        """See `Encoding.on_grid`; one scale per row, and no zero point."""
        scales = recorded.get("scales")
        if scales is None or "zeros" in recorded or scales.shape != (len(weight), 1):
            return None
        sides = {"scales": scales[:, 0].float()}
        if not bool((sides["scales"].isfinite() & (sides["scales"] > 0)).all()):
            return None
        codes = (weight.float() / sides["scales"][:, None]).round_()
        if not bool((codes.abs() <= LARGEST).all()):
            return None
        values = codes.to(torch.int8)
        return (self, values, sides) if torch.equal(self.decode(values, sides, weight.dtype), weight) else None

    def largest_error(self, weight: Tensor) -> Tensor:
        """Half a step of the row's scale, and what rounding to the weight's own type adds."""
        step = _scales(weight.abs().amax(1).float())[:, None]
        limits = torch.finfo(weight.dtype)
        return step * (0.5 + 1e-5) + weight.abs().float() * limits.eps + limits.tiny * limits.eps

    def check(self, what: str, values: Tensor, sides: Mapping[str, Tensor]) -> None:
        """See `Encoding.check`."""
        scales = sides["scales"]
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise CorruptFile(f"{what}: scales must be finite and above zero")
        if values.numel() and int(values.min()) < -LARGEST:
            raise CorruptFile(f"{what}: int8 values lie between -{LARGEST} and {LARGEST}, -128 is none")


def _scales(largest: Tensor) -> Tensor:
    """Largest magnitudes `[rows]` in float32 -> scales `[rows]`."""
    scales = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    scales[largest == 0] = 1.0
    return scales


def _pieces(rows: int) -> Iterator[slice]:
    return (slice(row, row + ROWS_AT_ONCE) for row in range(0, rows, ROWS_AT_ONCE))
