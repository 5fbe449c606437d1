"""PyramidKV: SnapKV with more tokens in early layers and fewer in late ones (Cai et al. 2024, arXiv:2406.02069)."""

from dataclasses import dataclass

from sparity.dynamic.cache.policies.base import kept_of
from sparity.dynamic.cache.policies.snapkv import SnapKV
from sparity.registry import register


@register("cache.policy", "pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores; the tokens beside the window fall in equal steps from the first layer to the last.

    Attributes:
        beta: how steep: the last layer has a `beta`-th of the mean, where there is room for it.
        layer: whose budget it is, from 0; a run gives it.
        layers: of the model; a run gives it.
    """

    beta: int = 20
    layer: int = 0
    layers: int = 1

    def budget(self, tokens: int, keep: float, layer: int | None = None, layers: int | None = None) -> int:
        """See `Policy.budget`."""
        mean, depth = kept_of(tokens, keep), self.layers if layers is None else layers
        place, beside, room = self.layer if layer is None else layer, mean - self.window, tokens - self.window
        if depth < 2 or beside <= 0 or tokens < 2 * beside:  # there is no room for a pyramid
            return mean
        last = beside // self.beta
        first = 2 * beside - last
        if first >= room:
            first, last = room, 2 * beside - room
        return self.window + first - place * ((first - last) // (depth - 1))
