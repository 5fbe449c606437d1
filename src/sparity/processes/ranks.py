"""Several processes as `torchrun` starts them, connected by torch.distributed: gloo for the CPU, NCCL for GPUs."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sparity.errors import InvalidInput, SparityError
from sparity.processes.group import ALONE, Group

T = TypeVar("T")

PATIENCE = "SPARITY_TIMEOUT"  # seconds that a rank waits for what another one computes
DEFAULT_PATIENCE = 3600.0
JOINING = "SPARITY_JOIN_TIMEOUT"  # seconds that ranks have to come together
DEFAULT_JOINING = 120.0
stores: Any = dist  # whose stores no type checker knows, and which builds of torch without peers have not
AGES = timedelta(days=100)
LOOK = 0.05  # seconds between two looks at the store
AFTERTHOUGHT = 3.0  # seconds in which a rank that failed can say why
FAILED = "failed"


class Ranks(Group):
    """This process as one of several, found through a store that all of them see.

    An error that leaves the context is told to the others, which stop with its message; a rank that is killed is
    noticed by its closed connections.

    Args:
        store: a store of torch.distributed, empty.
        rank: of this process.
        size: how many there are, 2 or more.
        gpu: whether tensors on GPUs are exchanged too.

    Raises:
        SparityError: a rank is missing, or two processes have the same one.
    """

    def __init__(self, store: Any, rank: int, size: int, gpu: bool = False) -> None:
        self.rank, self.size = rank, size
        self._store = store
        _meet(store, rank, size)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo",
                store=stores.PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=_seconds(PATIENCE, DEFAULT_PATIENCE)),
            )
            self._patient = dist.new_group(backend="gloo", timeout=AGES)  # of those who wait for rank 0
        except RuntimeError as error:
            raise SparityError(f"rank {rank} of {size} cannot reach the others: {_first_line(error)}") from error

    def wait(self) -> None:
        """See `Group.wait`."""
        with self._explained():
            dist.barrier()

    def told(self, value: T) -> T:
        """See `Group.told`."""
        found = [value]
        with self._explained():
            dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]

    def collected(self, value: T) -> list[T]:
        """See `Group.collected`."""
        found: list[Any] = [None] * self.size
        with self._explained():
            dist.all_gather_object(found, value)
        return found

    def first_does(self, work: Callable[[], T]) -> T:
        """See `Group.first_does`."""
        found = [work() if self.first else cast(T, None)]
        with self._explained():
            dist.broadcast_object_list(found, src=0, device=torch.device("cpu"), group=self._patient)
        return found[0]

    def send(self, tensor: Tensor, rank: int) -> None:
        """See `Group.send`."""
        with self._explained():
            dist.send(_bytes_of(tensor), rank)

    def receive(self, like: Tensor, rank: int) -> Tensor:
        """See `Group.receive`."""
        found = torch.empty_like(like, memory_format=torch.contiguous_format)
        with self._explained():
            dist.recv(_bytes_of(found), rank)
        return found

    def share(self, tensor: Tensor, rank: int) -> Tensor:
        """See `Group.share`."""
        found = tensor.contiguous()
        with self._explained():
            dist.broadcast(_bytes_of(found), rank)
        return found

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Leave the group; peers are told of an error."""
        if error is not None and not isinstance(error, PeerFailed):
            said = f"{type(error).__name__}: {error}" if not isinstance(error, SparityError) else str(error)
            with suppress(RuntimeError):
                self._store.set(FAILED, json.dumps([self.rank, said]))
        dist.destroy_process_group()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What torch says of a lost connection becomes a message that names the rank that failed, where it told."""
        try:
            yield
        except RuntimeError as error:
            raise PeerFailed(self._reason(error)) from error

    def _reason(self, error: RuntimeError) -> str:
        until = time.monotonic() + AFTERTHOUGHT
        with suppress(RuntimeError):
            while time.monotonic() < until:
                if self._store.check([FAILED]):
                    rank, said = json.loads(self._store.get(FAILED))
                    return f"rank {rank} stopped: {said}"
                time.sleep(LOOK)
        return (
            f"rank {self.rank} lost another one, which was killed or did not answer ({_first_line(error)}): finished "
            "blocks stay, run the same command again with --resume"
        )


class PeerFailed(SparityError):
    """Another rank stopped, for a reason that it said or not."""


@contextmanager
def joined(device: str = "auto") -> Iterator[Group]:
    """The processes that `torchrun` started together with this one; alone where it was started by itself.

    Args:
        device: as the user names it. Each process of a machine takes a GPU of its own.

    Raises:
        InvalidInput: the environment names no possible rank, or a device that all would share.
        SparityError: a rank is missing, or two processes have the same one.
    """
    rank, size = _rank(), _size()
    if size == 1:
        yield ALONE
        return
    gpu = torch.cuda.is_available() and device != "cpu"
    if gpu:
        if torch.device("cuda" if device == "auto" else device).index is not None:
            raise InvalidInput(f"device {device}: each of {size} processes takes a GPU of its own: say `cuda`")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    with Ranks(_store(rank, size), rank, size, gpu) as group:
        yield group


def processes() -> int:
    """How many processes the environment says there are."""
    return _size()


def _rank() -> int:
    rank, size = _whole("RANK", 0), _size()
    if rank >= size:
        raise InvalidInput(f"RANK={rank} of WORLD_SIZE={size}: ranks count from 0; start the processes with torchrun")
    return rank


def _size() -> int:
    return max(_whole("WORLD_SIZE", 1), 1)


def _whole(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InvalidInput(f"{name}={text!r} is no whole number: start the processes with torchrun")
    return int(text)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        found = float(text or default)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e7:
        raise InvalidInput(f"{name}={text!r}: give seconds, more than 0")
    return found


def _store(rank: int, size: int) -> Any:
    """A store of the group's own; torchrun's agent keeps one, else rank 0 does."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise InvalidInput(
            f"WORLD_SIZE={size} without MASTER_ADDR and MASTER_PORT: start the processes with torchrun, or unset "
            "WORLD_SIZE"
        )
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = stores.TCPStore(
            address,
            int(port),
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=_seconds(JOINING, DEFAULT_JOINING)),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise SparityError(
            f"rank {rank} cannot reach {address}:{port}, where the processes meet ({_first_line(error)}): is rank 0 "
            "running, and the port free?"
        ) from error
    return stores.PrefixStore(f"sparity-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _meet(store: Any, rank: int, size: int) -> None:
    if store.add(f"come-{rank}", 1) > 1:
        raise InvalidInput(f"two processes say that they are rank {rank} of {size}: start them with torchrun")
    seconds = _seconds(JOINING, DEFAULT_JOINING)
    until = time.monotonic() + seconds
    missing = list(range(size))
    while missing := [each for each in missing if not store.check([f"come-{each}"])]:
        if time.monotonic() > until:
            named = ", ".join(map(str, missing))
            raise SparityError(
                f"rank {named} of {size} did not come within {seconds:g} seconds: look at what it says, or start "
                "fewer processes"
            )
        time.sleep(LOOK)


def _bytes_of(tensor: Tensor) -> Tensor:
    """A view of a tensor's bytes, which every back end can send; that of a copy where it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
