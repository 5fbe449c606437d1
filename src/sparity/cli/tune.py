"""`sparity tune MODEL`: weights, bits and skipped inputs chosen for every part of a model, within a limit."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.options import CalibrationText, Device, Field, Force, Json, Model, Quiet, ResultFolder, Resume, Seed
from sparity.cli.sections import calibration_section


def tune(
    model: Model,
    output: ResultFolder,
    max_ppl: Annotated[str | None, typer.Option(help='The largest rise of perplexity: "+5%".')] = None,
    max_kl: Annotated[float | None, typer.Option(help="The largest KL to the dense model, nats per token.")] = None,
    maximise: Annotated[str, typer.Option(help="tokens/s, prefill or bytes (that are saved).")] = "tokens/s",
    at_least: Annotated[str | None, typer.Option(help='The least gain over dense: "1.5x".')] = None,
    choices: Annotated[Path | None, typer.Option(help="A menu in YAML (docs/tune.md).")] = None,
    how: Annotated[
        str, typer.Option(help="Measure each unit alone (each), roles and blocks (separable), or auto.")
    ] = "auto",
    minutes: Annotated[float, typer.Option(min=0, help="For each unit alone, about; beyond it roles and blocks.")] = 10,
    pairs: Annotated[int, typer.Option(min=0, help="Pairs of units that are measured together.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Measured runs of the answer, at most.")] = 3,
    text: CalibrationText = None,
    field: Field = "text",
    samples: Annotated[int, typer.Option(help="Calibration samples, for statistics.")] = 32,
    trials: Annotated[int, typer.Option(min=1, help="How many of them units are measured on.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sample.")] = 256,
    seed: Seed = 0,
    measure: Annotated[str, typer.Option(help="Text on which the limit holds, or .npy.")] = "python-docs:held-out",
    window: Annotated[int, typer.Option(help="Tokens per window that is measured.")] = 256,
    windows: Annotated[int, typer.Option(help="How many windows are measured.")] = 8,
    batch: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="The type of the model; the kernels take bfloat16.")] = "bfloat16",
    device: Device = "auto",
    force: Force = False,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose for every part of a model what is given up, for the most speed or the fewest bytes within a limit.

    Measures what each choice costs on this machine and what it loses, chooses exactly, and runs the answer. Writes
    recipe.yaml, tune.json, a page with the front, and the model. Where a limit is not met, the closest is shown, and
    the exit code is 1.
    """
    with console.errors_in_one_line():
        from sparity.cli.running import resume_command
        from sparity.measure.show.table_tune import print_tune
        from sparity.pipeline.studies.tuning.settings import Tuning
        from sparity.pipeline.studies.tuning.study import execute_tune
        from sparity.recipe import Text

        asked = Tuning.of(max_ppl, maximise, max_kl, at_least, choices, how, minutes, trials, pairs, runs)
        base: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "calibration": calibration_section(text, field, samples, length, seed, batch),
            "measure": {
                "perplexity": [Text.named(measure).model_dump(exclude_none=True)],
                "window": window,
                "windows": windows,
            },
        }
        with console.errors_in_one_line(resume_command()), console.ProgressBar(quiet or json) as progress:
            result = execute_tune(base, asked, progress, output=output, device=device, force=force, resume=resume)
    if json:
        console.print_json(result.report.to_dict())
    elif not quiet:
        print_tune(result.report, console.out)
        page = result.path / "tune.html"
        console.out.print(f"recipe: {result.path / 'recipe.yaml'}; page: {page}", soft_wrap=True)
    if result.report.verdict is not None:
        console.err.print(f"not met: {result.report.verdict}", style="red", soft_wrap=True)
        raise typer.Exit(1)
