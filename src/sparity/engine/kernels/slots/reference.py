"""What products with slots compute. The order of sums is that of units, so no result depends on where they lie."""

import torch
from torch import Tensor

AT_A_TIME = 1024  # units that are gathered together: so much is copied


def slot_rows(part: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """The outputs of some rows of a weight: `[tokens, count]`, in the type of `x`.

    Args:
        part: `[slots, in]`, the rows that are in memory.
        slots: `[count]`, where the rows lie that are asked for.
        x: `[tokens, in]`.
    """
    wide = _wide(x.dtype)
    found = [x.to(wide) @ part[some].to(wide).T for some in torch.split(slots.long(), AT_A_TIME)]
    return torch.cat(found, 1).to(x.dtype) if found else x.new_zeros(len(x), 0)


def slot_columns(part: Tensor, slots: Tensor, units: Tensor, x: Tensor) -> Tensor:
    """The product with a weight by channel of which the channels `units` count: `[tokens, out]`, in the type of `x`.

    Args:
        part: `[slots, out]`, the channels that are in memory.
        slots: `[count]`, where those of `units` lie.
        units: `[count]`, rising; all other inputs are 0.
        x: `[tokens, channels]`.
    """
    wide = _wide(x.dtype)
    total = torch.zeros(len(x), part.shape[1], dtype=wide)
    for some, at in zip(torch.split(units, AT_A_TIME), torch.split(slots.long(), AT_A_TIME), strict=True):
        total += x[:, some].to(wide) @ part[at].to(wide)
    return total.to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums."""
    return dtype if dtype == torch.float64 else torch.float32
