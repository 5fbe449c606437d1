"""Permute: channels in an order in which an N:M pattern loses less. The logits stay, nothing is added at run time."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparity import registry
from sparity.calibration.evidence import BlockEvidence
from sparity.calibration.statistics import GRADIENTS
from sparity.errors import InvalidInput
from sparity.models import Block, Decoder
from sparity.models.dimensions import CHANNELS
from sparity.registry import register
from sparity.sections import Spec, Whole
from sparity.stages import BlockEdit, BlockStage, Change, Decision, Needs
from sparity.stages.base import Estimate, ModelEvidence, Property, Workload
from sparity.static.permute.orders import VALUES, found_orders, readers, reorder
from sparity.static.permute.residual import RESIDUAL, Stream, reorder_block, reorder_rest

Place = Literal["mlp_channels", "values", "residual"]


@register("stage", "permute")
class Permute(BlockStage):
    """Put channels into an order in which the best N of every M neighbours hold more of a score.

    Only orders that cost nothing at run time: of the MLP channels (rows of gate and up, columns of down), of the values
    within each head (rows of v, columns of o), and, where asked for, one of the residual stream (columns of everything
    that reads it, rows of everything that writes it, norms, embedding, head). The model computes what it computed, up
    to the rounding of sums in another order. A `prune` with that pattern comes after it.
    """

    preserves: ClassVar[frozenset[Property]] = frozenset({"shapes", "tokens"})
    rewrites: ClassVar[bool] = True

    n: Annotated[Whole, Field(ge=1)] = Field(2, description="weights kept of each m neighbours")
    m: Annotated[Whole, Field(ge=2)] = Field(4, description="neighbours of a group")
    score: Spec = Field("wanda", description="what is to be kept: a score of `prune` without gradients")
    where: list[Place] = Field(
        ["mlp_channels", "values"], description="which orders may change: of mlp_channels, values, residual"
    )
    sweeps: Annotated[Whole, Field(ge=0)] = Field(8, description="rounds of exchanges, at most")
    seed: Whole = Field(0, ge=0, description="of the draws")

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return f"{self.n} of {self.m} by {self._score.name}: {', '.join(self.where)}"

    @property
    def edits_rest(self) -> bool:  # type: ignore[override]
        """Whether embedding, last norm and head are reordered too."""
        return RESIDUAL in self.where

    def needs(self) -> Needs:
        """See `Stage.needs`."""
        needed = frozenset(self._score.needs)
        if needed & frozenset(GRADIENTS):
            raise InvalidInput(f"permute: score {self._score.name} needs gradients: choose wanda, ria or magnitude")
        return Needs(decision=needed if self.sweeps else frozenset())

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """The orders: `{"blocks": [{dimension: order}], "residual": order}`; a draft leaves everything where it is."""
        if self.n > self.m:
            raise InvalidInput(f"permute: {self.n} of {self.m}: N weights are kept of M, so n is m or less")
        if RESIDUAL in self.where and (reason := Stream.declines(model)):
            raise InvalidInput(f"permute: the residual stream cannot be reordered: {reason}: take it out of `where`")
        decision: Decision = {"blocks": [{} for _ in range(len(model))], "residual": None}
        if evidence is None or not self.sweeps:
            return decision
        stream = Stream(int(model.config.hidden_size))
        for known in evidence.blocks():
            index, block = known.block.index, known.block
            dimensions = model.dimensions(index)
            wanted, scores = readers(dimensions, block.projections, self.where), dict[str, Tensor]()
            for site, statistics in known.sites():
                for projection in site.projections:
                    if projection.name in wanted or (self.edits_rest and stream.reads(projection)):
                        score = self._score.score(projection.weight.float(), statistics)
                        if projection.name in wanted:
                            scores[projection.name] = score
                        else:
                            stream.add(score)
            orders = found_orders(dimensions, block.projections, scores, (self.n, self.m), self.sweeps, self.seed)
            decision["blocks"][index] = orders
        if self.edits_rest:
            decision["residual"] = stream.order((self.n, self.m), self.sweeps, self.seed).tolist()
        return decision

    def edit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> BlockEdit:
        """See `BlockStage.edit`."""
        block, orders = evidence.block, decision["blocks"][evidence.block.index]
        changed = {each.name for each in reorder(block, model.dimensions(block.index), orders)}
        if decision["residual"] is not None:
            block = replace(block, sites=model.family.sites(block.module, block.name, model.config))
            changed |= reorder_block(block, torch.tensor(decision["residual"]), int(model.config.hidden_size))
        block = replace(block, sites=model.family.sites(block.module, block.name, model.config))
        changes = tuple(Change.of(self.name, each, block.index) for each in block.projections if each.name in changed)
        kept = {name: torch.tensor(order) for name, order in orders.items() if name != VALUES}
        return BlockEdit(block, changes, kept)

    def edit_rest(self, rest: Mapping[str, Tensor], decision: Decision) -> Mapping[str, Tensor]:
        """See `BlockStage.edit_rest`."""
        return rest if decision["residual"] is None else reorder_rest(rest, torch.tensor(decision["residual"]))

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        changes, most = list[Change](), 0
        for index in range(len(model) if self.sweeps else 0):
            every = [projection for site in model.sites(index) for projection in site.projections]
            columns = readers(model.dimensions(index), every, self.where)
            rows = {cut.projection for each in model.dimensions(index) for cut in each.cuts if cut.axis == "rows"}
            for each in every:
                if each.name in columns | (rows if CHANNELS in self.where else set()) or self.edits_rest:
                    changes.append(Change.planned(self.name, each, index))
                if each.name in columns:
                    most = max(most, each.weight.numel())
        return Estimate(tuple(changes), memory={"scores and what is tried": 4 * 4 * most})

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """Orders that are none."""
        found = {**decision["blocks"][block.index], "residual": decision["residual"] or []}
        return [
            f"{block.name}: the recorded order of {name} names a channel twice"
            for name, order in found.items()
            if name != VALUES and sorted(order) != list(range(len(order)))
        ]

    @property
    def _score(self):  # type: ignore[no-untyped-def]
        return registry.build("prune.score", self.score)
