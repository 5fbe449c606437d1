"""Tasks of a recipe: both models asked the same items, and what the limits on them say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparity.errors import InvalidInput
from sparity.measure.data.report import Verdict
from sparity.measure.data.task_comparison import TaskComparison
from sparity.measure.show.sentences_tasks import points, setting_words
from sparity.measure.tasks.names import HUB
from sparity.measure.tasks.pairs import run_beside
from sparity.measure.tasks.running import missing
from sparity.measure.tasks.section import Tasks, limit_of
from sparity.quality.paired import Pairs, largest_drop


def check_tasks(tasks: Tasks | None, tokenizer: Any) -> None:
    """Refuse tasks that could not be asked once the model is made.

    Raises:
        InvalidInput: the harness is not installed, or the model has no tokenizer.
    """
    if tasks is None:
        return
    if reason := missing():
        raise InvalidInput(f"measure.tasks: {reason}")
    if tokenizer is None:
        raise InvalidInput("measure.tasks: the model has no tokenizer, and tasks are texts")


def ask_tasks(
    tasks: Tasks, dense: Any, sparse: Any, tokenizer: Any
) -> tuple[tuple[TaskComparison, ...], tuple[str, ...]]:
    """What tasks say of the sparse model beside the dense one, and in a sentence each how they were asked."""
    asked, compared = run_beside(sparse, dense, tokenizer, tasks.names, tasks.settings)
    return compared, tuple(setting_words(each) for each in asked)


def judge_tasks(limits: Mapping[str, str], found: Sequence[TaskComparison]) -> Iterator[Verdict]:
    """A verdict per limit: it is kept where the sample rules out a drop as large, see `largest_drop`."""
    for name, words in limits.items():
        limit, confidence = limit_of(words)
        official = name.startswith(HUB)
        one = next(
            (each for each in found if each.name == name.removeprefix(HUB) and (each.source == "official") == official),
            None,
        )
        what = f"{name}: {words}"
        if one is None or one.lost is None or one.won is None:
            yield Verdict(what, "not measured" if one is None else "not judged: no score of right and wrong", False)
            continue
        largest = largest_drop(Pairs(one.items - one.lost - one.won, one.lost, one.won, 0), confidence)
        reached = f"{points(one.change)}; {one.items:,} items do not rule out a drop of {largest * 100:.2f} pt"
        yield Verdict(what, reached, largest < limit)
