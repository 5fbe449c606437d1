"""Which columns belong into one group of M, so that the N best of each group hold most.

The sweeps are those of RIA's linear sum assignment (Zhang et al. 2024, "Plug-and-Play", ICLR): one column is taken out
of every group, and the columns are given back to the groups in the best way, found exactly.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sparity.errors import InvalidInput

PART = 512  # groups that exchange columns at once: the assignment takes the square of them
AT_ONCE = 1 << 24  # numbers in memory


def kept_score(scores: Tensor, n: int, m: int) -> float:
    """The sum of the `n` highest of each `m` neighbouring columns; what `m` does not divide counts whole."""
    whole = scores.shape[1] - scores.shape[1] % m
    groups = scores[:, :whole].reshape(len(scores), -1, m)
    return float(groups.topk(n, dim=-1).values.double().sum() + scores[:, whole:].double().sum())


def column_order(scores: Tensor, n: int, m: int, sweeps: int, seed: int = 0) -> Tensor:
    """An order of columns that keeps more of `scores` under an N:M pattern, never less.

    It starts from the given order, or from columns dealt out by their sums where that keeps more. In a sweep each group
    gives away `m` times one of its columns; more than 512 groups exchange among 512 drawn at random. The last columns,
    where `m` does not divide their number, stay where they are.

    Args:
        scores: `[rows, columns]`, not negative, finite.
        n: columns of a group that stay, from 1 to m.
        m: columns of a group.
        sweeps: at most; it ends with one that changes nothing. 0 leaves the order.
        seed: of the draws.

    Returns:
        int64 `[columns]`, a permutation: column `order[i]` goes to place `i`.

    Raises:
        InvalidInput: scores that are negative, NaN or infinite, or numbers that make no pattern.
    """
    if not 1 <= n <= m:
        raise InvalidInput(f"pattern {n}:{m}: N columns are kept of M, so 1 <= N <= M")
    if not bool(scores.isfinite().all()) or bool((scores < 0).any()):
        raise InvalidInput("a score is negative, NaN or infinite: such columns have no best order")
    columns = scores.shape[1]
    count = columns // m
    identity = torch.arange(columns)
    if count < 2 or n == m or not sweeps:
        return identity
    scores = scores.float().cpu()
    body = scores[:, : count * m]
    order = max((identity[: count * m], _dealt(body, m)), key=lambda tried: kept_score(body[:, tried], n, m))
    generator = torch.Generator().manual_seed(seed)
    best = kept_score(body[:, order], n, m)
    for _ in range(sweeps):
        begun = best
        for _ in range(m):
            tried = _exchanged(body, order.view(count, m), n, generator).flatten()
            found = kept_score(body[:, tried], n, m)
            if found > best:  # sums are rounded, so an equal choice may look better within the assignment
                order, best = tried, found
        if best == begun:
            break
    return torch.cat([order, identity[count * m :]])


def _dealt(scores: Tensor, m: int) -> Tensor:
    """Columns by their sums, dealt to the groups forwards and backwards in turn (RIA's first guess)."""
    ranked = scores.double().sum(0).argsort(descending=True, stable=True).view(m, -1)
    return torch.stack([row.flip(0) if place % 2 else row for place, row in enumerate(ranked)], 1).flatten()


def _exchanged(scores: Tensor, groups: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`groups` int64 [groups, m] after each of them gave one column away and got the one that suits it best."""
    count, m = groups.shape
    places = torch.rand(count, m, generator=generator).argsort(-1)  # the first is the one that goes
    groups = groups.gather(1, places)
    given = groups[:, 0].clone()
    for part in torch.split(torch.randperm(count, generator=generator), PART):
        _, taken = linear_sum_assignment(_gains(scores, groups[part, 1:], given[part], n).numpy(), maximize=True)
        groups[part, 0] = given[part][torch.as_tensor(taken)]
    return groups


def _gains(scores: Tensor, rest: Tensor, given: Tensor, n: int) -> Tensor:
    """What each group keeps with each of the given columns, float64 `[groups, given]`, up to a constant per group.

    The n best of a group's other m - 1 and of x are its n - 1 best, and the larger of x and the next one.
    """
    rows, count = len(scores), len(rest)
    found = torch.zeros(count, count, dtype=torch.float64)
    columns = scores[:, given]
    if n == rest.shape[1] + 1:
        return found
    limit = scores[:, rest.flatten()].view(rows, *rest.shape).topk(n, dim=-1).values[..., -1]  # [rows, groups]
    step = max(AT_ONCE // (rows * count), 1)
    for first in range(0, count, step):
        some = limit[:, first : first + step, None]
        found[first : first + step] = torch.maximum(some, columns[:, None]).sum(0)
    return found
