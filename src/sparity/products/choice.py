"""Which types' matrix products PyTorch emulates on this processor, where float32 ones are faster; measured once.

`SPARITY_PRODUCTS` gives the answer instead: `float32` says that all are emulated, `own` that none are.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from sparity.errors import InvalidInput

SIXTEEN_BITS = (torch.bfloat16, torch.float16)  # of these products are rounded, so results depend on the answer
MARGIN = 1.5  # how many times as long as float32 a product in its own type takes when it counts as emulated
SHAPE = (64, 512, 512)  # tokens, rows and columns of the product that is timed
ROUNDS = 5
_settled: list[frozenset[torch.dtype]] = []  # what `settled` says, the last one counts


def emulated(dtype: torch.dtype) -> bool:
    """Whether products in bfloat16, float16 or int8 are to be computed in float32 on this processor; others never.

    Raises:
        InvalidInput: `SPARITY_PRODUCTS` says something unknown.
    """
    if dtype not in (*SIXTEEN_BITS, torch.int8):
        return False
    if _settled and dtype in SIXTEEN_BITS:
        return dtype in _settled[-1]
    asked = _asked()
    return asked == "float32" or (asked == "measured" and slowdown(dtype) >= MARGIN)


def emulated_types() -> frozenset[torch.dtype]:
    """Those of `SIXTEEN_BITS` that are emulated."""
    return frozenset(dtype for dtype in SIXTEEN_BITS if emulated(dtype))


@contextmanager
def settled(types: Collection[torch.dtype]) -> Iterator[None]:
    """Within the context these of `SIXTEEN_BITS` count as emulated and no others: what was found when a run began."""
    _settled.append(frozenset(types))
    try:
        yield
    finally:
        _settled.pop()


def words(dtype: torch.dtype) -> str:
    """What products in `dtype` are computed in where Sparity has the choice, and why."""
    asked, told = _asked(), os.environ.get("SPARITY_PRODUCTS")
    if asked == "measured":
        why = f"{slowdown(dtype):.1f}x the time of float32"
    else:
        why = f"SPARITY_PRODUCTS={told}" if told else "not timed: SPARITY_CHOICE=rules"
    return f"float32 (own type: {why})" if emulated(dtype) else f"own type ({why})"


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as the same product in float32, the conversions counted, one in `dtype` takes here."""
    tokens, rows, columns = SHAPE
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-9, 9, (size, columns), generator=generator).to(dtype) for size in (tokens, rows))
    multiply: Callable[[Tensor, Tensor], Tensor] = torch._int_mm if dtype == torch.int8 else torch.mm
    return _ratio(
        lambda: multiply(x, weight.T),
        lambda: torch.mm(x.float(), weight.float().T).to(torch.int32 if dtype == torch.int8 else dtype),
    )


def _ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """The fastest call of one over that of the other, in turns, in processor time of one thread.

    On a busy machine threads wait for each other, and the clock runs on meanwhile.
    """
    best, threads = [float("inf"), float("inf")], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(ROUNDS + 1):
            for place, call in enumerate((slow, fast)):
                begun = time.thread_time()
                call()
                if number:  # the first round warms up
                    best[place] = min(best[place], time.thread_time() - begun)
    finally:
        torch.set_num_threads(threads)
    return best[0] / best[1]


def _asked() -> str:
    default = "own" if os.environ.get("SPARITY_CHOICE") == "rules" else "measured"
    asked = os.environ.get("SPARITY_PRODUCTS") or default
    if asked not in ("float32", "own", "measured"):
        raise InvalidInput(f"SPARITY_PRODUCTS: float32, own or measured, not {asked!r}")
    return asked
