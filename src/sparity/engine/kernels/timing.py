"""Seconds per call of candidates that take turns, with the caches cold, as a model's next layer finds them."""

import time
from collections.abc import Callable, Mapping
from glob import glob
from pathlib import Path

import torch

Call = Callable[[], object]
Timer = Callable[[Mapping[str, Call]], Mapping[str, float] | None]

LEAST_CALLS = 9  # that count, per candidate
LEAST_ROUNDS = 2 * LEAST_CALLS  # before a machine counts as busy: calls of large weights are long
BUDGET = 1.0  # seconds, beyond which no further round begins, unless there were fewer
AGREE = 0.1  # how far the lower quartile may lie above the fastest call
UNDISTURBED = 0.02  # share of its time that a call's threads may have waited for a core
SWEPT = 64 << 20  # bytes read before each call: more than the last cache of common processors


def measure(calls: Mapping[str, Call], clock: Callable[[], float] = time.perf_counter) -> dict[str, float] | None:
    """Candidate -> seconds per call, the lower quartile over rounds in which all take turns, after one to warm up.

    A call in which a thread had to wait for a core does not count, where the system tells. None when the machine is too
    busy to tell: too few calls count, or a candidate's fastest ones do not agree.
    """
    sweep = torch.ones(SWEPT // 8, dtype=torch.int64)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begun, rounds = clock(), 0
    while not all(map(_settled, taken.values())):
        if clock() - begun > BUDGET and rounds >= LEAST_ROUNDS:
            return None
        for name, call in list(calls.items())[:: -1 if rounds % 2 else 1]:
            sweep.sum()
            waited, before = _waited(), clock()
            call()
            seconds = clock() - before
            if _waited() - waited <= UNDISTURBED * seconds:
                taken[name].append(seconds)
        rounds += 1
    return {name: _quartile(found) for name, found in taken.items()}


def _settled(seconds: list[float]) -> bool:
    return len(seconds) >= LEAST_CALLS and _quartile(seconds) <= min(seconds) * (1 + AGREE)


def _quartile(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 4]


def _waited() -> float:
    """Seconds that this process's threads have waited for a core so far; 0 where the system does not tell."""
    total = 0
    for path in glob("/proc/self/task/*/schedstat"):
        try:
            total += int(Path(path).read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue  # the thread has ended
    return total / 1e9
