"""What is kept of sequences from call to call: it lies on their cache, goes where that goes, and ends with it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ATTRIBUTE = "sparity_sequences"


@dataclass(frozen=True)
class CallOfSequences:
    """The tokens of the call that is running, a row for each sequence.

    Attributes:
        real: bool `[rows, fresh]`, False for padding.
        prompt: how many of the fresh tokens, from the first on, belong to a prompt; None: a text that is scored.
        kept: what may be changed, and is there again in the next call with the same cache.
    """

    real: Tensor
    prompt: int | None
    kept: dict[str, Any]

    def learned(self, scored: float) -> Tensor:
        """Bool `[rows, fresh]`: real tokens of a prompt, or the share `scored` of a scored text at its start."""
        if self.prompt is not None:
            return self.real & (torch.arange(self.real.shape[1]) < self.prompt)
        place = self.real.long().cumsum(1) - 1
        return self.real & (place < (scored * self.real.sum(1, keepdim=True)).ceil())


def kept_on(cache: Any, owner: int, starts: bool) -> dict[str, Any]:
    """What an owner keeps on a cache; nothing yet where its sequences start."""
    owners: dict[int, dict[str, Any]] = vars(cache).setdefault(ATTRIBUTE, {})
    if starts:
        owners[owner] = {}
    return owners.setdefault(owner, {})


def keep_on(cache: Any, owner: int, kept: dict[str, Any]) -> None:
    """Keep something on a cache that a call has made."""
    vars(cache).setdefault(ATTRIBUTE, {})[owner] = kept
