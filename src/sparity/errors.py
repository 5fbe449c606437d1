"""Errors that say what went wrong, where, and what to do about it."""

from collections.abc import Iterable
from difflib import get_close_matches


class SparityError(Exception):
    """Base of every error that Sparity raises on purpose; the command line prints it without a traceback."""


class InvalidInput(SparityError, ValueError):
    """A recipe, an argument or a text that cannot be used as given."""


class CorruptFile(SparityError):
    """A checkpoint, token file or run folder that is missing parts, truncated or altered."""


class UnsupportedModel(SparityError):
    """An architecture in which the projections cannot be found."""


class NumericalError(SparityError):
    """NaN or infinite numbers, or a matrix that cannot be factorised."""


class RunConflict(SparityError):
    """The output or the run folder is in use, finished, or belongs to another recipe."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean "wanda"?` when one of `known` is close to `name`, else an empty string."""
    close = get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""
