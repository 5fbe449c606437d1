"""GPT-NeoX and Pythia: q, k and v in one matrix, head by head."""

from typing import Any, ClassVar

from torch import nn

from sparity.models.block import InputSite
from sparity.models.families.base import Family, plain_sites
from sparity.registry import register

LAYOUT = (
    (("qkv", "attention.query_key_value"),),
    (("o", "attention.dense"),),
    (("fc1", "mlp.dense_h_to_4h"),),
    (("fc2", "mlp.dense_4h_to_h"),),
)


@register("family", "gpt_neox")
class GPTNeoX(Family):
    """`query_key_value` is pruned as one matrix: its rows go q, k, v within each head."""

    blocks: ClassVar[str] = "gpt_neox.layers"
    takes_head_width: ClassVar[bool] = False

    def stored_as(self, name: str, config: Any) -> str:
        """The head is called `embed_out` on disk."""
        return "embed_out.weight" if name == "lm_head.weight" else name

    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """Four inputs: attention, attention output, MLP, MLP output."""
        return plain_sites(block, name, LAYOUT)
