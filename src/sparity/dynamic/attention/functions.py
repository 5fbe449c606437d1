"""Layouts on tensors: `attention_blocks`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparity import registry
from sparity.dynamic.attention.layouts.base import Blocks, Layout
from sparity.dynamic.cache.checks import check_heads, check_states
from sparity.errors import InvalidInput, wrong_input

KIND = "attention.layout"
SHARES = ("gamma", "tau", "threshold")


@wrong_input()
def attention_blocks(
    queries: Tensor, keys: Tensor, *, method: str, block: int | Sequence[int], **options: Any
) -> Tensor:
    """Which blocks of a prompt's causal attention are computed.

    Args:
        queries: `[batch, heads, new, width]`, after rotary, of the last `new` tokens (usually of all).
        keys: `[batch, kv_heads, tokens, width]`, after rotary.
        method: of `sparity methods attention.layout`.
        block: tokens of a block, of queries and keys alike, or `(queries, keys)`.
        options: the method's, and `scaling` (of logits; default `width ** -0.5`).

    Returns:
        bool `[batch, heads, query blocks, key blocks]`, True where a block is computed. Blocks in which no query may
        attend to any key are False; every query's own token is in a block that is computed.

    Raises:
        InvalidInput: an unknown method or option, or shapes that do not fit.
        NumericalError: NaN or infinite numbers.

    Example:
        >>> import sparity, torch
        >>> x = torch.ones(1, 1, 8, 4)
        >>> sparity.attention_blocks(x, x, method="local", block=2, window=2)[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    check_states(queries=queries, keys=keys)
    check_heads(queries, keys)
    scaling = options.pop("scaling", None)
    layout, size = layout_of(method, block, options)
    scale = queries.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return layout.choose(Blocks(queries.detach(), keys.detach(), size, scale))


def layout_of(method: str, block: int | Sequence[int], options: Mapping[str, Any]) -> tuple[Layout, tuple[int, int]]:
    """A layout from its name and options, and the sizes of its blocks, of queries and of keys.

    Raises:
        InvalidInput: unknown, or with options that make no sense.
    """
    size = _size(block)
    if not isinstance(method, str):
        raise InvalidInput(f"method must be a name (`sparity methods attention.layout`), not {type(method).__name__}")
    layout: Layout = registry.build(KIND, {method: options})
    _check_options(layout, size)
    return layout, size


def _size(block: Any) -> tuple[int, int]:
    sizes = (block, block) if isinstance(block, int) else block
    if (
        not isinstance(sizes, Sequence)
        or len(sizes) != 2
        or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes)
    ):
        raise InvalidInput(f"block {block!r} must be a number of tokens, or two: of queries and of keys")
    return sizes[0], sizes[1]


def _check_options(layout: Layout, size: tuple[int, int]) -> None:
    options = {key: value for key, value in vars(layout).items() if not isinstance(value, bool)}
    for option, value in options.items():
        if option in SHARES and not 0 <= value <= 1:
            raise InvalidInput(f'layout "{layout.name}", option "{option}": {value} must lie in [0, 1]')
        if isinstance(value, int) and value < (1 if option in ("every", "stride", "last", "window") else 0):
            raise InvalidInput(f'layout "{layout.name}", option "{option}": {value} is too small')
        if not math.isfinite(value):
            raise InvalidInput(f'layout "{layout.name}", option "{option}": {value} is no number')
    stride = options.get("stride", 1)
    if any(side % stride for side in size):
        raise InvalidInput(f'layout "{layout.name}": blocks of {size} tokens are no multiples of the stride {stride}')
