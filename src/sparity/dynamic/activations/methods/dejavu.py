"""DejaVu: a trained predictor names the neurons before any is computed (Liu et al. 2023, arXiv:2310.17157)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.activations.method_data import skips_nothing
from sparity.dynamic.activations.methods.base import Method, Seen
from sparity.dynamic.activations.neuron_predictor import NeuronSkip, active, predictor_of, trained
from sparity.dynamic.activations.places import Kind, Place, Where
from sparity.dynamic.activations.quantiles import ROUNDING
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import InvalidInput
from sparity.models.block import in_features
from sparity.registry import register
from sparity.visible import logger

log = logger(__name__)
PER_RANK, LEAST_RANK = 8, 8  # input channels for each inner channel


@register("activations.method", "dejavu")
@dataclass(frozen=True)
class DejaVu(Method):
    """The k = int(neurons (1 - s)) neurons count that a predictor of low rank gives the largest logits.

    Attributes:
        rank: the predictor's inner width; None = an eighth of the MLP's inputs, at least 8.
        steps: of training, at most.
        rate: the learning rate.
    """

    rank: int | None = None
    steps: int = 100
    rate: float = 0.01
    where: ClassVar[Where] = "neurons"
    takes: ClassVar[tuple[Kind, ...]] = ("neurons",)

    def __post_init__(self) -> None:
        if (self.rank is not None and self.rank < 1) or self.steps < 1 or not 0 < self.rate < torch.inf:
            raise InvalidInput(f"{self.name}: rank, steps and rate must be positive")

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`: the two matrices, `kept`, and `recall` on tokens that were not trained on."""
        x = seen.values
        neurons = x if seen.neurons is None else seen.neurons
        kept = max(int(neurons.shape[-1] * (1 - sparsity) + ROUNDING), 1)
        labels, of_relu = active(neurons, kept)
        found = trained(x, labels, kept, self._rank(x.shape[-1]), self.steps, self.rate)
        if of_relu:
            log.info("%s: the predictor finds %.1f %% of the active neurons", seen.statistics.site, 100 * found.recall)
        else:
            log.warning(
                "%s: no neuron of this MLP is exactly 0, as a ReLU's are; of the largest of each token the predictor "
                "finds %.1f %%: other methods do better here",
                seen.statistics.site,
                100 * found.recall,
            )
        numbers = {"kept": torch.tensor(kept), "recall": torch.tensor(found.recall)}
        return {"first": found.first, "second": found.second, **numbers}

    def nbytes(self, place: Place, sparsity: float) -> int:
        """See `Method.nbytes`: in float32, and two numbers."""
        inputs = in_features(place.reads[0].module)
        return 4 * self._rank(inputs) * (inputs + place.columns) + torch.tensor(0).nbytes + torch.tensor(0.0).nbytes

    def _rank(self, inputs: int) -> int:
        return max(inputs // PER_RANK, LEAST_RANK) if self.rank is None else self.rank

    @contextmanager
    def attach(self, place: Place, tensors: Mapping[str, Tensor], tokens: SparseTokens) -> Iterator[None]:
        """See `Method.attach`: the outputs of the MLP's first projection are 0 for neurons that are not named."""
        if skips_nothing(tensors):
            yield
            return
        first = place.reads[0]
        predictor = predictor_of(tensors, in_features(first.module), place.columns, place.name)
        handle = first.module.register_forward_hook(NeuronSkip(predictor, first.rows, tokens))
        try:
            yield
        finally:
            handle.remove()

    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Method.mask`: `x` [samples, tokens, in] is what the MLP reads -> bool [samples, tokens, neurons]."""
        if skips_nothing(tensors):
            return torch.ones_like(x, dtype=torch.bool)
        return predictor_of(tensors, x.shape[-1], None, "x").keep(x)
