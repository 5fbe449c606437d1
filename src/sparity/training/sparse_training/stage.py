"""Sparse training: zeros that come about while the model is trained, by a method of its own."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sparity import registry
from sparity.errors import InvalidInput
from sparity.models import Block, Decoder
from sparity.models.attached_runtime import input_sites
from sparity.registry import register
from sparity.sections import Spec
from sparity.stages import Change, Decision, Trained
from sparity.stages.allocation import left_out, projections
from sparity.stages.base import Estimate, ModelEvidence, Property, Workload
from sparity.stages.kinds import Workspace
from sparity.training.fine_tune.options import FP32, PASSES, FineTune
from sparity.training.fine_tune.steps import FLOATS
from sparity.training.sparse_training.methods.base import Method, Task


@register("stage", "sparse_training")
class SparseTraining(FineTune):
    """Train a model and make it sparse by a method of `sparse_training.method`; earlier zeros stay."""

    keeps_zeros: ClassVar[bool] = True

    method: Spec = Field("asp", description="how; `sparity methods sparse_training.method` lists all")
    dense: list[str] = Field(default_factory=list, description="globs of projections that get no zeros")

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        built = self._built()
        return f"{built.words}, {built.total(self.steps)} steps"

    @property
    def how(self) -> str:
        """See `Stage.how`."""
        return self._built().name

    @property
    def zeros_lie(self) -> str | None:
        """See `Stage.zeros_lie`."""
        return str(self._built().pattern.words)

    @property
    def only_sparsity(self) -> float | None:
        """See `Stage.only_sparsity`."""
        found: float | None = self._built().pattern.sparsity
        return found

    @property
    def relies_on(self) -> frozenset[Property]:
        """Zeros must stay, and shapes too where the pattern counts columns."""
        return frozenset({"mask"}) if self._built().pattern.sparsity is None else frozenset({"mask", "shapes"})

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """The zeros of every projection: `{"sparsity": {projection: share}, "steps": n}`.

        Raises:
            InvalidInput: rows that the pattern does not divide, or steps that the method cannot take.
        """
        built, dense = self._built(), left_out(model, self.dense)
        if reason := built.declines(self.steps):
            raise InvalidInput(f"sparse_training ({built.name}): {reason}")
        shares, group = dict[str, float](), built.pattern.column_multiple
        for _, projection in projections(model):
            columns = projection.weight.shape[1]
            if projection.name not in dense and columns % group:
                raise InvalidInput(
                    f"sparse_training ({built.name}): groups of {group} do not divide the {columns} input columns of "
                    f"{projection.name}: list it under `dense:`"
                )
            shares[projection.name] = 0.0 if projection.name in dense else built.share
        if not any(projection not in dense for projection in shares):
            raise InvalidInput("sparse_training: every projection is to stay dense: leave the stage out")
        return {"sparsity": shares, "steps": built.total(self.steps)}

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        built, changes = self._built(), tuple(self._changes(model, decision))
        weights = sum(change.size for change in changes)
        numbers = int(built.numbers(weights))
        return Estimate(
            changes=changes,
            flops=PASSES * weights * built.total(self.steps) * self.batch * work.length,
            memory={"weights, what is trained, gradients and moments": FP32 * (weights + FLOATS * numbers)},
            disk={"the last step": FLOATS * FP32 * numbers},
        )

    def train(self, model: nn.Module, masks: Mapping[str, Tensor], tokens: Tensor, work: Workspace) -> Trained:
        """See `ModelStage.train`."""
        every = tuple(projection for site in input_sites(model) for projection in site.projections)
        dense = left_out(Decoder.open(model), self.dense)
        given = {
            projection.name: masks[projection.name].to(projection.weight.device)
            if projection.name in masks
            else torch.ones_like(projection.weight, dtype=torch.bool)
            for projection in every
        }
        task = Task(model, every, given, dense, tokens, work, self.steps, self.rate, self.batch)
        trained = self._built().train(task)
        for projection in every:  # no -0
            projection.weight.masked_fill_(projection.weight == 0, 0.0)
        return trained

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """Groups that break the pattern."""
        pattern = self._built().pattern
        counts = {
            projection.name: pattern.breaches(projection.weight != 0)
            for projection in block.projections
            if decision["sparsity"].get(projection.name, 0) > 0
        }
        return [
            f"{name}: {count} groups break the pattern ({pattern.words})" for name, count in counts.items() if count
        ]

    def _built(self) -> Method:
        built: Method = registry.build("sparse_training.method", self.method)
        return built

    def _changes(self, model: Decoder, decision: Decision) -> Iterator[Change]:
        for index, projection in projections(model):
            share = decision["sparsity"][projection.name]
            yield Change.planned(self.name, projection, index, share, target=share)
