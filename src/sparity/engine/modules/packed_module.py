"""What PyTorch does with a module's parameters, for modules whose weights are packed and no parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


class HoldsPacked(nn.Module, ABC):
    """A module that multiplies by packed weights: it is saved with dense ones, stays on the CPU, and is not pickled."""

    weights: tuple[str, ...]  # the names of the parameters that it stands for
    _prepared: Any  # the packed weights, ready to multiply; nothing changes them

    @abstractmethod
    def dense(self) -> dict[str, Tensor]:
        """The parameters that it stands for, unpacked anew each time; none while a model is loaded."""

    def stand_for(self, original: nn.Module) -> Self:
        """Take over the mode and the hooks of a module; a hook that comes or goes later does so for both."""
        for name in HOOKS:
            setattr(self, name, getattr(original, name))
        return self.train(original.training)

    def refuse_move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Raise `InvalidInput` if `change`, which is about to be applied to every parameter, is another device."""
        device = change(torch.empty(0)).device
        if device.type != "cpu":
            raise InvalidInput(
                f"packed weights are multiplied on the CPU and cannot be moved to {device}: "
                "move the model before it is attached, or convert the checkpoint to plain"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.refuse_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": weight for name, weight in self.dense().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = [f"{prefix}{name}" for name in self.weights if f"{prefix}{name}" in state_dict]
        error_msgs += [
            f"{name} is packed and cannot be overwritten: load it before the model is attached" for name in found
        ]
        others = {name: value for name, value in state_dict.items() if name not in found}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A module of its own that reads the same packed weights."""
        copied = type(self).__new__(type(self))
        memo[id(self)], memo[id(self._prepared)] = copied, self._prepared
        vars(copied).update(deepcopy(vars(self), memo))
        return copied

    def __getstate__(self) -> NoReturn:
        raise InvalidInput(NOT_PICKLED)


NOT_PICKLED = "a model on the engine cannot be pickled: save_pretrained writes it, and from_pretrained reads it"
