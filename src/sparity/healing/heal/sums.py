"""Regression, within a mask, of what the dense model gives on what the sparse one reads, from sums over tokens."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparity.static.prune.solvers.alps import TINY, refined


class Sums:
    """Of inputs x `[tokens, in]` and outputs y `[tokens, out]` by name, in float64: what regression needs of them."""

    def __init__(self) -> None:
        self.tokens = 0
        self.x = self.xx = torch.zeros(())
        self.y: dict[str, Tensor] = {}
        self.xy: dict[str, Tensor] = {}

    def add(self, x: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Add the tokens of one sequence, perhaps none."""
        self.tokens += len(x)
        self.x = self.x + x.double().sum(0)
        self.xx = self.xx + (x.T @ x).double()
        for name, y in outputs.items():
            self.y[name] = self.y.get(name, 0) + y.double().sum(0)
            self.xy[name] = self.xy.get(name, 0) + (x.T @ y).double()

    def gram(self, centred: bool = False) -> Tensor:
        """The sum of x xT, `[in, in]`, of deviations from the mean where `centred`."""
        return self.xx - torch.outer(self.x, self.x) / self.tokens if centred else self.xx

    def cross(self, name: str, centred: bool = False) -> Tensor:
        """The sum of x yT, `[in, out]`, of deviations from the means where `centred`."""
        return self.xy[name] - torch.outer(self.x, self.y[name]) / self.tokens if centred else self.xy[name]

    def bias(self, name: str, weight: Tensor) -> Tensor:
        """What is to be added to `weight` [out, in] times x so that the means of the outputs are met, `[out]`."""
        found: Tensor = (self.y[name] - weight.double() @ self.x) / self.tokens
        return found


def fitted(weight: Tensor, gram: Tensor, cross: Tensor, mask: Tensor, damping: float, iterations: int) -> Tensor:
    """The weights within a mask with the least |y - W x|^2 + d |W - weight|^2, d = damping times gram's mean diagonal.

    Args:
        weight: `[out, in]`, where conjugate gradients begin: never a larger sum than with it.
        gram: the sum of x xT, `[in, in]`.
        cross: the sum of x yT, `[in, out]`.
        mask: bool `[out, in]`, False where a weight is 0.
        damping: see above.
        iterations: of conjugate gradients, on inputs of norm 1.
    """
    begun = torch.where(mask, weight.float(), 0.0)
    held = damping * gram.diagonal().mean()
    damped, target = gram.clone(), cross.T + held * begun
    damped.diagonal().add_(held)
    norms = damped.diagonal().sqrt() + TINY  # [in]
    normal, goal = (damped / norms / norms[:, None]).float(), (target / norms).float()
    return refined(begun * norms.float(), normal, goal, mask, iterations) / norms.float()
