"""The published solvers written as plainly as possible, in float64, for tests to compare with."""

import numpy as np
import torch

import references


def gram(inputs):
    x = inputs.double().reshape(-1, inputs.shape[-1])
    return x.T @ x


def error(weight, found, total):
    change = weight.double() - found.double()
    return float(((change @ total) * change).sum())


def largest(values, count):
    """Mask of the `count` largest of all, of equal ones the later."""
    order = sorted(range(values.numel()), key=lambda place: (float(values.flatten()[place]), place))
    keep = torch.zeros(values.numel(), dtype=torch.bool)
    keep[order[values.numel() - count :]] = True
    return keep.view(values.shape)


def admm(weight, inputs, sparsity=None, pattern=None, at_once=False, damping=0.1, iterations=20, rounds=15):
    """ADMM (`admm.py`), layer-wise with the cubic schedule that its rows and patterns follow, or `at_once`."""
    total = gram(inputs)
    norm = total.diagonal().sqrt() + 1e-8
    total = total / norm / norm[:, None]
    total += damping * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
    dense = weight.double() * norm
    target = dense @ total
    inverse = torch.linalg.inv(total + torch.eye(len(total), dtype=torch.float64))
    current, multiplier = dense, torch.zeros_like(dense)
    for step in range(iterations):
        wanted = current + multiplier
        if step < rounds:
            if pattern is None:
                keep = largest(wanted.abs(), wanted.numel() - int(wanted.numel() * sparsity))
            else:
                keep = references.n_of_m(wanted.abs(), *pattern)
            share = 1 if at_once else 1 - (1 - (step + 1) / rounds) ** 3
            going = sorted(
                (~keep).flatten().nonzero().flatten().tolist(), key=lambda p: float(wanted.flatten()[p].abs())
            )
            mask = torch.ones(wanted.numel(), dtype=torch.bool)
            mask[going[: int(len(going) * share)]] = False
            mask = mask.view(wanted.shape)
        sparse = torch.where(mask, wanted, 0.0)
        multiplier = multiplier + current - sparse
        current = (target + sparse - multiplier) @ inverse
    return torch.where(keep, (current + multiplier) / norm, 0.0), keep


def alps(weight, inputs, sparsity, damping=0.01, iterations=300):
    """ALPS (`alps.py`), unstructured: D, V and rho as the paper calls them, then conjugate gradients row by row."""
    total = gram(inputs)
    total += damping * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
    norm = total.diagonal().sqrt() + 1e-8
    total = total / norm / norm[:, None]
    dense = weight.double() * norm
    target, kept = dense @ total, dense.numel() - int(dense.numel() * sparsity)
    first = largest(dense.abs(), kept)
    sparse, multiplier, rho, begun, before = torch.where(first, dense, 0.0), torch.zeros_like(dense), 0.1, False, first
    inverse = torch.linalg.inv(total + rho * torch.eye(len(total), dtype=torch.float64))
    current = dense
    for step in range(1, iterations + 1):
        current = (target - multiplier + rho * sparse) @ inverse
        wanted = (multiplier + rho * current) / rho
        keep = largest(wanted.abs(), kept)
        sparse = torch.where(keep, wanted, 0.0)
        multiplier = multiplier + rho * (current - sparse)
        if step % 3 == 0:
            changed = int((keep != before).sum())
            if changed / kept > 0.1:
                begun, rho = True, rho * 1.3
            elif changed / kept > 0.005:
                begun, rho = True, rho * 1.2
            elif changed > 0.5 and begun:
                rho *= 1.1
            elif changed > 0.5:
                rho, current = rho / 5, dense
                sparse, multiplier = torch.where(first, dense, 0.0), torch.zeros_like(dense)
            elif begun:
                break
            else:
                rho /= 5
            before, rho = keep, min(rho, 1e6)
            inverse = torch.linalg.inv(total + rho * torch.eye(len(total), dtype=torch.float64))
            if step - 1 >= 30 and changed / kept < 0.0003:
                break
    keep = largest(current.abs(), kept)
    found = torch.where(keep, current, 0.0)
    for row in range(len(found)):
        inside = keep[row].nonzero().flatten()
        if len(inside):
            matrix = total[inside][:, inside]
            found[row, inside] = conjugate_gradients(matrix, target[row, inside], found[row, inside], 10)
    return found / norm, keep


