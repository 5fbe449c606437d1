"""The products of a layer as one operator of PyTorch, by the layer's name: graphs that vLLM keeps on disk stay right.

A number that counts up within a process, as `engine.kernels.operators` uses, would mean another weight in the next one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparity.engine.kernels.prepared import Prepared
from sparity.errors import InvalidInput

_layers: dict[str, tuple[Prepared, ...]] = {}


def keep(name: str, weights: Sequence[Prepared]) -> None:
    """Let the operator find the weights of a layer, in the order of their outputs; those of before are let go."""
    _layers[name] = tuple(weights)


@torch.library.custom_op("sparity::packed_layer", mutates_args=())
def packed_layer(x: Tensor, name: str, rows: int) -> Tensor:
    """`x` [..., columns] -> `[..., rows]` in the type of `x`, by the weights kept under `name`, one beside the other.

    Raises:
        InvalidInput: nothing is kept under this name.
    """
    if name not in _layers:
        raise InvalidInput(f"no packed layer {name} in this process: the model must be loaded in it")
    found = [prepared(x.to(prepared.packed.dtype)).to(x.dtype) for prepared in _layers[name]]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


@packed_layer.register_fake
def _(x: Tensor, name: str, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))
