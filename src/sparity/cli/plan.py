"""`sparity plan RECIPE`: what a run would do, before any work."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sparity.cli import console
from sparity.cli.options import Device, Json, MemoryLimit, OtherModel, Overrides, RecipeFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparity.pipeline.run.plan import Plan, StageForecast
    from sparity.stages import Change


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model: OtherModel = None,
    device: Device = "auto",
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Also what speed could be gained at most, and where.")
    ] = False,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, for --roofline.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once, for --roofline.")] = 1,
    target: Annotated[
        str | None,
        typer.Option(help="Also whether the result loads there, and what it gains: transformers, llama.cpp or vllm."),
    ] = None,
    memory: MemoryLimit = None,
    json: Json = False,
) -> None:
    """Check a recipe; show shapes, sizes and time of each stage, memory and disk. What does not fit is an error."""
    with console.errors_in_one_line():
        from sparity.pipeline.run.job import prepare
        from sparity.pipeline.run.plan import plan as predict
        from sparity.pipeline.run.roofline import rooflines
        from sparity.pipeline.run.targets import check_target, outlook
        from sparity.recipe import Recipe

        check_target(target)
        job = prepare(Recipe.read(recipe, overrides), model, device)
        found = predict(job, memory)
        roofs = rooflines(job, found, prompt, batch) if roofline else ()
        seen = outlook(job, found, target) if target else None
    if json:
        totals = {"peak_memory": found.peak_memory, "seconds": found.seconds, "output_bytes": found.output_bytes}
        gains = [{**dataclasses.asdict(one), "gains": one.gains, "real": one.real} for one in roofs]
        there = {"target": {**dataclasses.asdict(seen), "gain": seen.gain}} if seen else {}
        console.print_json({**dataclasses.asdict(found), **totals, "roofline": gains, **there})
    else:
        _show(found)
        if seen:
            console.out.print(f"\n{seen.words}", soft_wrap=True)
        if roofs:
            from sparity.measure.show.table_roofline import print_rooflines

            console.out.print()
            print_rooflines(roofs, console.out)


def _show(plan: "Plan") -> None:
    from sparity.measure.show import numbers
    from sparity.measure.show.sentences_tasks import describe_needed
    from sparity.memory import available_memory

    passes = len({stage.number for stage in plan.stages})
    for place, stage in enumerate(plan.stages):
        where = f" (pass {stage.number} of {passes})" if passes > 1 else ""
        console.out.print(f"stage {place}, {stage.name}{where}: {stage.words}")
        if stage.changes:
            console.out.print(_table(stage))
        statistics = ", ".join(stage.statistics) or "none"
        console.out.print(
            f"statistics: {statistics}; time, about {numbers.seconds(stage.seconds)}; the model then has "
            f"{numbers.amount(stage.parameters)} parameters, {numbers.size(stage.bytes)}"
        )
        console.out.print()
    console.out.print(f"calibration: {plan.samples} samples of {plan.length} tokens")
    console.out.print(f"memory, about {numbers.size(plan.peak_memory)} beside the libraries: {_parts(plan.memory)}")
    if plan.gram_passes:
        console.out.print(f"Gram matrices in files, their sums in {plan.gram_passes} passes through each block")
    available = available_memory()
    if available is not None and plan.peak_memory > available:
        console.out.print(f"that is more than the {numbers.size(available)} of memory that are free here")
    if plan.disk:
        console.out.print(
            f"disk beside the result, at most {numbers.size(sum(plan.disk.values()))}: {_parts(plan.disk)}"
        )
    for needed in plan.tasks:
        console.out.print(describe_needed(needed))
    console.out.print(
        f"time, about {numbers.seconds(plan.seconds)}, measuring not counted; output {numbers.size(plan.output_bytes)}"
    )


def _table(stage: "StageForecast") -> Table:
    """Equal projections in one row."""
    table = Table()
    for column in ("projections", "role", "shape", "then", "weights", "sparsity"):
        table.add_column(column, justify="left" if column in ("projections", "role") else "right")
    groups: dict[tuple[object, ...], list[Change]] = {}
    for change in stage.changes:
        groups.setdefault((change.role, change.shape_before, change.shape_after, change.target), []).append(change)
    for members in groups.values():
        first = members[0]
        name = first.name if len(members) == 1 else f"{first.name} and {len(members) - 1} more"
        before, after = (f"{rows} x {columns}" for rows, columns in (first.shape_before, first.shape_after))
        sparsity = "" if first.target is None else f"{first.target:.1%}" if first.target else "dense"
        weights = sum(change.size for change in members)
        table.add_row(name, first.role, before, "" if after == before else after, f"{weights:,}", sparsity)
    return table


def _parts(sizes: "Mapping[str, int]") -> str:
    from sparity.measure.show import numbers

    return "; ".join(f"{name} {numbers.size(size)}" for name, size in sizes.items() if size)
