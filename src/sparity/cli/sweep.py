"""`sparity sweep SWEEP`: a recipe over the cross product of axes, in one table."""

from pathlib import Path
from typing import Annotated

import typer

from sparity.cli import console
from sparity.cli.options import Device, Force, Json, OtherModel, Quiet, ResultFolder, Resume


def sweep(
    sweep: Annotated[Path, typer.Argument(help="A sweep in YAML.", show_default=False)],
    output: ResultFolder,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes: measure.windows=8 in the base recipe, 'vary.NAME=[1, 2]' ...")
    ] = None,
    model: OtherModel = None,
    device: Device = "auto",
    force: Force = False,
    resume: Resume = False,
    on: Annotated[
        str, typer.Option("--on", help="Where combinations run: here, pool:WORKERS, ray[:ADDRESS], slurm[:PARTITION].")
    ] = "here",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every combination of a sweep's axes and put what was measured into one table: JSON, CSV and a page.

    No weights are kept. Everything is checked before the first run. A combination that fails is a row with its message;
    the others go on, and the exit code is 1.
    """
    with console.errors_in_one_line():
        from sparity.cli.running import resume_command
        from sparity.measure.show.table_sweep import print_sweep
        from sparity.pipeline.studies.sweeping import execute_sweep
        from sparity.sweep_file import Sweep

        checked = Sweep.read(sweep, overrides, model)
        with console.errors_in_one_line(resume_command()), console.ProgressBar(quiet or json) as progress:
            result = execute_sweep(checked, progress, output=output, device=device, force=force, resume=resume, on=on)
    if json:
        console.print_json(result.report.to_dict())
    elif not quiet:
        print_sweep(result.report, console.out)
        page = result.path / "sweep.html"
        console.out.print(f"saved to {result.path}; page: {page}", soft_wrap=True)
    for row in result.report.failed:
        console.err.print(f"failed: {row.words}: {row.message}", style="red", soft_wrap=True)
    if result.report.failed:
        raise typer.Exit(1)
