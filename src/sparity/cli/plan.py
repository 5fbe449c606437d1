"""`sparity plan RECIPE`: what a run would do, before any work."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sparity.cli import console
from sparity.cli.console import Json

if TYPE_CHECKING:
    from sparity.pipeline.run.plan import Plan


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: stages.0.prune.sparsity=0.6 ...")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model in place of the recipe's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")] = "auto",
    json: Json = False,
) -> None:
    """Check a recipe and show its sites, shapes, bytes, predicted memory and time; refused combinations are errors."""
    with console.errors_in_one_line():
        from sparity.pipeline.run.job import prepare
        from sparity.pipeline.run.plan import plan as predict
        from sparity.recipe import Recipe

        found = predict(prepare(Recipe.read(recipe, overrides), model, device))
    if json:
        console.print_json({**dataclasses.asdict(found), "peak_memory": found.peak_memory})
    else:
        _show(found)


def _show(plan: "Plan") -> None:
    from sparity.measure.show.numbers import size as words

    table = Table(title=f"{plan.model}: {plan.method}")
    for column in ("projections", "role", "shape", "parameters", "bytes", "sparsity"):
        table.add_column(column, justify="left" if column in ("projections", "role") else "right")
    groups: dict[tuple[str, tuple[int, int], float], list[int]] = {}
    for index, site in enumerate(plan.sites):
        groups.setdefault((site.role, site.shape, site.target), []).append(index)
    for (role, shape, target), members in groups.items():
        sites = [plan.sites[index] for index in members]
        name = sites[0].name if len(sites) == 1 else f"{sites[0].name} and {len(sites) - 1} more"
        parameters = sum(site.parameters for site in sites)
        table.add_row(
            name,
            role,
            f"{shape[0]} x {shape[1]}",
            f"{parameters:,}",
            words(sum(site.bytes for site in sites)),
            f"{target:.1%}" if target else "dense",
        )
    console.out.print(table)
    statistics = ", ".join(plan.statistics) or "none"
    console.out.print(f"calibration: {plan.samples} samples of {plan.length} tokens; statistics: {statistics}")
    if plan.store_bytes:
        console.out.print(f"statistics kept on disk, about {words(plan.store_bytes)} without gradients")
    parts = "; ".join(f"{name} {words(size)}" for name, size in plan.memory.items() if size)
    console.out.print(f"memory while pruning, about {words(plan.peak_memory)} beside the libraries: {parts}")
    if plan.gradient_bytes:
        console.out.print(f"disk while gradients are gathered, at most {words(plan.gradient_bytes)}")
    console.out.print(
        f"time to prune, about {plan.seconds:.0f} s, measuring not counted; output {words(plan.output_bytes)}"
    )
