"""`sparity eval MODEL`: perplexity, and KL, agreement, speed and tasks against another model."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparity.cli import console
from sparity.cli.options import Device, Dtype, Field, Json, Model
from sparity.cli.task_options import (
    Batch,
    Context,
    Fewshot,
    Items,
    Limit,
    PerplexityProtocol,
    TaskData,
    TaskNames,
    Way,
    measured_on,
    task_settings,
)

if TYPE_CHECKING:
    from sparity.measure.data.task_comparison import TaskComparison
    from sparity.measure.data.task_report import TaskResult


def evaluate(
    model: Model,
    text: Annotated[list[str] | None, typer.Option(help="Text or .npy of token ids; may be repeated.")] = None,
    against: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Only so many windows of each text; else all.")] = None,
    field: Field = "text",
    protocol: PerplexityProtocol = None,
    tasks: TaskNames = None,
    data: TaskData = None,
    fewshot: Fewshot = None,
    limit: Limit = None,
    batch: Batch = 1,
    context: Context = 512,
    items: Items = 100,
    way: Way = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure perplexity on texts and tasks; with --against also KL, top-1 agreement and speed, the two taking turns.

    With --tasks and without --text only the tasks are asked; two models are compared item by item.
    """
    with console.errors_in_one_line():
        from sparity.checkpoints.weight_files import is_read_packed
        from sparity.measure.timing.speed import compare_speed
        from sparity.models import transformers as hf
        from sparity.models.loading import load, load_tokenizer
        from sparity.models.transformers import context_length
        from sparity.pipeline.run.tokens import default_device, measured_text
        from sparity.quality.agreement import compare
        from sparity.quality.perplexity import perplexity
        from sparity.recipe import SpeedTest

        wanted, settings = task_settings(tasks, data, fewshot, limit, batch, context, items, way)
        place = default_device(device)
        if any(is_read_packed(hf.locate(name)) for name in (model, against) if name):
            place = "cpu"  # packed weights are multiplied there
        subject, tokenizer = load(model, device=place, dtype=dtype), load_tokenizer(model)
        dense = load(against, device=place, dtype=dtype) if against else None
        rows: list[dict[str, Any]] = []
        for each in measured_on(text, field, protocol, bool(wanted)):
            found = measured_text(each, tokenizer, subject, window, windows)
            row: dict[str, Any] = {"text": found.name, "window": found.window}
            if dense is None:
                row["perplexity"] = perplexity(subject, found.ids, found.window)
            else:
                row |= asdict(compare(dense, subject, found.ids, found.window))
            rows.append(row)
        speed = None
        if dense is not None and rows:
            test = SpeedTest.fitting(context_length(subject.config))
            speed = asdict(compare_speed(dense, subject, found.ids, test.prompt, test.tokens, test.rounds))
        asked: tuple[TaskResult, ...] = ()
        compared: tuple[TaskComparison, ...] = ()
        if wanted:
            from sparity.measure.tasks.pairs import run_beside

            asked, compared = run_beside(subject, dense, tokenizer, wanted, settings)
    if json:
        console.print_json(
            {
                "model": model,
                "against": against,
                "quality": rows,
                "speed": speed,
                "tasks": [each.to_dict() for each in asked],
                "differences": [asdict(each) for each in compared],
            }
        )
        return
    title = model if against is None else f"{model} against {against}"
    if rows:
        _print_rows(title, rows)
    if speed is not None:
        _print_speed(speed)
    if asked:
        from sparity.measure.show.table_tasks import print_tasks

        console.out.print(title, style="bold")
        print_tasks(asked, compared, console.out)


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.out.print(table)


def _print_speed(speed: dict[str, Any]) -> None:
    ratio = speed["decode_ratio"]
    console.out.print(
        f"decode {speed['sparse']['decode']['median']:.1f} tokens/s, "
        f"dense {speed['dense']['decode']['median']:.1f}: "
        f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
    )
    if (ours := speed["engine_dense"]) is not None:
        ratio = ours["decode_ratio"]
        console.out.print(
            f"dense on our kernels {ours['pace']['decode']['median']:.1f} tokens/s: "
            f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}) is sparsity"
        )
