"""`sparity methods [KIND]`: what there is."""

from typing import Annotated

import typer
from rich.table import Table

from sparity.cli import console
from sparity.cli.options import Json


def methods(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="stage, score, pattern, solver, method, grid, policy, layout, budget, statistic, family, format or "
            "encoding."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the plug-ins of every kind, or of one, with one sentence about each."""
    with console.errors_in_one_line():
        from sparity import registry
        from sparity.cli.explain import first_sentence

        kinds = [registry.kind_called(kind)] if kind else list(registry.PACKAGES)
        found = {k: {name: first_sentence(registry.get(k, name)) for name in registry.names(k)} for k in kinds}
    if json:
        console.print_json(found)
        return
    table = Table()
    for column in ("kind", "name", "what it does"):
        table.add_column(column)
    for k, plugins in found.items():
        for position, (name, words) in enumerate(plugins.items()):
            table.add_row(k if position == 0 else "", name, words)
    console.out.print(table)
