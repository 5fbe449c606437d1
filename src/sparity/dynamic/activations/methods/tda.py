"""TDA: a threshold from the sequence's own first activations (Ma et al. 2024, arXiv:2408.11393)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.activations.method_data import checked, skips_nothing
from sparity.dynamic.activations.methods.base import Seen
from sparity.dynamic.activations.places import Kind
from sparity.dynamic.activations.quantiles import ROUNDING, quantile
from sparity.dynamic.activations.rule_data import AGAIN
from sparity.dynamic.activations.sequence_masks import SequenceMethod, SequenceRule
from sparity.errors import CorruptFile
from sparity.registry import register

BINS, INFINITE = 1 << 15, 0x7F80  # numbers that share their upper 16 bits, and where infinity lies


@register("activations.method", "tda")
@dataclass(frozen=True)
class Tda(SequenceMethod):
    """Channel i of a token counts where |x_i| > t, the s-quantile of |x| over the prompt of its own sequence."""

    takes: ClassVar[tuple[Kind, ...]] = ("input", "hidden")

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`: `share`, the sparsity; everything else is found while the model runs."""
        return {"share": torch.tensor(sparsity, dtype=torch.float64)}

    def rule(self, tensors: Mapping[str, Tensor], columns: int, what: str) -> "OwnThreshold":
        """See `SequenceMethod.rule`."""
        checked(tensors, {"share": (torch.float64, ())}, what)
        share = float(tensors["share"])
        if not 0 < share < 1:
            raise CorruptFile(f"activations: {what}.share is {share}, not between 0 and 1; {AGAIN}")
        return OwnThreshold(share)

    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Method.mask`; exact, while a running model counts in bins under 1 % wide (exact in bfloat16)."""
        if skips_nothing(tensors):
            return super().mask(tensors, x)
        rule = self.rule(tensors, x.shape[-1], "x")
        size = x.float().abs().nan_to_num(torch.inf, torch.inf)
        return rule.keep(torch.stack([quantile(sample, rule.share) for sample in size]), x)


@dataclass(frozen=True)
class OwnThreshold(SequenceRule):
    """Counts of |x| by its upper 16 bits as float32, and their quantile; NaN counts as infinite."""

    share: float

    def empty(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """See `SequenceRule.empty`: int64 `[rows, bins]`."""
        return torch.zeros(rows, BINS, dtype=torch.int64, device=device)

    def add(self, sums: Tensor, x: Tensor, counted: Tensor) -> None:
        """See `SequenceRule.add`."""
        for row, activations, wanted in zip(sums, x, counted, strict=True):
            bits = activations[wanted].float().abs().contiguous().view(torch.int32) >> 16
            row += torch.bincount(bits.flatten(), minlength=BINS)

    def decide(self, sums: Tensor) -> Tensor:
        """See `SequenceRule.decide`: the upper end of the bin that holds the quantile, float32 `[rows]`."""
        wanted = (sums.sum(1, keepdim=True) * self.share - ROUNDING).ceil().clamp_min(1)
        bins = (sums.cumsum(1) < wanted).sum(1).int()
        ends = ((bins << 16) | 0xFFFF).view(torch.float32)
        return torch.where(bins < INFINITE, ends, torch.inf)

    def keep(self, decided: Tensor, x: Tensor) -> Tensor:
        """See `SequenceRule.keep`."""
        return (x.float().abs() > decided[:, None, None]) | x.isnan()
