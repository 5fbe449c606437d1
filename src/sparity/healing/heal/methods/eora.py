"""EoRA: a low rank beside every matrix makes good what was lost, weighed by the inputs (2024, arXiv:2410.21271)."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from sparity.errors import InvalidInput
from sparity.healing.heal.low_rank import PARTS, added, eigenspace_low_rank
from sparity.healing.heal.methods.base import Healed, Method, Task, weights_of
from sparity.healing.heal.side_by_side import Pair, keep, pairs, restore
from sparity.healing.heal.sums import Sums
from sparity.models import Decoder, InputSite
from sparity.models.attached_runtime import input_sites
from sparity.registry import register
from sparity.stages.base import Estimate, Workload

FP32 = 4


@register("heal.method", "eora")
@dataclass(frozen=True)
class EoRA(Method):
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
    def compares(self) -> bool:
        """See `Method.compares`."""
        return True

    @property
    def adds(self) -> bool:
        """See `Method.adds`."""
        return not self.merge

    @property
    def words(self) -> str:
        """See `Method.words`."""
        return f"eora, rank {self.rank}"

    def estimate(self, model: Decoder, work: Workload) -> Estimate:
        """See `Method.estimate`."""
        flops, largest, numbers = 0.0, 0, 0
        for index in range(len(model)):
            for site in model.sites(index):
                for projection in site.projections:
                    rows, columns = projection.weight.shape
                    if projection.expert is None:
                        flops += 2.0 * columns**2 * work.tokens + 20.0 * rows * columns * min(rows, columns)
                        largest = max(largest, columns * (columns + rows))
                        numbers += min(self.rank, rows, columns) * (rows + columns)
        whole = weights_of(model) * model.dtype.itemsize
        return Estimate(
            flops=flops,
            memory={"the dense model": whole, "sums and factors": 4 * FP32 * largest},
            runtime_bytes=0 if self.merge else numbers * model.dtype.itemsize,
        )

    def heal(self, task: Task) -> Healed:
        """See `Method.heal`."""
        begun, data = restore(task)
        sides = 0
        with ExitStack() as beside:
            beside.enter_context(added(input_sites(task.model), data))
            for pair in pairs(task, begun):
                for site in pair.block.sites:
                    found, compared = self._fit(pair, site, task.masks)
                    sides += compared
                    data |= found
                    beside.enter_context(added((site,), found))
                if not sides:
                    raise InvalidInput(
                        f"eora: no matrix of {pair.block.name} has the shape that it had in the dense model, so that "
                        "nothing is known of what it lost: use least_squares or distillation"
                    )
                keep(task, pair.index + 1, data, weights=self.merge)
        return Healed(runtime=data)

    def _fit(self, pair: Pair, site: InputSite, masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """What is added to the projections of a site, and how many of them could be compared."""
        lost = {}
        for projection in site.projections:
            twin = pair.twin(projection)
            if twin is not None and twin.expert is None and twin.weight.shape == projection.weight.shape:
                lost[projection.name] = twin.weight.double() - projection.weight.double()
        sums, found = Sums(), dict[str, Tensor]()
        if any(bool(error.any()) for error in lost.values()):
            pair.watch(site, {}, sums.add)
        for projection in site.projections:
            error = lost.get(projection.name)
            if error is None or not bool(error.any()):
                continue
            first, second = eigenspace_low_rank(error, sums.gram(), self.rank)
            if self.merge and bool(masks[projection.name].all()):
                projection.write(projection.weight.double() + second @ first)
                continue
            for part, tensor in zip(PARTS, (first, second), strict=True):
                found[f"{projection.name}.{part}"] = tensor.to(projection.weight.dtype).contiguous()
        return found, len(lost)
