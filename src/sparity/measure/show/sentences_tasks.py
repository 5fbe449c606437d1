"""What is said about tasks and about the difference of two models on them."""

from sparity.measure.data.task_comparison import TaskComparison
from sparity.measure.data.task_report import TaskResult, TaskScore
from sparity.measure.show import numbers
from sparity.measure.tasks.names import WAYS
from sparity.measure.tasks.planning import Needed

PAIRED = (
    "Intervals are of the change in points, by the paired bootstrap at 95 %; p is McNemar's exact test; lost and won "
    "are items that only one of both got right."
)


def points(change: float) -> str:
    """A change of a share as "+1.2 pt"."""
    return f"{change * 100:+.1f} pt"


def score_words(score: TaskScore) -> str:
    """A value as "41.2 % ± 1.4", with its standard error where it is a mean of right and wrong."""
    if score.kind != "mean" or not set(score.items) <= {0.0, 1.0}:
        return numbers.perplexity(score.value)
    error = "" if score.error is None else f" ± {score.error * 100:.1f}"
    return f"{numbers.percent(score.value)}{error}"


def change_words(one: TaskComparison) -> str:
    """The change with its interval: "-1.2 pt [-2.5, +0.1]"."""
    if one.drop is None:
        return f"{one.change:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
    return f"{points(one.change)} [{one.low * 100:+.1f}, {one.high * 100:+.1f}]"


def verdict_words(one: TaskComparison) -> str:
    """What the sample says, in a sentence."""
    if one.visible is None:
        return "differs" if one.differs else "no difference seen"
    if one.differs:
        return "better" if one.change > 0 else "worse"
    return f"no difference seen; {one.items:,} items show {one.visible * 100:.1f} pt or more"


def setting_words(result: TaskResult) -> str:
    """How a task was asked: examples, way of reading, what was cut."""
    parts = [f"{result.fewshot}-shot", f"definition {result.version}", f"read {WAYS[result.way]}"]
    if result.cut:
        parts.append(f"{result.cut} prompts lost their start: longer than the model's context")
    return f"{result.name}: {'; '.join(parts)}."


def describe_needed(one: Needed) -> str:
    """Whether a limit on a task can be kept by its sample."""
    needed = ", ".join(f"{items:,} if {share:.0%} of the answers differ" for share, items in one.needed.items())
    there = "how many there are is not known here" if one.items is None else f"there are {one.items:,}"
    said = f"{one.name}: {one.limit}: a model that loses nothing passes four times in five with {needed}; {there}"
    return f"{said}: too few, the limit will seldom be kept" if one.hopeless else said
