"""Reports from the JSON that they were written to: the fields of their dataclasses say what each value is."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from sparity.errors import CorruptFile

T = TypeVar("T")


def read_back(kind: type[T], content: Any, where: Path) -> T:
    """The dataclass `kind` whose `to_dict` gave `content`, which lies in the file `where`.

    Raises:
        CorruptFile: a field is missing, unknown or of another type.
    """
    try:
        found: T = _value(kind, content)
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{where} is damaged ({error})") from error


def _value(kind: Any, content: Any) -> Any:
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):  # of one type and None
        return None if content is None else _value(next(each for each in arguments if each is not type(None)), content)
    if typing.get_origin(kind) is tuple:
        kinds = arguments[:1] * len(content) if arguments[-1] is Ellipsis else arguments
        return tuple(_value(each, item) for each, item in zip(kinds, content, strict=True))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _value(hints[name], item) for name, item in content.items()})  # type: ignore[operator]
    if kind is float:
        return float(content)  # what is not finite is text
    if isinstance(kind, type) and not isinstance(content, kind):
        raise TypeError(f"{content!r:.100} is no {kind.__name__}")
    return content
