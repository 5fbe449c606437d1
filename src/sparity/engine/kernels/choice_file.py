"""Timings that outlive the process: one JSON file, by machine and versions.

    $SPARITY_CACHE, else $XDG_CACHE_HOME/sparity, else ~/.cache/sparity: kernels.json

A file that cannot be read or written costs new timings, nothing else; it is said once.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from sparity import __version__
from sparity.engine.kernels import native
from sparity.engine.kernels.processor import processor_name
from sparity.errors import SparityError
from sparity.files import cache_folder, make_folder, read_json_object, write_json
from sparity.products.choice import emulated
from sparity.visible import logger

log = logger(__name__)

FORMAT = 1
PATIENCE = 2.0  # seconds to wait for another writer
UNDECIDED: dict[str, float] = {}  # what is remembered of a case whose times did not repeat
Entry = dict[str, Any]  # seconds: candidate -> time; winner and lost are for who reads the file
_known: dict[tuple[Path, str], dict[str, Entry]] = {}  # file, machine -> case -> entry, as far as this process knows


def path() -> Path:
    """The file of all timings."""
    return cache_folder() / "kernels.json"


def machine() -> str:
    """What timings hold for: processor, instruction set and versions. Threads are part of the case."""
    isa = "no compiled kernels"
    if native.unavailable() is None:
        isa = f"{native.instruction_set()}, library {_library_hash()}"
    products = ["float32 products"] if emulated(torch.bfloat16) else []  # with which prefill is another
    versions = f"sparity {__version__}", f"torch {torch.__version__}"
    return ", ".join((processor_name(), f"{os.cpu_count()} cores", isa, *versions, *products))


def remembered(case: str) -> dict[str, float] | None:
    """Candidate -> seconds of a case, `UNDECIDED` after `give_up`, or None when it was not timed here yet."""
    entry = _opened().get(case)
    return None if entry is None else dict(entry["seconds"])


def remember(case: str, times: Mapping[str, float], winner: str, lost: Mapping[str, str]) -> None:
    """Keep what was found for a case, for this process and for later ones."""
    entry = {"winner": winner, "seconds": dict(times), "lost": dict(lost)}
    _opened()[case] = entry
    place, here = path(), machine()
    try:
        make_folder(place.parent)
        with FileLock(place.with_suffix(".lock"), timeout=PATIENCE):
            machines = _read(place)  # again: another process may have written since
            merged = {**machines.get(here, {}), case: entry}
            write_json(place, {"format": FORMAT, "machines": {**machines, here: merged}})
    except (SparityError, Timeout, OSError) as error:
        _say_once(f"kernel timings are kept for this process only: {error}")


def give_up(case: str) -> None:
    """Time a case no more in this process; a later one tries again."""
    _opened()[case] = {"seconds": UNDECIDED}


def _opened() -> dict[str, Entry]:
    key = path(), machine()
    if key not in _known:
        _known[key] = _read(key[0]).get(key[1], {})
    return _known[key]


def _read(place: Path) -> dict[str, dict[str, Entry]]:
    """Machine -> case -> entry; what makes no sense is left out."""
    if not place.exists():
        return {}
    try:
        content = read_json_object(place)
    except SparityError as error:
        _say_once(f"kernel timings are measured again: {error}")
        return {}
    machines = content.get("machines") if content.get("format") == FORMAT else None
    if not isinstance(machines, dict):
        _say_once(f"kernel timings are measured again: {place} is not of format {FORMAT}")
        return {}
    return {
        name: {case: entry for case, entry in cases.items() if _has_times(entry)}
        for name, cases in machines.items()
        if isinstance(cases, dict)
    }


def _has_times(entry: Any) -> bool:
    times = entry.get("seconds") if isinstance(entry, dict) else None
    return (
        isinstance(times, dict)
        and times != UNDECIDED
        and all(isinstance(seconds, float) and math.isfinite(seconds) and seconds > 0 for seconds in times.values())
    )


@cache
def _library_hash() -> str:
    return hashlib.sha256(Path(native.library()._name).read_bytes()).hexdigest()[:16]


@cache
def _say_once(words: str) -> None:
    log.warning(words)
