"""FLAP: parts whose inputs vary least, and a bias for what they gave on average (An et al. 2024, arXiv:2312.11983)."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import Decoder, InputSite
from sparity.models.cuts.biases import add_biases, bias_flags
from sparity.models.cuts.whole import blocks_of, cut_model, with_config
from sparity.models.dimensions import CHANNELS
from sparity.registry import register
from sparity.static.structure.competition import unit_weights
from sparity.static.structure.fluctuation import Fluctuation, Seen
from sparity.static.structure.methods.base import Choice, Method, Restructured
from sparity.static.structure.ranked import ranked_sizes
from sparity.static.structure.subject import Subject, run_watched
from sparity.static.structure.units import choose_rows, largest, stacked


@register("structure.method", "flap")
@dataclass(frozen=True)
class FLAP(Method):
    """Score input channels of o and down by their variance times the squared norm of their column (WIFV).

    Standardised within each block and kind, heads by the mean of their channels' squares, all heads and channels of all
    blocks compete for one share of the weights (`AL-AM`), or each block loses the same (`UL-UM`). `bias` adds what the
    removed channels gave on average. With `reference` the variance is the authors' running one.
    """

    structure: Literal["AL-AM", "UL-UM"] = "AL-AM"
    bias: bool = True
    reference: bool = False

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        return self._observed(subject).scores

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return self._choice(self._observed(subject), sparsity)

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """See `Method.restructure`."""
        seen = self._observed(subject)
        kept = self._choice(seen, sparsity)
        smaller = cut_model(subject.model, kept)
        if self.bias and sparsity:
            blocks = blocks_of(smaller, subject.family)
            changes = add_biases(smaller.config, blocks, seen.lost(subject, kept))
            with_config(smaller, subject.family, changes)
        return Restructured(smaller, kept)

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        if self.structure != "UL-UM":
            raise InvalidInput(
                "flap lets blocks have different sizes, which no stock configuration can say: set `structure: UL-UM` "
                "for equal ones, or `shapes: ragged` of the stage"
            )
        heads = next(d.name for d in decoder.dimensions(0) if d.name != CHANNELS)
        return {name: ranked_sizes(name, decoder, sparsity)[name] for name in (CHANNELS, heads)}

    def sizes_on_average(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes_on_average`."""
        return replace(self, structure="UL-UM").sizes(decoder, sparsity)

    def config_changes(self, decoder: Decoder) -> dict[str, Any]:
        """See `Method.config_changes`."""
        projections = [projection for site in decoder.sites(0) for projection in site.projections]
        changes = bias_flags(decoder.config, [p for p in projections if p.role in ("o", "down", "fc2")])
        if changes is None and self.bias:
            kind = decoder.config.model_type
            raise InvalidInput(
                f'flap adds biases, which a configuration of type "{kind}" cannot say: set `bias: false`'
            )
        return changes or {} if self.bias else {}

    def _observed(self, subject: Subject) -> Seen:
        channels, heads = list[Tensor | None](), list[Tensor | None]()
        seen = Seen({}, {}, {}, {})
        for visit in subject.visits():
            if any(projection.expert is not None for projection in visit.block.projections):
                raise InvalidInput(f"{visit.block.name}: flap has no rule for experts: use reap, or minitron")
            running: dict[str, Fluctuation] = {}

            def see(site: InputSite, x: Tensor, running: dict[str, Fluctuation] = running) -> None:
                running.setdefault(site.projections[0].name, Fluctuation(self.reference)).add(x)

            run_watched(visit, ("o", "down", "fc2"), see)
            weights = {projection.name: projection.weight for projection in visit.block.projections}
            of_channels = next(found for found in subject.dimensions(visit.block) if found.name == CHANNELS)
            for dimension, rows in ((subject.heads(visit.block), heads), (of_channels, channels)):
                cut = next(cut for cut in dimension.cuts if cut.axis == "columns")
                found = running[cut.projection]
                metric = found.variance * weights[cut.projection].float().cpu().square().sum(0)
                metric = metric.square() if rows is heads else metric
                metric = (metric - metric.mean()) / metric.std()
                rows.append(metric.view(-1, cut.width).mean(1))
                seen.means[cut.projection] = found.mean
                seen.cuts.setdefault(dimension.name, []).append(cut)
                seen.costs[dimension.name] = unit_weights(dimension, weights)
        seen.scores.update(zip(seen.costs, (stacked(heads), stacked(channels)), strict=True))
        return seen

    def _choice(self, seen: Seen, sparsity: float) -> Choice:
        if self.structure == "UL-UM" or not sparsity:
            return {name: choose_rows(scores, sparsity) for name, scores in seen.scores.items()}
        every = torch.cat([scores.flatten() for scores in seen.scores.values()])
        weighed = [torch.full((s.numel(),), float(seen.costs[name])) for name, s in seen.scores.items()]
        costs = torch.cat(weighed).double()
        order = every.argsort(descending=True, stable=True)
        spent = costs[order].cumsum(0)
        limit = every[order][(spent - costs.sum() * (1 - sparsity)).abs().argmin()]
        return {name: [_above(row, limit) for row in scores] for name, scores in seen.scores.items()}


def _above(row: Tensor, limit: Tensor) -> list[int]:
    """The units above the limit; the best where none is, so that no block is left without."""
    places = (row > limit).nonzero().flatten()
    return places.tolist() if len(places) else largest(row, 1).tolist()
