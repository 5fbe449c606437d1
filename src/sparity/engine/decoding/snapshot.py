"""What a model is made of, so that whatever is replaced in it is noticed before the next token."""

from typing import Any

from torch import nn
from torch.nn.modules import module as every_module

from sparity.engine.linear import PackedLinear

RECORDERS = "transformers.utils.output_capturing"  # its hooks stay once installed, and do nothing unless asked


class Snapshot:
    """The modules, parameters and packed weights below one module, as they were."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self._children = [(module._modules, tuple(module._modules.values())) for module in self._modules]
        self._parameters = [(module._parameters, name) for module in self._modules for name in module._parameters]
        self._packed = [module for module in self._modules if isinstance(module, PackedLinear)]
        self._weights = [layer._prepared for layer in self._packed]  # kept alive: the library reads their memory
        self._addresses = self._current_addresses()

    def changed(self) -> bool:
        """Whether a module came, went or was replaced, a parameter has other memory, a packed layer another weight."""
        return (
            any(tuple(held.values()) != children for held, children in self._children)
            or self._addresses != self._current_addresses()
            or any(layer._prepared is not weight for layer, weight in zip(self._packed, self._weights, strict=True))
        )

    def hooked(self) -> bool:
        """Whether something wants to be told when a module runs, or takes the place of its `forward`."""
        everywhere: bool = every_module._has_any_global_hook()  # type: ignore[no-untyped-call]
        return everywhere or any(
            "forward" in vars(module) or module._forward_pre_hooks or (module._forward_hooks and _hooked(module))
            for module in self._modules[1:]
        )

    def _current_addresses(self) -> list[int | None]:
        found = (held.get(name) for held, name in self._parameters)
        return [None if parameter is None else parameter.data_ptr() for parameter in found]


def _hooked(module: Any) -> bool:
    return any(getattr(hook, "__module__", None) != RECORDERS for hook in module._forward_hooks.values())
