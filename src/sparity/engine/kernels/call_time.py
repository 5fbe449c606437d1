"""How long a product with a packed matrix takes on this machine: timed once, and remembered."""

from functools import partial

import torch
from torch import Tensor

from sparity.engine.kernels import choice_file
from sparity.engine.kernels.choice import STEP, default_timer
from sparity.engine.kernels.prepared import case_of, prepare
from sparity.engine.kernels.timing import Timer
from sparity.errors import InvalidInput, SparityError
from sparity.formats import Packed

ATTEMPTS = 5  # on a machine that is busy


def call_seconds(packed: Packed, threads: int, batch: int = 1, skipped: float = 0.0) -> float:
    """Of `packed` with `batch` inputs, of which the share `skipped` of the channels is zero.

    Args:
        packed: a matrix that compiled kernels take.
        threads: that the kernels use.
        batch: inputs.
        skipped: rounded to steps of 5 %; the channels lie anywhere.

    Raises:
        InvalidInput: SPARITY_CHOICE=rules turns timing off.
        SparityError: the machine is too busy to tell.
    """
    timer = default_timer()
    if timer is None:
        raise InvalidInput("what is fastest is timed, which SPARITY_CHOICE=rules turns off: unset it")
    case = case_of(packed, batch, threads)
    steps = round(100 * skipped / STEP)
    case = case._replace(format=f"{case.format} alone, {steps * STEP}% of the inputs zero")
    known = choice_file.remembered(case.key)
    if known is None or packed.format not in known:
        known = {packed.format: _timed(packed, _inputs(packed, batch, steps), timer)}
        choice_file.remember(case.key, known, packed.format, {})
    return known[packed.format]


def _timed(packed: Packed, x: Tensor, timer: Timer) -> float:
    call = partial(prepare(packed), x)
    for _ in range(ATTEMPTS):
        if found := timer({packed.format: call}):
            return found[packed.format]
    raise SparityError("the machine is too busy to time its kernels: try again when it is idle")


def _inputs(packed: Packed, batch: int, steps: int) -> Tensor:
    """`[batch, columns]`, each with so many steps of its channels at zero."""
    generator, columns = torch.Generator().manual_seed(0), packed.shape[1]
    x = torch.randn(batch, columns, generator=generator)
    for row in x:
        row[torch.randperm(columns, generator=generator)[: columns * steps * STEP // 100]] = 0
    return x.to(packed.dtype)
