"""What stands in place of a model's blocks while the rest of it runs."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class Recorder:
    """Behind the stubs of the blocks: keeps what they are called with and passes the hidden states through."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.arguments: dict[int, list[dict[str, Any]]] = {}
        self.hidden = torch.empty(0)
        self._recording = True
        self._batch = 0

    def begin(self, batch: int) -> None:
        """A batch of so many sequences follows."""
        self._batch = batch
        self._recording = batch not in self.arguments
        if self._recording:
            self.arguments[batch] = [{} for _ in range(self.blocks)]

    def see(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Block `index` is called; the hidden states go on as they are."""
        if index == 0:
            self.hidden = hidden
        if self._recording:
            self.arguments[self._batch][index] = arguments
        return hidden


class Replay:
    """Behind the stubs of the blocks: gives the hidden states that it was handed."""

    hidden: Tensor

    def see(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Block `index` is called; the hidden states become those that were handed over."""
        return self.hidden


Watcher = Recorder | Replay


class Stub(nn.Module):
    """In place of one block: asks the watcher, computes nothing."""

    def __init__(self, watcher: Watcher, index: int, original: nn.Module) -> None:
        super().__init__()
        self._watcher, self._index = watcher, index
        self._original = [original]  # in a list, so that its parameters are not this module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some models read attributes of a layer, such as its attention type
            return getattr(super().__getattribute__("_original")[0], name)

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        """What the block would be called with, arguments by position given their names."""
        names = list(_parameter_names(self._original[0]))[1:]
        named = dict(zip(names, positional, strict=False))
        return self._watcher.see(self._index, hidden_states, {**named, **arguments})


def _parameter_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)
