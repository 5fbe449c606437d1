"""The compiled kernels: found, loaded, and told which instruction set to use.

The library is optional. Without it (`SPARITY_NO_NATIVE=1`, no compiler when Sparity was installed, another system) the
operations run in PyTorch, and `unavailable()` says why.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path

import torch  # before the library, which shares the OpenMP threads that torch brings

from sparity.errors import InvalidInput, suggestion

ABI = 11
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


class Matrix(ctypes.Structure):
    """`SparityMatrix` of csrc/sparity_kernels.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("masks", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("block_columns", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("block_rows", ctypes.c_int64),
        ("block_width", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("format", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("row_sums", "group_scales", "zeros")),
        *((name, ctypes.c_int32) for name in ("group", "scale_type")),
    )


class Cache(ctypes.Structure):
    """`SparityCache` of csrc/sparity_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "scales", "lengths")),
        ("capacity", ctypes.c_int64),
        ("mass", ctypes.c_void_p),
        ("type", ctypes.c_int32),
    )


class Attention(ctypes.Structure):
    """`SparityAttention` of csrc/sparity_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "heads", "kv_heads", "width")),
        *((name, ctypes.c_void_p) for name in ("fresh", "cos", "sin", "query_norm", "key_norm", "visible")),
        ("visible_keys", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "epsilon")),
        ("cache", Cache),
    )


class Skip(ctypes.Structure):
    """`SparitySkip` of csrc/sparity_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("thresholds", "centre")),
        ("scale", ctypes.c_int32),
        ("kept", ctypes.c_int64),
        ("deviations", ctypes.c_double),
    )


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class DecoderBlock(ctypes.Structure):
    """`SparityBlock` of csrc/sparity_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in PROJECTIONS),
        *((f"{name}_bias", ctypes.c_void_p) for name in PROJECTIONS),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm")),
        *((name, ctypes.c_float) for name in ("attention_epsilon", "mlp_epsilon")),
        *((f"{name}_skip", ctypes.c_void_p) for name in PROJECTIONS),
        *((f"{name}_shift", ctypes.c_void_p) for name in PROJECTIONS),
        ("neuron_skip", ctypes.c_void_p),
        ("attention", Attention),
    )


class Step(ctypes.Structure):
    """`SparityStep` of csrc/sparity_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "hidden")),
        *((name, ctypes.c_void_p) for name in ("fresh", "cos", "sin", "visible")),
        ("visible_keys", ctypes.c_int64),
        ("whole", ctypes.c_void_p),
        ("last_norm", ctypes.c_void_p),
        ("last_epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("stream", "out")),
    )


@cache
def unavailable() -> str | None:
    """Why there are no compiled kernels, or None when there are."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        InvalidInput: there is none; the message says why.
    """
    found = _load()
    if isinstance(found, str):
        raise InvalidInput(f"no compiled kernels: {found}")
    return found


def instruction_sets() -> list[str]:
    """The instruction sets of the library that this processor can run, the lowest first; none without a library."""
    if unavailable():
        return []
    best = library().sparity_isa_best()
    return [library().sparity_isa_name(rank).decode() for rank in range(best + 1)]


def instruction_set() -> str:
    """The one in use: the highest, or the one that `SPARITY_ISA` names."""
    library()
    return _in_use[-1]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within the context, kernels use the instruction set `name`, in all threads.

    Raises:
        InvalidInput: this processor or the library has no such instruction set.
    """
    before = instruction_set()
    _use(library(), name)
    try:
        yield
    finally:
        _use(library(), before)


_in_use: list[str] = []


def _use(found: ctypes.CDLL, name: str) -> None:
    known = [found.sparity_isa_name(rank).decode() for rank in range(found.sparity_isa_best() + 1)]
    if name not in known:
        raise InvalidInput(
            f'SPARITY_ISA: this processor has no "{name}"{suggestion(name, known) or ";"} choose of {", ".join(known)}'
        )
    found.sparity_isa_use(known.index(name))
    _in_use[:] = [name]


@cache
def _load() -> ctypes.CDLL | str:
    if os.environ.get("SPARITY_NO_NATIVE", "") not in ("", "0"):
        return "SPARITY_NO_NATIVE is set"
    named = os.environ.get("SPARITY_LIBRARY")
    folders = import_module("sparity.engine.kernels").__path__  # two in an editable install: sources, and what is built
    candidates = [Path(named)] if named else [Path(folder) / f"libsparity_kernels{SUFFIX}" for folder in folders]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        return "they were not built when Sparity was installed (no C++ compiler?)"
    try:
        found = ctypes.CDLL(str(path))
        version = found.sparity_abi()
        if version != ABI:
            return f"{path.name} has the interface {version}, this Sparity needs {ABI}: install it again"
        _declare(found)
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be used ({error}): install Sparity again"
    _use(found, os.environ.get("SPARITY_ISA") or found.sparity_isa_name(found.sparity_isa_best()).decode())
    return found


def _declare(found: ctypes.CDLL) -> None:
    pointer, whole, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    signatures = {
        "sparity_isa_name": (ctypes.c_char_p, (whole,)),
        "sparity_isa_best": (whole, ()),
        "sparity_isa_use": (whole, (whole,)),
        "sparity_gemv": (whole, (pointer, pointer, pointer, whole, long, whole)),
        "sparity_gemv_many": (whole, (pointer, whole, pointer, pointer, whole, long, whole)),
        "sparity_gemv_rows": (whole, (pointer, pointer, long, pointer, pointer, whole, long, whole)),
        "sparity_row_sums": (whole, (pointer, pointer, whole)),
        "sparity_unpack": (whole, (pointer, long, long, pointer, whole)),
        "sparity_gemv_slots": (whole, (*[pointer] * 4, whole, long, whole)),
        "sparity_quantize": (None, (pointer, long, long, pointer, pointer, whole)),
        "sparity_rms_norm": (None, (pointer, pointer, pointer, real, long, long, pointer, whole)),
        "sparity_gate": (None, (pointer, pointer, long, pointer, whole)),
        "sparity_silu": (None, (pointer, long, pointer, whole)),
        "sparity_skip": (whole, (pointer, pointer, pointer, long, long, pointer, whole)),
        "sparity_attend": (whole, (pointer, pointer, pointer, pointer, pointer, whole)),
        "sparity_attend_slots": (whole, (pointer, pointer, pointer, whole)),
        "sparity_choose_pages": (whole, (pointer, pointer, pointer, whole)),
        "sparity_attend_blocks": (whole, (pointer, pointer, pointer, pointer, pointer, whole)),
        "sparity_step": (whole, (pointer, pointer, whole, whole)),
        "sparity_read": (ctypes.c_uint64, (pointer, long, whole)),
        "sparity_allocate": (pointer, (long,)),
        "sparity_free": (None, (pointer, long)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments


def threads() -> int:
    """The threads that kernels use: PyTorch's."""
    return torch.get_num_threads()
