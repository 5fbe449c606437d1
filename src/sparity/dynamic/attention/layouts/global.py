"""Global: the first tokens, for every query (Zaheer et al. 2020, arXiv:2007.14062)."""  # noqa: N999

from dataclasses import dataclass

from torch import Tensor

from sparity.dynamic.attention.layouts.base import Blocks, Layout
from sparity.registry import register


@register("attention.layout", "global")
@dataclass(frozen=True)
class Global(Layout):
    """The blocks of the first `tokens` keys, and each query's own block.

    Attributes:
        tokens: at the start that every query sees.
    """

    tokens: int = 128

    def choose(self, blocks: Blocks) -> Tensor:
        """See `Layout.choose`."""
        return blocks.whole((blocks.causal & (blocks.key_starts < self.tokens)) | blocks.diagonal)
