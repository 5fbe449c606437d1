"""Experts on disk: those that a router names are in memory while a token passes through them."""

from typing import Any

import torch
from torch import Tensor, nn

from sparity.dynamic.offload.far_layer import FarLayer
from sparity.dynamic.offload.fixed import Fixed
from sparity.models.experts import DOWN, GATE_UP


class FarExperts(Fixed, nn.Module):
    """In place of a module that holds all experts; each token goes through its own, one expert after another.

    The products are those of transformers' own loop over experts, bit for bit.
    """

    def __init__(self, layer: FarLayer, like: Any, inner: int, hidden: int) -> None:
        super().__init__()
        self.layer, self.config, self.act_fn = layer, like.config, like.act_fn
        self.num_experts, self._inner, self._hidden = layer.slots.units, inner, hidden
        self.shapes = {
            GATE_UP: torch.Size((self.num_experts, 2 * inner, hidden)),
            DOWN: torch.Size((self.num_experts, hidden, inner)),
        }
        self.at_once = 1

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states` [tokens, hidden] -> the same shape.

        Args:
            hidden_states: the tokens.
            top_k_index: the experts that each goes to `[tokens, k]`.
            top_k_weights: how much each of these counts `[tokens, k]`.
        """
        out = torch.zeros_like(hidden_states)
        for experts in torch.unique(top_k_index).split(self.at_once):
            for expert, slot in zip(experts.tolist(), self.layer.take(experts).tolist(), strict=True):
                tokens, places = self._routed(top_k_index, expert)
                made = self._expert(slot, hidden_states[tokens]) * top_k_weights[tokens, places, None]
                out.index_add_(0, tokens, made.to(out.dtype))
        return out

    def _routed(self, chosen: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of an expert and at which of their places it stands, place by place as transformers has them."""
        places, tokens = torch.where(chosen.T.eq(expert))
        return tokens, places

    def _expert(self, slot: int, x: Tensor) -> Tensor:
        gate_up, down = self.layer.arena.of(slot)
        gate, up = nn.functional.linear(x, gate_up.view(2 * self._inner, self._hidden)).chunk(2, dim=-1)
        inner = self.act_fn(gate) * up
        return nn.functional.linear(inner, down.view(self._hidden, self._inner))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"experts={self.num_experts}, {self.layer.words}"
