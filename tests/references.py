"""The published algorithms written as plainly as possible: slow, loop by loop, for the tests to compare with."""

import torch


def hessian(inputs):
    """SparseGPT's running Hessian, by sequence: H <- H n/(n+1) + 2/(n+1) x xT; inputs [samples, tokens, in]."""
    total = torch.zeros(inputs.shape[-1], inputs.shape[-1], dtype=torch.float64)
    for count, sequence in enumerate(inputs.double()):
        total *= count / (count + 1)
        total += 2 / (count + 1) * sequence.T @ sequence
    return total


def input_norm(inputs):
    """Wanda's running squared norm, then its root."""
    scaler = torch.zeros(inputs.shape[-1], dtype=torch.float64)
    for count, sequence in enumerate(inputs.double()):
        scaler *= count / (count + 1)
        scaler += sequence.norm(dim=0) ** 2 / (count + 1)
    return scaler.sqrt()


def wanda(weight, inputs, sparsity):
    """Mask of Wanda: in each row the first int(in * s) of a stable ascending sort go."""
    metric = weight.double().abs() * input_norm(inputs)
    keep = torch.ones_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        order = torch.sort(metric[row], stable=True).indices
        keep[row, order[: int(weight.shape[1] * sparsity)]] = False
    return keep


def magnitude(weight, sparsity):
    """Mask of layer-wise magnitude: everything up to the value at rank int(numel * s) goes."""
    values = weight.abs()
    threshold = torch.sort(values.flatten()).values[int(values.numel() * sparsity)]
    return values > threshold


def n_of_m(metric, kept, of):
    """Mask that keeps the highest `kept` of each `of` neighbours, lower columns pruned first on ties."""
    keep = torch.zeros_like(metric, dtype=torch.bool)
    for row in range(metric.shape[0]):
        for start in range(0, metric.shape[1], of):
            group = metric[row, start : start + of].tolist()
            best = sorted(range(of), key=lambda column: (group[column], column))[of - kept :]
            for column in best:
                keep[row, start + column] = True
    return keep


def inverse_factor(inputs, damping):
    """The upper factor U of the inverse damped Hessian, and the dead channels, in float64."""
    matrix = hessian(inputs)
    dead = matrix.diagonal() == 0
    matrix[dead, dead] = 1
    matrix += damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True), dead


def sparsegpt(weight, inputs, sparsity=None, pattern=None, damping=0.01, width=128, mask=None):
    """SparseGPT column by column in float64; `pattern` is (kept, of), `mask` a mask to keep instead of choosing."""
    factor, dead = inverse_factor(inputs, damping)
    current = weight.double().clone()
    current[:, dead] = 0
    keep = torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    for start in range(0, columns, width):
        end = min(start + width, columns)
        for column in range(start, end):
            if mask is not None:
                keep[:, column] = mask[:, column]
            elif pattern is None and column == start:
                scores = current[:, start:end] ** 2 / factor.diagonal()[start:end] ** 2
                threshold = torch.sort(scores.flatten()).values[int(scores.numel() * sparsity)]
                keep[:, start:end] = scores > threshold
            elif pattern is not None and (column - start) % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                scores = current[:, group] ** 2 / factor.diagonal()[group] ** 2
                keep[:, group] = n_of_m(scores, *pattern)
            error = torch.where(keep[:, column], 0.0, current[:, column] / factor[column, column])
            for later in range(column, columns):
                current[:, later] -= error * factor[column, later]
    return torch.where(keep, current, 0.0), keep


def least_squares(weight, inputs, keep, damping=0.0):
    """The best survivors of each row for a given mask: min ||(w - w') H (w - w')T||, row by row."""
    matrix = hessian(inputs)
    matrix += damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    solved = torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        kept = keep[row].nonzero().flatten()
        right = matrix[kept] @ weight[row].double()
        solved[row, kept] = torch.linalg.solve(matrix[kept][:, kept], right)
    return solved


def output_error(before, after, inputs, outputs=None):
    """||X (W - W')T||^2 over all tokens, in float64; with `outputs` G [out, out] an error e counts as e G eT."""
    x = inputs.double().reshape(-1, inputs.shape[-1])
    errors = x @ (before.double() - after.double()).T
    return float((errors * (errors if outputs is None else errors @ outputs.double())).sum())


def layer(rows, columns, seed=0, samples=3, tokens=None):
    """A random weight [rows, columns] and correlated inputs [samples, tokens, columns] for it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    scale = torch.rand(columns, generator=generator) + 0.1
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5  # correlated
    inputs = torch.randn(samples, tokens or 3 * columns, columns, generator=generator) @ mixing * scale
    return weight, inputs
