"""The models that a server answers with, the thread that computes, and what is counted."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sparity.errors import InvalidInput
from sparity.serve.guard.guard import Guard
from sparity.serve.http.metrics import Metrics
from sparity.serve.scheduler import Scheduler
from sparity.serve.sequence import Answer
from sparity.serve.served_model import ServedModel
from sparity.serve.worker import Worker


@dataclass(frozen=True)
class Split:
    """Another model under the name of the first.

    Attributes:
        other: the model, with the same tokens.
        share: of the requests that it answers.
    """

    other: ServedModel
    share: float


class Service:
    """Models under their names.

    Args:
        models: of different names; the first answers requests that name none.
        guard: of the first of them, which then answers in its place, or the dense model.
        split: what else answers in the first one's place.

    Attributes:
        models: by name.
        every: of all that answer.
        metrics: of all of them.
        worker: the thread; `start` begins it.

    Raises:
        InvalidInput: two have one name, or the other model of a split has other tokens than the first.
    """

    def __init__(self, models: Sequence[ServedModel], guard: Guard | None = None, split: Split | None = None) -> None:
        self.models: Mapping[str, ServedModel] = {model.name: model for model in models}
        if len(self.models) < len(models):
            raise InvalidInput(f"two models have one name: {', '.join(model.name for model in models)}")
        self._default, self._guard, self._split = models[0], guard, split
        self._draws = random.Random()
        every = [*models] if guard is None else [*models, guard.dense]
        if split is not None:
            split.other.kind = "other"
            split.other.check_stands_in(models[0])
            every.append(split.other)
        self.every: Sequence[ServedModel] = every
        self.metrics = Metrics(every, guard)
        for model in every:
            model.scheduler.finished = partial(self._finished, model.scheduler)
        spare = (lambda: False) if guard is None else guard.go_on
        self.worker = Worker([model.scheduler for model in every], spare, self.metrics.stepped)

    @property
    def alive(self) -> bool:
        """Whether answers are worked on."""
        return self.worker.is_alive()

    def route(self, name: str | None) -> ServedModel | None:
        """The model that answers a request for a name, or for none; None where there is no such model."""
        found = self._default if name is None else self.models.get(name)
        if self._split is not None and found is self._default and self._draws.random() < self._split.share:
            return self._split.other
        return self._guard.serving if self._guard is not None and found is self._guard.sparse else found

    def start(self) -> None:
        """Begin to work."""
        self.worker.start()

    def close(self) -> None:
        """End all answers and stop."""
        self.worker.close()

    def _finished(self, scheduler: Scheduler, answer: Answer) -> None:
        if answer.order.forced:  # the guard's own
            return
        self.metrics.finished(scheduler, answer)
        if self._guard is not None and scheduler in (self._guard.sparse.scheduler, self._guard.dense.scheduler):
            self._guard.finished(answer)
