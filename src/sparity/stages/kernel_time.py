"""How long this machine takes for one token's product with a matrix of which a share is gone, or dense if faster.

What is gone are weights, by the bitmask kernel, or channels of the token's input, by the kernel of weights by column.
"""

from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from sparity.budgets.base import between
from sparity.engine.kernels import choice_file, native
from sparity.engine.kernels.choice import STEP, Case, default_timer
from sparity.engine.kernels.prepared import prepare
from sparity.engine.kernels.timing import Timer
from sparity.errors import InvalidInput, SparityError
from sparity.formats import build_encoding, build_format
from sparity.models import Projection

GRID = 100 // STEP  # sparsities that are timed; those in between lie on straight lines
Gone = Literal["weights", "inputs"]
KERNELS: dict[Gone, str] = {"weights": "bitmask", "inputs": "columns"}
DENSE = "dense"


def kernel_milliseconds(projection: Projection, sparsity: float) -> float:
    """Of a matrix of that shape and type at a sparsity in [0, 1], unstructured; timed once, and remembered.

    Raises:
        InvalidInput: SPARITY_CHOICE=rules turns timing off.
        SparityError: the machine is too busy to tell.
    """
    rows, columns = projection.weight.shape
    return milliseconds(rows, columns, projection.weight.dtype, sparsity, "weights")


def milliseconds(rows: int, columns: int, dtype: torch.dtype, sparsity: float, gone: Gone) -> float:
    """Of a matrix `[rows, columns]` of which that share of the weights, or of the input's channels, is gone.

    Raises:
        InvalidInput: SPARITY_CHOICE=rules turns timing off.
        SparityError: the machine is too busy to tell.
    """
    low = min(int(sparsity * GRID + 1e-9), GRID - 1)
    timer = default_timer()
    if timer is None:
        raise InvalidInput("cost: milliseconds rests on timings, which SPARITY_CHOICE=rules turns off: unset it")
    threads = native.threads()
    table = {place / GRID: timed(rows, columns, dtype, place, threads, timer, gone) for place in (low, low + 1)}
    return between(table)(sparsity)


@cache
def timed(
    rows: int, columns: int, dtype: torch.dtype, place: int, threads: int, timer: Timer, gone: Gone = "weights"
) -> float:
    """Milliseconds of a random matrix of which, or of whose input, `place` of `GRID` parts are zero."""
    encoding, kernel = build_encoding("same"), KERNELS[gone]
    case = Case(
        rows=rows,
        columns=columns,
        format=f"budget: {kernel} or {DENSE}",
        values=encoding.words(dtype),
        density=100 - STEP * place,
        batch=1,
        threads=threads,
        bits=encoding.bits(dtype),
    )
    times = choice_file.remembered(case.key)
    if not times:
        weight = _random(rows, columns, place if gone == "weights" else 0, dtype)
        x = _random(1, columns, place, dtype) if gone == "inputs" else torch.ones(1, columns, dtype=dtype)
        calls = {name: prepare(build_format(name).pack(weight, encoding)) for name in (kernel, DENSE)}
        found = timer({name: partial(call, x) for name, call in calls.items()})
        if found is None:
            raise SparityError("the machine is too busy to time its kernels: try again when it is idle")
        times = dict(found)
        choice_file.remember(case.key, times, min(times, key=lambda name: times[name]), {})
    return 1000 * min(times.values())


def _random(rows: int, columns: int, place: int, dtype: torch.dtype) -> Tensor:
    """`[rows, columns]`, of which exactly that share is zero, anywhere."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(rows * columns, generator=generator) + 0.5
    weight[torch.randperm(rows * columns, generator=generator)[: rows * columns * place // GRID]] = 0
    return weight.reshape(rows, columns).to(dtype)
