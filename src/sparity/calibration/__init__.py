"""Text to tokens to statistics, one block at a time."""

from sparity.calibration.statistics import Statistics
from sparity.calibration.walk import Visit, walk

__all__ = ["Statistics", "Visit", "walk"]
