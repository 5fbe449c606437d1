"""Running a recipe from the command line: progress, result, exit code; shared by `prune`, `run` and `demo`."""

import logging
import shlex
import sys
from contextlib import nullcontext

import typer

from sparity.cli import console
from sparity.errors import InvalidInput
from sparity.integrations.tracking import Told, nobody, tracker
from sparity.measure.show.table import print_report
from sparity.pipeline.run.runner import Result, execute
from sparity.processes.ranks import joined, processes
from sparity.recipe import Recipe
from sparity.visible import logger


def run_and_show(
    recipe: Recipe,
    *,
    output: str | None,
    device: str,
    force: bool,
    resume: bool,
    json: bool,
    quiet: bool,
    keep_passes: bool = False,
    memory: str | None = None,
    track: str | None = None,
    project: str = "sparity",
) -> Result:
    """Run, print the table, name the page that lies beside the model, and exit with 1 when a limit was missed.

    Of several processes rank 0 alone prints; all exit with the same code.
    """
    if output is None and recipe.output.path is None:
        raise InvalidInput("no output: pass -o FOLDER or set `output: {path: FOLDER}` in the recipe")
    with console.errors_in_one_line(resume_command()), joined(device) as group:
        if not group.first:  # rank 0 says the same, and what others alone have met it is told
            logger("sparity").addHandler(logging.NullHandler())
            logger("sparity").propagate = False
        tracked = nullcontext() if track is None or not group.first else tracker(track, project, recipe.summary())
        with console.ProgressBar(quiet or json or not group.first) as bar, tracked as hook:
            told = Told(hook or nobody, bar)
            result = execute(
                recipe, told, output=output, device=device, force=force, resume=resume, keep_passes=keep_passes,
                memory=memory, group=group,
            )  # fmt: skip
            if group.first:
                told.result(result.report)
    if not group.first:
        raise typer.Exit(0 if result.accepted else 1)
    if json:
        console.print_json(result.report.to_dict())
    elif not quiet:
        print_report(result.report, console.out)
        console.out.print(f"saved to {result.path}; page: {result.path / 'report.html'}", soft_wrap=True)
    for verdict in result.report.candidates[0].verdicts:
        if not verdict.passed:
            message = f"not accepted: {verdict.limit}, reached {verdict.reached}"
            console.err.print(message, style="red", soft_wrap=True)
    if not result.accepted:
        raise typer.Exit(1)
    return result


def resume_command() -> str:
    """The command that was given, with --resume after the verb; --force stays, for the output that it replaces."""
    verb, *arguments = [argument for argument in sys.argv[1:] if argument != "--resume"] or [""]
    size = processes()
    starter = ["sparity"] if size == 1 else ["torchrun", "--nproc-per-node", str(size), "-m", "sparity"]
    return shlex.join([*starter, verb, "--resume", *arguments])
