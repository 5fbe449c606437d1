"""OPT: learned positions, biases, ReLU; the MLP's two matrices lie in the block itself."""

from typing import Any, ClassVar

from torch import nn

from sparity.models.block import InputSite
from sparity.models.families.base import Family, plain_sites
from sparity.registry import register

LAYOUT = (
    (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj")),
    (("o", "self_attn.out_proj"),),
    (("fc1", "fc1"),),
    (("fc2", "fc2"),),
)


@register("family", "opt")
class OPT(Family):
    """Separate q, k and v, `out_proj`, `fc1` and `fc2`, all `nn.Linear`."""

    blocks: ClassVar[str] = "model.decoder.layers"
    channels: ClassVar[str] = "ffn_dim"
    takes_head_width: ClassVar[bool] = False

    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """Four inputs: attention, attention output, MLP, MLP output."""
        return plain_sites(block, name, LAYOUT)
