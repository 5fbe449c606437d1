"""What a model is made of, so that whatever is replaced in it is noticed before the next token."""

from copy import copy
from itertools import compress, repeat
from operator import attrgetter, contains, is_not
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module

from sparity.engine.decoding.llama_layout import forwards
from sparity.engine.modules.linear import DenseLinear, PackedLinear
from sparity.engine.modules.skips import InputSkip, OutputSkip, output_skip_of, skip_of

SETTINGS = ("layer_idx", "head_dim", "num_key_value_groups", "scaling", "variance_epsilon")  # of modules
KINDS = ("layer_types", "sliding_window")  # of the configuration
RECORDERS = "transformers.utils.output_capturing"  # its hooks stay once installed, and do nothing unless asked
PREPARED = attrgetter("_prepared")


class Snapshot:
    """The modules below one, their code, settings, parameters and prepared weights, as they were.

    A model has hundreds of modules and is looked at before every token, so lists are compared whole, without a loop of
    Python's.
    """

    def __init__(self, root: Any) -> None:
        self._modules = list(root.modules())
        self._own = [vars(module) for module in self._modules]
        self._held = [module._modules for module in self._modules if module._modules]  # a leaf's code asks for none
        self._children = self._current_children()
        held = [(module._parameters, name) for module in self._modules for name in module._parameters]
        self._owners, self._names = [owner for owner, _ in held], [name for _, name in held]
        self._parameters = [owner[name] for owner, name in held]
        self._memory = [parameter for parameter in self._parameters if parameter is not None]
        self._addresses = self._current_addresses()
        set_on = [*((vars(module), SETTINGS) for module in self._modules), (vars(root.config), KINDS)]
        found = [(owner, name) for owner, names in set_on for name in names if name in owner]
        self._set_on, self._set = [owner for owner, _ in found], [name for _, name in found]
        self._settings = [copy(owner[name]) for owner, name in found]
        self._forwards = forwards(self._modules)
        self._holders = [*filter(None, map(_holder, self._modules))]
        self._weights = [holder._prepared for holder in self._holders]  # kept alive: the library reads their memory
        self._skips = self._current_skips()  # kept alive: the library reads their numbers

    def changed(self) -> bool:
        """Whether a module came, went, has other code, settings or memory of a parameter, or a layer another weight."""
        return (
            self._children != self._current_children()
            or any(map(is_not, map(dict.get, self._owners, self._names), self._parameters))
            or self._addresses != self._current_addresses()
            or self._skips != self._current_skips()
            or self._settings != list(map(dict.get, self._set_on, self._set))
            or any(vars(kind).get("forward") is not forward for kind, forward in self._forwards)
            or any(map(is_not, map(PREPARED, self._holders), self._weights))
        )

    def hooked(self) -> bool:
        """Whether something wants to be told when a module runs, or takes the place of its `forward`."""
        everywhere: bool = every_module._has_any_global_hook()  # type: ignore[no-untyped-call]
        root = self._modules[0]
        return (
            everywhere
            or any(map(contains, self._own[1:], repeat("forward")))
            or any(_watched(module) or _hooked(module) for module in self._with_hooks() if module is not root)
        )

    def _with_hooks(self) -> list[Any]:
        """The modules that have some hooks, those with hooks in front of them first."""
        return [
            module
            for kind in ("_forward_pre_hooks", "_forward_hooks")
            for module in compress(self._modules, map(dict.get, self._own, repeat(kind)))
        ]

    def _current_children(self) -> list[tuple[Any, ...]]:
        return list(map(tuple, map(dict.values, self._held)))

    def _current_skips(self) -> list[InputSkip | OutputSkip | None]:
        found = ((skip_of(module), output_skip_of(module)) for module in dict.fromkeys(self._with_hooks()))
        return [skip for pair in found for skip in pair]

    def _current_addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._memory))


def _holder(module: nn.Module) -> Any:
    """What keeps the prepared weight of a linear layer; None for any other module."""
    return module._held if isinstance(module, DenseLinear) else module if isinstance(module, PackedLinear) else None


def _watched(module: nn.Module) -> bool:
    """Whether anything but one skip, which the fast path does itself, waits in front of a module."""
    hooks = module._forward_pre_hooks
    return bool(hooks) and not (len(hooks) == 1 and skip_of(module) is not None and _holder(module) is not None)


def _hooked(module: Any) -> bool:
    """Whether anything but one skip, which the fast path does itself or declines, waits behind a module."""
    hooks = [hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", None) != RECORDERS]
    return bool(hooks) and not (len(hooks) == 1 and type(hooks[0]) is OutputSkip)
