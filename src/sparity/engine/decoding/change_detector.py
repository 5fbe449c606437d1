"""What a model is made of, so that whatever is replaced in it is noticed before the next token."""

from copy import copy
from typing import Any

from torch import nn
from torch.nn.modules import module as every_module

from sparity.engine.decoding.llama_layout import forwards
from sparity.engine.modules.linear import DenseLinear, PackedLinear
from sparity.engine.modules.skips import InputSkip, OutputSkip, output_skip_of, skip_of

SETTINGS = ("layer_idx", "head_dim", "num_key_value_groups", "scaling", "variance_epsilon")  # of modules
KINDS = ("layer_types", "sliding_window")  # of the configuration
RECORDERS = "transformers.utils.output_capturing"  # its hooks stay once installed, and do nothing unless asked


class Snapshot:
    """The modules below one, their code, settings, parameters and prepared weights, as they were."""

    def __init__(self, root: Any) -> None:
        self._modules = list(root.modules())
        self._children = [(module._modules, tuple(module._modules.values())) for module in self._modules]
        self._parameters = [(module._parameters, name) for module in self._modules for name in module._parameters]
        set_on = [*((vars(module), SETTINGS) for module in self._modules), (vars(root.config), KINDS)]
        self._settings = [(held, name, copy(held[name])) for held, names in set_on for name in names if name in held]
        self._forwards = forwards(self._modules)
        self._holders = [*filter(None, map(_holder, self._modules))]
        self._weights = [holder._prepared for holder in self._holders]  # kept alive: the library reads their memory
        self._addresses = self._current_addresses()
        self._skips = self._current_skips()  # kept alive: the library reads their numbers

    def changed(self) -> bool:
        """Whether a module came, went, has other code, settings or memory of a parameter, or a layer another weight."""
        return (
            any(tuple(held.values()) != children for held, children in self._children)
            or self._addresses != self._current_addresses()
            or self._skips != self._current_skips()
            or any(held.get(name) != value for held, name, value in self._settings)
            or any(vars(kind).get("forward") is not forward for kind, forward in self._forwards)
            or any(holder._prepared is not weight for holder, weight in zip(self._holders, self._weights, strict=True))
        )

    def hooked(self) -> bool:
        """Whether something wants to be told when a module runs, or takes the place of its `forward`."""
        everywhere: bool = every_module._has_any_global_hook()  # type: ignore[no-untyped-call]
        return everywhere or any(
            "forward" in vars(module) or _watched(module) or (module._forward_hooks and _hooked(module))
            for module in self._modules[1:]
        )

    def _current_skips(self) -> list[InputSkip | None]:
        found = ((skip_of(module), output_skip_of(module)) for module in self._modules if _has_hooks(module))
        return [skip for pair in found for skip in pair]

    def _current_addresses(self) -> list[int | None]:
        found = (held.get(name) for held, name in self._parameters)
        return [None if parameter is None else parameter.data_ptr() for parameter in found]


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


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)
