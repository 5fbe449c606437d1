"""The options and estimates that the stages that train share."""

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from sparity.models import Decoder
from sparity.sections import Number, Whole
from sparity.stages import Change, Decision, ModelStage, Needs
from sparity.stages.allocation import projections
from sparity.stages.base import Estimate, Property, Workload
from sparity.training.fine_tune.steps import FLOATS

FP32 = 4
PASSES = 6.0  # multiplications and additions per weight and token, forward and backward


class FineTune(ModelStage):
    """Some steps on the calibration text; zeros of earlier stages stay."""

    preserves: ClassVar[frozenset[Property]] = frozenset({"mask", "shapes", "tokens"})
    steps: Annotated[Whole, Field(ge=0)] = Field(100, description="steps of training")
    rate: Annotated[Number, Field(gt=0)] = Field(
        1e-4, description="AdamW's learning rate at the start; it falls to 0 along half a cosine"
    )
    batch: Annotated[Whole, Field(ge=1)] = Field(4, description="sequences per step")

    def needs(self) -> Needs:
        """See `Stage.needs`: the calibration text itself."""
        return Needs(trials=1)

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        changes = tuple(same_shapes(self.name, model))
        weights = sum(change.size for change in changes)
        return Estimate(
            changes=changes,
            flops=PASSES * weights * self.steps * self.batch * work.length,
            memory={"weights, gradients and moments": (FLOATS + 1) * FP32 * weights},
            disk={"the last step": FLOATS * FP32 * weights},
        )


def same_shapes(stage: str, model: Decoder) -> Iterator[Change]:
    """What a stage plans that changes weights and no shape."""
    for index, projection in projections(model):
        yield Change.planned(stage, projection, index)
