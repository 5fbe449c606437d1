"""What tasks say of a model, item by item, so that two models can be compared on the same items."""

from dataclasses import dataclass
from typing import Any

from sparity.errors import InvalidInput
from sparity.measure.data.plain import plain
from sparity.measure.tasks.names import Way


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task.

    Attributes:
        metric: its name, with the filter behind a comma where the task has several.
        value: over all items.
        error: standard error of a mean; None for metrics that are no mean.
        items: of each item, in the order of the file.
        kind: "mean", or what `value` is of the items.
    """

    metric: str
    value: float
    error: float | None
    items: tuple[float, ...]
    kind: str = "mean"


@dataclass(frozen=True)
class TaskResult:
    """A task as one model did it.

    Attributes:
        name: without a mark of where its data lies.
        source: where that is: "own file, official format", "made here" or "official".
        version: of the task's definition.
        fewshot: examples before each question, by the task's own count.
        way: how the model read: "whole" or "steps".
        cut: questions that lost their start because they were longer than the model's context.
        hashes: of each item, what it asked; equal for two models only where they did the same items.
        scores: the first is the one that is compared and judged.
    """

    name: str
    source: str
    version: str
    fewshot: int
    way: Way
    cut: int
    hashes: tuple[str, ...]
    scores: tuple[TaskScore, ...]

    @property
    def main(self) -> TaskScore:
        """The score that is compared and judged."""
        return self.scores[0]

    @property
    def label(self) -> str:
        """The name with what must be said beside it."""
        return self.name if self.source == "official" else f"{self.name} ({self.source})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(plain({**vars(self), "scores": [vars(score) for score in self.scores]}))


def same_items(first: TaskResult, second: TaskResult) -> None:
    """Refuse two results that cannot be compared item by item.

    Raises:
        InvalidInput: other items, another number of examples, or another way of reading.
    """
    for what, a, b in (
        ("items", first.hashes, second.hashes),
        ("numbers of examples", first.fewshot, second.fewshot),
        ("ways of reading", first.way, second.way),
        ("metrics", [score.metric for score in first.scores], [score.metric for score in second.scores]),
    ):
        if a != b:
            raise InvalidInput(f"{first.name}: the two models had different {what}: run them in one command")
