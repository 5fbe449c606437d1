"""TEAL: an input channel below its projection's threshold is zero (Liu et al. 2024, arXiv:2408.14690).

Channel i of an input x counts where |x_i| > t, as float32; NaN counts. The threshold t is a quantile of |x| over all
channels and calibration tokens. For now the inputs are masked and then multiplied densely: exact, and no faster.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sparity.calibration import Statistics
from sparity.calibration.evidence import BlockEvidence
from sparity.errors import CorruptFile, InvalidInput, suggestion
from sparity.models import Block, Decoder, InputSite, Projection
from sparity.registry import register
from sparity.sections import Number
from sparity.stages import Change, Decision, Needs, RuntimeStage
from sparity.stages.base import Estimate, ModelEvidence, RuntimeFit, Workload

FP32 = 4
AGAIN = "the data belongs to another model or to other options: fetch or make the folder again"


@register("stage", "activations")
class Activations(RuntimeStage):
    """Input channels below a threshold are zero, token by token; one threshold per projection."""

    sparsity: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.4, description="share of input channels to skip, in [0, 1)"
    )
    roles: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="the roles of the projections whose inputs are skipped, such as [gate, up, down]; default: all",
    )

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        where = f" of {', '.join(self.roles)}" if self.roles else ""
        return f"activations, {100 * self.sparsity:g} %{where}"

    def needs(self) -> Needs:
        """See `Stage.needs`."""
        return Needs(statistics=frozenset({"histogram"}))

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """The share of every projection: `{"sparsity": {projection: share of its input channels to skip}}`."""
        every = [projection for _, projection in _projections(model)]
        self._check_roles(every)
        return {"sparsity": {projection.name: self.sparsity for projection in self._chosen(every)}}

    def fit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> RuntimeFit:
        """`PROJECTION.threshold`, float32 `[]`, of the projections that are chosen; 0 skips nothing."""
        tensors, changes = {}, []
        for site, statistics in evidence.sites():
            for projection in self._chosen(site.projections):
                sparsity = decision["sparsity"].get(projection.name, 0.0)
                threshold, skipped = threshold_for(statistics, sparsity)
                tensors[_key(projection)] = torch.tensor(threshold)
                zeros = float((projection.weight == 0).sum()) / projection.weight.numel()
                changes.append(self._change(projection, evidence.block.index, zeros, sparsity, skipped))
        return RuntimeFit(tensors, tuple(changes))

    @contextmanager
    def attach(self, module: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor]) -> Iterator[None]:
        """See `RuntimeStage.attach`; a module that holds several projections takes the threshold of the first."""
        thresholds = self._thresholds(sites, data)
        with ExitStack() as hooks:
            for layer, threshold in thresholds:
                if threshold > 0:
                    hooks.callback(layer.register_forward_pre_hook(partial(_mask_inputs, threshold)).remove)
            yield

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        allocation = decision["sparsity"]
        changes = [
            self._change(projection, index, 0.0, allocation[projection.name], allocation[projection.name])
            for index, projection in _projections(model)
            if projection.name in allocation
        ]
        return Estimate(changes=tuple(changes), runtime_bytes=FP32 * len(changes))

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """Projections whose recorded share is not the one of the options."""
        allocation = decision["sparsity"]
        return [
            f"{projection.name}: recorded to skip {allocation.get(projection.name)} of inputs, not {self.sparsity:g}"
            for projection in self._chosen(block.projections)
            if allocation.get(projection.name) != self.sparsity
        ]

    def _chosen(self, projections: Sequence[Projection]) -> list[Projection]:
        return [projection for projection in projections if self.roles is None or projection.role in self.roles]

    def _check_roles(self, projections: Sequence[Projection]) -> None:
        """Raise `InvalidInput` for fused experts, for roles that no projection has, for a part of a fused matrix."""
        if expert := next((projection for projection in projections if projection.expert is not None), None):
            raise InvalidInput(
                f"activations: {expert.name} is one of several experts in one module, whose inputs cannot be skipped "
                "yet: leave the stage out for this model; thresholds for experts come later"
            )
        known = list(dict.fromkeys(projection.role for projection in projections))
        for role in self.roles or ():
            if role not in known:
                close = suggestion(role, known)
                raise InvalidInput(
                    f'activations.roles: no projection has the role "{role}"{close} (roles: {", ".join(known)})'
                )
        chosen = {projection.module for projection in self._chosen(projections)}
        for projection in projections:
            if projection.module in chosen and self.roles is not None and projection.role not in self.roles:
                together = [other.role for other in projections if other.module is projection.module]
                raise InvalidInput(
                    f"activations.roles: {', '.join(together)} are one matrix in this model ({projection.name} is a "
                    "part of it) and have one input: name all of them or none"
                )

    def _change(self, projection: Projection, block: int, zeros: float, sparsity: float, skipped: float) -> Change:
        rows, columns = projection.weight.shape
        return Change(
            stage=self.name,
            name=projection.name,
            role=projection.role,
            block=block,
            shape_before=(rows, columns),
            shape_after=(rows, columns),
            zeros=zeros,
            target=sparsity,
            skipped=skipped,
        )

    def _thresholds(self, sites: Sequence[InputSite], data: Mapping[str, Tensor]) -> list[tuple[nn.Module, float]]:
        """Each module with its threshold.

        Raises:
            CorruptFile: the data is not that of these sites.
        """
        chosen = self._chosen([projection for site in sites for projection in site.projections])
        wanted = {_key(projection) for projection in chosen}
        for what, names in (("lacks", wanted - data.keys()), ("holds the unknown", data.keys() - wanted)):
            if names:
                raise CorruptFile(f"activations: the file {what} {min(names)} ({len(names)} such tensors); {AGAIN}")
        found: dict[nn.Module, float] = {}
        for projection in chosen:
            if projection.expert is not None:
                raise CorruptFile(f"activations: {projection.name} is one of several experts in one module; {AGAIN}")
            found.setdefault(projection.module, _checked(_key(projection), data[_key(projection)]))
        return list(found.items())


def threshold_for(statistics: Statistics, sparsity: float) -> tuple[float, float]:
    """The least threshold, at the upper end of a bin of the histogram, that skips a share of the inputs; what it skips.

    Bins are under 1 % wide. In bfloat16, whose numbers are the bins' lower ends, it is the exact quantile.
    """
    if sparsity == 0:
        return 0.0, 0.0
    least = torch.tensor(statistics.magnitude_at(sparsity)).view(torch.int32)
    number = int(least) >> 16
    greatest = float(torch.tensor(int(least) | 0xFFFF, dtype=torch.int32).view(torch.float32))
    counts = statistics.histogram
    return greatest, int(counts[: number + 1].sum()) / int(counts.sum())


def mask(x: Tensor, threshold: float) -> Tensor:
    """`x` [..., in] with zeros where |x| <= threshold, compared in float32; NaN stays."""
    return x.masked_fill(x.float().abs() <= threshold, 0)


def _mask_inputs(threshold: float, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (mask(arguments[0], threshold), *arguments[1:])


def _checked(key: str, threshold: Tensor) -> float:
    if threshold.dtype != torch.float32 or threshold.shape != ():
        kind = f"{str(threshold.dtype).removeprefix('torch.')} {list(threshold.shape)}"
        raise CorruptFile(f"activations: {key} is {kind}, not one number in float32; {AGAIN}")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise CorruptFile(f"activations: {key} is {float(threshold)}, which is no threshold; {AGAIN}")
    return float(threshold)


def _key(projection: Projection) -> str:
    return f"{projection.name}.threshold"


def _projections(model: Decoder) -> Iterator[tuple[int, Projection]]:
    """The number of its block, and every projection."""
    for index in range(len(model)):
        for site in model.sites(index):
            for projection in site.projections:
                yield index, projection
