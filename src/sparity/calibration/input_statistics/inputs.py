"""A sample of the inputs themselves, for what no sum can tell: quantiles of any score, medians, modes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.calibration.input_statistics.base import Statistic
from sparity.registry import register

MOST_TOKENS = 1024
MOST_NUMBERS = 1 << 22  # of a site: 16 MB
HASHED = 256  # columns that decide which tokens are kept


@register("statistic", "inputs")
@dataclass(frozen=True)
class Inputs(Statistic):
    """Up to 1024 tokens' inputs, fewer where they are wide: `[tokens, in]`, float32.

    Of more tokens those whose numbers have the smallest hashes are kept, so that neither order nor batches count. The
    raw sum has one row more: how many tokens were seen, NaN when some were not finite.
    """

    def limit(self, columns: int) -> int:
        """The tokens that are kept of inputs of `columns` channels."""
        return max(min(MOST_TOKENS, MOST_NUMBERS // columns), 1)

    def empty(self, columns: int, device: torch.device | str) -> Tensor:
        """See `Statistic.empty`."""
        return torch.zeros(self.limit(columns) + 1, columns, device=device)

    def add(self, total: Tensor, x: Tensor) -> None:
        """See `Statistic.add`."""
        seen = total[-1, 0] + len(x) + x.sum() * 0
        rows = torch.cat([self._rows(total), x])
        chosen = _hashes(rows).argsort(stable=True)[: len(total) - 1]
        total[: len(chosen)] = rows[chosen]
        total[-1] = seen

    def merge(self, total: Tensor, other: Tensor) -> Tensor:
        """See `Statistic.merge`."""
        merged = total.clone()
        self.add(merged, self._rows(other))
        merged[-1] = total[-1] + other[-1]
        return merged

    def is_finite(self, total: Tensor) -> bool:
        """See `Statistic.is_finite`."""
        return bool(torch.isfinite(total[-1]).all())

    def is_silent(self, total: Tensor) -> bool:
        """See `Statistic.is_silent`; of a sample that holds all tokens only."""
        return bool(total[-1, 0] < len(total)) and not bool(self._rows(total).any())

    def value(self, total: Tensor, sequences: int, tokens: int) -> Tensor:
        """`[tokens, in]`: the sample, in no order that means anything."""
        return self._rows(total)

    def _rows(self, total: Tensor) -> Tensor:
        return total[: min(int(total[-1, 0]), len(total) - 1)]


def _hashes(x: Tensor) -> Tensor:
    """One number per row of `x` [tokens, in], the same for the same inputs."""
    columns = torch.linspace(0, x.shape[1] - 1, min(x.shape[1], HASHED), device=x.device).long()
    bits = (x[:, columns] + 0.0).contiguous().view(torch.int32).long()  # 0 for -0 too
    places = torch.arange(1, len(columns) + 1, device=x.device)
    mixed = (bits + 0x9E3779B9 * places) * 0x5851F42D4C957F2D
    mixed = (mixed ^ (mixed >> 29)) * (2 * places + 1)
    total = mixed.sum(1)
    return total ^ (total >> 32)
