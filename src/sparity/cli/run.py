"""`sparity run RECIPE`: everything that a recipe says."""

from pathlib import Path
from typing import Annotated

import typer

from sparity.cli import console
from sparity.cli.console import Json, Quiet


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: stages.0.prune.sparsity=0.6 ...")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model in place of the recipe's.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The folder of the result.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune, measure and save a model as a recipe says; exit code 1 when a limit of `accept` is missed."""
    with console.errors_in_one_line():
        from sparity.cli.running import run_and_show
        from sparity.recipe import Recipe

        checked = Recipe.read(recipe, overrides)
        if model is not None:
            checked = checked.model_copy(update={"model": model})
        run_and_show(checked, output=output, device=device, force=force, resume=resume, json=json, quiet=quiet)
