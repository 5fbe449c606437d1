"""The group of weights whose scores compete."""

from typing import Literal

CompareWithin = Literal["row", "layer"]
