"""The tasks that can be asked for, without loading the harness."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from sparity.errors import InvalidInput, suggestion

FILES = Path(str(resources.files("sparity.measure.tasks").joinpath("files")))
OWN, HUB = "own_", "hub:"
Way = Literal["whole", "steps"]
WAYS: dict[Way, str] = {
    "whole": "each question with its answer in one pass",
    "steps": "the question into the cache, then the answer token by token from what the cache holds",
}
MADE = ("passkey", "several_keys", "variable_tracking", "common_words")


@cache
def own_tasks() -> tuple[str, ...]:
    """The tasks whose files are local or whose items are made here."""
    return tuple(sorted(path.stem for path in FILES.glob("*.yaml")))


def checked_tasks(names: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Task names from a list or a text with commas; `hub:NAME` is the harness's own task.

    Raises:
        InvalidInput: none, one twice, or an unknown one.
    """
    every = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    every = [name.removeprefix(OWN) for name in every]
    if not every:
        raise InvalidInput(f"no task is named; there are {', '.join(own_tasks())}, and {HUB}NAME of the harness")
    for name in every:
        if every.count(name) > 1:
            raise InvalidInput(f"the task {name} is named twice")
        if not name.startswith(HUB) and name not in own_tasks():
            raise InvalidInput(
                f"there is no local task {name!r}{suggestion(name, own_tasks())} (there are {', '.join(own_tasks())}; "
                f"{HUB}{name} would be the harness's own, which it downloads)"
            )
    return tuple(every)


def is_task(name: object) -> bool:
    """Whether a key names a task."""
    return isinstance(name, str) and (name in own_tasks() or name.startswith(HUB))


def source_of(name: str) -> str:
    """Where a task's items come from, as it stands beside every figure."""
    if name.startswith(HUB):
        return "official"
    return "made here" if name.startswith(MADE) else "own file, official format"
