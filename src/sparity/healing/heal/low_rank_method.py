"""What methods share that keep a low rank beside every matrix: the walk, the errors, and where it is kept."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack

from torch import Tensor

from sparity.errors import InvalidInput
from sparity.healing.heal.low_rank import PARTS, added
from sparity.healing.heal.methods.base import Healed, Method, Task, weights_of
from sparity.healing.heal.side_by_side import Pair, keep, pairs, restore
from sparity.models import Decoder, InputSite
from sparity.models.attached_runtime import input_sites
from sparity.stages.base import Estimate, Workload

FP32 = 4


class LowRankMethod(Method):
    """y = W' x + B A x, B A fitted to W - W' by what the matrix reads in the model as it is healed so far.

    Zeros, scales and packed formats stay as they are. Experts, which share a module, get none.
    """

    @property
    def compares(self) -> bool:
        """See `Method.compares`."""
        return True

    @property
    def adds(self) -> bool:
        """See `Method.adds`; where it does not, B A is added to matrices without zeros instead."""
        return True

    @abstractmethod
    def rank_of(self, rows: int, columns: int) -> int:
        """The rank of B A beside a matrix of that shape."""

    @abstractmethod
    def sums(self, columns: int) -> int:
        """How many numbers `gathered` has for so many inputs."""

    @abstractmethod
    def gathered(self, pair: Pair, site: InputSite) -> Tensor:
        """Sums over the tokens that a site reads."""

    @abstractmethod
    def factors(self, error: Tensor, read: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A `[rank, in]` and B `[out, rank]`, float64.

        Args:
            error: W - W', `[out, in]`, float64.
            read: what was gathered.
            rank: of B A; a matrix may have less.
        """

    def estimate(self, model: Decoder, work: Workload) -> Estimate:
        """See `Method.estimate`."""
        flops, largest, numbers = 0.0, 0, 0
        for index in range(len(model)):
            for site in model.sites(index):
                for projection in site.projections:
                    rows, columns = projection.weight.shape
                    if projection.expert is None:
                        flops += 2.0 * self.sums(columns) * work.tokens + 20.0 * rows * columns * min(rows, columns)
                        largest = max(largest, self.sums(columns) + columns * rows)
                        numbers += min(self.rank_of(rows, columns), rows, columns) * (rows + columns)
        whole = weights_of(model) * model.dtype.itemsize
        return Estimate(
            flops=flops,
            memory={"the dense model": whole, "sums and factors": 4 * FP32 * largest},
            runtime_bytes=numbers * model.dtype.itemsize if self.adds else 0,
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
                        f"{self.name}: no matrix of {pair.block.name} has the shape that it had in the dense model, so "
                        "that nothing is known of what it lost: use least_squares or distillation"
                    )
                keep(task, pair.index + 1, data, weights=not self.adds)
        return Healed(runtime=data)

    def _fit(self, pair: Pair, site: InputSite, masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """What is added to the projections of a site, and how many of them could be compared."""
        lost = {}
        for projection in site.projections:
            twin = pair.twin(projection)
            if twin is not None and twin.expert is None and twin.weight.shape == projection.weight.shape:
                lost[projection.name] = twin.weight.double() - projection.weight.double()
        if not any(bool(error.any()) for error in lost.values()):
            return {}, len(lost)
        read, found = self.gathered(pair, site), dict[str, Tensor]()
        for projection in site.projections:
            error = lost.get(projection.name)
            if error is None or not bool(error.any()):
                continue
            first, second = self.factors(error, read, self.rank_of(*error.shape))
            if not self.adds and bool(masks[projection.name].all()):
                projection.write(projection.weight.double() + second @ first)
                continue
            for part, tensor in zip(PARTS, (first, second), strict=True):
                found[f"{projection.name}.{part}"] = tensor.to(projection.weight.dtype).contiguous()
        return found, len(lost)
