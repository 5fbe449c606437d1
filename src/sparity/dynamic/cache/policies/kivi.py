"""KIVI: keys in a few bits per channel, values per token, but the last (Liu et al. 2024, arXiv:2402.02750)."""

from dataclasses import dataclass
from typing import ClassVar

from sparity.dynamic.cache.policies.keep_all import KeepAll
from sparity.registry import register


@register("cache.policy", "kivi")
@dataclass(frozen=True)
class Kivi(KeepAll):
    """Every token stays, all but the last ones quantised: asymmetrically, by the least and the greatest of a group.

    Attributes:
        bits: of each number, 2, 4 or 8.
        group: numbers that share a step: tokens of a channel of keys, channels of a value.
        residual: the last tokens that stay as they are; up to `group` more wait to fill a group.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    stores: ClassVar[bool] = True
