"""LLM Surgeon: parts by the Fisher information, the rest updated (van der Ouderaa et al. 2024, arXiv:2312.17244)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import CHANNELS
from sparity.registry import register
from sparity.static.structure.competition import Part, cheapest, unit_weights
from sparity.static.structure.kronecker import Kronecker, curvature
from sparity.static.structure.methods.base import Choice, Method, Restructured
from sparity.static.structure.ranked import ranked_sizes
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import largest, left_of, stacked


@register("structure.method", "llm_surgeon")
@dataclass(frozen=True)
class LLMSurgeon(Method):
    """Remove the channels and heads whose columns of down and o cost the loss least, in `shots`, and update the others.

    The curvature is the Fisher information as a Kronecker product of inputs and of gradients at outputs, taken again in
    every shot of the model as it is then. All units compete by cost per weight for one share of the weights (`share:
    model`), or each block loses the same share of its units (`share: block`).
    """

    share: Literal["model", "block"] = "model"
    shots: int = 40
    damping: float = 0.01

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """What the loss of the whole model would gain without each unit, in nats a token."""
        parts = self._parts(subject, self._factors(subject))
        return {name: stacked([part.costs for part in found]) for name, found in parts.items()}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return dict(self.restructure(subject, sparsity).kept)

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """See `Method.restructure`."""
        model, kept = cut_model(subject.model, {}), dict[str, list[Tensor]]()
        for shot in range(1, self.shots + 1 if sparsity else 1):
            now = Subject(model, subject.given)
            factors = self._factors(now)
            parts = self._parts(now, factors)
            if not kept:
                kept = {name: [torch.arange(len(part.costs)) for part in found] for name, found in parts.items()}
                dense = {name: [len(part.costs) for part in found] for name, found in parts.items()}
            left = self._left(parts, dense, sparsity * shot / self.shots)
            for block in blocks_of(model, now.family):
                projections = {projection.name: projection for projection in block.projections}
                for name, found in parts.items():
                    cut, units = found[block.index].cut, found[block.index].costs
                    gone = torch.ones(len(units), dtype=torch.bool)
                    gone[left[name][block.index]] = False
                    if gone.any():
                        output = projections[cut.projection]
                        columns = cut.indices(gone.nonzero().flatten())
                        output.write(factors[output.name].without(output.weight, columns, self.damping))
            model = cut_model(model, {name: [units.tolist() for units in rows] for name, rows in left.items()})
            kept = {name: [had[i] for had, i in zip(rows, left[name], strict=True)] for name, rows in kept.items()}
        return Restructured(model, {name: [units.tolist() for units in rows] for name, rows in kept.items()})

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        if self.share != "block":
            raise InvalidInput(
                "llm_surgeon lets blocks have different sizes, which no stock configuration can say: set `share: "
                "block` for equal ones, or `shapes: ragged` of the stage"
            )
        heads = next(each.name for each in decoder.dimensions(0) if each.name != CHANNELS)
        return {name: ranked_sizes(name, decoder, sparsity)[name] for name in (CHANNELS, heads)}

    def sizes_on_average(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes_on_average`."""
        return replace(self, share="block").sizes(decoder, sparsity)

    def _factors(self, subject: Subject) -> dict[str, Kronecker]:
        if self.shots < 1 or not self.damping > 0:
            raise InvalidInput(
                f"llm_surgeon: `shots` must be 1 or more and `damping` above 0, not {self.shots}, {self.damping:g}"
            )
        return curvature(subject)

    def _parts(self, subject: Subject, factors: Mapping[str, Kronecker]) -> dict[str, list[Part]]:
        found: dict[str, list[Part]] = {}
        for block in blocks_of(subject.model, subject.family):
            weights = {projection.name: projection.weight for projection in block.projections}
            channels = next(each for each in subject.dimensions(block) if each.name == CHANNELS)
            for dimension in (channels, subject.heads(block)):
                cut = next(cut for cut in dimension.cuts if cut.axis == "columns")
                costs = factors[cut.projection].costs(weights[cut.projection], cut.width, self.damping)
                found.setdefault(dimension.name, []).append(Part(cut, costs, unit_weights(dimension, weights)))
        return found

    def _left(
        self, parts: Mapping[str, Sequence[Part]], dense: Mapping[str, Sequence[int]], gone: float
    ) -> dict[str, list[Tensor]]:
        """Of each block the units that stay when a share of the dense model is gone."""
        if self.share == "model":
            return cheapest(parts, dense, gone)
        return {
            name: [largest(part.costs, left_of(size, gone)) for part, size in zip(found, dense[name], strict=True)]
            for name, found in parts.items()
        }
