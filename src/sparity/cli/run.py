"""`sparity run RECIPE`: everything that a recipe says."""

from typing import Annotated

import typer

from sparity.cli import console
from sparity.cli.options import Device, Force, Json, MemoryLimit, OtherModel, Overrides, Quiet, RecipeFile, Resume


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model: OtherModel = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The folder of the result.")] = None,
    device: Device = "auto",
    force: Force = False,
    resume: Resume = False,
    keep_passes: Annotated[
        bool, typer.Option("--keep-passes", help="Keep what each pass made in OUTPUT.passes, for later runs.")
    ] = False,
    memory: MemoryLimit = None,
    track: Annotated[
        str | None, typer.Option("--track", help="Log to trackio, wandb or mlflow, which must be installed.")
    ] = None,
    project: Annotated[str, typer.Option("--project", help="The tracker's project or experiment.")] = "sparity",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take a model through the stages of a recipe, measure and save it; exit code 1 when a limit is missed.

    A run that was stopped goes on with --resume, also when a later stage of the recipe changed: the passes before it
    stay. With --keep-passes they also serve later runs to the same output.
    """
    with console.errors_in_one_line():
        from sparity.cli.running import run_and_show
        from sparity.recipe import Recipe

        checked = Recipe.read(recipe, overrides)
        if model is not None:
            checked = checked.model_copy(update={"model": model})
        run_and_show(
            checked, output=output, device=device, force=force, resume=resume, json=json, quiet=quiet,
            keep_passes=keep_passes, memory=memory, track=track, project=project,
        )  # fmt: skip
