"""The models that a server answers with, the thread that computes, and what is counted."""

from collections.abc import Mapping, Sequence
from functools import partial

from sparity.errors import InvalidInput
from sparity.serve.http.metrics import Metrics
from sparity.serve.served_model import ServedModel
from sparity.serve.worker import Worker


class Service:
    """Models under their names.

    Args:
        models: of different names; the first answers requests that name none.

    Attributes:
        models: by name.
        metrics: of all of them.
        worker: the thread; `start` begins it.

    Raises:
        InvalidInput: two have one name.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.models: Mapping[str, ServedModel] = {model.name: model for model in models}
        if len(self.models) < len(models):
            raise InvalidInput(f"two models have one name: {', '.join(model.name for model in models)}")
        self._default = models[0]
        self.metrics = Metrics(models)
        for model in models:
            model.scheduler.finished = partial(self.metrics.finished, model.scheduler)
        self.worker = Worker([model.scheduler for model in models], stepped=self.metrics.stepped)

    @property
    def alive(self) -> bool:
        """Whether answers are worked on."""
        return self.worker.is_alive()

    def route(self, name: str | None) -> ServedModel | None:
        """The model that answers a request for a name, or for none; None where there is no such model."""
        return self._default if name is None else self.models.get(name)

    def start(self) -> None:
        """Begin to work."""
        self.worker.start()

    def close(self) -> None:
        """End all answers and stop."""
        self.worker.close()
