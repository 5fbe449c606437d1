"""By how much the columns of a matrix are multiplied before rounding: AWQ's search, SmoothQuant's formula."""

from typing import Literal

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.static.quantize.methods.awq import scales_of
from sparity.static.quantize.methods.base import Task, row_errors, scaled_nearest
from sparity.static.quantize.methods.smoothquant import smoothing
from sparity.static.quantize.quantizing import Quantizing
from sparity.static.rescale.sources import Source

Method = Literal["awq", "smoothquant"]
NEEDS = {"awq": frozenset({"gram", "mean_absolute"}), "smoothquant": frozenset({"max_absolute"})}


def factors_of(
    source: Source,
    statistics: Statistics,
    method: Method,
    exact: bool,
    quantizing: Quantizing,
    steps: int = 20,
    alpha: float = 0.5,
) -> Tensor:
    """`[columns]`, float32, above 0: the factors of the columns that a source's readers share.

    Args:
        source: the channels.
        statistics: of the readers' inputs.
        method: whose factors.
        exact: only powers of two, which change no bit of a product.
        quantizing: how the readers will be rounded; AWQ's search rounds so.
        steps: powers that AWQ tries.
        alpha: SmoothQuant's.
    """
    weight = torch.cat([reader.weight.float().cpu() for reader in source.readers])
    if method == "smoothquant":
        sizes = source.shared(statistics["max_absolute"].float().cpu(), "amax")
        return _rounded(source.shared(smoothing(weight, sizes, alpha), "mean"), exact)
    gram, sizes = statistics.gram.float().cpu(), source.shared(statistics["mean_absolute"].float().cpu(), "mean")
    group = quantizing.group or weight.shape[1]
    task = Task(weight, weight != 0, quantizing.grid, group, statistics)
    best, least = torch.ones(weight.shape[1]), torch.inf
    for step in range(steps):
        factors = _rounded(scales_of(sizes, step / steps), exact) if step else torch.ones(weight.shape[1])
        error = float(row_errors(weight - scaled_nearest(task, factors).weight, gram).sum())
        if error < least:
            best, least = factors, error
    return best


def _rounded(factors: Tensor, exact: bool) -> Tensor:
    return torch.exp2(factors.log2().round()) if exact else factors
