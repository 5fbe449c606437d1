"""Records from disk into their slots, by several threads; nothing of them stays in the system's file cache."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from sparity.dynamic.offload.arena import Arena
from sparity.dynamic.offload.bundle import Bundle
from sparity.dynamic.offload.slots import NOWHERE, Load
from sparity.errors import CorruptFile, SparityError

MOST_BUFFERS = 512  # of one call; systems take 1024
LARGEST_READ = 1 << 20  # bytes of one call, so that threads have something to share
PAGE = 4096


@dataclass
class Counts:
    """What reading has come to.

    Attributes:
        asked: units that tokens needed.
        missed: of these, those that were in memory neither from before nor read ahead.
        ahead: units that were read ahead.
        ahead_used: of these, those that the next token needed.
        bytes: read.
        calls: of the system.
    """

    asked: int = 0
    missed: int = 0
    ahead: int = 0
    ahead_used: int = 0
    bytes: int = 0
    calls: int = 0

    @property
    def words(self) -> str:
        """A sentence."""
        return (
            f"{self.asked:,} units were needed, {100 * self.hit_rate:.1f} % of them in memory ({self.ahead_used:,} of "
            f"{self.ahead:,} that were read ahead); {self.bytes / 1e6:,.1f} MB were read"
        )

    @property
    def hit_rate(self) -> float:
        """The share of needed units that were in memory when they were needed."""
        return 1 - self.missed / self.asked if self.asked else 1.0


class Reader:
    """Reads records of one bundle.

    Args:
        bundle: open.
        pool: of threads; reads of one call are shared out among them.
        threads: how many these are.
        counts: what is counted.
        gap: so many records between two that are wanted are read too, where that is faster than another call.
    """

    def __init__(self, bundle: Bundle, pool: ThreadPoolExecutor, threads: int, counts: Counts, gap: int = 0) -> None:
        self.bundle, self._pool, self._threads, self._counts, self._gap = bundle, pool, threads, counts, gap
        self._lock, self._scrap = Lock(), memoryview(bytearray(bundle.record_bytes))  # nobody looks at what lands there
        try:
            self._file = os.open(bundle.path, os.O_RDONLY)
        except OSError as error:
            raise CorruptFile(f"{bundle.path} cannot be opened ({error.strerror}): write the model again") from error
        advise(self._file, 0, 0, "RANDOM")  # what lies beside a record is not read with it

    def close(self) -> None:
        """No more reads."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def read(self, load: Load, arena: Arena) -> None:
        """Fill the slots; neighbours in the file are one call.

        Raises:
            CorruptFile: the file has become shorter.
            SparityError: the disk gives an error, or the model was closed.
        """
        if self._file < 0:
            raise SparityError(f"{self.bundle.path}: the model was closed: load it again")
        runs = self._runs(load)
        shares = [runs[at :: self._threads] for at in range(min(self._threads, len(runs)))]
        if len(shares) == 1:
            self._read_runs(shares[0], arena)
        else:
            for done in [self._pool.submit(self._read_runs, share, arena) for share in shares]:
                done.result()
        with self._lock:
            self._counts.bytes += sum(len(slots) for _, slots in runs) * self.bundle.record_bytes
            self._counts.calls += len(runs)

    def _runs(self, load: Load) -> list[tuple[int, list[int]]]:
        """The first place in the file, and the slots, of each run of neighbours; a record between them has none, -1."""
        if not len(load):
            return []
        places = self.bundle.place_of[load.units]
        order = np.argsort(places)
        places, slots = places[order], load.slots[order]
        most = max(1, min(MOST_BUFFERS // len(self.bundle.widths), LARGEST_READ // self.bundle.record_bytes))
        ends = np.flatnonzero(np.diff(places) > 1 + self._gap) + 1
        runs = []
        for run, where in zip(np.split(places, ends), np.split(slots, ends), strict=True):
            first = int(run[0])
            every = np.full(int(run[-1]) - first + 1, NOWHERE)
            every[run - first] = where
            for at in range(0, len(every), most):
                wanted = np.flatnonzero(every[at : at + most] != NOWHERE)
                if len(wanted):
                    begin, end = at + int(wanted[0]), at + int(wanted[-1]) + 1
                    runs.append((first + begin, every[begin:end].tolist()))
        return runs

    def _read_runs(self, runs: Sequence[tuple[int, list[int]]], arena: Arena) -> None:
        for place, slots in runs:
            at = self.bundle.offset + place * self.bundle.record_bytes
            room = [view for slot in slots for view in (arena.room(slot) if slot != NOWHERE else (self._scrap,))]
            fill(self._file, room, at, self.bundle.path)
            end = at + len(slots) * self.bundle.record_bytes
            begin = at // PAGE * PAGE
            advise(self._file, begin, -(-end // PAGE) * PAGE - begin, "DONTNEED")


def fill(file: int, room: list[memoryview], offset: int, path: Path) -> None:
    """Read as many bytes as there is room for, from `offset` of an open file on.

    Raises:
        CorruptFile: the file ends before.
        SparityError: the disk gives an error.
    """
    while room:
        try:
            found = os.preadv(file, room, offset)
        except OSError as error:
            raise SparityError(f"{path} cannot be read at {offset:,} ({error.strerror}): check the disk") from error
        if not found:
            raise CorruptFile(f"{path} ends at byte {offset:,}, within its records: write the model again")
        offset += found
        while room and found >= len(room[0]):
            found -= len(room[0])
            room = room[1:]
        if found:
            room = [room[0][found:], *room[1:]]


def advise(file: int, begin: int, count: int, what: str) -> None:
    """Tell the system how a file is read, where it can be told."""
    code: Any = getattr(os, f"POSIX_FADV_{what}", None)
    if code is not None:
        os.posix_fadvise(file, begin, count, code)
