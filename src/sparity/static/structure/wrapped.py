"""Blocks that compute more than their architecture's: they work in memory, and no stock configuration can say them."""

from typing import Any

import torch
from torch import Tensor, nn


class Wrapped(nn.Module):
    """Around one decoder block, whose attributes it shows."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some models read attributes of a layer, such as its attention type
            return getattr(super().__getattr__("block"), name)


class Mapped(Wrapped):
    """A linear map `x + x A` of the residual stream before the block, or behind it."""

    def __init__(self, block: nn.Module, added: Tensor, before: bool) -> None:
        super().__init__(block)
        self.added = nn.Parameter(added, requires_grad=False)  # [hidden, hidden]
        self._before = before

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """As the block."""
        if self._before:
            return self.block(self._map(hidden_states), *arguments, **named)
        output = self.block(hidden_states, *arguments, **named)
        return (self._map(output[0]), *output[1:]) if isinstance(output, tuple) else self._map(output)

    def _map(self, hidden: Tensor) -> Tensor:
        return hidden + hidden @ self.added


class Sliced(Wrapped):
    """A block between two bases of the residual stream: each of its two sums goes through a matrix of its own."""

    def __init__(self, block: nn.Module, attention_shortcut: Tensor, mlp_shortcut: Tensor) -> None:
        super().__init__(block)
        self.attention_shortcut = nn.Parameter(attention_shortcut, requires_grad=False)  # [before, between]
        self.mlp_shortcut = nn.Parameter(mlp_shortcut, requires_grad=False)  # [between, behind]

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """As the block; its arguments are those of its attention."""
        between = attention_output(self.block, hidden_states, *arguments, **named)
        between = between + hidden_states @ self.attention_shortcut
        return mlp_output(self.block, between) + between @ self.mlp_shortcut


def attention_output(block: Any, hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """What the attention of a block shaped like Llama's adds to the stream."""
    output = block.self_attn(block.input_layernorm(hidden), *arguments, **named)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def mlp_output(block: Any, between: Tensor) -> Tensor:
    """What the MLP of a block shaped like Llama's adds to the stream."""
    output = block.mlp(block.post_attention_layernorm(between))
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def principal(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of a Gram matrix with `damping` of its mean diagonal added."""
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    values, vectors = torch.linalg.eigh(damped)
    return values.flip(0), vectors.flip(1)
