"""Mixtral: every block's MLP is a mixture of experts."""

from typing import Any

from torch import nn

from sparity.models.block import InputSite
from sparity.models.experts import expert_sites, stored_experts
from sparity.models.families.base import Family, Fused, plain_sites
from sparity.models.families.llama import ATTENTION
from sparity.registry import register

ROLES = {"gate": "w1", "up": "w3", "down": "w2"}


@register("family", "mixtral")
class Mixtral(Family):
    """Attention as in Llama; each expert is pruned on the tokens that are routed to it."""

    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """Attention, attention output, and two inputs per expert."""
        experts = expert_sites(block.get_submodule("mlp.experts"), f"{name}.block_sparse_moe.experts", ROLES)
        return plain_sites(block, name, ATTENTION) + experts

    def stored_as(self, name: str, config: Any) -> str | Fused:
        """`mlp` is called `block_sparse_moe` on disk."""
        return stored_experts(name, "mlp", "block_sparse_moe", ROLES, config.num_local_experts)

    def experts(self, config: Any, index: int) -> int:
        """Every block has as many."""
        return int(config.num_local_experts)
