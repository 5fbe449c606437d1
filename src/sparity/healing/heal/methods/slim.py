"""SLiM: a low rank beside every matrix, weighed by the size of each input (Mozaffari et al. 2025, arXiv:2410.09615)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.healing.heal.low_rank import salient_low_rank
from sparity.healing.heal.low_rank_method import LowRankMethod
from sparity.healing.heal.side_by_side import Pair
from sparity.models import InputSite
from sparity.registry import register


@register("heal.method", "slim")
@dataclass(frozen=True)
class SLiM(LowRankMethod):
    """y = W' x + B A x: B A is the matrix of that rank with the least |(W - W' - B A) diag(s)|^2, s the inputs' size.

    s is the root mean square of each input of the healed model, the saliency of its column. Zeros, scales and packed
    formats stay as they are. Experts, which share a module, get none.

    Attributes:
        rank: of B A, as a share of the shorter side of the matrix; at least 1 is kept.
    """

    rank: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rank <= 1:
            raise InvalidInput(f"slim: rank {self.rank} is a share of a matrix's shorter side, above 0 and at most 1")

    @property
    def words(self) -> str:
        """See `Method.words`."""
        return f"slim, rank {self.rank:g} of the shorter side"

    def rank_of(self, rows: int, columns: int) -> int:
        """See `LowRankMethod.rank_of`."""
        return max(int(self.rank * min(rows, columns)), 1)

    def sums(self, columns: int) -> int:
        """See `LowRankMethod.sums`."""
        return columns

    def gathered(self, pair: Pair, site: InputSite) -> Tensor:
        """See `LowRankMethod.gathered`: the sum of squares of each input, `[in]`."""
        squares = list[Tensor]()

        def add(x: Tensor, outputs: Mapping[str, Tensor]) -> None:
            squares.append(x.double().square().sum(0))

        pair.watch(site, {}, add)
        return torch.stack(squares).sum(0)

    def factors(self, error: Tensor, read: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """See `LowRankMethod.factors`."""
        return salient_low_rank(error, read, rank)
