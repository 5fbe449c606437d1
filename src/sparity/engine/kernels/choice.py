"""Which candidate is used: each is timed once, the winner is remembered, and every loser is told why.

`SPARITY_CHOICE=rules` turns timing off, everywhere: then a stated rule decides, the same on every machine.
"""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sparity.engine.kernels import choice_file
from sparity.engine.kernels.timing import Call, Timer, measure
from sparity.errors import InvalidInput

MARGIN = 0.03  # what a candidate must win by over the favourite: less may be the machine's noise
SMALL = 1 << 19  # bytes of a weight that is read in about 20 us: timing such a call says little
STEP = 5  # percent; weights whose share of kept values falls into the same step share their timing


class Case(NamedTuple):
    """What timings depend on, beside the machine and the versions.

    Attributes:
        format: the weight's format, or those that compete for it, joined by "/".
        values: the type of the stored values, or their encoding.
        density: the share of values that are kept, in percent, see `density_step`.
        batch: inputs per call.
        bits: of a stored value.
    """

    rows: int
    columns: int
    format: str
    values: str
    density: int
    batch: int
    threads: int
    bits: int = 16

    @property
    def key(self) -> str:
        """The name under which the choice is kept."""
        return (
            f"{self.rows}x{self.columns} {self.format} {self.values} {self.density}% batch {self.batch} "
            f"threads {self.threads}"
        )

    @property
    def nbytes(self) -> int:
        """About the bytes that one call reads."""
        return self.rows * self.columns * self.density * self.bits // 800


@dataclass(frozen=True)
class KernelCandidate:
    """One of those that competed.

    Attributes:
        seconds: per call; None when it was not timed.
        lost: why it lost; None for the winner.
    """

    name: str
    seconds: float | None
    lost: str | None


@dataclass(frozen=True)
class Choice:
    """The winner, how it was found (`timed`, or the rule in words), and all candidates."""

    winner: str
    how: str
    candidates: tuple[KernelCandidate, ...]

    @property
    def timed(self) -> bool:
        """Whether candidates were timed."""
        return self.how == TIMED


TIMED = "timed"
_deciding = threading.RLock()  # timings that run side by side would disturb each other


def density_step(kept: int, total: int) -> int:
    """The share of kept values in percent, rounded to a multiple of `STEP`."""
    return round(100 / STEP * kept / total) * STEP


def default_timer() -> Timer | None:
    """The clock, or None when `SPARITY_CHOICE=rules`.

    Raises:
        InvalidInput: the variable says something else.
    """
    asked = os.environ.get("SPARITY_CHOICE") or TIMED
    if asked not in (TIMED, "rules"):
        raise InvalidInput(f"SPARITY_CHOICE: timed or rules, not {asked!r}")
    return measure if asked == TIMED else None


def choose(
    case: Case,
    offered: Mapping[str, str | None],
    calls: Callable[[list[str]], Mapping[str, Call]],
    *,
    rule: str,
    favourite: str | None = None,
    timer: Timer | None,
) -> Choice:
    """The candidate to use for a case.

    Args:
        case: what the timing holds for.
        offered: candidate -> why it cannot run, or None when it can.
        calls: gives something to call for each named candidate; asked only when there is something to time.
        rule: the candidate that is used without timing, if it can run.
        favourite: the candidate that the others must beat by more than `MARGIN`; `rule` when not given.
        timer: seconds per call of each candidate, or None when times do not repeat; no timer = by the rule.

    Raises:
        InvalidInput: no candidate can run.
    """
    able = [name for name, reason in offered.items() if reason is None]
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in offered.items())
        raise InvalidInput(f"{case.key}: nothing can run it ({reasons})")
    fallback = rule if rule in able else able[0]
    if len(able) == 1:
        return _by_rule("the only candidate", able[0], offered)
    if timer is None:
        return _by_rule("not timed: SPARITY_CHOICE=rules", fallback, offered)
    if case.nbytes < SMALL:
        return _by_rule("not timed: too small, a call takes about 20 us or less", fallback, offered)
    favourite = rule if favourite is None else favourite
    with _deciding:
        known = choice_file.remembered(case.key)
        if known is not None and known.keys() == set(able):
            return judge(known, offered, favourite)
        times = None if known == choice_file.UNDECIDED else timer(calls(able))
        if times is None:
            choice_file.give_up(case.key)
            return _by_rule("not timed: the machine is too busy, times do not repeat", fallback, offered)
        found = judge(times, offered, favourite)
        lost = {candidate.name: candidate.lost for candidate in found.candidates if candidate.lost}
        choice_file.remember(case.key, times, found.winner, lost)
    return found


def judge(times: Mapping[str, float], offered: Mapping[str, str | None], favourite: str) -> Choice:
    """The fastest by `times`, in seconds per call; the favourite, unless one is faster by more than `MARGIN`."""
    winner = min(times, key=lambda name: times[name])
    if favourite in times and times[favourite] <= times[winner] * (1 + MARGIN):
        winner = favourite

    def lost(name: str) -> str:
        ratio = times[name] / times[winner]
        if ratio < 1:
            return f"faster by {1 / ratio - 1:.1%}: less than {MARGIN:.0%} may be noise"
        return f"{ratio:.2f}x the time"

    candidates = [
        KernelCandidate(name, times.get(name), reason or (None if name == winner else lost(name)))
        for name, reason in offered.items()
    ]
    return Choice(winner, TIMED, tuple(candidates))


def _by_rule(how: str, winner: str, offered: Mapping[str, str | None]) -> Choice:
    def lost(name: str) -> str | None:
        return None if name == winner else "not the rule's"

    return Choice(
        winner, how, tuple(KernelCandidate(name, None, reason or lost(name)) for name, reason in offered.items())
    )
