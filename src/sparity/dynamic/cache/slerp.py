"""Directions of vectors: the angle between two of them, and those that lie between (Shoemake 1985)."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

STRAIGHT = 1e-4  # angles below have the sine of themselves in float32: what lies between lies on a line
OPPOSITE = math.pi - 1e-3  # beyond, no direction lies between


def angles(first: Tensor, second: Tensor) -> Tensor:
    """The angles between vectors `[..., width]`, float32 `[...]` in [0, pi]; pi / 2 where one is zero.

    By half the angle's tangent, which float32 resolves where the cosine is 1 to all its digits.
    """
    one, other = normalize(first.float(), dim=-1), normalize(second.float(), dim=-1)
    return 2 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The unit vectors on the arc between two, float32 `[..., width]`.

    Args:
        first: `[..., width]`, of any length.
        second: likewise.
        share: of the angle that lies before them, 0 = at `first`, 1 = at `second`.
    """
    angle = angles(first, second)[..., None]
    straight, sine = angle < STRAIGHT, angle.sin()
    before = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / sine)
    after = torch.where(straight, share, (share * angle).sin() / sine)
    found = before * normalize(first.float(), dim=-1) + after * normalize(second.float(), dim=-1)
    return normalize(found, dim=-1)
