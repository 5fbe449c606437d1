"""Where a result goes: a named folder, or a temporary one that lives as long as the result."""

import tempfile
from pathlib import Path

from sparity.errors import InvalidInput
from sparity.files import expand


def output_folder(
    output: str | Path | None, name: str, resume: bool
) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """The folder of the result, and the temporary one to keep alive when no output was named.

    Args:
        output: as the user named it.
        name: the folder's name within a temporary one.
        resume: whether something unfinished is to be continued.

    Raises:
        InvalidInput: there is nothing to resume without an output.
    """
    if output is not None:
        return expand(output), None
    if resume:
        raise InvalidInput("resume needs the output folder of what is to be continued")
    temporary = tempfile.TemporaryDirectory(prefix="sparity-")
    return Path(temporary.name) / name, temporary
