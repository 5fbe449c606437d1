"""The table of verbs."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import sparity
from sparity.cli import console
from sparity.cli.bench import bench
from sparity.cli.chat import chat
from sparity.cli.compare import compare
from sparity.cli.convert import convert
from sparity.cli.demo import demo
from sparity.cli.doctor import doctor
from sparity.cli.eval import evaluate
from sparity.cli.explain import explain
from sparity.cli.fetch import fetch, may_fetch
from sparity.cli.generate import generate
from sparity.cli.methods import methods
from sparity.cli.offload import offload
from sparity.cli.plan import plan
from sparity.cli.prune import prune
from sparity.cli.run import run
from sparity.cli.schema import schema
from sparity.cli.sensitivity import sensitivity
from sparity.cli.serve import serve
from sparity.cli.shape import shape
from sparity.cli.sweep import sweep
from sparity.cli.tune import tune
from sparity.cli.verify import verify
from sparity.visible import one_line

VERBS: dict[str, Callable[..., Any]] = {
    "prune": prune,
    "run": run,
    "plan": plan,
    "sensitivity": sensitivity,
    "sweep": sweep,
    "tune": tune,
    "shape": shape,
    "eval": evaluate,
    "bench": bench,
    "compare": compare,
    "generate": generate,
    "serve": serve,
    "chat": chat,
    "convert": convert,
    "offload": offload,
    "verify": verify,
    "methods": methods,
    "explain": explain,
    "schema": schema,
    "doctor": doctor,
    "fetch": fetch,
    "demo": demo,
}
SEVERAL = ("run", "prune")  # what processes started by torchrun can do together
OPENING = (  # a model
    *("prune", "run", "plan", "sensitivity", "sweep", "tune", "shape"),
    *("eval", "bench", "compare", "generate", "serve", "convert", "offload", "doctor"),
)


# The base of what is said about arguments; typer brings it along, older releases take it from click.
ArgumentError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Verbs(TyperGroup):
    """The verbs; what is wrong with an argument is said in visible text."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Options before the verb."""
        with _visible_usage():
            return super().make_context(*arguments, **options)

    def invoke(self, context: Any) -> Any:
        """The verb and what stands behind it."""
        with _visible_usage():
            return super().invoke(context)


@contextmanager
def _visible_usage() -> Iterator[None]:
    try:
        yield
    except ArgumentError as error:
        error.message = one_line(error.message)
        raise


app = typer.Typer(
    name="sparity",
    cls=Verbs,
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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a causal language model sparse and measure what that changed."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and context.invoked_subcommand not in SEVERAL:
        console.err.print(
            f"error: {context.invoked_subcommand} works in one process: start it without torchrun "
            f"(WORLD_SIZE={os.environ['WORLD_SIZE']}; several processes share: {', '.join(SEVERAL)})",
            style="red",
            soft_wrap=True,
        )
        raise typer.Exit(2)


def main() -> None:
    """Entry point of the `sparity` command.

    An output that cannot be written ends it with one line and exit code 1; one that nobody reads any more, silently.
    """
    console.guard_terminal()
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
