"""Llama and everything shaped like it: Mistral, Qwen2, Qwen3, Gemma 2 and 3, others with its attribute names."""

from typing import Any

from torch import nn

from sparity.models.block import InputSite
from sparity.models.families.base import Family, plain_sites
from sparity.registry import register

ATTENTION = (
    (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj")),
    (("o", "self_attn.o_proj"),),
)
LAYOUT = (
    *ATTENTION,
    (("gate", "mlp.gate_proj"), ("up", "mlp.up_proj")),
    (("down", "mlp.down_proj"),),
)


@register("family", "llama")
class Llama(Family):
    """Separate q, k, v, o and a gated MLP, all `nn.Linear`."""

    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """Four inputs: attention, attention output, MLP, MLP output."""
        return plain_sites(block, name, LAYOUT)
