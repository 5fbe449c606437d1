"""REAP: experts by the size of what they add to their tokens (Lasby et al. 2025, arXiv:2510.13999)."""

from dataclasses import dataclass

from torch import Tensor

from sparity.models.dimensions import EXPERTS
from sparity.registry import register
from sparity.static.structure.expert_methods import ExpertMethod
from sparity.static.structure.experts import Routed, each_routed
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import stacked


@register("structure.method", "reap")
@dataclass(frozen=True)
class REAP(ExpertMethod):
    """Score an expert by the mean over the tokens routed to it of router weight times the norm of its output.

    The weight is the one that the model multiplies with. With `reference` it is the softmax over all experts' logits,
    as in the authors' code, whatever the router does with it afterwards. An expert without tokens scores 0.
    """

    reference: bool = False

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        return {EXPERTS: stacked([None if each is None else self.saliency(each) for each in each_routed(subject)])}

    def saliency(self, sums: Routed) -> Tensor:
        """`[experts]`, float32."""
        norms = sums.soft_norms if self.reference else sums.norms
        return (norms / sums.count.clamp_min(1)).float()
