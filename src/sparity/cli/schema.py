"""`sparity schema`: the JSON schema of recipes or of sweeps, for editors."""

from enum import StrEnum
from typing import Annotated

import typer

from sparity.cli import console


class File(StrEnum):
    """What has a schema."""

    recipe = "recipe"
    sweep = "sweep"


def schema(file: Annotated[File, typer.Argument(help="recipe or sweep.")] = File.recipe) -> None:
    """Print the JSON schema of recipes, or of sweeps; editors complete and check files with it."""
    from sparity.recipe import Recipe
    from sparity.sweep_file import SweepFile

    console.print_json((Recipe if file is File.recipe else SweepFile).model_json_schema())
