"""Rescale: AWQ's or SmoothQuant's scales put into the weights around; nothing is added at run time."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from sparity.calibration.evidence import BlockEvidence, Order
from sparity.models import Decoder
from sparity.registry import register
from sparity.sections import Number, Whole
from sparity.stages import BlockEdit, BlockStage, Change, Decision, Needs
from sparity.stages.allocation import projections
from sparity.stages.base import Estimate, Property, Workload
from sparity.static.quantize.methods.base import check_group
from sparity.static.quantize.quantizing import Quantizing
from sparity.static.rescale.scales import NEEDS, Method, factors_of
from sparity.static.rescale.sources import Source, sources_of

Place = Literal["norms", "values", "mlp_channels"]
TOUCHED = {
    "norms": frozenset({"q", "k", "v", "qkv", "gate", "up", "fc1"}),
    "values": frozenset({"v", "o"}),
    "mlp_channels": frozenset({"up", "down"}),
}


@register("stage", "rescale")
class Rescale(BlockStage):
    """Multiply columns by the scales of AWQ or SmoothQuant, and divide what writes them: norms, rows of v and of up.

    A `quantize` that comes after it then loses less, and its codes can be stored as they are: no input has to be
    divided at run time. The model computes what it computed, with powers of two (`exact`) bit for bit. Zeros stay.
    """

    preserves: ClassVar[frozenset[Property]] = frozenset({"mask", "shapes", "tokens"})
    rewrites: ClassVar[bool] = True

    method: Method = Field("awq", description="whose scales: awq (searched) or smoothquant (a formula)")
    bits: Whole = Field(4, ge=2, le=8, description="bits that AWQ's search rounds to")
    group: Whole | None = Field(None, ge=1, description="neighbours that share a scale there; default: a whole row")
    symmetric: bool = Field(True, description="whether it rounds around 0, or with a zero point")
    steps: Annotated[Whole, Field(ge=1)] = Field(20, description="powers that AWQ tries")
    alpha: Number = Field(0.5, ge=0, le=1, description="SmoothQuant's: how much of a range moves into the weights")
    exact: bool = Field(False, description="only powers of two, so that no bit of the logits changes")
    where: list[Place] = Field(
        ["norms", "values", "mlp_channels"], description="which channels: behind norms, values of heads, of the MLP"
    )
    order: Order = Field("sequential", description="statistics after the edited blocks, or of the model before them")

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return f"scales of {self.method}{', powers of two' if self.exact else ''}: {', '.join(self.where) or 'nowhere'}"

    @property
    def how(self) -> str:
        """See `Stage.how`."""
        return self.method

    def needs(self) -> Needs:
        """See `Stage.needs`."""
        return Needs(statistics=NEEDS[self.method] if self.where else frozenset(), order=self.order)

    def decide(self, model: Decoder, evidence: object) -> Decision:
        """Where: `{"where": [...]}`; the scales are in the weights.

        Raises:
            InvalidInput: a group that does not divide the rows of a projection whose columns are scaled.
        """
        for _, projection in projections(model) if self.where and self.method == "awq" else ():
            check_group(self.group, projection.weight.shape[1], projection.name)
        return {"where": list(self.where)}

    def edit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> BlockEdit:
        """See `BlockStage.edit`."""
        block = evidence.block
        sources = list(sources_of(block, model.dimensions(block.index), model.config, decision["where"]))
        found: list[tuple[Source, Tensor]] = []
        rounding = Quantizing.of("nearest", self.bits, self.group, self.symmetric)
        for site, statistics in evidence.sites() if sources else ():
            names = {projection.name for projection in site.projections}
            for source in sources:
                if names >= {reader.name for reader in source.readers}:
                    factors = factors_of(
                        source, statistics, self.method, self.exact, rounding, self.steps, float(self.alpha)
                    )
                    found.append((source, factors))
        touched: set[str] = set()
        for source, factors in found:
            source.scale(factors)
            touched |= {projection.name for projection in source.projections}
        changes = (Change.of(self.name, p, block.index) for p in block.projections if p.name in touched)
        return BlockEdit(block, tuple(changes))

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        roles = frozenset[str]().union(*(TOUCHED[place] for place in self.where))
        changes, most = list[Change](), 0
        for index, projection in projections(model):
            if projection.role in roles:
                changes.append(Change.planned(self.name, projection, index))
                most = max(most, projection.weight.numel())
        flops = sum(2.0 * change.size * change.shape_before[1] for change in changes) * self.steps
        return Estimate(tuple(changes), flops if self.method == "awq" else 0.0, {"what is tried": 4 * 6 * most})
