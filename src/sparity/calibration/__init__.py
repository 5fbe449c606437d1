"""Text to tokens to statistics, one block at a time."""

from sparity.calibration.statistics import Statistics
from sparity.calibration.walk import Step, walk

__all__ = ["Statistics", "Step", "walk"]
