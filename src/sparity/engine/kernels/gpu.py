"""Whether Triton's kernels can run, and how: compiled on a GPU, or interpreted on the processor to be tested."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch


def interpreted() -> bool:
    """Whether `TRITON_INTERPRET=1` makes kernels run on the processor; it must be set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on")


def unavailable(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on `device`, or None when they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu":
        return None if interpreted() else "Triton's kernels run on the processor only with TRITON_INTERPRET=1, slowly"
    return no_cuda(device) or _broken()


def no_cuda(device: torch.device) -> str | None:
    """Why `device` is no CUDA GPU that PyTorch can use, or None when it is one."""
    if device.type != "cuda":
        return f"GPU kernels run on CUDA, not on {device.type}"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    if device.index is not None and device.index >= torch.cuda.device_count():
        return f"there is no {device}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs"
    return None


def processors(device: torch.device) -> int:
    """How many multiprocessors `device` has; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _broken() -> str | None:
    try:
        import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}): install the release that belongs to torch {torch.__version__}"
    return None
