"""What a token must wait for, before anything is promised: the bytes that it misses, over the speed of the disk."""

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sparity.dynamic.offload.bundle import Bundle
from sparity.dynamic.offload.layout import Layout
from sparity.dynamic.offload.reading import LARGEST_READ, PAGE, advise, fill

MOST_GAP = 16
SAMPLES, SECONDS = 512, 0.4  # of reads that measure the disk, at most
Speeds = tuple[float, float]  # of large reads, and of single records, in bytes per second


@dataclass(frozen=True)
class Bound:
    """The least that a token takes.

    Attributes:
        tokens: of calibration text that it was counted on; 0 = none was given, and every unit is taken to be needed.
        asked_bytes: that a token needs.
        missed_bytes: of these, those that are not in memory.
        speed: of the disk in large reads, in bytes per second.
        scattered: the same in reads of single units; neighbours on disk are read together, so the truth lies between.
    """

    tokens: int
    asked_bytes: float
    missed_bytes: float
    speed: float
    scattered: float = 0.0

    @property
    def seconds(self) -> float:
        """A token takes no less, where nothing is read ahead of the token before."""
        return self.missed_bytes / self.speed if self.speed else 0.0

    @property
    def hit_rate(self) -> float:
        """The share of needed bytes that are in memory."""
        return 1 - self.missed_bytes / self.asked_bytes if self.asked_bytes else 1.0

    @property
    def words(self) -> str:
        """A sentence."""
        where = f"on {self.tokens:,} tokens of calibration text" if self.tokens else "with all units needed"
        alone = f" and {self.scattered / 1e9:.2f} in reads of single units" if self.scattered else ""
        most = f"at most {1 / self.seconds:,.1f} tokens/s" if self.seconds else "the disk is no limit"
        return (
            f"a token needs {self.asked_bytes / 1e6:,.2f} MB of what is on disk and misses "
            f"{self.missed_bytes / 1e6:,.2f} MB ({100 * self.hit_rate:.0f} % are in memory, {where}); the disk gives "
            f"{self.speed / 1e9:.2f} GB/s at best{alone}: at least {1e3 * self.seconds:,.1f} ms a token, {most}"
        )


def gap_of(speeds: Speeds) -> int:
    """How many records cost less to read in passing than another call does."""
    large, single = speeds
    return min(int(large / single) - 1, MOST_GAP) if single and large > single else 0


def bound_of(bundles: Sequence[Bundle], layout: Layout, window: int | None, speeds: Speeds, begin: int = 0) -> Bound:
    """Go through the traces as decoding would, token by token from `begin` on, without reading anything."""
    tokens = min((len(bundle.trace) for bundle in bundles), default=0) - begin
    if tokens <= 0:
        whole = float(sum(bundle.units * bundle.record_bytes for bundle in bundles))
        held = sum(
            (len(hot) + room) * bundle.record_bytes
            for bundle, hot, room in zip(bundles, layout.hot, layout.room, strict=True)
        )
        return Bound(0, whole, whole - held, *speeds)
    asked = missed = 0.0
    for bundle, slots in zip(bundles, layout.slots_of([bundle.units for bundle in bundles], window), strict=True):
        for token in bundle.trace[begin:]:
            units = np.flatnonzero(token)
            load, _ = slots.take(units)
            asked += len(units) * bundle.record_bytes
            missed += len(load) * bundle.record_bytes
    return Bound(tokens, asked / tokens, missed / tokens, *speeds)


def disk_speeds(bundles: Sequence[Bundle], pool: ThreadPoolExecutor, threads: int) -> Speeds:
    """Bytes per second of large reads and of reads of single records, at random places, nothing from the cache."""
    return _speed(bundles, pool, threads, max(LARGEST_READ // bundles[0].record_bytes, 1)), _speed(
        bundles, pool, threads, 1
    )


def _speed(bundles: Sequence[Bundle], pool: ThreadPoolExecutor, threads: int, records: int) -> float:
    draw = random.Random(0)
    wanted = [draw.choice(bundles) for _ in range(min(SAMPLES, sum(bundle.units for bundle in bundles)))]
    files = {bundle.path: os.open(bundle.path, os.O_RDONLY) for bundle in bundles}
    try:
        for file in files.values():
            advise(file, 0, 0, "DONTNEED")
            advise(file, 0, 0, "RANDOM")
        places = [(each, draw.randrange(max(each.units - records, 0) + 1)) for each in wanted]
        begun = time.perf_counter()

        def some(share: Sequence[tuple[Bundle, int]]) -> int:
            count = 0
            for bundle, place in share:
                if time.perf_counter() > begun + SECONDS:
                    break
                size = min(records, bundle.units) * bundle.record_bytes
                at = bundle.offset + place * bundle.record_bytes
                fill(files[bundle.path], [memoryview(bytearray(size))], at, bundle.path)
                advise(files[bundle.path], at // PAGE * PAGE, size + PAGE, "DONTNEED")
                count += size
            return count

        done = list(pool.map(some, [places[at::threads] for at in range(threads)]))
        return sum(done) / max(time.perf_counter() - begun, 1e-9)
    finally:
        for file in files.values():
            os.close(file)
