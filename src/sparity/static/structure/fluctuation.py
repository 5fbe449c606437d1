"""How much the inputs of projections vary, and what they are on average."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.models.dimensions import Cut
from sparity.static.structure.methods.base import Choice
from sparity.static.structure.subject import Subject


class Fluctuation:
    """Mean and variance of each input channel over all tokens."""

    def __init__(self, reference: bool) -> None:
        self._reference, self._sequences, self._tokens = reference, 0, 0
        self._total = self._squares = self._theirs = self.mean = torch.zeros(1, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """One sequence, `[tokens, channels]`."""
        x = x.detach().cpu().double()
        count = self._sequences
        self.mean = self.mean * (count / (count + 1)) + x.mean(0) / (count + 1)
        if count:  # the code takes both deviations from the new mean, and nothing of the first sequence
            self._theirs = self._theirs * ((count - 1) / count) + (x - self.mean).square().sum(0) / (count + 1)
        self._total, self._squares = self._total + x.sum(0), self._squares + x.square().sum(0)
        self._tokens, self._sequences = self._tokens + len(x), count + 1

    @property
    def variance(self) -> Tensor:
        """float32 `[channels]`."""
        if self._reference:
            return (self._theirs + torch.zeros_like(self._total)).float()
        centred = self._squares - self._total.square() / self._tokens
        return (centred.clamp_min(0) / max(self._tokens - 1, 1)).float()


@dataclass(frozen=True)
class Seen:
    """What the text showed: scores by dimension, the mean inputs of projections, their cuts, the weights of a unit."""

    scores: dict[str, Tensor]
    means: dict[str, Tensor]
    cuts: dict[str, list[Cut]]
    costs: dict[str, int]

    def lost(self, subject: Subject, kept: Choice) -> dict[str, Tensor]:
        """What the removed channels gave on average, `[out]` by projection."""
        found = {}
        for block in subject.blocks():
            weights = {projection.name: projection.weight for projection in block.projections}
            for name, cuts in self.cuts.items():
                cut, left = cuts[block.index], kept[name][block.index]
                mean = self.means[cut.projection].clone()
                mean[cut.indices(torch.as_tensor(left))] = 0
                found[cut.projection] = weights[cut.projection].double().cpu() @ mean
        return found
