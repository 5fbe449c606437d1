"""The tensors of a method that is more than a rule, checked; and a hook by which it changes a module's input."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparity.dynamic.activations.rule_data import AGAIN
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import CorruptFile

Layout = Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]  # name -> type and shape; None = any length


def skips_nothing(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the data is that of a place where every channel counts."""
    threshold = tensors.get("threshold")
    return tensors.keys() == {"threshold"} and threshold is not None and not threshold.ndim and not bool(threshold)


def checked(tensors: Mapping[str, Tensor], layout: Layout, what: str) -> None:
    """Refuse data that does not have a layout.

    Raises:
        CorruptFile: a tensor is missing, unknown, of another type or shape, or not finite.
    """
    for words, names in (
        ("lacks", layout.keys() - tensors.keys()),
        ("has the unknown", tensors.keys() - layout.keys()),
    ):
        if names:
            raise CorruptFile(f"activations: {what} {words} {min(names)}; {AGAIN}")
    for name, (dtype, shape) in layout.items():
        tensor = tensors[name]
        fits = len(shape) == tensor.ndim and all(
            side in (None, found) for side, found in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            found, wanted = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
            sides = ["any" if side is None else side for side in shape]
            raise CorruptFile(
                f"activations: {what}.{name} is {found} {list(tensor.shape)}, not {wanted} "
                f"[{', '.join(map(str, sides))}]; {AGAIN}"
            )
        if not bool(tensor.isfinite().all()):
            raise CorruptFile(f"activations: {what}.{name} is not finite; {AGAIN}")


def whole_number(tensors: Mapping[str, Tensor], name: str, least: int, most: int, what: str) -> int:
    """A number of checked data.

    Raises:
        CorruptFile: it is out of range.
    """
    number = int(tensors[name])
    if not least <= number <= most:
        raise CorruptFile(f"activations: {what}.{name} is {number}, not {least} to {most}; {AGAIN}")
    return number


class InputChange:
    """A forward pre-hook that changes a module's input in the tokens that are sparse; no fast path knows it."""

    def __init__(self, change: Callable[[Tensor], Tensor], tokens: SparseTokens) -> None:
        self.change, self.tokens = change, tokens

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The module's arguments with the input changed, or None when no token is sparse."""
        x = arguments[0]
        flags = self.tokens.of(x)
        if flags is not None and not bool(flags.any()):
            return None
        changed = self.change(x)
        return (changed if flags is None else torch.where(flags[..., None], changed, x), *arguments[1:])


@contextmanager
def in_front(module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Call a forward pre-hook until the context closes."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
