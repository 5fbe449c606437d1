"""The curvature of the loss at a projection as a Kronecker product: what columns cost, and how the rest makes up."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparity.calibration.gradients import check_length
from sparity.errors import InvalidInput, NumericalError
from sparity.models.dimensions import WRITE_HIDDEN
from sparity.static.matrices.damping import damped
from sparity.static.structure.forward import forward
from sparity.static.structure.subject import Subject


@dataclass(frozen=True)
class Kronecker:
    """The Fisher information of a weight `[out, in]` of one token, as K-FAC takes it: `outputs` times `inputs`.

    `inputs` `[in, in]` is the mean of x x^T over tokens, `outputs` `[out, out]` that of g g^T, g being the gradient of
    the sequence's summed loss at the projection's output; both float64. A change D of the weight then adds
    tr(outputs D inputs D^T) / 2 to the mean loss of a token.
    """

    inputs: Tensor
    outputs: Tensor

    def costs(self, weight: Tensor, width: int, damping: float) -> Tensor:
        """What the loss gains in nats when `width` neighbouring columns go and the others make up, `[in / width]`."""
        count = weight.shape[1] // width
        inverse = self._inverse(damping).view(count, width, count, width)
        inverse = inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, width, width]
        weight = weight.double().cpu()
        reached = (self.outputs @ weight).view(-1, count, width)
        squares = torch.einsum("ouw,ouv->uwv", weight.reshape(-1, count, width), reached)
        costs: Tensor = 0.5 * torch.linalg.solve(inverse, squares).diagonal(dim1=1, dim2=2).sum(1)
        return costs

    def without(self, weight: Tensor, columns: Tensor, damping: float) -> Tensor:
        """The weight with these columns at zero and the others where the loss is least, float64 `[out, in]`."""
        inverse = self._inverse(damping)
        weight = weight.double().cpu()
        known = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # [gone, in]
        left: Tensor = weight - weight[:, columns] @ known
        left[:, columns] = 0
        return left

    def _inverse(self, damping: float) -> Tensor:
        inverse: Tensor = torch.linalg.inv(damped(self.inputs, damping))
        return inverse


def curvature(subject: Subject) -> dict[str, Kronecker]:
    """The factors of every projection that writes into the residual stream, by name.

    Raises:
        InvalidInput: a mixture of experts, or sequences that are too short.
        NumericalError: a loss or gradient is NaN or infinite.
    """
    tokens = subject.tokens
    check_length(tokens)
    sums: dict[str, list[Any]] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with forward(subject) as passes, ExitStack() as hooks:
        for block in passes.blocks:
            for projection in block.projections:
                if projection.expert is not None:
                    raise InvalidInput(f"{block.name}: llm_surgeon has no rule for experts: use reap, or minitron")
                if projection.role in WRITE_HIDDEN:

                    def see(module: Any, given: Any, output: Tensor, name: str = projection.name) -> None:
                        seen[name] = given[0], output

                    hooks.callback(projection.module.register_forward_hook(see).remove)
        for sample in range(len(tokens)):
            loss = passes.summed_loss(sample)
            slopes = torch.autograd.grad(loss, [output for _, output in seen.values()])
            for (name, (x, _)), slope in zip(seen.items(), slopes, strict=True):
                total = sums.setdefault(name, [0, 0])
                for place, part in enumerate((x.detach(), slope)):
                    rows = part.flatten(0, -2).double().cpu()
                    total[place] = total[place] + rows.T @ rows / tokens.numel()
            seen.clear()
    for name, factors in sums.items():
        if not all(bool(torch.isfinite(factor).all()) for factor in factors):
            raise NumericalError(f"{name}: the gradient of the loss is NaN or infinite; use float32 or other text")
    return {name: Kronecker(*factors) for name, factors in sums.items()}
