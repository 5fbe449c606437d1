"""Phi-3: q, k and v in one matrix, gate and up in another."""

from itertools import accumulate, pairwise
from typing import Any

from torch import nn

from sparity.models.block import InputSite, Projection
from sparity.models.families.base import Family
from sparity.registry import register


@register("family", "phi3")
class Phi3(Family):
    """The parts of `qkv_proj` and `gate_up_proj` are pruned as matrices of their own."""

    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """Four inputs: attention, attention output, MLP, MLP output."""

        def parts(path: str, heights: dict[str, int]) -> tuple[Projection, ...]:
            module, limits = block.get_submodule(path), pairwise(accumulate(heights.values(), initial=0))
            return tuple(
                Projection(f"{name}.{path}.{role}", role, module, rows=rows)
                for role, rows in zip(heights, limits, strict=True)
            )

        def whole(path: str, role: str) -> tuple[Projection, ...]:
            return (Projection(f"{name}.{path}", role, block.get_submodule(path)),)

        head = self.head_width(config)
        keys = config.num_key_value_heads * head
        heads = {"q": config.num_attention_heads * head, "k": keys, "v": keys}
        halves = {"gate": config.intermediate_size, "up": config.intermediate_size}
        return (
            InputSite(f"{name}.q_k_v", parts("self_attn.qkv_proj", heads)),
            InputSite(f"{name}.o", whole("self_attn.o_proj", "o")),
            InputSite(f"{name}.gate_up", parts("mlp.gate_up_proj", halves)),
            InputSite(f"{name}.down", whole("mlp.down_proj", "down")),
        )
