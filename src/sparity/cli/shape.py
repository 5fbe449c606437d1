"""`sparity shape MODEL`: the uniform shape that gives up least within limits of speed and bytes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.options import CalibrationText, Field, Force, Json, Model, Quiet, Seed
from sparity.cli.sections import calibration_section


def shape(
    model: Model,
    at_least: Annotated[
        str | None, typer.Option(help='The least speed of decoding: "1.5x" of dense, or "40 tokens/s".')
    ] = None,
    prefill: Annotated[str | None, typer.Option(help="The least speed of a prompt, written likewise.")] = None,
    at_most: Annotated[str | None, typer.Option(help='The most bytes of the plain checkpoint: "100MB".')] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file for the recipe.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="Whose scores are the importance: minitron or magnitude.")] = "minitron",
    dimension: Annotated[
        list[str] | None,
        typer.Option(help="What may become smaller (all that the model allows); may be repeated.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sizes are multiples of 1 / STEPS of the whole.")] = 8,
    multiple_of: Annotated[int, typer.Option(min=1, help="That channels and hidden sizes are rounded up to.")] = 32,
    least: Annotated[float, typer.Option(min=0, max=1, help="The share of a dimension that stays at least.")] = 0.25,
    text: CalibrationText = None,
    field: Field = "text",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens per sample.")] = 256,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="The type of the model; the kernels take bfloat16.")] = "bfloat16",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose depth, hidden size, heads and MLP channels, the same for all blocks, for the limits that are given.

    Times dense matrices of every size on this machine, counts bytes, tries all combinations, and shows the shape within
    the limits that keeps most importance. Cuts nothing: -o FILE is the recipe that does, for `sparity run`.
    """
    with console.errors_in_one_line():
        from sparity.errors import RunConflict
        from sparity.files import write_text
        from sparity.measure.show import numbers
        from sparity.measure.show.table_shape import print_shape
        from sparity.pipeline.studies.shapes.axes import Grid
        from sparity.pipeline.studies.shapes.limits import Limits
        from sparity.pipeline.studies.shapes.study import execute_plan

        limits, grid = Limits.of(at_least, prefill, at_most), Grid(steps, multiple_of, least)
        if output is not None and output.exists() and not force:
            raise RunConflict(f"{output} exists already: pass --force to replace it")
        base: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "calibration": calibration_section(text, field, samples, length, seed, batch),
        }
        with console.ProgressBar(quiet or json) as progress:
            report = execute_plan(base, limits, grid, method, {}, dimension, progress)
        if output is not None:
            write_text(output, numbers.recipe_yaml(dict(report.recipe)))
    if json:
        console.print_json(report.to_dict())
    elif not quiet:
        print_shape(report, console.out)
        if output is not None:
            console.out.print(f"recipe: {output}", soft_wrap=True)
