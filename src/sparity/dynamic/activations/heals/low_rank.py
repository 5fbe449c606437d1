"""Low rank: what the skipped channels would have added, through a narrow pair of matrices fitted in closed form.

Reduced-rank regression (Izenman 1975) of the output that is lost on the input before it is skipped; a correction of low
rank beside sparse layers as in Caprese (2025, arXiv:2505.07861), which is distilled.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparity.dynamic.activations.heals.base import Heal, Spot
from sparity.dynamic.activations.method_data import Layout
from sparity.dynamic.activations.places import Kind
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import InvalidInput
from sparity.registry import register

AT_ONCE = 1 << 29  # bytes of sums, of the spots that share a pass
DAMPING = 1e-3  # of the mean of the Gram matrix's diagonal


@register("activations.heal", "low_rank")
@dataclass(frozen=True)
class LowRank(Heal):
    """y = W x' + B A x, where B A is the matrix of that rank that is nearest to what W (x - x') is of x.

    Attributes:
        share: of the weights behind a place, what A and B may have together; the rank is 1 at least.
    """

    share: float = 0.01
    takes: ClassVar[tuple[Kind, ...]] = ("input", "hidden")

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InvalidInput(f"{self.name}: share {self.share} must lie between 0 and 1")

    def rank(self, spot: Spot) -> int:
        """The inner width."""
        rows, columns = spot.outputs, spot.inputs
        return min(max(int(self.share * rows * columns / (rows + columns)), 1), rows, columns)

    def fit(self, model: Any, spots: Sequence[Spot], skipping: SparseTokens, tokens: Tensor) -> list[dict[str, Tensor]]:
        """See `Heal.fit`."""
        found: list[dict[str, Tensor]] = []
        for group in _groups(spots):
            with ExitStack() as hooks, torch.no_grad():
                seen = [Lost(spot, skipping) for spot in group]
                for spot, lost in zip(group, seen, strict=True):
                    hooks.callback(spot.module.register_forward_pre_hook(lost.before, prepend=True).remove)
                    hooks.callback(spot.module.register_forward_pre_hook(lost.after).remove)
                for ids in tokens:
                    model(input_ids=ids[None].to(model.device), use_cache=False)
            for spot, lost in zip(group, seen, strict=True):
                first, second = reduced_rank(lost.gram, lost.lost @ spot.place.weight.double().T, self.rank(spot))
                found.append({"first": first.float(), "second": second.float()})
        return found

    def layout(self, spot: Spot) -> Layout:
        """See `Heal.layout`."""
        rank = self.rank(spot)
        return {"first": (torch.float32, (rank, spot.inputs)), "second": (torch.float32, (spot.outputs, rank))}

    def nbytes(self, spot: Spot) -> int:
        """See `Heal.nbytes`."""
        return 4 * self.rank(spot) * (spot.inputs + spot.outputs)

    def correction(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Heal.correction`."""
        return x.float() @ tensors["first"].T @ tensors["second"].T


class Lost:
    """Sums over the sparse tokens of a place: x xT, and x (x - x')T for what is lost of them."""

    def __init__(self, spot: Spot, skipping: SparseTokens) -> None:
        size = (spot.inputs, spot.inputs)
        self.gram, self.lost = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        self._skipping, self._given = skipping, list[Tensor]()

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook in front of those that skip."""
        self._given[:] = arguments[:1]

    def after(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook behind them."""
        x, left = self._given.pop(), arguments[0]
        flags = self._skipping.of(x)
        chosen = (x, left) if flags is None else (x[flags], left[flags])
        wide, rest = (each.reshape(-1, each.shape[-1]).float() for each in chosen)
        self.gram += (wide.T @ wide).double().cpu()
        self.lost += (wide.T @ (wide - rest)).double().cpu()


def reduced_rank(gram: Tensor, cross: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The A `[rank, in]` and B `[out, rank]` with the least sum of squares of l - B A x over tokens.

    Args:
        gram: the sum of x xT, `[in, in]`.
        cross: the sum of x lT, `[in, out]`.
        rank: of B A.
    """
    size = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    damped = gram + DAMPING * size * torch.eye(len(gram), dtype=gram.dtype)
    whole = torch.linalg.solve(damped, cross).T  # [out, in]: the best matrix of any rank
    explained = whole @ cross  # [out, out]: whole damped wholeT
    directions = torch.linalg.eigh((explained + explained.T) / 2).eigenvectors[:, -rank:]
    return directions.T @ whole, directions


def _groups(spots: Sequence[Spot]) -> Iterator[list[Spot]]:
    """Spots whose sums have room at once, in their order."""
    group: list[Spot] = []
    room = AT_ONCE
    for spot in spots:
        need = 16 * spot.inputs**2
        if group and need > room:
            yield group
            group, room = [], AT_ONCE
        group.append(spot)
        room -= need
    yield group
