"""Bias: a learned constant behind every place that is skipped (SPON 2025, arXiv:2512.12744)."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparity.dynamic.activations.divergence import divergence
from sparity.dynamic.activations.heals.base import Correction, Heal, Spot, corrected
from sparity.dynamic.activations.method_data import Layout
from sparity.dynamic.activations.places import Kind
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import InvalidInput
from sparity.registry import register


@register("activations.heal", "bias")
@dataclass(frozen=True)
class Bias(Heal):
    """y = W x' + b, b learned so that the model's predictions are those of the dense one: least KL(dense || sparse).

    All biases are learned together, by Adam from zero, one calibration sequence a step.

    Attributes:
        steps: of training.
        rate: Adam's learning rate, in units of the rms of the module's outputs.
    """

    steps: int = 60
    rate: float = 0.01
    takes: ClassVar[tuple[Kind, ...]] = ("input", "hidden", "gate_output", "neurons", "heads")

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rate < torch.inf:
            raise InvalidInput(f"{self.name}: steps and rate must be positive")

    def fit(self, model: Any, spots: Sequence[Spot], skipping: SparseTokens, tokens: Tensor) -> list[dict[str, Tensor]]:
        """See `Heal.fit`."""
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as hooks:
            sizes = _sizes(model, spots, skipping, tokens[:1])
            shares = [torch.zeros(spot.outputs, device=model.device, requires_grad=True) for spot in spots]
            corrections = [Correction(self, {"bias": share}, skipping) for share in shares]
            for spot, correction in zip(spots, corrections, strict=True):
                hooks.enter_context(corrected(spot.module, correction))
            optimiser = torch.optim.Adam(shares, self.rate)
            for _, ids in zip(range(self.steps), itertools.cycle(tokens), strict=False):
                for correction, share, size in zip(corrections, shares, sizes, strict=True):
                    correction.tensors = {"bias": share * size}
                loss = divergence(model, skipping, ids[None])
                for share, gradient in zip(shares, torch.autograd.grad(loss, shares), strict=True):
                    share.grad = gradient  # of the biases alone
                optimiser.step()
        return [{"bias": (share.detach() * size).float()} for share, size in zip(shares, sizes, strict=True)]

    def layout(self, spot: Spot) -> Layout:
        """See `Heal.layout`."""
        return {"bias": (torch.float32, (spot.outputs,))}

    def nbytes(self, spot: Spot) -> int:
        """See `Heal.nbytes`."""
        return 4 * spot.outputs

    def correction(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Heal.correction`."""
        return tensors["bias"]


def _sizes(model: Any, spots: Sequence[Spot], skipping: SparseTokens, ids: Tensor) -> list[float]:
    """The rms of what each module gives in the dense model, on one sequence."""
    found: list[float] = []
    with ExitStack() as hooks, torch.no_grad(), skipping.dense():
        for spot in spots:

            def note(module: Any, given: Any, output: Tensor) -> None:
                found.append(float(output.float().square().mean().sqrt()))

            hooks.callback(spot.module.register_forward_hook(note).remove)
        model(input_ids=ids.to(model.device), use_cache=False)
    return found
