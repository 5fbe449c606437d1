"""Two models on one task, item by item."""

from dataclasses import dataclass, replace

from sparity.measure.data.task_report import TaskResult, same_items
from sparity.quality.paired import (
    CONFIDENCE,
    Pairs,
    bootstrap,
    largest_drop,
    mcnemar,
    smallest_difference,
)


@dataclass(frozen=True)
class TaskComparison:
    """What a task says of a model beside a first one.

    Attributes:
        name: of the task.
        source: where its items lie.
        metric: that is compared.
        items: that both models did.
        first: the first model's value.
        second: the other's.
        change: second - first, and for scores of 0 and 1 a share.
        low: the lower end of the 95 % interval of the change, by the paired bootstrap.
        high: the upper end.
        lost: items that only the first got right; None for scores that are not 0 or 1, as the rest.
        won: items that only the second got right.
        p: of McNemar's exact test.
        drop: the largest drop that is not ruled out, one-sided at 95 %.
        visible: the smallest true difference that so many items show four times in five.
    """

    name: str
    source: str
    metric: str
    items: int
    first: float
    second: float
    change: float
    low: float
    high: float
    lost: int | None = None
    won: int | None = None
    p: float | None = None
    drop: float | None = None
    visible: float | None = None

    @property
    def differs(self) -> bool:
        """Whether the interval rules out that both are alike."""
        return self.low > 0 or self.high < 0


def compare_task(first: TaskResult, second: TaskResult, confidence: float = CONFIDENCE) -> TaskComparison:
    """The main score of a task, of two models that did the same items.

    Raises:
        InvalidInput: they did not.
    """
    same_items(first, second)
    a, b = first.main, second.main
    low, high = bootstrap(a.items, b.items, confidence)
    change = sum(b.items) / len(b.items) - sum(a.items) / len(a.items)
    found = TaskComparison(first.name, first.source, a.metric, len(a.items), a.value, b.value, change, low, high)
    if not {*a.items, *b.items} <= {0.0, 1.0}:
        return found
    pairs = Pairs.of(a.items, b.items)
    return replace(
        found,
        lost=pairs.lost,
        won=pairs.won,
        p=mcnemar(pairs),
        drop=largest_drop(pairs, confidence),
        visible=smallest_difference(pairs.items, pairs.discordant, confidence),
    )
