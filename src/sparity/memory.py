"""How much memory there is, and refusing what would need more of it before any of it is taken."""

import os
from pathlib import Path

from sparity.errors import InvalidInput


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
