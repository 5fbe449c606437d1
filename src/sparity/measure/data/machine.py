"""The machine a measurement was made on, and the memory that a stretch of work took."""

import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparity.engine.kernels.processor import processor_name
from sparity.products import choice

PACKAGES = ("sparity", "torch", "transformers", "safetensors", "numpy")


def describe() -> dict[str, Any]:
    """Processor, memory, device, versions, and what products of bfloat16 are computed in."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "bfloat16_products": choice.words(torch.bfloat16),
        **{name: package_version(name) for name in PACKAGES},
    }


def package_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@contextmanager
def watch_peak_memory() -> Iterator[Callable[[], int]]:
    """Within the context, the yielded function gives the peak resident bytes of the process since it opened.

    Where the system cannot reset its peak (anything but Linux) it is the peak since the process began.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        reset = True
    except OSError:
        reset = False

    def peak() -> int:
        if reset:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    yield peak
