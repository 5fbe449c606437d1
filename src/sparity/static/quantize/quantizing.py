"""One decision about the bits of a matrix: method, grid and group together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparity import registry
from sparity.calibration import Statistics
from sparity.errors import InvalidInput, NumericalError
from sparity.static.quantize.grids.base import Grid
from sparity.static.quantize.methods.base import Method, Quantized, Task, check_group, without_minus_zero

Spec = str | Mapping[str, Any]
INTEGERS = "integers"
ENTRY_BITS = 32  # of a value of a codebook that was fitted


@dataclass(frozen=True)
class Quantizing:
    """How a matrix gets fewer bits; `group` is None for one scale per row."""

    method: Method
    grid: Grid
    group: int | None

    @classmethod
    def of(
        cls,
        method: Spec = "nearest",
        bits: int | None = None,
        group: int | None = None,
        symmetric: bool | None = None,
        grid: Spec = INTEGERS,
    ) -> "Quantizing":
        """Build the parts from a recipe's values.

        Raises:
            InvalidInput: unknown names or options, bits that the grid does not have, or a grid or group that the
                method cannot use.
        """
        chosen: Method = registry.build("quantize.method", method)
        check_group(group, 0, "weight")
        values = build_grid(grid, bits, symmetric)
        chosen.check(values, group)
        return cls(chosen, values, group)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the method reads."""
        return frozenset(self.method.needs)

    @property
    def words(self) -> str:
        """In a few words, such as "gptq, 4 bits, symmetric, groups of 32"."""
        if self.method.fits_codebook:
            return f"{self.method.name}, {self.grid.bits} bits, one per matrix"
        return f"{self.method.name}, {self.grid.words}, {f'groups of {self.group}' if self.group else 'by row'}"

    def bits(self, rows: int, columns: int) -> float:
        """Bits per weight of a matrix `[rows, columns]`, with its scales and zero points, or its codebook."""
        grid = self.grid
        if self.method.fits_codebook:
            return grid.bits + float(2**grid.bits * ENTRY_BITS) / (rows * columns)
        return grid.bits + (8 * grid.stored_scale.itemsize + grid.zero_bits) / (self.group or columns)

    def apply(self, weight: Tensor, statistics: Statistics, keep: Tensor | None = None) -> Quantized:
        """Quantise `weight` [out, in]; its zeros, or with `keep` those that it names, are zeros of the result.

        Raises:
            InvalidInput: the group does not divide the row, or the method cannot use the grid.
            NumericalError: statistics or weights that cannot be used.
        """
        group = check_group(self.group, weight.shape[1], statistics.site)
        keep = weight != 0 if keep is None else keep
        task = Task(without_minus_zero(weight.float(), keep), keep, self.grid, group, statistics)
        found = self.method.quantize(task)
        del task  # its copy of the weight is as large as what follows
        if not bool(found.weight.isfinite().all()):
            raise NumericalError(
                f"{statistics.site}: {self.method.name} gave NaN or infinite weights; raise its damping, or calibrate "
                "on other text"
            )
        if _has_zero_points(found):
            zero_codes = found.zeros.short().repeat_interleave(group, 1)
        else:
            zero_codes = _code_of_zero(found)
        return Quantized(
            without_minus_zero(found.weight, keep),
            torch.where(keep, found.codes, zero_codes),
            found.scales,
            found.zeros,
            found.grids,
            found.input_scales,
            found.codebook,
        )


def _has_zero_points(found: Quantized) -> bool:
    return any(grid.zero_bits for grid in found.grids)


def _code_of_zero(found: Quantized) -> Tensor:
    nothing, one = torch.zeros(1, device=found.codes.device), torch.ones(1, device=found.codes.device)
    return found.grids[0].codes(nothing, one, nothing).expand(found.codes.shape)


def build_grid(grid: Spec, bits: int | None = None, symmetric: bool | None = None) -> Grid:
    """A grid from its name, or `{name: {option: value}}`; bits and symmetry are those of integers.

    Raises:
        InvalidInput: no such grid or option, or bits that the grid does not have.
    """
    name, options = (grid, {}) if isinstance(grid, str) else next(iter(grid.items()), ("", {}))
    if name == INTEGERS:
        asked = {"width": bits, "symmetric": symmetric}
        given = {**dict(options or {}), **{key: value for key, value in asked.items() if value is not None}}
        found: Grid = registry.create("quantize.grid", name, given)
        return found
    found = registry.build("quantize.grid", grid)
    if bits is not None and bits != found.bits:
        raise InvalidInput(f"bits {bits!r}: {found.words} has {found.bits}; leave bits out")
    if symmetric is False:
        raise InvalidInput(f"symmetric: {found.words} has no zero point; leave it out, or use grid integers")
    return found
