"""Narrow pairs of matrices beside linear layers: what they are fitted to, and how they are added while a model runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import CorruptFile
from sparity.models import InputSite
from sparity.models.block import Projection, in_features, out_features

PARTS = ("first", "second")  # A [rank, in] and B [out, rank]
FLOOR = 1e-6  # of the largest eigenvalue or square: directions that are weaker count as this strong
AGAIN = "fetch the folder again, or load it without (sparity.load(path, runtime=False))"


def eigenspace_low_rank(error: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The A `[rank, in]` and B `[out, rank]` with the least sum of |E x - B A x|^2, in float64.

    Args:
        error: E, `[out, in]`.
        gram: the sum of x xT, `[in, in]`.
        rank: of B A.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    roots = _roots(values)
    first, second = _nearest(error.double() @ vectors * roots, rank)
    return (first / roots) @ vectors.T, second


def salient_low_rank(error: Tensor, squares: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The A `[rank, in]` and B `[out, rank]` with the least sum of squares_j (E - B A)_ij^2, in float64.

    Args:
        error: E, `[out, in]`.
        squares: the sum of x^2 of each input, `[in]`.
        rank: of B A.
    """
    roots = _roots(squares.double())
    first, second = _nearest(error.double() * roots, rank)
    return first / roots, second


def _roots(strengths: Tensor) -> Tensor:
    """Roots of what directions or inputs weigh, none of them too weak to divide by."""
    return strengths.clamp_min(FLOOR * strengths.max().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def _nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `[rank, in]` and B `[out, rank]` whose product B A is the nearest of its rank to `matrix` [out, in]."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    halves = sizes[:rank].sqrt()
    return halves[:, None] * right[:rank], left[:, :rank] * halves


@contextmanager
def added(sites: Sequence[InputSite], data: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context B A x is added to what projections give for x.

    Args:
        sites: of a model or of one of its blocks.
        data: `PROJECTION.first` and `PROJECTION.second`.

    Raises:
        CorruptFile: the data does not fit the sites.
    """
    known = {projection.name: projection for site in sites for projection in site.projections}
    pairs = _checked(known, data)
    with ExitStack() as hooks:
        for name, (first, second) in pairs.items():
            hook = _adding(known[name], first, second)
            hooks.callback(known[name].module.register_forward_hook(hook).remove)
        yield


def _adding(projection: Projection, first: Tensor, second: Tensor) -> Callable[..., Tensor]:
    held = [first, second]

    def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        x = arguments[0]
        held[:] = (part.to(x) for part in held)
        found: Tensor = x @ held[0].T @ held[1].T
        if projection.rows is None:
            return output + found
        whole = output.clone()
        whole[..., slice(*projection.rows)] += found
        return whole

    return add


def _checked(known: Mapping[str, Projection], data: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    names = dict.fromkeys(key.rpartition(".")[0] for key in data)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        parts = [data.get(f"{name}.{part}") for part in PARTS]
        projection = known.get(name)
        if projection is None or projection.expert is not None:
            raise CorruptFile(f"heal: {name} is no linear layer of the model; {AGAIN}")
        first, second = parts
        columns = in_features(projection.module)
        start, stop = projection.rows or (0, out_features(projection.module))
        rows = stop - start
        rank = 0 if first is None else len(first)
        if first is None or second is None or first.shape != (rank, columns) or second.shape != (rows, rank):
            raise CorruptFile(f"heal: the low rank beside {name} does not fit [{rows}, {columns}]; {AGAIN}")
        if not bool(first.isfinite().all() and second.isfinite().all()):
            raise CorruptFile(f"heal: the low rank beside {name} is not finite; {AGAIN}")
        found[name] = first, second
    strange = data.keys() - {f"{name}.{part}" for name in names for part in PARTS}
    if strange:
        raise CorruptFile(f"heal: unknown data {min(strange)}; {AGAIN}")
    return found
