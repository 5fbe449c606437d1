"""Files that are either complete or absent: written to a temporary name, flushed, renamed."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparity.errors import CorruptFile, RunConflict, SparityError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, flush it to disk and rename it to `path`.

    Raises:
        SparityError: the disk is full or the folder cannot be written; nothing is left behind under either name.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fchmod(file.fileno(), 0o666 & ~_umask())  # safetensors writes files that only their owner may read
                os.fsync(file.fileno())
            temporary.replace(path)
            flush_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says while `path` is written into a `SparityError` that names it."""
    try:
        yield
    except BaseException as error:
        if _is_disk_full(error):
            free = shutil.disk_usage(path.parent).free
            raise SparityError(
                f"the disk is full: {path} could not be written ({free / 1e6:.1f} MB free in {path.parent}); "
                "free some space and continue with --resume"
            ) from error
        if isinstance(error, OSError) or _is_safetensors(error):
            raise SparityError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
        raise


def expand(path: str | Path) -> Path:
    """A path with its `~` replaced; one that names no user stays as it is."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Where what can be made again is kept: $SPARITY_CACHE, else $XDG_CACHE_HOME/sparity, else ~/.cache/sparity."""
    folder = os.environ.get("SPARITY_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or expand("~/.cache"), "sparity")
    return expand(folder)


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they are missing.

    Raises:
        SparityError: something that is no folder is in the way, or the place cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparityError(f"cannot create the folder {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; half a surrogate pair, which UTF-8 has not, is written as JSON escapes it."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode(errors="backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; numbers must be finite, so that every JSON reader takes the file."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json_object(path: Path, advice: str = "") -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        CorruptFile: it cannot be read, is not JSON or no object, or a number in it is not finite, which JSON does not
            have; the message ends with `advice`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is not JSON ({error}){advice}") from error
    if not isinstance(content, dict):
        raise CorruptFile(f"{path} must hold a JSON object, not a {type(content).__name__}{advice}")
    return content


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number that JSON has")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(digits)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock; the kernel drops it when the process ends, however it ends.

    Args:
        wait: until another process that holds it lets it go.

    Raises:
        RunConflict: another process holds it, and `wait` is not wanted.
        SparityError: the file cannot be written.
    """
    from filelock import FileLock, Timeout

    guard = FileLock(path, timeout=-1 if wait else 0)
    try:
        guard.acquire()
    except Timeout as error:
        raise RunConflict(
            f"another run is writing to {path.parent.parent}: wait for it to end or choose another output"
        ) from error
    except OSError as error:
        raise SparityError(f"cannot lock {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        guard.release()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _is_disk_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    # safetensors reports the system's error only in its text
    return _is_safetensors(error) and any(f"os error {number})" in str(error) for number in full)


def _is_safetensors(error: BaseException) -> bool:
    return type(error).__name__ == "SafetensorError"  # by name: this module does without the import
