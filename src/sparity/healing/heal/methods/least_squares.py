"""Least squares: every matrix fitted anew, in its mask, to what the dense model gives.

The best weights of a given mask (Meng et al. 2024, arXiv:2406.07831), for the outputs of the dense model on its own
inputs, so that a matrix also makes up for what those before it have lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.healing.heal.methods.base import Healed, Method, Task, weights_of
from sparity.healing.heal.side_by_side import Pair, keep, own_block, pairs, restore
from sparity.healing.heal.sums import Sums, fitted
from sparity.models import Decoder, InputSite
from sparity.models.block import Projection
from sparity.models.cuts.biases import add_biases, bias_flags
from sparity.registry import register
from sparity.stages.allocation import projections
from sparity.stages.base import Estimate, Workload

FP32 = 4


@register("heal.method", "least_squares")
@dataclass(frozen=True)
class LeastSquares(Method):
    """The least |y - W' x - b'|^2 + damping |W' - W|^2: x of the healed model so far, y of the dense one.

    Matrix after matrix, by conjugate gradients. Biases are fitted where there are some. An expert is fitted to what
    the dense expert gives on the same tokens.

    Attributes:
        iterations: steps of conjugate gradients for each matrix.
        damping: share of the mean of the Gram matrix's diagonal that holds weights where they are.
        new_bias: give every linear layer of the blocks a bias, where the configuration can say so.
    """

    iterations: int = 60
    damping: float = DAMPING
    new_bias: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 < self.damping <= 1:
            raise InvalidInput("least_squares: 1 or more iterations, and a damping in (0, 1]")

    @property
    def compares(self) -> bool:
        """See `Method.compares`."""
        return True

    def declines(self, model: Decoder) -> str | None:
        """See `Method.declines`."""
        if not self.new_bias or bias_flags(model.config, _linear(model)) is not None:
            return None
        kind = model.config.model_type
        return f'the configuration of "{kind}" cannot say that all its layers have biases: leave `new_bias` out'

    def config_changes(self, model: Decoder) -> Mapping[str, Any]:
        """See `Method.config_changes`."""
        return (bias_flags(model.config, _linear(model)) or {}) if self.new_bias else {}

    def prepared(self, model: nn.Module) -> nn.Module:
        """See `Method.prepared`."""
        if self.new_bias:
            decoder = Decoder.open(model)
            blocks = [own_block(decoder, model, index) for index in range(len(decoder))]
            add_biases(decoder.config, blocks, {each.name: torch.zeros(len(each.weight)) for each in _linear(decoder)})
        return model

    def estimate(self, model: Decoder, work: Workload) -> Estimate:
        """See `Method.estimate`."""
        flops, largest = 0.0, 0
        for index in range(len(model)):
            for site in model.sites(index):
                outputs = sum(len(projection.weight) for projection in site.projections)
                inputs = site.projections[0].weight.shape[1]
                flops += 2.0 * inputs * (inputs + outputs) * work.tokens + 2.0 * self.iterations * outputs * inputs**2
                largest = max(largest, inputs * (inputs + outputs))
        whole = weights_of(model) * model.dtype.itemsize
        return Estimate(flops=flops, memory={"the dense model": whole, "sums": 2 * FP32 * largest})

    def heal(self, task: Task) -> Healed:
        """See `Method.heal`."""
        begun, _ = restore(task)
        for pair in pairs(task, begun):
            if not sum(self._fit(pair, site, task.masks) for site in pair.block.sites):
                raise InvalidInput(
                    f"least_squares: no matrix of {pair.block.name} gives as many numbers as in the dense model, so "
                    "that there is nothing to fit it to: use distillation, or finetune"
                )
            keep(task, pair.index + 1, {})
        return Healed()

    def _fit(self, pair: Pair, site: InputSite, masks: Mapping[str, Tensor]) -> int:
        """Fit the matrices of a site; how many have a twin to be fitted to."""
        twins = {each.name: twin for each in site.projections if (twin := pair.twin(each)) is not None}
        linear = {name: twin for name, twin in twins.items() if twin.expert is None}
        sums = Sums()
        if twins:
            pair.watch(site, linear, sums.add)
        for projection in site.projections:
            if projection.name in twins and sums.tokens:
                expert = None if projection.name in linear else twins[projection.name]
                self._refit(projection, expert, sums, masks[projection.name])
        return len(twins)

    def _refit(self, projection: Projection, expert: Projection | None, sums: Sums, mask: Tensor) -> None:
        """The best weights of the mask; `expert` is the dense one where it, on the same tokens, gives the outputs."""
        bias = None if expert is not None else getattr(projection.module, "bias", None)
        gram = sums.gram(centred=bias is not None)
        cross = sums.cross(projection.name, bias is not None) if expert is None else gram @ expert.weight.double().T
        weight = fitted(projection.weight, gram, cross, mask, self.damping, self.iterations)
        projection.write(weight)
        if bias is not None:
            rows = slice(None) if projection.rows is None else slice(*projection.rows)
            bias.data[rows].copy_(sums.bias(projection.name, projection.weight))


def _linear(model: Decoder) -> list[Projection]:
    return [projection for _, projection in projections(model) if projection.expert is None]
