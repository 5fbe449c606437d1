"""GRIFFIN: the neurons that a prompt used most, for all that follows it (Dong et al. 2024, arXiv:2404.01365)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.activations.method_data import checked, whole_number
from sparity.dynamic.activations.methods.base import Seen
from sparity.dynamic.activations.quantiles import ROUNDING
from sparity.dynamic.activations.sequence_masks import FixedNeurons, SequenceMethod
from sparity.registry import register


@register("activations.method", "griffin")
@dataclass(frozen=True)
class Griffin(SequenceMethod):
    """The k = int(in (1 - s)) neurons count whose activations, each token's scaled to norm 1, have the largest norm."""

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`: `kept`, the number of neurons."""
        return {"kept": torch.tensor(max(int(seen.values.shape[-1] * (1 - sparsity) + ROUNDING), 1))}

    def rule(self, tensors: Mapping[str, Tensor], columns: int, what: str) -> "Flocking":
        """See `SequenceMethod.rule`."""
        checked(tensors, {"kept": (torch.int64, ())}, what)
        return Flocking(whole_number(tensors, "kept", 1, columns, what))


class Flocking(FixedNeurons):
    """Sums of the squares of each token's activations, scaled to norm 1; numbers that are not finite count as 0."""

    def add(self, sums: Tensor, x: Tensor, counted: Tensor) -> None:
        """See `SequenceRule.add`."""
        size = x.double().nan_to_num(0, 0, 0)
        norm = size.norm(dim=-1, keepdim=True)
        share = torch.where(norm > 0, size / norm, 0)
        sums += (share.square() * counted[..., None]).sum(1)
