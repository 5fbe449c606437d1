"""Gradients of a block's own output: no loss and no other block is needed for them."""

import torch
from torch import Tensor

from sparity.calibration.gradients import projection_gradients
from sparity.errors import NumericalError
from sparity.models import Block, BlockInputs
from sparity.products.float32 import float32_products


@torch.enable_grad()
@float32_products()
def regional_gradients(block: Block, inputs: BlockInputs, hidden: Tensor) -> dict[str, Tensor]:
    """The mean over sequences of the squared gradient of ||block output||_2, by projection, `[out, in]` in float32.

    Args:
        block: with its weights as they are when the gradient is wanted.
        inputs: with the blocks' arguments for batches of one sequence.
        hidden: the block's inputs `[samples, tokens, hidden]`.

    Raises:
        NumericalError: a gradient is NaN or infinite.
    """
    device = next(block.module.parameters()).device
    for projection in block.projections:
        projection.stored.requires_grad_()
    sums = {
        projection.name: torch.zeros_like(projection.weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        for projection in block.projections
    }
    for sequence in hidden:
        torch.linalg.vector_norm(block.output(inputs, sequence[None].to(device)).float()).backward()
        for name, gradient in projection_gradients(block):
            sums[name] += gradient.float().square()
        for projection in block.projections:
            projection.stored.grad = None
    for projection in block.projections:
        projection.stored.requires_grad_(False)
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise NumericalError(f"{name}: the gradient of the block's output holds NaN or infinite numbers")
        total /= len(hidden)
    return sums
