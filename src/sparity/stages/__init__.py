"""The contract of a recipe's stages: what they need, decide, change and promise."""

from sparity.stages.base import (
    BlockEdit,
    BlockStage,
    Decision,
    ModelStage,
    Needs,
    Reshaped,
    RuntimeStage,
    ShapeStage,
    Stage,
)
from sparity.stages.change import Change

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
]
