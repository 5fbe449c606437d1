"""From a recipe to a checked, measured, saved model."""

from sparity.pipeline.runner import Result, run

__all__ = ["Result", "run"]
