"""Muon, the optimiser of the zoo's matrices."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made nearly orthogonal before it is applied (Jordan et al. 2024, "Muon").

    torch.optim.Muon takes two dimensions only; here leading dimensions, as of fused experts, are matrices of their own.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, momentum: float = 0.95, decay: float = 0.05):
        super().__init__(parameters, {"lr": rate, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(mean, group["momentum"]))
                rows, columns = weight.shape[-2:]
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """[..., rows, columns] with all singular values moved near 1, by five quintic Newton-Schulz steps in bf16."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    near = (matrix.mT if tall else matrix).bfloat16()
    near = near / near.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = near @ near.mT
        near = 3.4445 * near + (-4.7750 * gram + 2.0315 * gram @ gram) @ near
    return (near.mT if tall else near).to(matrix.dtype)
