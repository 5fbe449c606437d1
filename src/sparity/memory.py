"""How much memory there is, and refusing what would need more of it before any of it is taken."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparity.errors import InvalidInput

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGEST_KEPT = 32 << 20  # bytes: what glibc comes to keep by itself
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def available_memory() -> int | None:
    """Bytes that a process can still take without swapping or reaching its own limit; None where nothing tells."""
    found = [amount for amount in (_of_the_system(), _of_the_process()) if amount is not None]
    return min(found, default=None)


def check_memory(what: str, needed: int, advice: str) -> None:
    """Raise `InvalidInput`, which begins with `what`, when `needed` bytes are more than there are."""
    available = available_memory()
    if available is not None and needed > available:
        raise InvalidInput(
            f"{what} would take {needed / 1e9:,.1f} GB of memory, and {available / 1e9:,.1f} GB are free: {advice}"
        )


def as_bytes(memory: int | str) -> int:
    """Bytes from a number or from such as "1.5GB".

    Raises:
        InvalidInput: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(memory).lower())
    if isinstance(memory, bool) or not match or match[2] not in UNITS:
        raise InvalidInput(f"memory {memory!r}: bytes, or a number with B, kB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * UNITS[match[2]])


def give_back() -> None:
    """Hand freed memory to the system: glibc keeps pieces of up to 32 MB each, all in all perhaps hundreds of them."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within the context, freed pieces of memory of 1 MB and more go back to the system, at some cost in time."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)


def _of_the_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return int(found.split()[1]) * 1024 if found else None


def _of_the_process() -> int | None:
    """What is left of the address space that `ulimit -v` allows."""
    try:
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):
        return None
    return None if most == resource.RLIM_INFINITY else max(most - taken, 0)
