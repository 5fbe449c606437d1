"""Where a result goes: a named folder, or a temporary one that lives as long as the result."""

import os
import tempfile
from pathlib import Path

from sparity import zoo
from sparity.errors import InvalidInput
from sparity.files import expand


def named_folder(output: str | Path) -> Path:
    """The folder that the user named for a result, with its `~` replaced.

    Raises:
        InvalidInput: the name is empty, which would be the current folder, no name that a folder can have, the root of
            the file system, or that of a model of the zoo.
    """
    if not str(output).strip():
        raise InvalidInput("the name of the output is empty: name a folder, or . for the current one")
    if str(output).startswith(zoo.PREFIX):
        raise InvalidInput(f"output {output}: that is a model of the zoo, which is not written to: name a folder")
    path = expand(output)
    try:
        if b"\0" in str(path).encode():
            raise InvalidInput(f"output {output}: no name of a folder holds a NUL")
    except UnicodeEncodeError as error:
        raise InvalidInput(f"output {output}: safetensors writes only to names in UTF-8") from error
    if not Path(os.path.abspath(path)).name:  # "." and "x/.." have names then
        raise InvalidInput(f"output {output} is the root of the file system: name a folder")
    return path


def output_folder(
    output: str | Path | None, name: str, resume: bool
) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """The folder of the result, and the temporary one to keep alive when no output was named.

    Args:
        output: as the user named it.
        name: the folder's name within a temporary one.
        resume: whether something unfinished is to be continued.

    Raises:
        InvalidInput: there is nothing to resume without an output, or its name is none, see `named_folder`.
    """
    if output is not None:
        return named_folder(output), None
    if resume:
        raise InvalidInput("resume needs the output folder of what is to be continued")
    temporary = tempfile.TemporaryDirectory(prefix="sparity-")
    return Path(temporary.name) / name, temporary


def working_places(output: Path) -> tuple[Path, Path]:
    """The folder of a result and the one in which a run works for it: what lies there is replaced."""
    place = output.resolve()
    return place, place.with_name(place.name + ".partial")


def refuse_to_replace(model: Path | None, output: Path) -> None:
    """Raise `InvalidInput` when a result would take the place of the model that it is made from."""
    if model is not None and any(model.resolve().is_relative_to(place) for place in working_places(output)):
        raise InvalidInput(f"output {output}: the dense model lies there and would be lost; choose another output")
