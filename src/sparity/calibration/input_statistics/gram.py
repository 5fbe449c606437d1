"""Gram matrix of the inputs: the Hessian of OBS and SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.calibration.input_statistics.base import Statistic
from sparity.calibration.mapped import release
from sparity.registry import register

PANEL = 1024  # columns that are summed together


@register("statistic", "gram")
@dataclass(frozen=True)
class Gram(Statistic):
    """The sum of x xT over tokens, `[in, in]`.

    Only panels of its upper triangle are summed and stored; the rest is filled in when somebody reads the matrix.
    """

    def empty(self, columns: int, device: torch.device | str) -> Tensor:
        """See `Statistic.empty`."""
        return torch.zeros(columns, columns, device=device)

    def add(self, total: Tensor, x: Tensor) -> None:
        """Add x xT to `total` [in, in], whose part below the diagonal of its panels stays as it is."""
        for start in range(0, len(total), PANEL):
            add_panel(total[start : start + PANEL, start:], x, start)

    def is_finite(self, total: Tensor) -> bool:
        """An input that is not finite, or too large to be squared, shows on the diagonal."""
        return bool(torch.isfinite(total.diagonal()).all())

    def is_silent(self, total: Tensor) -> bool:
        """See `Statistic.is_silent`."""
        return not bool(diagonal_of(total).any())

    def value(self, total: Tensor, sequences: int, tokens: int) -> Tensor:
        """`[in, in]`: `total` with the part that `add` leaves out filled in place."""
        for start in range(0, len(total), PANEL):
            panel = slice(start, start + PANEL)
            total[start + PANEL :, panel] = total[panel, start + PANEL :].T
        return total

    def stored(self, total: Tensor) -> dict[str, Tensor]:
        """The panels, each by its first column."""
        return {str(start): total[start : start + PANEL, start:] for start in range(0, len(total), PANEL)}

    def restore(self, part: Callable[[str], Tensor], columns: int) -> Tensor:
        """See `Statistic.restore`."""
        total = torch.zeros(columns, columns)
        for start in range(0, columns, PANEL):
            total[start : start + PANEL, start:] = part(str(start))
        return total


def diagonal_of(total: Tensor) -> Tensor:
    """A copy of the diagonal `[in]`, panel by panel: of a matrix in a file whole pages are read for every entry."""
    found = torch.empty(len(total), dtype=total.dtype, device=total.device)
    for start in range(0, len(total), PANEL):
        rows = slice(start, start + PANEL)
        found[rows] = total[rows, start:].diagonal()
        release(total[rows])
    return found


def add_panel(panel: Tensor, x: Tensor, start: int) -> None:
    """Add to the `panel` [rows, in - start] of the sum that begins at row and column `start`; x is `[tokens, in]`."""
    panel.addmm_(x[:, start : start + len(panel)].T, x[:, start:])
