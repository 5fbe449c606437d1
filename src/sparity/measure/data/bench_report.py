"""How fast models generate beside each other: the data of `bench.json`. `docs/bench.md` describes it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparity.measure.data.plain import plain
from sparity.measure.data.report import Pace, Spread

FORMAT = 1


@dataclass(frozen=True)
class Runner:
    """One contender: its name, what computes it, and the bytes of weights that it holds in memory."""

    name: str
    computed: str
    weight_bytes: int


@dataclass(frozen=True)
class Timing:
    """One contender at one batch size; `token` is in seconds, `pace.decode` counts the tokens of the whole batch."""

    name: str
    batch: int
    pace: Pace
    token: Spread
    peak_memory: int | None  # resident bytes of a process of its own, Python and PyTorch among them


@dataclass(frozen=True)
class Ratio:
    """The subject against one opponent at one batch size, round by round; above 1 where the subject is faster."""

    against: str
    batch: int
    decode: Spread
    first_token: Spread


@dataclass(frozen=True)
class Skipped:
    """A batch size that was not run, and why."""

    batch: int
    reason: str


@dataclass(frozen=True)
class BenchReport:
    """All contenders timed in one run; the last of `runners` is the subject of every ratio."""

    model: str
    architecture: str
    prompt: int
    tokens: int
    rounds: int
    threads: int
    interleaved: bool  # False: there was no room for all, so each ran its rounds alone, one after another
    runners: tuple[Runner, ...]
    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The content of `bench.json`."""
        content: dict[str, Any] = plain({"format": FORMAT, **dataclasses.asdict(self)})
        return content

    @property
    def batches(self) -> list[int]:
        """The batch sizes that were run."""
        return list(dict.fromkeys(timing.batch for timing in self.timings))

    def at(self, batch: int) -> list[tuple[Timing, Ratio | None]]:
        """What was measured at one batch size, each opponent with the subject's ratio to it; the subject has none."""
        ratios = {ratio.against: ratio for ratio in self.ratios if ratio.batch == batch}
        return [(timing, ratios.get(timing.name)) for timing in self.timings if timing.batch == batch]
