"""The contract of a recipe's stages: what they need, decide, change and promise."""

from sparity.stages.base import Decision, Needs, Stage
from sparity.stages.change import Change
from sparity.stages.kinds import BlockEdit, BlockStage, ModelStage, Reshaped, RuntimeStage, ShapeStage, Trained

__all__ = [
    "BlockEdit",
    "BlockStage",
    "Change",
    "Decision",
    "ModelStage",
    "Needs",
    "Reshaped",
    "RuntimeStage",
    "ShapeStage",
    "Stage",
    "Trained",
]
