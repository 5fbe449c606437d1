"""How the importance of a group comes from those of its tensors."""

from torch import Tensor

from sparity.models.dimensions import KV_GROUPS, Dimension


def folded(line: Tensor, narrow: int, dimension: Dimension, reference: bool) -> Tensor:
    """The rows of query heads that share a key-value head, added to those of their head."""
    if len(line) == narrow:
        return line
    if reference or dimension.name != KV_GROUPS:  # the code adds each row to the one that `narrow` rows precede
        return line.view(-1, narrow).sum(0)
    width = narrow // dimension.size
    return line.view(dimension.size, -1, width).sum(1).flatten()


def join(stack: Tensor, grouping: str) -> Tensor:
    """The importance of a group from those of its tensors, `[tensors, rows]` -> `[rows]`."""
    if grouping == "first":
        return stack[0]
    if grouping == "second":
        return stack[1]
    if grouping == "max":
        return stack.max(0).values
    joined: Tensor = getattr(stack, grouping)(0)
    return joined
