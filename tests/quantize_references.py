"""The published algorithms of quantisation written as plainly as possible, in float64, for tests to compare with."""

import torch

import references


def min_max_grid(weight, bits, symmetric):
    """Scale and zero point of each row of `weight`, as in the code of GPTQ (`quant.py`)."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = -high
    nothing = (low == 0) & (high == 0)
    low[nothing], high[nothing] = -1, 1
    scale = (high - low) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale, zero


def quantized(column, scale, zero, bits):
    return scale * ((torch.round(column / scale) + zero).clamp(0, 2**bits - 1) - zero)


def nearest(weight, bits, group, symmetric):
    found = torch.zeros(weight.shape, dtype=torch.float64)
    for start in range(0, weight.shape[1], group):
        part = weight[:, start : start + group].double()
        scale, zero = min_max_grid(part, bits, symmetric)
        for column in range(group):
            found[:, start + column] = quantized(part[:, column], scale, zero, bits)
    return found


def gptq(weight, inputs, bits, group, symmetric, keep=None, damping=0.01, width=128, static=False):
    """GPTQ column by column; grids of groups are found on weights corrected by the blocks of `width` columns before."""
    factor, _ = references.inverse_factor(inputs, damping)
    keep = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep
    current = torch.where(keep, weight.double(), 0.0)
    found = torch.zeros_like(current)
    before = current.clone()
    for column in range(weight.shape[1]):
        if column % width == 0:
            at_block = current.clone()
        if column % group == 0:
            source = before if static else at_block
            members = slice(column, column + group)
            scale, zero = min_max_grid(torch.where(keep, source, 0.0)[:, members], bits, symmetric)
        values = torch.where(keep[:, column], current[:, column], 0.0)
        found[:, column] = quantized(values, scale, zero, bits)
        error = (current[:, column] - found[:, column]) / factor[column, column]
        for later in range(column, weight.shape[1]):
            current[:, later] -= error * factor[column, later]
    return found


def awq(weight, inputs, bits, group, symmetric, steps=20):
    """AWQ's search: the power of the inputs' mean size whose scales give the least squared error of the output."""
    x = inputs.double().reshape(-1, inputs.shape[-1])
    size, best, least = x.abs().mean(0), None, torch.inf
    for step in range(steps):
        scales = size.pow(step / steps).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        found = nearest(weight.double() * scales, bits, group, symmetric) / scales
        error = float((x @ (weight.double() - found).T).square().mean())
        if error < least:
            best, least = found, error
    return best


def k_means(weights, bits, iterations):
    """Values at equal distances, the one nearest to 0 moved there for good; each is the mean of its weights next."""
    w = weights.double().reshape(-1)
    values = torch.linspace(min(float(w.min()), 0), max(float(w.max()), 0), 2**bits, dtype=torch.double)
    still = int(values.abs().argmin())
    values[still] = 0
    for _ in range(iterations):
        nearest_to = (w[:, None] - values).abs().argmin(1)
        for place in range(len(values)):
            members = w[nearest_to == place]
            if place != still and len(members):
                values[place] = members.mean()
    return values


def smoothquant(weight, inputs, bits, group, symmetric, alpha=0.5):
    x = inputs.double().reshape(-1, inputs.shape[-1])
    largest = weight.double().abs().amax(0).clamp(min=1e-5)
    scales = (x.abs().amax(0).pow(alpha) / largest.pow(1 - alpha)).clamp(min=1e-5)
    return nearest(weight.double() * scales, bits, group, symmetric) / scales


def slim_llm(weight, inputs, bits, group, damping=0.01):
    """The bits of each group by the KL divergence of the outputs, then GPTQ with ranges of 0.9 to 1.1 of the whole."""
    factor, _ = references.inverse_factor(inputs, damping)
    x, current = inputs.double().reshape(-1, inputs.shape[-1]), weight.double().clone()
    starts = list(range(0, weight.shape[1], group))
    salience = (current / factor.diagonal()).square()
    totals = [float(salience[:, start : start + group].sum()) for start in starts]
    order = sorted(range(len(starts)), key=lambda place: totals[place])
    dense = (x @ current.T).softmax(1).clamp(min=1e-6)
    chosen, least = [bits] * len(starts), torch.inf
    for count in range(len(starts) // 2 + 1):
        widths = [bits] * len(starts)
        for place in range(count):
            widths[order[place]], widths[order[-1 - place]] = bits - 1, bits + 1
        parts = [
            nearest(current[:, start : start + group], width, group, False)
            for start, width in zip(starts, widths, strict=True)
        ]
        found = (x @ torch.cat(parts, 1).T).softmax(1).clamp(min=1e-6)
        divergence = float((found * (found.log() - dense.log())).sum(1).mean())
        if divergence < least:
            chosen, least = widths, divergence
    result = torch.zeros_like(current)
    for start, width in zip(starts, chosen, strict=True):
        members = slice(start, start + group)
        grids = [min_max_grid(current[:, members] * factor_, width, False) for factor_ in ranges()]
        errors = torch.stack(
            [
                (quantized(current[:, members], scale[:, None], zero[:, None], width) - current[:, members])
                .abs()
                .pow(2.4)
                .sum(1)
                for scale, zero in grids
            ]
        )
        best = errors.argmin(0)
        scale = torch.stack([scale for scale, _ in grids]).gather(0, best[None])[0]
        zero = torch.stack([zero for _, zero in grids]).gather(0, best[None])[0]
        for column in range(start, start + group):
            result[:, column] = quantized(current[:, column], scale, zero, width)
            error = (current[:, column] - result[:, column]) / factor[column, column]
            for later in range(column, weight.shape[1]):
                current[:, later] -= error * factor[column, later]
    return result, chosen


def ranges():
    return [1.0, *(1 + step / 500 for step in range(1, 51)), *(1 - step / 500 for step in range(1, 51))]


def sparsegpt_and_bits(weight, inputs, sparsity, bits, damping=0.01, width=128):
    """SparseGPT with `--wbits`: one grid with a zero point per row of the dense weight; zero, round, propagate."""
    factor, dead = references.inverse_factor(inputs, damping)
    scale, zero = min_max_grid(weight.double(), bits, symmetric=False)
    current = weight.double().clone()
    current[:, dead] = 0
    found, columns = torch.zeros_like(current), weight.shape[1]
    for start in range(0, columns, width):
        end = min(start + width, columns)
        scores = current[:, start:end] ** 2 / factor.diagonal()[start:end] ** 2
        pruned = scores <= torch.sort(scores.flatten()).values[int(scores.numel() * sparsity)]
        for column in range(start, end):
            values = torch.where(pruned[:, column - start], 0.0, current[:, column])
            found[:, column] = quantized(values, scale, zero, bits)
            error = (current[:, column] - found[:, column]) / factor[column, column]
            for later in range(column, columns):
                current[:, later] -= error * factor[column, later]
    return found
