"""LazyLLM: every token that is generated chooses anew how deep which tokens go (Fu et al. 2024, arXiv:2407.14057)."""

from dataclasses import dataclass
from typing import ClassVar

from sparity.dynamic.cache.policies.lazyllm_static import LazyLLMStatic
from sparity.registry import register


@register("cache.policy", "lazyllm")
@dataclass(frozen=True)
class LazyLLM(LazyLLMStatic):
    """Behind some layers a call reads only the tokens that its last one heeds most; what they lack there is computed.

    A token that goes no deeper leaves its hidden state, from which it goes on when it is chosen again: each layer
    computes each token at most once. `keep` is the share of the text that the last layers read.
    """

    revives: ClassVar[bool] = True
