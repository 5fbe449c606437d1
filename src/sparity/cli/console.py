"""What the verbs share: the consoles, progress, and errors as one line."""

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from sparity.errors import SparityError, wrong_input
from sparity.measure.data.plain import plain
from sparity.visible import harmless, visible


class VisibleConsole(Console):
    """A console on which no text acts, whatever file or argument it came from; long words are cut."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, emoji=False, markup=False)  # text may hold brackets of its own

    def render_str(self, text: str, **options: Any) -> Text:
        """Texts and the cells of tables, before their widths are measured."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is printed; what rich itself says to the terminal passes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


out = VisibleConsole()
err = VisibleConsole(stderr=True)


def print_json(value: Any) -> None:
    """Print JSON on standard output, for programs."""
    text = json.dumps(plain(value), indent=1, default=str, allow_nan=False)
    sys.stdout.write(text.replace("\x7f", "\\u007f") + "\n")  # the one control character that JSON lets through


def guard_terminal() -> None:
    """Let no other way to standard error show text that acts: logs and warnings of libraries, and tracebacks."""
    make, write = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = make(*arguments, **options)
        made.msg, made.args = visible(made.getMessage()), ()
        return made

    def warning(message: Warning | str, *arguments: Any, **options: Any) -> str:
        return visible(write(message, *arguments, **options))

    def crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = warning
    sys.excepthook = crash


@contextmanager
def errors_in_one_line(when_interrupted: str | None = None) -> Iterator[None]:
    """Turn Sparity's own errors into one line and exit code 1, an interruption into `when_interrupted` and 130."""
    try:
        with wrong_input():
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
