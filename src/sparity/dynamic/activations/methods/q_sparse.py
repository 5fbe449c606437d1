"""Q-Sparse: for each token the channels of largest magnitude (Wang et al. 2024, arXiv:2407.10969)."""

from dataclasses import dataclass

from sparity.dynamic.activations.methods.thresholds import Composed, Thresholds
from sparity.registry import register


@register("activations.method", "q_sparse")
@dataclass(frozen=True)
class QSparse(Composed):
    """The in - int(in s) channels of a token with the largest |x_i| count, before every linear layer.

    It is meant for models that were trained with this mask: see the stage `topk_training`.
    """

    @property
    def parts(self) -> Thresholds:
        """See `Composed.parts`."""
        return Thresholds(limit="top")
