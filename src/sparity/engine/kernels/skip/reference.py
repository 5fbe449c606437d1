"""The one rule by which input channels are skipped; every method of activation sparsity is a choice of its numbers."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sparity.errors import InvalidInput

Scale = Literal["constant", "rms", "top", "statistical"]


@dataclass(frozen=True)
class SkipRule:
    """Channel i of a token's input x counts where |x_i - m_i| > t_i s, compared in float32, or where that is NaN.

    Attributes:
        threshold: t, float32 `[in]`, or `[]` for all channels alike; not negative, infinite = never counts.
        centre: m, `[in]`, in the type of x; None = zeros.
        scale: what s is for a token. `constant`: 1. `rms`: the root of the mean of x_i^2. `top`: just so large that
            `kept` channels count, those with the largest |x_i - m_i| / t_i, the first of equal ones. `statistical`: the
            mean plus `deviations` standard deviations of |x_i - m_i| / t_i over the channels.
        kept: of `top`, 1 or more.
        deviations: of `statistical`.
    """

    threshold: Tensor
    centre: Tensor | None = None
    scale: Scale = "constant"
    kept: int = 0
    deviations: float = 0.0

    def __post_init__(self) -> None:
        if self.scale == "top" and self.kept < 1:
            raise InvalidInput(f"a rule that keeps the top channels must keep 1 or more, not {self.kept}")
        if self.scale == "statistical" and not math.isfinite(self.deviations):
            raise InvalidInput(f"standard deviations {self.deviations}: a finite number is needed")

    @property
    def idle(self) -> bool:
        """Whether every channel of every input is left as it is: no threshold, or none that a number does not pass."""
        return self.centre is None and self.scale in ("constant", "rms") and not bool(self.threshold.any())

    def same(self, other: "SkipRule") -> bool:
        """Whether another rule says the same of every input."""
        mine, theirs = (self.scale, self.kept, self.deviations), (other.scale, other.kept, other.deviations)
        centres = (self.centre, other.centre)
        alike = all(c is None for c in centres) or (all(c is not None for c in centres) and torch.equal(*centres))  # type: ignore[arg-type]
        return mine == theirs and alike and torch.equal(self.threshold, other.threshold)

    def keep(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> bool like `x`, True where a channel counts."""
        size = self._size(x)
        if self.scale == "constant":
            counts = size > self.threshold
        elif self.scale == "rms":
            rms = x.double().pow(2).mean(-1, keepdim=True).sqrt().float()
            counts = size > self.threshold * rms
        else:
            ratio = (size / self.threshold).nan_to_num(torch.inf, torch.inf)  # 0 / 0: what no threshold keeps out
            counts = self._top(ratio) if self.scale == "top" else self._statistical(ratio)
        return counts | size.isnan()

    def apply(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> `x - centre` where a channel counts, else 0; a bias then holds `weight @ centre`."""
        kept = x if self.centre is None else x - self.centre
        return kept.masked_fill(~self.keep(x), 0)

    def fill(self, x: Tensor) -> Tensor:
        """`x` [..., in] with the centre, or 0, in place of what does not count: `apply` plus the centre."""
        keep = self.keep(x)
        return x.masked_fill(~keep, 0) if self.centre is None else torch.where(keep, x, self.centre)

    def like(self, x: Tensor) -> "SkipRule":
        """The rule with its numbers where `x` is, and the centre in its type."""
        centre = self.centre
        if self.threshold.device == x.device and (centre is None or centre.dtype == x.dtype):
            return self
        return replace(self, threshold=self.threshold.to(x.device), centre=None if centre is None else centre.to(x))

    def _size(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide if self.centre is None else wide - self.centre.float()).abs()

    def _top(self, ratio: Tensor) -> Tensor:
        order = ratio.argsort(dim=-1, descending=True, stable=True)[..., : self.kept]
        return torch.zeros_like(ratio, dtype=torch.bool).scatter(-1, order, True)

    def _statistical(self, ratio: Tensor) -> Tensor:
        wide = ratio.double()
        limit = wide.mean(-1, keepdim=True) + self.deviations * wide.std(-1, correction=0, keepdim=True)
        return ratio > limit.float()
