"""CHESS: a threshold per neuron, by what it is multiplied with (He et al. 2024, arXiv:2409.01366)."""

from dataclasses import dataclass
from typing import ClassVar

from sparity.dynamic.activations.methods.thresholds import Composed, Thresholds
from sparity.dynamic.activations.places import Where
from sparity.registry import register


@register("activations.method", "chess")
@dataclass(frozen=True)
class Chess(Composed):
    """Neuron i counts where |act(gate_i)| mean|up_i| > T, the quantile over all neurons and calibration tokens.

    So the threshold of neuron i is T / mean|up_i|. The gate is computed in full; rows of up and columns of down are
    skipped.
    """

    where: ClassVar[Where] = "gate_output"

    @property
    def parts(self) -> Thresholds:
        """See `Composed.parts`."""
        return Thresholds(importance="partner")
