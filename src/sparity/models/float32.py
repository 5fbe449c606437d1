"""A module and what it is called with, in float32 for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Within the context a module is in float32 and knows gradients, of no parameter yet; then it is as it was."""
    types = {name: parameter.dtype for name, parameter in module.named_parameters()}
    module.float().requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(False).data = parameter.data.to(types[name])
            parameter.grad = None


@contextmanager
def computes_in_float32(module: nn.Module) -> Iterator[None]:
    """The same, and the module takes arguments of the type that it had: it gives what it computes in float32."""

    def convert(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return in_float(arguments), in_float(named)

    handle = module.register_forward_pre_hook(convert, with_kwargs=True)
    try:
        with in_float32(module):
            yield
    finally:
        handle.remove()


def in_float(value: Any) -> Any:
    """The same with every floating tensor in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_float(each) for key, each in value.items()}
    return type(value)(in_float(each) for each in value) if isinstance(value, tuple | list) else value
