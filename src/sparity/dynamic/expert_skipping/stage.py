"""NAEE's dynamic skipping: experts that weigh little beside a token's first (Lu et al. 2024, arXiv:2402.14800).

Weights stay; what is saved beside them is one threshold for each block.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from sparity.calibration.evidence import BlockEvidence
from sparity.checkpoints.runtime_data import AGAIN
from sparity.dynamic.expert_skipping.calibrating import check_routing, found_thresholds
from sparity.dynamic.expert_skipping.skipping import experts_of_sites, skipping
from sparity.errors import CorruptFile
from sparity.models import Block, Decoder, InputSite
from sparity.models.cuts.experts import top_k
from sparity.registry import register
from sparity.sections import Number
from sparity.stages import Change, Decision, Needs, RuntimeStage
from sparity.stages.allocation import projections
from sparity.stages.base import Estimate, ModelEvidence, Property, Workload
from sparity.stages.kinds import RuntimeFit


@register("stage", "expert_skipping")
class ExpertSkipping(RuntimeStage):
    """Experts are skipped, token by token, that weigh little beside the token's first."""

    preserves = RuntimeStage.preserves - {"experts"}

    sparsity: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.5,
        description="share of the experts behind each token's first that is skipped on the calibration text, in [0, 1)",
    )

    @property
    def relies_on(self) -> frozenset[Property]:
        """What is calibrated holds for these weights; and one stage alone skips experts."""
        return super().relies_on | {"experts"}

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return f"{100 * self.sparsity:g} % of the experts behind each token's first"

    def needs(self) -> Needs:
        """The calibration text, on which thresholds are found."""
        return Needs(text=self.refines)

    @property
    def refines(self) -> bool:
        """See `RuntimeStage.refines`."""
        return self.sparsity > 0

    def refine(
        self, model: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor], tokens: Tensor
    ) -> Mapping[str, Tensor]:
        """See `RuntimeStage.refine`: the threshold of each block."""
        found = found_thresholds(model, experts_of_sites(sites), tokens, self.sparsity)
        return {_key(name): torch.tensor(threshold, dtype=torch.float64) for name, threshold in found.items()}

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """What is asked of each block: `{"sparsity": {experts: share}}`."""
        sites = [site for index in range(len(model)) for site in model.sites(index)]
        experts = experts_of_sites(sites)
        check_routing(model.config, experts)
        return {"sparsity": dict.fromkeys(experts, self.sparsity)}

    def fit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> RuntimeFit:
        """`EXPERTS.threshold`, float64 `[]`, 0 until `refine` finds it; nothing of a dense block."""
        block = evidence.block
        tensors = {_key(name): torch.zeros((), dtype=torch.float64) for name in experts_of_sites(block.sites)}
        changes = (
            Change.of(self.name, projection, block.index)
            for projection in block.projections
            if projection.expert is not None
        )
        return RuntimeFit(tensors, tuple(changes))

    @contextmanager
    def attach(self, module: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor]) -> Iterator[None]:
        """See `RuntimeStage.attach`."""
        experts = experts_of_sites(sites)
        with skipping(experts, _thresholds_of(experts, data)):
            yield

    def zeroes(self, module: nn.Module, sites: Sequence[InputSite]) -> frozenset[str]:
        """See `RuntimeStage.zeroes`."""
        return frozenset({"experts"}) if self.refines and experts_of_sites(sites) else frozenset()

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        every, blocks = list(projections(model)), len(decision["sparsity"])
        changes = (Change.planned(self.name, each, index) for index, each in every if each.expert is not None)
        whole = sum(projection.weight.numel() for _, projection in every) * model.dtype.itemsize
        ratios = torch.float32.itemsize * work.tokens * (top_k(model.config) - 1) * blocks
        memory = {"the model in which thresholds are found": whole, "ratios of weights": ratios}
        return Estimate(tuple(changes), memory=memory if self.refines else {}, runtime_bytes=8 * blocks)

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """Blocks whose recorded share is another than was asked for."""
        recorded = {name: decision["sparsity"].get(name) for name in experts_of_sites(block.sites)}
        return [
            f"{name}: recorded to skip a share of {share} of its experts, not {self.sparsity:g}"
            for name, share in recorded.items()
            if share != self.sparsity
        ]


def _key(experts: str) -> str:
    return f"{experts}.threshold"


def _thresholds_of(experts: Mapping[str, nn.Module], data: Mapping[str, Tensor]) -> dict[str, float]:
    """Name of experts -> the threshold.

    Raises:
        CorruptFile: the data does not fit the experts.
    """
    names = {_key(name): name for name in experts}
    if odd := sorted(names.keys() ^ data.keys()):
        what = "lacks" if odd[0] in names else "holds the unknown"
        raise CorruptFile(f"expert_skipping: the file {what} {odd[0]}; {AGAIN}")
    for key, threshold in data.items():
        if threshold.dtype != torch.float64 or threshold.shape or not 0 <= float(threshold) <= 1:
            raise CorruptFile(
                f"expert_skipping: {key} is {threshold.dtype} {threshold.tolist()}, not a share of a weight; {AGAIN}"
            )
    return {name: float(data[key]) for key, name in names.items()}
