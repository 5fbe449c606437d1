"""What the functions of a single matrix are given: checked tensors, and the statistics of its inputs."""

from collections.abc import Collection

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput, NumericalError


def check_matrix(weight: object, inputs: object = None) -> None:
    """Refuse what is no weight `[out, in]`, or no inputs `[tokens, in]` or `[samples, tokens, in]` of it.

    Raises:
        InvalidInput: another shape or type.
        NumericalError: NaN or infinite numbers.
    """
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        shape = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise InvalidInput(f"weight must be a floating-point matrix [out, in], got {shape}")
    if inputs is not None and not isinstance(inputs, Tensor):
        raise InvalidInput(f"inputs must be a torch tensor, got {type(inputs).__name__}")
    if isinstance(inputs, Tensor) and (inputs.ndim not in (2, 3) or inputs.shape[-1] != weight.shape[1]):
        raise InvalidInput(
            f"inputs must be [tokens, {weight.shape[1]}] or [samples, tokens, {weight.shape[1]}] to fit the weight "
            f"{list(weight.shape)}, got {list(inputs.shape)}"
        )
    check_finite(weight=weight, inputs=inputs if isinstance(inputs, Tensor) else None)


def check_finite(**tensors: Tensor | None) -> None:
    """Raise `NumericalError` for one that holds NaN or infinite numbers, by its name."""
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"{name} holds NaN or infinite numbers")


def gathered(needs: Collection[str], inputs: Tensor | None, who: str, instead: str) -> Statistics:
    """The statistics of a matrix's inputs.

    Raises:
        InvalidInput: there are none, and `who` needs some; `instead` is what needs none.
    """
    statistics = Statistics.gather("weight", needs)
    if needs and inputs is None:
        raise InvalidInput(f"{who} needs the statistics {', '.join(sorted(needs))}: pass `inputs`, or use {instead}")
    if inputs is not None:
        statistics.add(inputs)
    return statistics
