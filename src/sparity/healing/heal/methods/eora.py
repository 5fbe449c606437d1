"""EoRA: a low rank beside every matrix makes good what was lost, weighed by the inputs (2024, arXiv:2410.21271)."""

from dataclasses import dataclass

from torch import Tensor

from sparity.errors import InvalidInput
from sparity.healing.heal.low_rank import eigenspace_low_rank
from sparity.healing.heal.low_rank_method import LowRankMethod
from sparity.healing.heal.side_by_side import Pair
from sparity.healing.heal.sums import Sums
from sparity.models import InputSite
from sparity.registry import register


@register("heal.method", "eora")
@dataclass(frozen=True)
class EoRA(LowRankMethod):
    """y = W' x + B A x: B A is the matrix of that rank with the least |(W - W') x - B A x|^2, x of the healed model.

    Zeros, scales and packed formats stay as they are. Experts, which share a module, get none.

    Attributes:
        rank: of B A, 4 to 128 as a rule.
        merge: add B A to matrices without zeros instead; those with zeros keep it beside them.
    """

    rank: int = 32
    merge: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidInput(f"eora: rank {self.rank} must be 1 or more")

    @property
    def adds(self) -> bool:
        """See `Method.adds`."""
        return not self.merge

    @property
    def words(self) -> str:
        """See `Method.words`."""
        return f"eora, rank {self.rank}"

    def rank_of(self, rows: int, columns: int) -> int:
        """See `LowRankMethod.rank_of`."""
        return self.rank

    def sums(self, columns: int) -> int:
        """See `LowRankMethod.sums`."""
        return columns**2

    def gathered(self, pair: Pair, site: InputSite) -> Tensor:
        """See `LowRankMethod.gathered`: the sum of x xT, `[in, in]`."""
        sums = Sums()
        pair.watch(site, {}, sums.add)
        return sums.gram()

    def factors(self, error: Tensor, read: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """See `LowRankMethod.factors`."""
        return eigenspace_low_rank(error, read, rank)
