"""The part of a model's evidence that is found by trying decisions, which is set up when it is first asked for."""

from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Self

from sparity.stages.base import Decision
from sparity.stages.trials import Trials


class Tried(ABC):
    """A context in which decisions are tried. What it opened is closed at its end."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._trials: Trials | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @abstractmethod
    def _begin(self) -> Trials:
        """Set the trials up; the context closes them."""

    def trial(self, decision: Decision, samples: int | None = None) -> float:
        """See `ModelEvidence.trial`."""
        return self._tried().measure(decision, samples).kl

    def block_error(self, block: int, decision: Decision, error: str = "token") -> float:
        """See `ModelEvidence.block_error`."""
        return self._tried().block_error(block, decision, error)

    def _tried(self) -> Trials:
        if self._trials is None:
            self._trials = self._open.enter_context(self._begin())
        return self._trials
