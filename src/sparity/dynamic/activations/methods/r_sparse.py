"""R-Sparse: large channels in full, the others through a low rank (Zhang et al. 2025, arXiv:2504.19449)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.activations.method_data import InputChange, checked, in_front
from sparity.dynamic.activations.methods.base import RuleMethod, Seen, stand_in
from sparity.dynamic.activations.places import Kind, Place
from sparity.dynamic.activations.quantiles import ROUNDING, divided, quantile
from sparity.dynamic.activations.rule_data import rule_bytes, rule_of
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import InvalidInput
from sparity.registry import register


@register("activations.method", "r_sparse")
@dataclass(frozen=True)
class RSparse(RuleMethod):
    """Channel i counts where |x_i| ||W[:, i]|| > t; those that do not go through the largest singular values of W.

    Attributes:
        rho: the share of the budget that is spent on channels, in [0, 1]; the rest buys the rank. At 1 there is none.
        reference: as the authors' code: plain |x_i| where rho is 1.
    """

    rho: float = 1.0
    reference: bool = False
    takes: ClassVar[tuple[Kind, ...]] = ("input", "hidden")

    def __post_init__(self) -> None:
        if not 0 <= self.rho <= 1:
            raise InvalidInput(f"{self.name}: rho {self.rho} must lie in [0, 1]")

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        if self.rho == 0:
            return SkipRule(torch.tensor(torch.inf))
        plain = self.reference and self.rho == 1
        norms = torch.ones((), device=seen.values.device) if plain else seen.column_norms
        limit = quantile(seen.values.abs() * norms, 1 - (1 - sparsity) * self.rho)
        return SkipRule(divided(limit, norms))

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`: the rule, and `basis` [in, rank], the right singular vectors, where the rank is not 0."""
        found = super().fit(seen, sparsity)
        if self.rho == 1:
            return found
        if seen.weight is None:
            raise InvalidInput(f"{seen.statistics.site}: a low rank is one of the weight: give it (`weight`)")
        rows, columns = seen.weight.shape
        if rank := self.rank(rows, columns, sparsity):
            right = torch.linalg.svd(seen.weight.float(), full_matrices=False).Vh[:rank]  # [rank, in]
            found["basis"] = right.T.contiguous()
        return found

    def rank(self, rows: int, columns: int, sparsity: float) -> int:
        """What the weights that the channels leave of the budget buy: a rank costs `rows + columns` of them."""
        channels = int(columns * (1 - sparsity) * self.rho + ROUNDING)
        left = rows * columns * (1 - sparsity) - channels * rows
        return min(int(left / (rows + columns) + ROUNDING), rows, columns)

    def nbytes(self, place: Place, sparsity: float) -> int:
        """See `Method.nbytes`."""
        rows = sum(projection.weight.shape[0] for projection in place.reads)
        rank = 0 if self.rho == 1 else self.rank(rows, place.columns, sparsity)
        return rule_bytes(self.rule(stand_in(place), sparsity)) + 4 * place.columns * rank

    @contextmanager
    def attach(self, place: Place, tensors: Mapping[str, Tensor], tokens: SparseTokens) -> Iterator[None]:
        """See `Method.attach`. W (x_A + V VT x_rest) is W x_A + U S VT x_rest: the input alone is changed."""
        rest = dict(tensors)
        basis = rest.pop("basis", None)
        if basis is None:
            with super().attach(place, rest, tokens):
                yield
            return
        rule = rule_of(rest, place.columns, place.name)
        checked({"basis": basis}, {"basis": (torch.float32, (place.columns, None))}, place.name)
        with in_front(place.module, InputChange(LowRank(rule, basis), tokens)):
            yield

    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Method.mask`: the channels that count in full."""
        return super().mask({name: tensor for name, tensor in tensors.items() if name != "basis"}, x)


@dataclass
class LowRank:
    """What counts in full, and what is left seen through a basis `[in, rank]` of orthogonal columns."""

    rule: SkipRule
    basis: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> x_A + V VT x_rest, in the type of x."""
        self.rule, self.basis = self.rule.like(x), self.basis.to(x.device)
        counts = self.rule.keep(x)
        rest = x.float().masked_fill(counts, 0)
        return torch.where(counts, x, 0) + ((rest @ self.basis) @ self.basis.T).to(x.dtype)
