"""What the verbs share: the consoles, progress, and errors as one line."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparity.errors import SparityError
from sparity.measure.data.report import plain

out = Console(highlight=False, emoji=False, markup=False)  # what is printed may hold brackets of its own
err = Console(stderr=True, highlight=False, emoji=False, markup=False)


def print_json(value: Any) -> None:
    """Print JSON on standard output, for programs."""
    sys.stdout.write(json.dumps(plain(value), indent=1, default=str, allow_nan=False) + "\n")


@contextmanager
def errors_in_one_line(when_interrupted: str | None = None) -> Iterator[None]:
    """Turn Sparity's own errors into one line and exit code 1, an interruption into `when_interrupted` and 130."""
    try:
        yield
    except SparityError as error:
        err.print(f"error: {error}", style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        err.print("interrupted; finished blocks are kept." if when_interrupted else "interrupted.")
        if when_interrupted:
            err.print(f"continue with: {when_interrupted}", soft_wrap=True)
        raise typer.Exit(130) from error


class ProgressBar:
    """Shows phases and blocks with the time left on standard error; says nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=err,
            disable=quiet or not err.is_terminal,
            transient=True,
        )
        self._quiet = quiet
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, words: str) -> None:
        """A new phase begins."""
        self._bar.update(self._task, description=words)
        if not self._quiet and not err.is_terminal:
            err.print(f"{words} ...")

    def block(self, done: int, total: int, seconds: float) -> None:
        """A block was committed."""
        self._bar.update(self._task, completed=done, total=total)
