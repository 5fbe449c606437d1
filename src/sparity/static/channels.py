"""MLP channels removed by the norm of their activations, the same number in every block: a smaller stock model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sparity.calibration.evidence import BlockEvidence
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cutting import cut_block
from sparity.models.dimensions import Dimension, mlp_channels
from sparity.registry import register
from sparity.sections import Number, Whole
from sparity.stages import BlockEdit, BlockStage, Change, Decision, Needs
from sparity.stages.base import Estimate, Property, Workload
from sparity.static.structure.units import largest, left_of


@register("stage", "channels")
class Channels(BlockStage):
    """Remove the MLP channels whose activations are smallest, from gate, up and down at once.

    A channel's importance is the norm of its activation before the last projection over calibration text (Wanda's input
    norm). Every block, and every expert, keeps equally many, so that the result is an ordinary model of the same
    architecture: it opens in stock transformers.
    """

    preserves: ClassVar[frozenset[Property]] = frozenset({"mask", "tokens"})

    sparsity: Number = Field(0.25, ge=0, lt=1, description="share of the channels to remove, in [0, 1)")
    multiple_of: Whole = Field(1, ge=1, description="the number that is kept is rounded up to a multiple of this")

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return f"MLP channels by input norm, {100 * self.sparsity:g}%"

    def needs(self) -> Needs:
        """See `Stage.needs`."""
        return Needs(statistics=frozenset({"column_norm"}))

    def decide(self, model: Decoder, evidence: object) -> Decision:
        """How many channels stay: `{"channels": {dimension: number}}` per block.

        Raises:
            InvalidInput: a block without MLP channels, or blocks that would need different numbers.
        """
        kept = []
        for index in range(len(model)):
            found = {
                dimension.name: left_of(dimension.size, self.sparsity, self.multiple_of)
                for dimension in mlp_channels(model.dimensions(index))
            }
            if not found:
                raise InvalidInput(f"channels: {model.block_name(index)} has no MLP channels that could be removed")
            kept.append(found)
        model.config_changes(kept)  # refused here when Hugging Face cannot express it
        return {"channels": kept}

    def sizes(self, model: Decoder, decision: Decision) -> Sequence[Mapping[str, int]]:
        """See `Stage.sizes`."""
        changed = []
        for index, kept in enumerate(decision["channels"]):
            sizes = {dimension.name: dimension.size for dimension in mlp_channels(model.dimensions(index))}
            changed.append({name: size for name, size in kept.items() if size != sizes[name]})
        return changed

    def edit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> BlockEdit:
        """See `BlockStage.edit`."""
        block, index = evidence.block, evidence.block.index
        norms = {
            projection.name: statistics.column_norm
            for site, statistics in evidence.sites()
            for projection in site.projections
            if projection.role in ("down", "fc2")
        }
        kept: dict[str, Tensor] = {}
        for dimension in mlp_channels(model.dimensions(index)):
            left = decision["channels"][index][dimension.name]
            if left < dimension.size:
                kept[dimension.name] = largest(norms[_last(dimension)], left)
        before = {projection.name: projection.weight.shape for projection in block.projections}
        if kept:
            block = cut_block(block, kept, model.family, model.config)
        changes = tuple(
            Change.of(self.name, projection, index, before[projection.name])
            for projection in block.projections
            if projection.role in ("gate", "up", "down", "fc1", "fc2")
        )
        return BlockEdit(block, changes, kept)

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        after = model.resized(self.sizes(model, decision))
        changes = []
        for index in range(len(model)):
            shapes = dict(_shapes(after, index))
            for name, (role, rows, columns) in _shapes(model, index):
                _, rows_after, columns_after = shapes[name]
                if role in ("gate", "up", "down", "fc1", "fc2"):
                    changes.append(
                        Change(self.name, name, role, index, (rows, columns), (rows_after, columns_after), 0.0)
                    )
        largest_block = max(sum(c.size_before for c in changes if c.block == index) for index in range(len(model)))
        return Estimate(tuple(changes), memory={"the cut block": largest_block * model.dtype.itemsize})


def _last(dimension: Dimension) -> str:
    """The projection that reads the channels."""
    return next(cut.projection for cut in dimension.cuts if cut.axis == "columns")


def _shapes(model: Decoder, index: int) -> Iterator[tuple[str, tuple[str, int, int]]]:
    for site in model.sites(index):
        for projection in site.projections:
            rows, columns = projection.weight.shape
            yield projection.name, (projection.role, rows, columns)
