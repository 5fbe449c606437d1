"""GPT-2: transposed `Conv1D` weights, with q, k and v in one matrix."""

from typing import Any, ClassVar

from torch import nn

from sparity.models.block import InputSite, Projection
from sparity.models.families.base import Family
from sparity.registry import register


@register("family", "gpt2")
class GPT2(Family):
    """`c_attn` holds q, k and v one after another along its outputs; each is pruned as a matrix of its own."""

    blocks: ClassVar[str] = "transformer.h"
    channels: ClassVar[str] = "n_inner"
    takes_head_width: ClassVar[bool] = False

    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """Four inputs: attention, attention output, MLP, MLP output."""

        def whole(role: str, path: str) -> Projection:
            return Projection(f"{name}.{path}", role, block.get_submodule(path), transposed=True)

        width = config.hidden_size
        fused = block.get_submodule("attn.c_attn")
        qkv = tuple(
            Projection(f"{name}.attn.c_attn.{role}", role, fused, rows=(i * width, (i + 1) * width), transposed=True)
            for i, role in enumerate("qkv")
        )
        return (
            InputSite(f"{name}.q_k_v", qkv),
            InputSite(f"{name}.o", (whole("o", "attn.c_proj"),)),
            InputSite(f"{name}.fc1", (whole("fc1", "mlp.c_fc"),)),
            InputSite(f"{name}.fc2", (whole("fc2", "mlp.c_proj"),)),
        )

    def _width(self, config: Any, attribute: str, index: int) -> int:
        """An `n_inner` of None stands for four times the hidden size."""
        if attribute == self.channels and config.n_inner is None:
            return 4 * int(config.hidden_size)
        return super()._width(config, attribute, index)
