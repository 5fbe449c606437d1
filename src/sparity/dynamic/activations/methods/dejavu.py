"""DejaVu: a trained predictor names neurons and heads before any is computed (Liu et al. 2023, arXiv:2310.17157)."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.activations.method_data import skips_nothing
from sparity.dynamic.activations.methods.base import Method, Seen
from sparity.dynamic.activations.neuron_predictor import AHEAD, active, predictor_of, top, trained
from sparity.dynamic.activations.places import Kind, Place, Where
from sparity.dynamic.activations.predicted_skips import HeadSkip, InputNote, NeuronSkip
from sparity.dynamic.activations.quantiles import ROUNDING
from sparity.dynamic.activations.rule_data import AGAIN
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import CorruptFile, InvalidInput
from sparity.models.block import in_features
from sparity.registry import register
from sparity.visible import logger

log = logger(__name__)
PER_RANK, LEAST_RANK = 8, 8  # input channels for each inner channel


@register("activations.method", "dejavu")
@dataclass(frozen=True)
class DejaVu(Method):
    """The k = int(n (1 - s)) of n neurons, or heads, count that a predictor of low rank gives the largest logits.

    Attributes:
        rank: the predictor's inner width; None = an eighth of the inputs that it reads, at least 8.
        steps: of training, at most.
        rate: the learning rate.
        lookahead: read what the MLP, or the attention, of the block before reads, so that the answer is there in time;
            in the first block there is none before, and its own is read.
        labelled: the share of a token's heads, those with the largest outputs, that the training calls active.
    """

    rank: int | None = None
    steps: int = 100
    rate: float = 0.01
    lookahead: bool = False
    labelled: float = 0.7
    where: ClassVar[Where] = "neurons"
    takes: ClassVar[tuple[Kind, ...]] = ("neurons", "heads")

    def __post_init__(self) -> None:
        if (self.rank is not None and self.rank < 1) or self.steps < 1 or not 0 < self.rate < torch.inf:
            raise InvalidInput(f"{self.name}: rank, steps and rate must be positive")
        if not 0 < self.labelled < 1:
            raise InvalidInput(f"{self.name}: labelled {self.labelled} must lie between 0 and 1")

    def looks_ahead(self) -> bool:
        """See `Method.looks_ahead`."""
        return self.lookahead

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`: the two matrices, `kept`, and `recall` on tokens that were not trained on."""
        found = self._of_neurons(seen, sparsity) if seen.head_norms is None else self._of_heads(seen, sparsity)
        ahead = torch.tensor(int(seen.before is not None), dtype=torch.uint8)
        return {**found, AHEAD: ahead} if self.lookahead else found

    def _of_heads(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        assert seen.head_norms is not None
        norms, x = seen.head_norms, seen.read
        kept = max(int(norms.shape[-1] * (1 - sparsity) + ROUNDING), 1)
        labels = top(norms, max(int(norms.shape[-1] * self.labelled + ROUNDING), 1))
        found = trained(x, labels, kept, self._rank(x.shape[-1]), self.steps, self.rate)
        most = min(1.0, kept / max(float(labels.double().sum(-1).mean()), 1.0))
        log.info(
            "%s: the predictor finds %.1f %% of the heads with the largest outputs (so few can find %.1f %% at most)",
            seen.statistics.site,
            100 * found.recall,
            100 * most,
        )
        numbers = {"kept": torch.tensor(kept), "recall": torch.tensor(found.recall)}
        return {"first": found.first, "second": found.second, **numbers}

    def _of_neurons(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        x = seen.read
        neurons = seen.values if seen.neurons is None else seen.neurons
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
        inputs, named = in_features(place.reads[0].module), place.heads or place.columns
        numbers = torch.tensor(0).nbytes + torch.tensor(0.0).nbytes + int(self.lookahead)
        return 4 * self._rank(inputs) * (inputs + named) + numbers

    def _rank(self, inputs: int) -> int:
        return max(inputs // PER_RANK, LEAST_RANK) if self.rank is None else self.rank

    @contextmanager
    def attach(self, place: Place, tensors: Mapping[str, Tensor], tokens: SparseTokens) -> Iterator[None]:
        """See `Method.attach`.

        The outputs of the MLP's first projection are 0 for neurons that are not named, and the inputs of o for heads.
        """
        if skips_nothing(tensors):
            yield
            return
        first, ahead = place.reads[0], bool(tensors.get(AHEAD, False))
        predictor = predictor_of(tensors, in_features(first.module), place.heads or place.columns, place.name)
        if ahead and place.before is None:
            raise CorruptFile(
                f"activations: {place.name} reads what a block before it reads, and there is none; {AGAIN}"
            )
        reader = place.before.reads[0] if ahead and place.before else first
        with ExitStack() as hooks:
            note = InputNote() if ahead or place.heads else None
            if note is not None:
                hooks.callback(reader.module.register_forward_pre_hook(note).remove)
            if place.heads:
                assert note is not None
                skip = HeadSkip(predictor, place.columns // place.heads, tokens, note)
                hooks.callback(place.module.register_forward_pre_hook(skip).remove)
            else:
                skipped = NeuronSkip(predictor, first.rows, tokens, note)
                hooks.callback(first.module.register_forward_hook(skipped).remove)
            yield

    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Method.mask`: `x` [samples, tokens, in] is what is read -> bool [samples, tokens, neurons or heads]."""
        if skips_nothing(tensors):
            return torch.ones_like(x, dtype=torch.bool)
        return predictor_of(tensors, x.shape[-1], None, "x").keep(x)
