"""Runs told to experiment trackers: one hook that takes events, and adapters of trackio, wandb and mlflow for it."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from sparity.errors import InvalidInput, suggestion
from sparity.measure.data.report import Report
from sparity.pipeline.run.progress import Progress, Silence

TRACKERS = ("trackio", "wandb", "mlflow")


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        name: "phase", "block" (one was committed) or "result".
        step: blocks committed so far, over all phases.
        words: of a phase, what begins; of the result, what was done.
        numbers: of a block its seconds; of the result, what was measured.
    """

    name: Literal["phase", "block", "result"]
    step: int
    words: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


Hook = Callable[[Event], None]


def nobody(event: Event) -> None:
    """A hook that does nothing."""


class Told:
    """A progress that tells a hook of phases, blocks and the result, and another progress of the first two."""

    def __init__(self, hook: Hook, beside: Progress | None = None) -> None:
        self._hook, self._beside, self._blocks = hook, beside or Silence(), 0

    def phase(self, words: str) -> None:
        """A new phase begins."""
        self._beside.phase(words)
        self._hook(Event("phase", self._blocks, words))

    def block(self, done: int, total: int, seconds: float) -> None:
        """A block was committed."""
        self._beside.block(done, total, seconds)
        self._blocks += 1
        self._hook(Event("block", self._blocks, numbers={"seconds_per_block": seconds}))

    def result(self, report: Report) -> None:
        """The run is finished."""
        self._hook(Event("result", self._blocks, report.candidates[0].name, numbers_of(report)))


def numbers_of(report: Report) -> dict[str, float]:
    """What a report measured of its first candidate, by name; rates are medians in tokens per second."""
    candidate = report.candidates[0]
    found = {
        "sparsity": candidate.sparsity,
        "model_sparsity": candidate.model_sparsity,
        "parameters": float(candidate.parameters),
        "bytes_dense": float(candidate.bytes_dense),
        "bytes_sparse": float(candidate.bytes_sparse),
    }
    for quality in candidate.quality:
        figures = {"dense_perplexity": quality.dense_perplexity, "perplexity": quality.perplexity, "kl": quality.kl}
        found.update({f"{name}/{quality.text}": value for name, value in figures.items()})
    for speed in candidate.speeds:
        rates = {"dense": speed.dense.decode, "sparse": speed.sparse.decode}
        found.update({f"decode_{name}/batch_{speed.batch}": rate.median for name, rate in rates.items()})
    return found


@contextmanager
def tracker(name: str, project: str, settings: Mapping[str, Any]) -> Iterator[Hook]:
    """A hook that logs to a new run of a tracker, which ends with the context.

    Args:
        name: which library; it must be installed.
        project: the tracker's project, of mlflow the experiment.
        settings: what the run is told to be configured by, such as a recipe.

    Raises:
        InvalidInput: another name, or the library is not installed.
    """
    if name not in TRACKERS:
        raise InvalidInput(f'no tracker "{name}"{suggestion(name, TRACKERS)} (trackers: {", ".join(TRACKERS)})')
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        raise InvalidInput(f"{name} is not installed: pip install {name}") from error
    with (_mlflow if name == "mlflow" else _wandb)(library, project, settings) as hook:
        yield hook


@contextmanager
def _wandb(library: Any, project: str, settings: Mapping[str, Any]) -> Iterator[Hook]:
    """Of wandb, whose interface trackio has too."""
    library.init(project=project, config=dict(settings))
    try:
        yield lambda event: library.log(dict(event.numbers), step=event.step) if event.numbers else None
    finally:
        library.finish()


@contextmanager
def _mlflow(library: Any, project: str, settings: Mapping[str, Any]) -> Iterator[Hook]:
    library.set_experiment(project)
    with library.start_run():
        library.log_dict(dict(settings), "recipe.json")  # its parameters are flat and short

        def log(event: Event) -> None:
            if event.numbers:
                library.log_metrics({_allowed(key): value for key, value in event.numbers.items()}, step=event.step)

        yield log


def _allowed(name: str) -> str:
    """A name of which mlflow takes every character."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "-" for letter in name)
