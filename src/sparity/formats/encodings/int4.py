"""Int4: whole numbers of four bits, with one scale for each group of neighbours in a row (round to nearest)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparity.errors import CorruptFile, InvalidInput
from sparity.formats.encodings.base import Encoding, SideTensors
from sparity.formats.storage.signed_scales import losing_less
from sparity.registry import register

GROUPS = (32, 64, 128)
WIDTH = 4  # bits of a code
STEPS = 15  # between the lowest and the highest of 16 codes
LOWEST = -8  # of symmetric codes
ROWS_AT_ONCE = 32  # what is computed in float32 stays in the cache


@register("encoding", "int4")
@dataclass(frozen=True)
class Int4(Encoding):
    """Store two values in a byte, with a scale for each `group` neighbours of a row.

    Symmetric: the scale is `2 max|w| / 15` of the group or, where that loses less, `-w / 8` of its largest weight `w`,
    which may be negative; a value is `round(weight / scale)` between -8 and 7. With a zero
    point: the scale is the group's range, stretched to hold 0, over 15; codes run from 0 to 15, and what is stored is
    the code minus the zero point, modulo 16. Either way 0 is stored as 0. The weight is `(code - zero) * scale`,
    multiplied in float32. On the processor, up to 16 inputs are quantised to int8 in the same groups.
    """

    half_bytes: ClassVar[bool] = True
    keeps_grids: ClassVar[bool] = True
    group: int = 32
    symmetric: bool = True
    scale_type: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise InvalidInput(f"encoding int4: groups of 32, 64 or 128 weights, not {self.group}")

    @property
    def stored_scale(self) -> torch.dtype:
        """The type of a scale."""
        found: torch.dtype = getattr(torch, self.scale_type)
        return found

    def words(self, dtype: torch.dtype) -> str:
        """See `Encoding.words`."""
        zeros = "" if self.symmetric else " with zero points"
        return f"int4 in groups of {self.group}{zeros}, {self.scale_type} scales"

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """See `Encoding.stored`."""
        return torch.int8

    def side_tensors(self, rows: int, columns: int) -> SideTensors:
        """`scales` and, unless symmetric, `zeros`, one of each per group."""
        shape = (rows, self.groups(columns))
        zeros: SideTensors = {} if self.symmetric else {"zeros": (torch.uint8, shape)}
        return {"scales": (self.stored_scale, shape), **zeros}

    def groups(self, columns: int) -> int:
        """Groups of a row.

        Raises:
            InvalidInput: the row has no whole groups.
        """
        if columns % self.group:
            fitting = [str(group) for group in GROUPS if not columns % group]
            advice = f"choose a group of {' or '.join(fitting)}" if fitting else "keep another encoding, such as int8"
            raise InvalidInput(f"int4: groups of {self.group} do not divide a row of {columns} weights; {advice}")
        return columns // self.group

    def encode(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Encoding.encode`; refuses NaN, infinity and scales that their type cannot hold."""
        scales, zeros = self._fitted(weight)
        sides = {"scales": scales} if self.symmetric else {"scales": scales, "zeros": zeros}
        return self.codes(weight, sides), sides

    def codes(self, weight: Tensor, sides: Mapping[str, Tensor]) -> Tensor:
        """The nearest stored value, int8 `[rows, columns]`, by the scales and zero points of `sides`."""
        values = torch.empty(weight.shape, dtype=torch.int8)
        for row in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(row, row + ROWS_AT_ONCE)
            steps = (self._grouped(weight[rows].float()) / sides["scales"][rows, :, None].float()).round_()
            if self.symmetric:
                steps.clamp_(LOWEST, LOWEST + STEPS)
            else:
                zeros = sides["zeros"][rows, :, None].float()
                steps.add_(zeros).clamp_(0, STEPS).sub_(zeros).sub_(LOWEST).remainder_(STEPS + 1).add_(LOWEST)
            values[rows] = steps.flatten(1).to(torch.int8)
        return values

    def decode(self, values: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `Encoding.decode`."""
        weight = torch.empty(values.shape, dtype=dtype)
        for row in range(0, len(values), ROWS_AT_ONCE):
            rows = slice(row, row + ROWS_AT_ONCE)
            steps = self._grouped(values[rows].float())
            if not self.symmetric:
                zeros = sides["zeros"][rows, :, None].float()
                steps.add_(zeros).remainder_(STEPS + 1).sub_(zeros)
            steps.mul_(sides["scales"][rows, :, None].float()).add_(0.0)  # no -0, which a negative scale would make
            weight[rows] = steps.flatten(1).to(dtype)
        return weight

    def on_grid(
        self, weight: Tensor, recorded: Mapping[str, Tensor]
    ) -> tuple[Encoding, Tensor, dict[str, Tensor]] | None:
        """See `Encoding.on_grid`; the scale of a wider group is that of each of its parts."""
        scales, zeros, (rows, columns) = recorded.get("scales"), recorded.get("zeros"), weight.shape
        if scales is None or scales.dim() != 2 or len(scales) != rows or not scales.numel():
            return None
        if columns % scales.shape[1]:
            return None
        wide = columns // scales.shape[1]
        group = next((group for group in reversed(GROUPS) if not wide % group), None)
        known = str(scales.dtype).removeprefix("torch.")
        if group is None or known not in ("bfloat16", "float16", "float32") or not bool((scales != 0).all()):
            return None
        fits = zeros is None or (
            zeros.dtype == torch.uint8 and zeros.shape == scales.shape and int(zeros.max()) <= STEPS
        )
        if not fits:
            return None
        encoding = Int4(group, zeros is None, known)  # type: ignore[arg-type]
        given = {"scales": scales} if zeros is None else {"scales": scales, "zeros": zeros}
        sides = {name: side.repeat_interleave(wide // group, 1) for name, side in given.items()}
        values = encoding.codes(weight, sides)
        same = torch.equal(encoding.decode(values, sides, weight.dtype), weight)
        return (encoding, values, sides) if same else None

    def largest_error(self, weight: Tensor) -> Tensor:
        """Half a step of the group's scale, what rounding the scale adds, and what rounding to the weight's type.

        A whole step where steps were made smaller, so that no code stands for more than the type can hold, and for a
        weight that is as large as the group's largest, with the other sign.
        """
        scales, _ = self._fitted(weight)
        step = scales.float().abs().repeat_interleave(self.group, 1)
        limits = torch.finfo(weight.dtype)
        opposite = self.symmetric and weight.abs().float() > (STEPS / 2) * step
        half = torch.where((step < limits.max / (STEPS + 1)) & ~torch.as_tensor(opposite), 0.5, 1.0)
        rounding = half + (STEPS + 1) * torch.finfo(self.stored_scale).eps + 1e-5
        return step * rounding + weight.abs().float() * limits.eps + limits.tiny * limits.eps

    def check(self, what: str, values: Tensor, sides: Mapping[str, Tensor]) -> None:
        """See `Encoding.check`."""
        scales = sides["scales"].float()
        if not bool((scales.isfinite() & (scales != 0)).all()):
            raise CorruptFile(f"{what}: scales must be finite and not zero")
        if not self.symmetric and int(sides["zeros"].max()) > STEPS:
            raise CorruptFile(f"{what}: a zero point is one of the codes 0 to {STEPS}")

    def _grouped(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), self.groups(rows.shape[1]), self.group)

    def _fitted(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales in their type and zero points as uint8, both `[rows, groups]`."""
        groups = self._grouped(weight)
        low, high = groups.amin(2).float().clamp(max=0), groups.amax(2).float().clamp(min=0)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise InvalidInput(
                "int4 values cannot hold NaN or infinity; repair the weight or keep floating-point values"
            )
        smallest, largest = torch.finfo(self.stored_scale).tiny, torch.finfo(weight.dtype).max
        empty = (low == 0) & (high == 0)
        if self.symmetric:
            exact = (torch.maximum(-low, high) / (STEPS / 2)).clamp(max=largest / -LOWEST)
        else:
            exact = (high / STEPS - low / STEPS).clamp(max=largest / (STEPS + 1))
        scales = torch.where(empty, 1.0, exact.clamp(min=smallest)).to(self.stored_scale)
        if self.symmetric:
            scales = losing_less(groups.flatten(0, 1), scales.flatten(), WIDTH).view(scales.shape)
        if not bool(scales.isfinite().all()):
            raise InvalidInput(
                f"int4: a scale of {float(exact.max()):.3g} does not fit into {self.scale_type}; take scale_type "
                "bfloat16, or repair the weight"
            )
        return scales, (-low / scales.float()).round().clamp(0, STEPS).to(torch.uint8)
