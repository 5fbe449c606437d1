"""What tensors of one layer must be before anything is computed from them."""

from typing import Any

from torch import Tensor

from sparity.errors import InvalidInput, NumericalError


def check_states(**given: Any) -> None:
    """Refuse what is not floating-point `[batch, heads, tokens, width]`, is empty or is not finite.

    Raises:
        InvalidInput: another shape or type, or nothing in it.
        NumericalError: NaN or infinite numbers.
    """
    for name, states in given.items():
        if not isinstance(states, Tensor) or states.ndim != 4 or not states.is_floating_point():
            shape = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise InvalidInput(f"{name} must be floating-point [batch, heads, tokens, width], got {shape}")
        if not states.numel():
            raise InvalidInput(f"{name} {list(states.shape)} hold nothing")
        if not bool(states.isfinite().all()):
            raise NumericalError(f"{name} hold NaN or infinite numbers")


def check_heads(queries: Tensor, keys: Tensor) -> None:
    """Refuse queries that cannot attend to the keys.

    Raises:
        InvalidInput: other rows, widths or numbers of heads, or more queries than keys.
    """
    if queries.shape[0] != keys.shape[0] or queries.shape[3] != keys.shape[3] or queries.shape[1] % keys.shape[1]:
        raise InvalidInput(
            f"queries {list(queries.shape)} and keys {list(keys.shape)} must have one batch and width, and a whole "
            "number of query heads for each KV head"
        )
    if queries.shape[2] > keys.shape[2]:
        raise InvalidInput(f"there are {queries.shape[2]} queries and only {keys.shape[2]} keys")


def check_right(real: Tensor) -> None:
    """Refuse padding on the right, bool `[rows, tokens]`; raises `InvalidInput`."""
    if not bool(real[:, -1].all()):
        raise InvalidInput(
            "padding on the right: the last token of every row must be a real one where tokens are evicted, "
            'quantised or merged; pad on the left (tokenizer.padding_side = "left")'
        )
