"""Frequency: the experts that fewest tokens visit go (the baseline of Lu et al. 2024, arXiv:2402.14800)."""

from dataclasses import dataclass

from torch import Tensor

from sparity.models.dimensions import EXPERTS
from sparity.registry import register
from sparity.static.structure.expert_methods import ExpertMethod
from sparity.static.structure.experts import each_routed
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import stacked


@register("structure.method", "frequency")
@dataclass(frozen=True)
class Frequency(ExpertMethod):
    """Score an expert by how many calibration tokens the router sends to it."""

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        return {EXPERTS: stacked([None if each is None else each.count for each in each_routed(subject)])}
