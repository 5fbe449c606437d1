"""MiniCache: one direction for the keys and values of two layers (Liu et al. 2024, arXiv:2405.14366)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparity.dynamic.cache.policies.keep_all import KeepAll
from sparity.dynamic.cache.slerp import OPPOSITE, angles, slerp
from sparity.errors import UnsupportedModel
from sparity.registry import register


@register("cache.policy", "minicache")
@dataclass(frozen=True)
class MiniCache(KeepAll):
    """Every token stays; neighbouring layers share the direction of its states, and each keeps their norms.

    Attributes:
        interpolation: where the shared direction lies, 0 = the earlier layer's, 1 = the later layer's.
        retain: tokens stay as they are in both layers whose angle lies in the upper `retain` of the range between the
            least and the greatest of their head; 1 = all do.
        start: the share of the layers before the first pair.
    """

    interpolation: float = 0.6
    retain: float = 0.05
    start: float = 0.5

    def pairs(self, whole: Sequence[bool]) -> Mapping[int, int]:
        """See `Policy.pairs`.

        Raises:
            UnsupportedModel: no two neighbours see the whole text.
        """
        found, index = dict[int, int](), int(self.start * len(whole))
        while index + 1 < len(whole):
            both = whole[index] and whole[index + 1]
            if both:
                found[index + 1] = index
            index += 2 if both else 1
        if not found:
            raise UnsupportedModel(
                f"minicache merges neighbouring layers, and from layer {int(self.start * len(whole))} of {len(whole)} "
                "on no two neighbours see the whole text: lower `start`, or take another policy"
            )
        return found

    def distinct(self, first: Tensor, second: Tensor) -> Tensor:
        """The tokens of one head that are not merged, bool `[tokens]`.

        Args:
            first: keys or values of the earlier layer, `[tokens, width]`.
            second: those of the later one.
        """
        found = angles(first, second)
        if not len(found):
            return found > 0
        low, high = found.amin(), found.amax()
        return (found > high - self.retain * (high - low)) | (found > OPPOSITE)

    def merged(self, first: Tensor, second: Tensor) -> Tensor:
        """The shared unit vectors of states `[..., width]`, float32."""
        return slerp(first, second, self.interpolation)
