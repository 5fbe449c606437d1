"""One module of a model and the packed one that takes its place, for as long as it does."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparity.engine.modules.packed_module import HoldsPacked


@dataclass(frozen=True)
class Swap:
    """A place in a model, what stood there, and what is put there.

    Attributes:
        owner: the module that has it as an attribute; its name may lead elsewhere by the time of `undo`.
        leaf: the attribute.
        original: what stood there.
        packed: what is put there.
        own: the parameters of the original that nothing else in the model uses, among those that are packed.
    """

    owner: nn.Module
    leaf: str
    original: Any
    packed: HoldsPacked
    own: tuple[str, ...]

    def put(self) -> None:
        """Put the packed module in."""
        setattr(self.owner, self.leaf, self.packed)

    def let_go(self) -> None:
        """Free the dense weights of the original that are its own: then they are only in the packed module."""
        for name in self.own:
            parameter = self.original.get_parameter(name)
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def undo(self) -> None:
        """Put the original back, with its weights if they were let go; it does not matter how far the swap had come."""
        empty = [name for name in self.own if not self.original.get_parameter(name).numel()]
        dense = self.packed.dense() if empty else {}
        for name in empty:
            self.original.get_parameter(name).data = dense[name]
        setattr(self.owner, self.leaf, self.original)
