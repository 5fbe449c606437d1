"""What a method of quantisation is, and what all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.static.quantize.grids.base import Fitted, Grid


@dataclass(frozen=True)
class Task:
    """One matrix that is to get fewer bits.

    Attributes:
        weight: `[out, in]`, float32, 0 where `keep` is False.
        keep: bool `[out, in]`, False where a weight must be 0.
        grid: the values that a group may have.
        group: how many neighbours of a row share a scale; it divides the row.
        statistics: what is known of the inputs.
    """

    weight: Tensor
    keep: Tensor
    grid: Grid
    group: int
    statistics: Statistics

    @property
    def groups(self) -> int:
        """How many there are in a row."""
        return self.weight.shape[1] // self.group


@dataclass(frozen=True)
class Quantized:
    """A matrix of few bits.

    Attributes:
        weight: `[out, in]`, float32, what the codes stand for.
        codes: `[out, in]`, int16.
        scales: `[out, groups]`, float32.
        zeros: `[out, groups]`, float32 whole numbers, the code of 0.
        grids: the grid of each group, or the one of all.
        input_scales: `[in]`, float32: what the columns were multiplied with before they were rounded; the weight is
            divided by it, as the inputs would be. None where they were not.
        codebook: `[entries]`, float32, rising: the values of the whole matrix, where the method found them itself.
    """

    weight: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    grids: tuple[Grid, ...]
    input_scales: Tensor | None = None
    codebook: Tensor | None = None

    @property
    def bits(self) -> float:
        """Bits of a code, on average."""
        return sum(grid.bits for grid in self.grids) / len(self.grids)


class Method(ABC):
    """How weights are moved onto a grid; a frozen dataclass whose fields are its options.

    The laws: a weight outside the mask is +0 in the result; `never_worse` says that the output on calibration inputs is
    never further from the dense one than with rounding to nearest.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    never_worse: ClassVar[bool] = False
    scales_inputs: ClassVar[bool] = False  # whether columns are multiplied before rounding, and divided again
    mixes_bits: ClassVar[bool] = False  # whether some groups have one bit more or less
    fits_codebook: ClassVar[bool] = False  # whether it finds the values of a whole matrix, which then needs no scales

    @property
    def by_rows(self) -> bool:
        """Whether all that it reads of the Gram matrix is the rows of its factor, in their order."""
        return False

    @property
    def products(self) -> float:
        """How many products of the weight with a matrix `[in, in]` the method takes, for the estimate of its time."""
        return 0.0

    def most_bits(self, grid: Grid) -> int:
        """Bits of the longest codes."""
        return grid.bits + self.mixes_bits

    def check(self, grid: Grid, group: int | None) -> None:  # noqa: B027 - most take every grid
        """Raise `InvalidInput` for a grid or a group that the method cannot use."""

    @abstractmethod
    def quantize(self, task: Task) -> Quantized:
        """Choose grids and codes.

        Raises:
            InvalidInput: a grid that the method cannot use.
            NumericalError: statistics that cannot be used.
        """


def fit_groups(grid: Grid, weight: Tensor, group: int) -> Fitted:
    """The grid of every group of `weight` [out, in]; scales and zeros are `[out, groups]`."""
    rows = len(weight)
    fitted = grid.fit(weight.reshape(-1, group))
    return Fitted(fitted.scales.view(rows, -1), fitted.zeros.view(rows, -1))


def round_to(grid: Grid, fitted: Fitted, weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The nearest codes `[out, in]` of a weight, each group on its own grid, and their values."""
    grouped = weight.reshape(len(weight), -1, group)
    scales, zeros = fitted.scales[..., None], fitted.zeros[..., None]
    codes = grid.codes(grouped, scales, zeros)
    return codes.view(weight.shape), grid.values(codes, scales, zeros).view(weight.shape)


def nearest(task: Task, weight: Tensor | None = None) -> Quantized:
    """Every weight, of the task or in place of it, on the nearest value of a grid that spans its group."""
    weight = task.weight if weight is None else weight
    fitted = fit_groups(task.grid, weight, task.group)
    codes, values = round_to(task.grid, fitted, weight, task.group)
    return Quantized(values, codes, fitted.scales, fitted.zeros, (task.grid,))


def row_errors(change: Tensor, gram: Tensor) -> Tensor:
    """`[out]`: the squared change of each output on calibration inputs, for a change of the weight `[out, in]`."""
    return ((change @ gram) * change).sum(1)


def scaled_nearest(task: Task, scales: Tensor) -> Quantized:
    """Rounding to nearest of columns multiplied with `scales` [in], divided again by them."""
    found = nearest(task, task.weight * scales)
    return Quantized(found.weight / scales, found.codes, found.scales, found.zeros, found.grids, scales)


def check_group(group: object, columns: int, name: str) -> int:
    """How many neighbours share a scale; None is a whole row.

    Raises:
        InvalidInput: no whole number above 0, or one that does not divide the row.
    """
    if group is None:
        return columns
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise InvalidInput(f"group {group!r}: give how many neighbours of a row share a scale, or None for a whole row")
    if columns % group:
        fitting: Sequence[int] = [size for size in (128, 64, 32, 16, 8) if columns % size == 0 and size < group]
        instead = f"choose {fitting[0]}" if fitting else "choose one that does"
        raise InvalidInput(
            f"{name}: a group of {group} does not divide its row of {columns} weights; {instead}, or leave the group "
            "out for one scale per row"
        )
    return group


def without_minus_zero(weight: Tensor, keep: Tensor) -> Tensor:
    """`weight` with +0 outside the mask, and for every -0."""
    return torch.where(keep, weight, 0.0) + 0.0
