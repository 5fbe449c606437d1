"""Rotary tables of new tokens, so that a token has the frequencies of a step of its own.

Two kinds of scaling, dynamic and longrope, let the frequencies depend on the length of the text. transformers' modules
take the length of the whole call, and the dynamic one remembers the longest of all calls, those of other texts and of
drafts that were taken back too. Here nothing is remembered, and a token behind a cache counts up to itself.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor


def by_length(rotary: Any) -> bool:
    """Whether the frequencies of a module of transformers depend on the length of the text."""
    kind = getattr(rotary, "rope_type", None)
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def forget(rotary: Any) -> None:
    """Give a module the frequencies that it began with, in place, whatever it was called with since."""
    if by_length(rotary) and getattr(rotary, "max_seq_len_cached", None) != rotary.original_max_seq_len:
        rotary.register_buffer("inv_freq", rotary.original_inv_freq.clone(), persistent=False)
        rotary.max_seq_len_cached = rotary.original_max_seq_len


def tables(rotary: Any, embeddings: Tensor, positions: Tensor, behind: bool) -> tuple[Tensor, Tensor]:
    """cos and sin `[batch or 1, new, width]` in the type of `embeddings`.

    Args:
        rotary: the model's module, which stays as it is.
        embeddings: the new tokens `[batch, new, hidden]`.
        positions: `[batch, new]` or `[1, new]`.
        behind: whether other tokens are in the cache; without any, the new ones are a prompt, read at once.
    """
    if not by_length(rotary):
        cos, sin = rotary(embeddings, position_ids=positions)
        return cos, sin
    parts = torch.split(positions, 1 if behind else positions.shape[1], 1)
    found = [_own(rotary)(embeddings, position_ids=part) for part in parts]
    return torch.cat([cos for cos, _ in found], 1), torch.cat([sin for _, sin in found], 1)


def _own(rotary: Any) -> Any:
    """A copy that shares no buffer, as if it had never been called."""
    own = copy(rotary)
    own.__dict__["_buffers"] = {name: buffer.clone() for name, buffer in rotary._buffers.items() if buffer is not None}
    forget(own)
    return own
