"""`sparity compare A B C`: models beside the first of them, in one table and on one page."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.options import Dtype, Field, Force, Json, Quiet
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
    from sparity.pipeline.run.tokens import MeasuredText

RESULTS = ("compare.json", "compare.html")


def compare(
    models: Annotated[
        list[str], typer.Argument(help="Two models or more; the first is what the others are compared with.")
    ],
    text: Annotated[list[str] | None, typer.Option(help="Text or .npy of token ids; may be repeated.")] = None,
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
    speed: Annotated[bool, typer.Option(help="Whether speed and memory are measured, in bfloat16.")] = True,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt of the speed test.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens timed after the first.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Measurements of speed.")] = 5,
    dtype: Dtype = "auto",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A folder for compare.json and compare.html.")
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare models: perplexity, KL and top-1 to the first, tasks item by item, speed in turns, memory."""
    with console.errors_in_one_line():
        from sparity.errors import InvalidInput
        from sparity.files import make_folder, write_json, write_text
        from sparity.measure.show.page_compare import render_comparison
        from sparity.measure.show.table_compare import print_comparison
        from sparity.measure.timing.bench import Protocol
        from sparity.pipeline.run.result_folder import named_folder
        from sparity.pipeline.run.tokens import measured_text
        from sparity.pipeline.studies.comparing import Asked, compare_models

        wanted, settings = task_settings(tasks, data, fewshot, limit, batch, context, items, way)
        folder = None if output is None else named_folder(output)
        if folder is not None and not force and any((folder / name).exists() for name in RESULTS):
            raise InvalidInput(
                f"{folder} holds a comparison already: choose another output or pass --force to replace it"
            )
        if folder is not None:
            make_folder(folder)

        def measured(first: Any, tokenizer: Any) -> "list[MeasuredText]":
            named = measured_on(text, field, protocol, tasks=False)
            return [measured_text(each, tokenizer, first, window, windows) for each in named]

        asked = Asked(wanted, settings, Protocol(prompt, tokens, rounds, (1,)) if speed else None, dtype)
        with console.ProgressBar(quiet or json) as progress:
            report = compare_models(models, measured, asked, progress.phase)
        if folder is not None:
            write_json(folder / RESULTS[0], report.to_dict())
            write_text(folder / RESULTS[1], render_comparison(report))
    if json:
        console.print_json(report.to_dict())
    elif not quiet:
        print_comparison(report, console.out)
        if folder is not None:
            console.out.print(f"saved to {folder}; page: {folder / RESULTS[1]}", soft_wrap=True)
