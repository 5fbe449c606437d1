"""Qwen3-MoE: mixtures of experts, with dense MLPs in the blocks that the configuration names."""

from typing import Any, ClassVar

from torch import nn

from sparity.models.block import InputSite
from sparity.models.experts import expert_sites, stored_experts
from sparity.models.families.base import Family, Fused, plain_sites
from sparity.models.families.llama import ATTENTION, LAYOUT
from sparity.registry import register

ROLES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@register("family", "qwen3_moe")
class Qwen3Moe(Family):
    """Attention as in Llama; each expert is pruned on the tokens that are routed to it."""

    expert_channels: ClassVar[str] = "moe_intermediate_size"

    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """Attention, attention output, and either two inputs per expert or the two of a dense MLP."""
        if not hasattr(block.get_submodule("mlp"), "experts"):
            return plain_sites(block, name, LAYOUT)
        experts = expert_sites(block.get_submodule("mlp.experts"), f"{name}.mlp.experts", ROLES)
        return plain_sites(block, name, ATTENTION) + experts

    def stored_as(self, name: str, config: Any) -> str | Fused:
        """Each expert's matrices lie apart on disk."""
        return stored_experts(name, "mlp", "mlp", ROLES, config.num_experts)

    def experts(self, config: Any, index: int) -> int:
        """None in the blocks that the configuration leaves dense."""
        sparse = index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0
        return int(config.num_experts) if sparse else 0
