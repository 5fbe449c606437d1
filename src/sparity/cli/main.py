"""The table of verbs."""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import sparity
from sparity.cli import console
from sparity.cli.bench import bench
from sparity.cli.convert import convert
from sparity.cli.demo import demo
from sparity.cli.doctor import doctor
from sparity.cli.eval import evaluate
from sparity.cli.explain import explain
from sparity.cli.fetch import fetch, may_fetch
from sparity.cli.generate import generate
from sparity.cli.methods import methods
from sparity.cli.plan import plan
from sparity.cli.prune import prune
from sparity.cli.run import run
from sparity.cli.schema import schema
from sparity.cli.sensitivity import sensitivity
from sparity.cli.sweep import sweep
from sparity.cli.verify import verify

VERBS: dict[str, Callable[..., Any]] = {
    "prune": prune,
    "run": run,
    "plan": plan,
    "sensitivity": sensitivity,
    "sweep": sweep,
    "eval": evaluate,
    "bench": bench,
    "generate": generate,
    "convert": convert,
    "verify": verify,
    "methods": methods,
    "explain": explain,
    "schema": schema,
    "doctor": doctor,
    "fetch": fetch,
    "demo": demo,
}
OPENING = ("prune", "run", "plan", "sensitivity", "sweep", "eval", "bench", "generate", "convert", "doctor")  # a model

app = typer.Typer(
    name="sparity",
    help="Make a causal language model sparse and measure what that changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb, function in VERBS.items():
    app.command(verb)(may_fetch(function) if verb in OPENING else function)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(sparity.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a causal language model sparse and measure what that changed."""


def main() -> None:
    """Entry point of the `sparity` command.

    An output that cannot be written ends it with one line and exit code 1; one that nobody reads any more, silently.
    """
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # what goes wrong with files has become a message of its own before
        if not isinstance(error, BrokenPipeError):
            console.err.print(f"error: cannot write the output: {error.strerror or error}", style="red")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter tries once more when it ends
        sys.exit(1)
