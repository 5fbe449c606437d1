"""Weights that a layer computes while a model is trained, and that take what it gives when the training is over."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparity.models import Projection

Layer = TypeVar("Layer", bound=nn.Module)


@contextmanager
def computed_weights(
    projections: Sequence[Projection], build: Callable[[Tensor, tuple[Projection, ...]], Layer]
) -> Iterator[list[Layer]]:
    """Within the context a layer stands between each stored weight and the model; then its result is stored.

    Args:
        projections: of a model, all that share a stored parameter among them.
        build: gives the layer for a stored weight, in its own layout, and the projections that lie in it.
    """
    stored: dict[tuple[nn.Module, str], list[Projection]] = {}
    for projection in projections:
        stored.setdefault((projection.module, projection.parameter), []).append(projection)
    layers = []
    for (module, parameter), parts in stored.items():
        layers.append(build(module.get_parameter(parameter).data, tuple(parts)))
        parametrize.register_parametrization(module, parameter, layers[-1])
    try:
        yield layers
    finally:
        for module, parameter in stored:
            with torch.no_grad():
                parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
