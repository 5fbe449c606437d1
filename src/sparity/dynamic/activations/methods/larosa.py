"""LaRoSA: for each token the largest coordinates in a rotated basis (Liu et al. 2025, arXiv:2507.01299)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.activations.method_data import InputChange, checked, in_front
from sparity.dynamic.activations.methods.base import RuleMethod, Seen, stand_in
from sparity.dynamic.activations.places import Kind, Place
from sparity.dynamic.activations.quantiles import ROUNDING
from sparity.dynamic.activations.rule_data import rule_bytes, rule_of
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.engine.modules.skips import SparseTokens
from sparity.registry import register

INNER = frozenset({"o", "down", "fc2"})  # their inputs are not the residual stream's and stay as they are


@register("activations.method", "larosa")
@dataclass(frozen=True)
class Larosa(RuleMethod):
    """Of QT x the k largest coordinates of a token count, where Q holds the eigenvectors of E[x xT].

    The inputs of o, down and fc2 are not rotated: there the k largest channels count.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("input", "hidden")

    @property
    def statistics(self) -> frozenset[str]:
        """See `Method.statistics`."""
        return frozenset({"gram", "inputs"})

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`: of the coordinates."""
        kept = max(int(seen.values.shape[-1] * (1 - sparsity) + ROUNDING), 1)
        return SkipRule(torch.ones(()), scale="top", kept=kept)

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`: the rule, and `rotation` [in, in] where the input is rotated, a coordinate per column."""
        found = super().fit(seen, sparsity)
        if not INNER & set(seen.roles):
            gram = seen.statistics.gram.double()
            size = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
            found["rotation"] = torch.linalg.eigh(gram / size).eigenvectors.float().contiguous()  # by rising eigenvalue
        return found

    def nbytes(self, place: Place, sparsity: float) -> int:
        """See `Method.nbytes`."""
        rotated = not INNER & {projection.role for projection in place.reads}
        return rule_bytes(self.rule(stand_in(place), sparsity)) + (4 * place.columns**2 if rotated else 0)

    @contextmanager
    def attach(self, place: Place, tensors: Mapping[str, Tensor], tokens: SparseTokens) -> Iterator[None]:
        """See `Method.attach`."""
        if "rotation" not in tensors:
            with super().attach(place, tensors, tokens):
                yield
            return
        with in_front(place.module, InputChange(rotated(tensors, place.columns, place.name), tokens)):
            yield

    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Method.mask`: True where a coordinate of the rotated token counts; NaN makes all of them count."""
        if "rotation" not in tensors:
            return super().mask(tensors, x)
        return rotated(tensors, x.shape[-1], "x").keep(x)


@dataclass
class Rotated:
    """The largest coordinates of a token in an orthogonal basis, a column each."""

    rotation: Tensor  # [in, in]
    rule: SkipRule  # of the coordinates

    def keep(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> bool, for each coordinate."""
        return self._rule(x).keep(self._coordinates(x))

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> Q top(QT x), in the type of x."""
        coordinates = self._coordinates(x)
        return (self._rule(x).apply(coordinates) @ self.rotation.T).to(x.dtype)

    def _rule(self, x: Tensor) -> SkipRule:
        self.rule = self.rule.like(x)
        return self.rule

    def _coordinates(self, x: Tensor) -> Tensor:
        self.rotation = self.rotation.to(x.device)
        return x.float() @ self.rotation


def rotated(tensors: Mapping[str, Tensor], columns: int, what: str) -> Rotated:
    """The data of a rotated place, checked.

    Raises:
        CorruptFile: it does not fit, or is no rotation.
    """
    rest = dict(tensors)
    checked({"rotation": rest.pop("rotation")}, {"rotation": (torch.float32, (columns, columns))}, what)
    return Rotated(tensors["rotation"], rule_of(rest, columns, what))
