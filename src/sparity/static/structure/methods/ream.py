"""REAM: experts are merged into the most salient ones (Samsung SAIL Montreal 2026, arXiv:2604.04356)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.calibration import Visit
from sparity.errors import InvalidInput
from sparity.models.cuts.experts import cut_experts, experts_module
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import EXPERTS
from sparity.models.experts import expert_matrices
from sparity.registry import register
from sparity.static.structure.expert_methods import ExpertMethod
from sparity.static.structure.experts import each_routed, routed_norms
from sparity.static.structure.merging import Observed, grouped, merged
from sparity.static.structure.methods.base import Choice, Restructured
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import largest, stacked

Matrices = list[Tensor]  # gate, up and down


@register("structure.method", "ream")
@dataclass(frozen=True)
class REAM(ExpertMethod):
    """Keep the experts of REAP's highest saliency, and merge the others into them, block after block.

    The most salient takes the most similar of the rest, up to `group` in all, then the next. Experts are similar in
    what they add to all tokens on average, and in their router logits. Neurons are matched on `tokens` tokens before
    weights are averaged by saliency. The router keeps the rows of those that stay.
    """

    group: int = 16
    tokens: int = 4096

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """REAP's saliency in the dense model."""
        return {EXPERTS: stacked([None if each is None else each.mean_gated for each in each_routed(subject)])}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return {EXPERTS: [None if found is None else sorted(found) for found in self._merged(subject, sparsity)]}

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """See `Method.restructure`."""
        everywhere = self._merged(subject, sparsity)
        kept = {EXPERTS: [None if found is None else sorted(found) for found in everywhere]}
        smaller = cut_model(subject.model, kept)
        for block, found in zip(blocks_of(smaller, subject.family), everywhere, strict=True):
            experts = experts_module(block)
            if found is not None and experts is not None:
                _write(experts, found)
        return Restructured(smaller, kept)

    def _merged(self, subject: Subject, sparsity: float) -> list[dict[int, Matrices] | None]:
        """Of each block the experts that stay with their new matrices; later blocks see the earlier ones merged."""
        left = self.sizes(subject.decoder, sparsity)[EXPERTS]
        if self.group < 2:
            raise InvalidInput(f'ream, option "group": at least 2 experts, not {self.group}')
        found: list[dict[int, Matrices] | None] = []
        for visit in subject.visits():
            found.append(self._of_block(visit, left, subject))
            visit.finish()
        return found

    def _of_block(self, visit: Visit, left: int, subject: Subject) -> dict[int, Matrices] | None:
        sums, experts = routed_norms(visit), experts_module(visit.block)
        if sums is None or experts is None:
            return None
        saliency = sums.mean_gated
        saliency[saliency == 0] = min(0.5, float(saliency[saliency > 0].min()))  # so that unused ones count a little
        centres = largest(saliency, left).tolist()
        if len(saliency) == left:
            return {centre: [m.clone() for m in expert_matrices(experts, centre)] for centre in centres}
        seen = Observed.of(visit, self.tokens)
        groups = grouped(saliency, seen.similarity(), centres, self.group)
        if sum(map(len, groups.values())) < len(saliency):
            raise InvalidInput(
                f"{visit.block.name}: {left} groups of {self.group} cannot hold {len(saliency)} experts: raise `group`"
            )
        with torch.no_grad():
            new = {centre: merged(experts, groups[centre], saliency, seen.neurons) for centre in sorted(groups)}
        cut_experts(visit.block, torch.tensor(centres), subject.config)
        _write(experts, new)
        return new


def _write(experts: torch.nn.Module, found: Mapping[int, Matrices]) -> None:
    """Put matrices in the places of the experts that are left, in order."""
    for place, centre in enumerate(sorted(found)):
        for written, matrix in zip(expert_matrices(experts, place), found[centre], strict=True):
            written.data.copy_(matrix)
