"""`sparity sensitivity MODEL`: what sparsity costs in each part of a model."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparity.cli import console
from sparity.cli.options import (
    CalibrationText,
    Device,
    Dtype,
    Field,
    Force,
    Json,
    Length,
    Model,
    Pattern,
    Quiet,
    ResultFolder,
    Resume,
    Score,
    Seed,
    Solver,
)
from sparity.cli.sections import calibration_section

if TYPE_CHECKING:
    from sparity.measure.data.sensitivity_report import SensitivityReport


def sensitivity(
    model: Model,
    output: ResultFolder,
    ratios: Annotated[list[float] | None, typer.Option("--ratio", help="A sparsity to try; may be repeated.")] = None,
    score: Score = None,
    pattern: Pattern = "unstructured",
    solver: Solver = "mask_only",
    unseen_expert: Annotated[
        str, typer.Option(help="What becomes of an expert that sees no token: error, magnitude or dense.")
    ] = "error",
    text: CalibrationText = None,
    field: Field = "text",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 32,
    length: Length = None,
    seed: Seed = 0,
    measure: Annotated[str, typer.Option(help="Text to measure on, or .npy of token ids.")] = "python-docs:held-out",
    window: Annotated[int, typer.Option(help="Tokens per window that is measured.")] = 256,
    windows: Annotated[int, typer.Option(help="How many windows are measured.")] = 8,
    batch: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune every layer, and attention and MLP of every block, alone at several ratios; measure KL and perplexity.

    Writes sensitivity.json and a page with plots. The table is also a budget: `budget: {knapsack: {table: FILE}}`.
    """
    with console.errors_in_one_line():
        from sparity.cli.running import resume_command
        from sparity.pipeline.studies.sensitivity import RATIOS, execute_sensitivity
        from sparity.recipe import Recipe, Text

        prune: dict[str, Any] = {"pattern": pattern, "solver": solver, "unseen_expert": unseen_expert}
        if score is not None:
            prune["score"] = score
        measured = Text.named(measure).model_dump(exclude_none=True)
        recipe = Recipe.read(
            {
                "model": model,
                "dtype": dtype,
                "calibration": calibration_section(text, field, samples, length, seed, batch),
                "stages": [{"prune": prune}],
                "measure": {"perplexity": [measured], "window": window, "windows": windows, "speed": None},
            }
        )
        with console.errors_in_one_line(resume_command()), console.ProgressBar(quiet or json) as progress:
            result = execute_sensitivity(
                recipe, ratios or RATIOS, progress, output=output, device=device, force=force, resume=resume
            )
    if json:
        console.print_json(result.report.to_dict())
    elif not quiet:
        _show(result.report)
        page = result.path / "sensitivity.html"
        console.out.print(f"saved to {result.path}; page: {page}", soft_wrap=True)


def _show(report: "SensitivityReport") -> None:
    from sparity.measure.show import numbers
    from sparity.measure.show.page_sensitivity import describe_sensitivity, most_sensitive

    console.out.print(describe_sensitivity(report), soft_wrap=True)
    table = Table(title="KL, nats per token")
    table.add_column("part")
    for head in ("parameters", "FLOPs", *(numbers.percent(ratio) for ratio in report.ratios)):
        table.add_column(head, justify="right")
    whole = {row.name: row for row in report.rows if row.block is None}
    for row in (*whole.values(), *most_sensitive(report)):
        found = [numbers.divergence(other.kl) for other in report.rows if other.name == row.name]
        place = row.name if row.block is None else f"block {row.block}, {row.role}"
        table.add_row(place, numbers.percent(row.parameters), numbers.percent(row.flops), *found)
    console.out.print(table)
    console.out.print(
        "and the five layers that cost most for their share of the parameters, at the ratio nearest to 50 %"
    )
