"""`sparity prune MODEL`: a recipe without YAML."""

from typing import Annotated, Any

import typer

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


def prune(
    model: Model,
    output: ResultFolder,
    score: Score = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of weights to remove, default 0.5.")] = None,
    pattern: Pattern = "unstructured",
    solver: Solver = "mask_only",
    text: CalibrationText = None,
    field: Field = "text",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    length: Length = None,
    seed: Seed = 0,
    measure: Annotated[list[str] | None, typer.Option(help="Text to measure perplexity on; may be repeated.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window that is measured.")] = None,
    windows: Annotated[int | None, typer.Option(help="Measure only so many windows of each text.")] = None,
    speed: Annotated[bool, typer.Option(help="Measure the decode speed of both models.")] = True,
    batch: Annotated[int, typer.Option(help="Calibration sequences per forward pass.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model, measure it beside the dense one, and save it.

    Without --text the model is calibrated on Python's own documentation, which every Python brings along: fine for a
    first try, but text like the model's own use is better. Without --measure it is measured on 16 windows of held-out
    parts of it.
    """
    with console.errors_in_one_line():
        from sparity.cli.running import run_and_show
        from sparity.recipe import Recipe

        stage: dict[str, Any] = {"pattern": pattern, "solver": solver}
        stage |= {key: value for key, value in {"score": score, "sparsity": sparsity}.items() if value is not None}
        measured: dict[str, Any] = {"perplexity": measure or ["python-docs:held-out"]}
        if measure is None and windows is None:
            windows = 16
        measured |= {key: value for key, value in {"window": window, "windows": windows}.items() if value is not None}
        if not speed:
            measured["speed"] = None
        recipe = Recipe.read(
            {
                "model": model,
                "dtype": dtype,
                "calibration": calibration_section(text, field, samples, length, seed, batch),
                "stages": [{"prune": stage}],
                "measure": measured,
            }
        )
        run_and_show(recipe, output=output, device=device, force=force, resume=resume, json=json, quiet=quiet)
