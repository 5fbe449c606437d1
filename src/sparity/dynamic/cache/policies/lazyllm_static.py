"""LazyLLM without reviving: a prompt loses tokens on its way through the model (Fu et al. 2024, arXiv:2407.14057)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparity.dynamic.cache.policies.base import kept_of
from sparity.dynamic.cache.policies.tova import Tova
from sparity.errors import UnsupportedModel
from sparity.registry import register


@register("cache.policy", "lazyllm_static")
@dataclass(frozen=True)
class LazyLLMStatic(Tova):
    """Behind some layers the tokens of a prompt that its last one heeds least are computed no further, for good.

    `keep` is the share that the last layers compute and hold; it is reached in equal steps. The score is TOVA's.

    Attributes:
        at: the depths at which tokens go, as shares of the layers, in ascending order.
    """

    at: tuple[float, ...] = (0.3, 0.5, 0.7)
    evicts_while_decoding: ClassVar[bool] = False
    narrows: ClassVar[bool] = True

    def budget(self, tokens: int, keep: float, layer: int | None = None, layers: int | None = None) -> int:
        """See `Policy.budget`: what a layer computes of a prompt; without a layer, what the last ones do.

        Each step's number of dropped tokens never falls with the text's length, so that of two rows the longer one
        drops as many at each.
        """
        kept, steps = kept_of(tokens, keep), len(self.at)
        if layer is None or layers is None:
            return kept
        behind = sum(layer >= max(int(share * layers), 1) for share in self.at)
        return tokens - sum((tokens - kept + steps - 1 - step) // steps for step in range(behind))

    def pairs(self, whole: Sequence[bool]) -> Mapping[int, int]:
        """See `Policy.pairs`: none.

        Raises:
            UnsupportedModel: a layer does not see the whole text.
        """
        if not all(whole):
            raise UnsupportedModel(
                f"{self.name} lets tokens go no deeper, and layer {list(whole).index(False)} has a sliding window, "
                "whose cache counts on every token: take another policy"
            )
        return {}
