"""How long this machine takes for one token's product with a pruned matrix: the bitmask kernel, or dense if faster."""

from functools import cache, partial

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
PRUNED = "bitmask"
DENSE = "dense"


def kernel_milliseconds(projection: Projection, sparsity: float) -> float:
    """Of a matrix of that shape and type at a sparsity in [0, 1], unstructured; timed once, and remembered.

    Raises:
        InvalidInput: SPARITY_CHOICE=rules turns timing off.
        SparityError: the machine is too busy to tell.
    """
    rows, columns = projection.weight.shape
    low = min(int(sparsity * GRID + 1e-9), GRID - 1)
    timer = default_timer()
    if timer is None:
        raise InvalidInput("cost: milliseconds rests on timings, which SPARITY_CHOICE=rules turns off: unset it")
    threads = native.threads()
    table = {
        place / GRID: timed(rows, columns, projection.weight.dtype, place, threads, timer) for place in (low, low + 1)
    }
    return between(table)(sparsity)


@cache
def timed(rows: int, columns: int, dtype: torch.dtype, place: int, threads: int, timer: Timer) -> float:
    """Milliseconds of a random matrix of which `place` of `GRID` parts are zero."""
    encoding = build_encoding("same")
    case = Case(
        rows=rows,
        columns=columns,
        format=f"budget: {PRUNED} or {DENSE}",
        values=encoding.words(dtype),
        density=100 - STEP * place,
        batch=1,
        threads=threads,
        bits=encoding.bits(dtype),
    )
    times = choice_file.remembered(case.key)
    if not times:
        weight, x = _random(rows, columns, place, dtype), torch.ones(1, columns, dtype=dtype)
        calls = {name: prepare(build_format(name).pack(weight, encoding)) for name in (PRUNED, DENSE)}
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
