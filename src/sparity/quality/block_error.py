"""How far the output of one block is from the dense block's, on the same inputs."""

from collections.abc import Callable, Mapping

from torch import Tensor

TEAL_POSITIONS = 4  # the last quarter of them


def token_error(dense: Tensor, found: Tensor) -> float:
    """The L2 norm of a token's difference, mean over tokens; both are one sequence's `[tokens, hidden]`."""
    return float((found.float() - dense.float()).norm(dim=1).mean())


def teal_error(dense: Tensor, found: Tensor) -> float:
    """That of TEAL's code: the norm over the last quarter of the positions, mean over channels."""
    last = max(1, len(dense) // TEAL_POSITIONS)
    return float((found[-last:].float() - dense[-last:].float()).norm(dim=0).mean())


BLOCK_ERRORS: Mapping[str, Callable[[Tensor, Tensor], float]] = {"token": token_error, "teal": teal_error}
