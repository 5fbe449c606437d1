"""Reconstruction: attention and MLP of every block, apart, trained towards what they give in the dense model.

Wagner et al. 2025, arXiv:2510.14444.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.healing.heal.methods.base import Healed, Task, Training, weights_of
from sparity.healing.heal.side_by_side import Pair, keep, pairs, restore
from sparity.healing.heal.submodules import Call, Submodule, calls, relative_error, run, submodules
from sparity.models import Decoder
from sparity.models.float32 import in_float32
from sparity.registry import register
from sparity.stages.base import Estimate, Workload
from sparity.training.fine_tune.in_memory import InMemory
from sparity.training.fine_tune.options import FP32, PASSES
from sparity.training.fine_tune.steps import FLOATS, Schedule, descend, places


@register("heal.method", "reconstruction")
@dataclass(frozen=True)
class Reconstruction(Training):
    """AdamW on |f'(x') - f(x)|^2 / |f(x)|^2 within the mask: x' of the healed model so far, f(x) of the dense one.

    Steps are those of one attention or MLP. What does not come nearer is put back.
    """

    steps: int = 50
    rate: float = 1e-3

    @property
    def compares(self) -> bool:
        """See `Method.compares`."""
        return True

    def estimate(self, model: Decoder, work: Workload) -> Estimate:
        """See `Method.estimate`."""
        weights = weights_of(model)
        of_block = weights // max(len(model), 1)
        states = 4 * FP32 * work.tokens * int(model.config.hidden_size)
        return Estimate(
            flops=PASSES * weights * self.steps * self.batch * work.length,
            memory={
                "the dense model": weights * model.dtype.itemsize,
                "a block with gradients and moments": (FLOATS + 1) * FP32 * of_block,
                "hidden states": states,
            },
            disk={"the blocks so far": weights * model.dtype.itemsize},
        )

    def heal(self, task: Task) -> Healed:
        """See `Method.heal`."""
        if not self.steps:
            return Healed()
        begun, errors = restore(task)
        for pair in pairs(task, begun):
            for part in submodules(pair.block):
                found = self._train(pair, part, task.masks)
                errors[part.name] = torch.cat([errors.get(part.name, torch.empty(0)), torch.tensor([found])])
            keep(task, pair.index + 1, errors)
        return Healed(curves={f"{name} by block": dict(enumerate(e.tolist(), 1)) for name, e in errors.items()})

    def _train(self, pair: Pair, part: Submodule, masks: Mapping[str, Tensor]) -> float:
        """Train one submodule; the mean relative error that is left of what it gives."""
        module = pair.block.module.get_submodule(part.path)
        given, _ = calls(pair.sparse, pair.index, part.path)
        _, wanted = calls(pair.dense, pair.origin, part.path)
        if given and wanted[0].shape[-1] != pair.sparse.hidden.shape[-1]:
            raise InvalidInput(
                "reconstruction: the dense model has another hidden size, so that what its parts give cannot be "
                "reached: use distillation, or finetune"
            )
        before = _error(module, given, wanted)
        was = {name: parameter.data.clone() for name, parameter in module.named_parameters()}
        with in_float32(module):
            held = {id(each.stored) for each in part.projections}
            held |= {id(getattr(each.module, "bias", None)) for each in part.projections}
            trained = {name: each for name, each in module.named_parameters() if id(each) in held}

            def loss(step: int) -> Tensor:
                chosen = places(step, self.batch, len(given)).tolist()
                return torch.stack([relative_error(run(module, given[n]), wanted[n]) for n in chosen]).mean()

            def zero() -> None:
                for projection in part.projections:
                    projection.weight.mul_(masks[projection.name])

            descend(trained, loss, InMemory(), Schedule(self.steps, self.rate, stops=True), after=zero)
        after = _error(module, given, wanted)
        if not after < before:
            for name, parameter in module.named_parameters():
                parameter.data.copy_(was[name])
        return min(after, before)


def _error(module: nn.Module, given: list[Call], wanted: list[Tensor]) -> float:
    """The mean relative error of what a module gives, as it is stored."""
    with in_float32(module), torch.no_grad():
        errors = [float(relative_error(run(module, call), target)) for call, target in zip(given, wanted, strict=True)]
    return sum(errors) / len(errors)
