"""What a search is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from sparity.errors import InvalidInput, suggestion
from sparity.pipeline.studies.tuning.costs import Goal
from sparity.pipeline.studies.tuning.limits import Limits
from sparity.pipeline.studies.tuning.losses import Measure
from sparity.pipeline.studies.tuning.menu import Menu

GOALS: tuple[str, ...] = get_args(Goal)
WAYS: tuple[str, ...] = get_args(Measure)


@dataclass(frozen=True)
class Tuning:
    """What is asked for.

    Attributes:
        limits: what may be lost, and must be gained.
        goal: what is to be had for it.
        menu: what can be chosen.
        measure: each unit alone, or roles and blocks (`separable`), or what the time allows.
        minutes: about how long measuring each unit alone may take before roles and blocks are measured instead.
        samples: calibration sequences on which units are measured.
        pairs: pairs of units whose errors are measured together.
        runs: of the answer, at most; a further one is made where one misses the limit, or leaves much of it.
    """

    limits: Limits
    goal: Goal = "tokens/s"
    menu: Menu = field(default_factory=Menu.read)
    measure: Measure = "auto"
    minutes: float = 10.0
    samples: int = 8
    pairs: int = 0
    runs: int = 3

    @classmethod
    def of(
        cls,
        max_ppl: str | None,
        maximise: str,
        max_kl: float | None,
        at_least: str | None,
        choices: str | Path | Mapping[str, Any] | None,
        how: str,
        minutes: float,
        samples: int,
        pairs: int,
        runs: int,
    ) -> "Tuning":
        """From what users write, see `study.tune`.

        Raises:
            InvalidInput: a limit or a menu that is none, an unknown goal or way to measure, or too few of something.
        """
        goal, measure = _one_of(GOALS, maximise, "maximise"), _one_of(WAYS, how, "how")
        for name, count, least in (("samples", samples, 1), ("pairs", pairs, 0), ("runs", runs, 1)):
            if count < least:
                raise InvalidInput(f"{name} {count}: at least {least}")
        limits = Limits.of(max_ppl, max_kl, at_least)
        return cls(limits, goal, Menu.read(choices), measure, minutes, samples, pairs, runs)  # type: ignore[arg-type]

    def identity(self) -> dict[str, Any]:
        """What makes two searches the same."""
        return {
            "limits": [self.limits.words, self.limits.least],
            "goal": self.goal,
            "menu": self.menu.model_dump(mode="json"),
            "measured": [self.measure, self.samples, self.pairs, self.runs],
        }


def _one_of(known: tuple[str, ...], asked: str, what: str) -> str:
    if asked not in known:
        raise InvalidInput(f"{what} {asked!r}{suggestion(asked, known)} (use {', '.join(known)})")
    return asked
