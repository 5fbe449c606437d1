"""The loss as a quadratic function of one weight whose curvature is a Kronecker product, as LLM Surgeon takes it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import WEAKEST
from sparity.errors import InvalidInput, NumericalError
from sparity.static.matrices.damping import damped

STATISTICS = ("gram", "output_gradient_gram")
OUTPUT_DAMPING = 0.1  # share of the mean diagonal of what belongs to the outputs that is added to it


@dataclass(frozen=True)
class KroneckerQuadratic:
    """A change D `[out, in]` of a weight adds tr(G D A DT) / 2 to the loss of a token, in nats.

    A `[in, in]` is the mean over tokens of x xT, G `[out, out]` that of g gT, g being the gradient of a sequence's
    summed loss at the projection's output: the Fisher information in K-FAC's form. Both are damped.
    """

    inputs: Tensor  # [in, in], float32, A but for a factor
    outputs: Tensor  # [out, out], float32, G but for a factor
    inverse_inputs: Tensor
    inverse_outputs: Tensor
    factor: float  # the loss is so many times what `inputs` and `outputs` say
    dead_inputs: Tensor  # bool [in], True where an input was always zero
    dead_outputs: Tensor  # bool [out], True where an output makes no difference to the loss

    @classmethod
    def of(cls, statistics: Statistics, damping: float, output_damping: float) -> "KroneckerQuadratic":
        """That of one projection; `damping` and `output_damping` are shares of the mean diagonals of A and of G.

        Raises:
            NumericalError: no tokens reached it, or the damping is too weak for an inverse.
        """
        matrices = (statistics.gram / statistics.tokens, statistics.output_gradient_gram)
        parts, factor, dead = list[tuple[Tensor, Tensor]](), 1.0, list[Tensor]()
        for matrix, strength in zip(matrices, (damping, output_damping), strict=True):
            dead.append(matrix.diagonal() < WEAKEST)
            mean = float(matrix.diagonal().mean())
            factor *= mean
            whole = damped(matrix / (mean or 1.0), strength)
            parts.append((whole, _inverse(whole, statistics.site)))
        (inputs, inverse_inputs), (outputs, inverse_outputs) = parts
        return cls(inputs, outputs, inverse_inputs, inverse_outputs, factor, *dead)

    def costs(self, weight: Tensor) -> Tensor:
        """What the loss gains when one weight goes and all others make up for it, `[out, in]`, float32, in nats.

        w^2 / (2 [G^-1]_ii [A^-1]_jj); nothing where an input was always zero, or an output makes no difference.
        """
        costs = weight.float().square() / (2 * self.inverse_inputs.diagonal())
        costs = costs / self.inverse_outputs.diagonal()[:, None] * self.factor
        return costs.masked_fill(self.dead_inputs | self.dead_outputs[:, None], 0.0)

    def refitted(self, weight: Tensor, keep: Tensor, steps: int) -> Tensor:
        """`weight` with zeros where `keep` is False, and the others where the loss is least; float32 `[out, in]`.

        So many steps of conjugate gradients from the weights as they are, with the inverse curvature as the
        preconditioner: each lessens the loss. Weights that read dead inputs stay.
        """
        free = keep & ~self.dead_inputs
        current = torch.where(keep, weight.float(), 0.0)
        residual = torch.where(free, self.outputs @ (weight.float() - current) @ self.inputs, 0.0)
        direction, before, least = torch.zeros_like(residual), 1.0, 0.0
        for step in range(steps):
            wanted = torch.where(free, self.inverse_outputs @ residual @ self.inverse_inputs, 0.0)
            length = float((residual * wanted).sum())
            least = least if step else length * torch.finfo(torch.float32).eps ** 2
            if length <= least:
                break
            direction = wanted + length / before * direction
            image = torch.where(free, self.outputs @ direction @ self.inputs, 0.0)
            along = length / float((direction * image).sum())
            current, residual, before = current + along * direction, residual - along * image, length
        return current


def check_dampings(damping: float, output_damping: float) -> None:
    """Raise `InvalidInput` for those that leave no inverse."""
    if not (0 < damping <= 1 and 0 < output_damping <= 1):
        raise InvalidInput(f"damping {damping}, output_damping {output_damping}: both must lie in (0, 1]")


def _inverse(matrix: Tensor, site: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise NumericalError(f"{site}: the curvature of the loss has no inverse: raise damping and output_damping")
    return torch.cholesky_inverse(factor)
