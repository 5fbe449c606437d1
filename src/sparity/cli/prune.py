"""`sparity prune MODEL`: a recipe without YAML."""

from typing import Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.console import Json, Quiet
from sparity.cli.sections import calibration_section


def prune(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name, or one of the zoo.", show_default=False)],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder of the result.", show_default=False)],
    score: Annotated[str | None, typer.Option(help="How much a weight matters (sparity methods score).")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of weights to remove, default 0.5.")] = None,
    pattern: Annotated[
        str, typer.Option(help="unstructured, N:M (N kept of M) or block:ROWSxCOLUMNS.")
    ] = "unstructured",
    solver: Annotated[str, typer.Option(help="mask_only or sparsegpt.")] = "mask_only",
    text: Annotated[str | None, typer.Option(help="Calibration text: file or data set name[:split].")] = None,
    field: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    length: Annotated[int | None, typer.Option(help="Tokens per sample.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration samples.")] = 0,
    measure: Annotated[list[str] | None, typer.Option(help="Text to measure perplexity on; may be repeated.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window that is measured.")] = None,
    windows: Annotated[int | None, typer.Option(help="Measure only so many windows of each text.")] = None,
    speed: Annotated[bool, typer.Option(help="Measure the decode speed of both models.")] = True,
    batch: Annotated[int, typer.Option(help="Calibration sequences per forward pass.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
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
