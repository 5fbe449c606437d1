"""A shape as an ordinary recipe: one stage `structure` for each axis that becomes smaller."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparity.models import Decoder
from sparity.models.cuts.outline import outlined
from sparity.pipeline.studies.shapes.axes import Axis
from sparity.pipeline.studies.shapes.tensors import Sizes
from sparity.static.structure.asking import removing
from sparity.static.structure.ranked import ranked_sizes

DIGITS = 17  # that tell any share apart


def recipe_of(
    base: Mapping[str, Any],
    decoder: Decoder,
    axes: Sequence[Axis],
    sizes: Sizes,
    method: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The recipe that cuts a model to these sizes, in the order of its axes.

    Args:
        base: the sections of the recipe other than its stages.
        decoder: the model.
        axes: of it.
        sizes: of every axis.
        method: of `structure.method`, one that ranks the parts of a `dimension`.
        options: the method's own.
    """
    stages = []
    for axis in axes:
        left = sizes[axis.name]
        if left < axis.whole:
            removed = share(decoder, axis.name, axis.whole, left)
            stages.append(removing(method, {**options, "dimension": axis.name}, removed))
            decoder = outlined(decoder, {axis.name: left}, {})
    return {**base, "stages": stages}


def share(decoder: Decoder, dimension: str, whole: int, left: int) -> float:
    """The share with the fewest digits that, removed, leaves so many units of a dimension."""
    gone = (whole - left) / whole
    tried = (each for digits in range(2, DIGITS) for each in (round(gone, digits), round(gone + 10**-digits, digits)))
    return next(each for each in tried if 0 < each < 1 and ranked_sizes(dimension, decoder, each)[dimension] == left)
