"""Errors that say what went wrong, where, and what to do about it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice

from sparity.visible import one_line

LONGEST_NAME, MOST_NAMES = 100, 1000  # that a suggestion is looked for


class SparityError(Exception):
    """Base of every error that Sparity raises on purpose; the command line prints it without a traceback.

    Its message is one line that can be shown anywhere, whatever the input was that it names (see `sparity.visible`).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


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
    if len(name) > LONGEST_NAME:
        return ""
    close = get_close_matches(str(name), [str(each) for each in islice(known, MOST_NAMES)], n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


@contextmanager
def wrong_input() -> Iterator[None]:
    """The boundary of an entry point, a decorator too: what Python says of its input becomes a `SparityError`.

    It is what no check before has named: a text that is none, a file that cannot be read, a number beyond all bounds,
    more than fits into memory. Errors of other kinds are faults of the program, and pass.
    """
    try:
        yield
    except SparityError:
        raise
    except MemoryError as error:
        raise InvalidInput(
            f"this needs more memory than there is ({str(error) or 'none is left'}): ask for less"
        ) from error
    except RecursionError as error:  # one of the RuntimeErrors
        raise InvalidInput("the input is nested too deeply to be read") from error
    except RuntimeError as error:
        if "allocate" not in str(error):  # how PyTorch says that there is no memory left
            raise
        raise InvalidInput(f"this needs more memory than there is ({error}): ask for less") from error
    except (OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.filename is None:  # an output that is closed or full is no input
            raise
        said = str(error) or type(error).__name__
        raise InvalidInput(f"the input cannot be used ({type(error).__name__}): {said}") from error
