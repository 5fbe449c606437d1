"""Gradients at the outputs of projections, summed into Gram matrices while a backward pass goes by."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import Block, Decoder
from sparity.models.block import Projection


def check_outputs(decoder: Decoder) -> None:
    """Raise `InvalidInput` for a mixture of experts, whose products no module of its own computes."""
    for index in range(len(decoder)):
        for site in decoder.sites(index):
            if site.projections[0].expert is not None:
                raise InvalidInput(
                    f"{site.projections[0].name}: gradients at the outputs of experts cannot be seen: choose a method "
                    "that reads no output_gradient_gram, such as sparsegpt or taylor"
                )


@contextmanager
def summed_output_grams(block: Block, sums: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, every backward pass adds the mean over its tokens of g gT to the sum of each projection in `sums`.

    g is the gradient at the projection's output; the sums are `[out, out]`.
    """
    with ExitStack() as hooks:
        for projection in block.projections:
            if projection.name in sums:
                see = partial(_see, projection, sums[projection.name])
                hooks.callback(projection.module.register_forward_hook(see).remove)
        yield


def _see(projection: Projection, total: Tensor, module: Any, given: Any, output: Tensor) -> None:
    output.register_hook(partial(_add, projection, total))  # type: ignore[no-untyped-call]


def _add(projection: Projection, total: Tensor, gradient: Tensor) -> None:
    rows = gradient.flatten(0, -2).float()  # [tokens, out]
    if projection.rows is not None:
        rows = rows[:, slice(*projection.rows)]
    total.addmm_(rows.T, rows, alpha=1 / len(rows))
