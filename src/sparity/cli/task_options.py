"""Options of the verbs that evaluate models: tasks, and protocols of perplexity."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sparity.measure.tasks.running import Settings
    from sparity.recipe import Text

TaskNames = Annotated[
    str | None, typer.Option(help="Tasks with commas between them, such as arc_easy,piqa: docs/eval.md.")
]
TaskData = Annotated[str | None, typer.Option(help="The folder of local task files; else the variable SPARITY_DATA.")]
Fewshot = Annotated[int | None, typer.Option(min=0, help="Examples before each question; else what a task says, or 0.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many items of each task.")]
Batch = Annotated[int, typer.Option(min=1, help="Questions per pass; the same for every model.")]
Context = Annotated[int, typer.Option(min=32, help="Tokens of the long texts that are made.")]
Items = Annotated[int, typer.Option(min=1, help="How many long texts are made for each task.")]
Way = Annotated[
    str | None,
    typer.Option(help="whole: one pass; steps: from the cache. Else steps where a model's cache has a policy."),
]

PerplexityProtocol = Annotated[
    str | None,
    typer.Option(help="wikitext2, c4, ptb or ptb-gptq: as papers measure it; --text may name the file of its split."),
]


def measured_on(text: list[str] | None, field: str, protocol: str | None, tasks: bool) -> "list[Text]":
    """The texts that options name; Python's documentation where there are none, and nothing where tasks are asked.

    Raises:
        InvalidInput: no such protocol, or several files for one.
    """
    from sparity.calibration.protocols import PROTOCOLS
    from sparity.errors import InvalidInput
    from sparity.recipe import Text

    if protocol is None:
        return [Text.named(name, field) for name in text or ([] if tasks else ["python-docs:held-out"])]
    if protocol not in PROTOCOLS:
        raise InvalidInput(f"--protocol {protocol}: one of {', '.join(PROTOCOLS)}")
    if len(text or ()) > 1:
        raise InvalidInput(f"--protocol {protocol} is measured on one text: name one file, or none to download it")
    return [Text.model_validate({"protocol": protocol, "text": text[0] if text else None})]


def task_settings(
    tasks: str | None,
    data: str | None,
    fewshot: int | None,
    limit: int | None,
    batch: int,
    context: int,
    items: int,
    way: Any,
) -> tuple[tuple[str, ...], "Settings | None"]:
    """The tasks that are asked for, checked before any model is loaded, and how.

    Raises:
        InvalidInput: an unknown task or way, or the harness is not installed.
    """
    if tasks is None:
        return (), None
    from sparity.errors import InvalidInput
    from sparity.measure.tasks.names import WAYS, checked_tasks
    from sparity.measure.tasks.running import Settings, missing

    if way is not None and way not in WAYS:
        raise InvalidInput(f"--way {way}: {' or '.join(WAYS)}")
    wanted = checked_tasks(tasks)
    if reason := missing():
        raise InvalidInput(reason)
    return wanted, Settings(data, fewshot, limit, batch, context, items, way=way)
