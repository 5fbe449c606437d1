"""The processes that do one run together; alone, as nearly always, there is nobody to wait for."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Group:
    """A process and its peers, each with a rank from 0; this one is alone.

    Whatever is exchanged, all ranks must ask for it in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and talks to the user."""
        return self.rank == 0

    @property
    def peers(self) -> range:
        """All ranks, this one among them."""
        return range(self.size)

    def wait(self) -> None:
        """Until every rank has come here: what they wrote before can be read then."""

    def told(self, value: T) -> T:
        """What rank 0 gave; the others' own value counts for nothing."""
        return value

    def collected(self, value: T) -> list[T]:
        """What every rank gave, by rank."""
        return [value]

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, however long that takes; the others do nothing meanwhile."""
        return work()

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a tensor's bytes to another rank, which must `receive` them."""
        raise ValueError(f"there is no rank {rank}")

    def receive(self, like: Tensor, rank: int) -> Tensor:
        """The tensor that another rank sends, of the shape, type and device of `like`, whose content is lost."""
        raise ValueError(f"there is no rank {rank}")

    def share(self, tensor: Tensor, rank: int) -> Tensor:
        """The tensor that one rank has, on all of them; the others give one of its shape and type."""
        return tensor

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Leave the group; peers are told of an error."""


ALONE = Group()
