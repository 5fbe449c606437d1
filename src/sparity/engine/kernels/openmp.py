"""Which OpenMP runtimes are loaded: two in one process have two pools of threads, and may give wrong results."""

import re
from pathlib import Path

RUNTIME = re.compile(r"lib(gomp|iomp5|omp)\b.*\.(so|dylib)")
MAPS = Path("/proc/self/maps")


def loaded(maps: str | None = None) -> tuple[str, ...]:
    """The files of the OpenMP runtimes that this process has loaded, each once, in the order of their names.

    Args:
        maps: memory maps in the form of Linux's /proc/PID/maps; None = this process's. Systems without them tell none.
    """
    if maps is None:
        maps = MAPS.read_text(encoding="utf-8", errors="replace") if MAPS.exists() else ""
    fields = (line.split(maxsplit=5) for line in maps.splitlines())
    paths = {field[5].removesuffix(" (deleted)") for field in fields if len(field) == 6}
    return tuple(sorted(path for path in paths if RUNTIME.match(path.rpartition("/")[2])))


def words(files: tuple[str, ...]) -> str:
    """One line about them, each by its last two folders and its name."""
    if not files:
        return "none seen"
    listed = ", ".join("/".join(path.split("/")[-3:]) for path in files)
    return listed if len(files) == 1 else f"{len(files)} copies, which may disturb each other: {listed}"