def conjugate_gradients(matrix, right, start, steps):
    x, residual = start.clone(), right - matrix @ start
    direction = residual.clone()
    for _ in range(steps):
        if residual.norm() < 1e-12:
            break
        step = (residual @ residual) / (direction @ matrix @ direction)
        x = x + step * direction
        later = residual - step * matrix @ direction
        direction = later + (later @ later) / (residual @ residual) * direction
        residual = later
    return x


def best_swaps(weight, keep, total, width, swaps=100):
    """The best exchange of every pair, tried one after the other, until none makes a row's error smaller."""
    keep = keep.clone()
    for row in range(len(weight)):
        for _ in range(swaps):
            best, least = None, error(weight[row : row + 1], torch.where(keep[row], weight[row], 0.0)[None], total)
            begin = least
            for pruned in keep[row].nonzero().flatten().tolist():
                for revived in (~keep[row]).nonzero().flatten().tolist():
                    if pruned // width != revived // width:
                        continue
                    tried = keep[row].clone()
                    tried[pruned], tried[revived] = False, True
                    found = error(weight[row : row + 1], torch.where(tried, weight[row], 0.0)[None], total)
                    if found < least:
                        best, least = tried, found
            if best is None or begin - least < 1e-6 * begin:
                break
            keep[row] = best
    return keep


def thanos(weight, inputs, sparsity=None, pattern=None, width=128, damping=0.01):
    """Thanos (`slowprune`): for each block of columns and each row, one system for all weights that go."""
    matrix = references.hessian(inputs)
    matrix += damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    norm, current = references.input_norm(inputs), weight.double().clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], width):
        block = slice(start, min(start + width, weight.shape[1]))
        metric = current[:, block].abs() * norm[block]
        if pattern is None:
            keep = largest(metric, metric.numel() - int(metric.numel() * sparsity))
        else:
            keep = references.n_of_m(metric, *pattern)
        mask[:, block] = keep
        inverse = torch.linalg.inv(matrix[start:, start:])
        for row in range(len(weight)):
            gone = (~keep[row]).nonzero().flatten()
            if len(gone):
                multipliers = torch.linalg.solve(inverse[gone][:, gone], current[row, start + gone])
                current[row, start:] -= inverse[:, gone] @ multipliers
                current[row, start + gone] = 0
    return current, mask


def dsnot_row(shares, variance, scores, keep, width, cycles=12, threshold=0.1, power=1.0):
    """One row of the published code: unstructured without a look at signs, N:M with one."""
    columns, keep = len(shares), keep.copy()
    start = keep.copy()
    error = shares[~start].sum()
    first = np.sign(error)
    key = np.where(start, 0.0, shares) / variance**power
    growth = list(np.argsort(key, kind="stable"))
    kept = [int(c) for c in np.argsort(np.where(start, scores, np.inf), kind="stable") if start[c]]
    negative = [c for c in kept if shares[c] < 0]
    positive = [c for c in kept if shares[c] > 0]
    scores = np.where(start, scores, np.inf)
    going = True
    for _ in range(cycles):
        if not going:
            break
        revived = growth.pop(-1) if error > 0 else growth.pop(0)
        if width == columns:
            pruned = negative.pop(0) if error >= 0 else positive.pop(0)
        else:
            group = range(revived - revived % width, revived - revived % width + width)
            pruned = min(group, key=lambda c: scores[c])
            scores[pruned] = np.inf
        after = error + shares[pruned] - shares[revived]
        going = abs(error) > threshold and (width == columns or np.sign(after) == first)
        if going:
            keep[pruned], keep[revived], error = False, True, after
    return keep
