"""What a pattern is, how it is written, and how the lowest scores are picked."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparity import registry
from sparity.errors import InvalidInput, NumericalError, suggestion
from sparity.static.prune.compare_within import CompareWithin

SMALL_GROUP = 16  # up to here comparing all pairs beats selecting


class Pattern(ABC):
    """Where zeros may lie.

    `compare_within` says which scores compete: those of an output row, or of all that `keep` is given.
    """

    name: ClassVar[str]

    @abstractmethod
    def keep(self, scores: Tensor, sparsity: float, compare_within: CompareWithin) -> Tensor:
        """`scores` [out, in], float32 -> bool [out, in], True where the weight is kept.

        Of equal scores the one in the lower column (then row) is pruned first.
        """

    @property
    @abstractmethod
    def words(self) -> str:
        """The pattern in words, such as "2 of 4 kept"."""

    @property
    def sparsity(self) -> float | None:
        """The only sparsity that the pattern allows, or None when it allows any."""
        return None

    @property
    def column_step(self) -> int | None:
        """The width of the column groups in which a solver that goes column by column must choose."""
        return None

    @property
    def column_multiple(self) -> int:
        """The solver's column blocks must be a multiple of this."""
        return self.column_step or 1

    def exchange_width(self, columns: int) -> int:
        """In rows of so many columns, the width of the groups in which a kept and a pruned weight may change places.

        0 where that could break the pattern.
        """
        return 0

    def competing(self, scores: Tensor) -> Tensor:
        """What competes when all matrices of a model are compared: here each score of `[out, in]` by itself."""
        return scores

    def sparsity_of(self, pruned: int, total: int) -> float:
        """The sparsity for which `keep` prunes just the `pruned` lowest of `total` competitors, compared in a layer."""
        return min((pruned + 0.5) / total, 1.0) if pruned else 0.0  # rounded down there: half of one more is nothing

    def check_shape(self, rows: int, columns: int, name: str) -> None:  # noqa: B027 - not every pattern must
        """Raise `InvalidInput` when the pattern does not fit a matrix of this shape; most fit all."""

    @abstractmethod
    def breaches(self, keep: Tensor) -> int:
        """The number of groups of a mask [out, in] that break the pattern; 0 when it is legal."""


def build_pattern(spec: str | Mapping[str, Any]) -> Pattern:
    """A pattern from its name: `unstructured`, `2:4` (kept:of), `block:16x16`, or `{name: {option: value}}`.

    Raises:
        InvalidInput: no such pattern, or sizes that make no sense.
    """
    if isinstance(spec, str):
        return _from_text(spec, {})
    if isinstance(spec, Mapping) and len(spec) == 1:
        (name, options), *_ = spec.items()
        if options is None or isinstance(options, Mapping):
            return _from_text(str(name), dict(options or {}))
    raise InvalidInput(f"pattern: give a name or {{name: {{option: value}}}}, not {spec!r}")


def _from_text(text: str, options: dict[str, Any]) -> Pattern:
    name, sizes = text, dict[str, int]()
    if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text):
        name, sizes = "n_of_m", {"n": int(match[1]), "m": int(match[2])}
    elif match := re.fullmatch(r"block:(\d{1,9})x(\d{1,9})", text):
        name, sizes = "block", {"rows": int(match[1]), "columns": int(match[2])}
    elif text not in registry.names("prune.pattern"):
        raise InvalidInput(
            f'no pattern "{text}"{suggestion(text, registry.names("prune.pattern")) or ";"} '
            "use unstructured, N:M with N kept of M (2:4), or block:ROWSxCOLUMNS (block:16x16)"
        )
    if twice := sizes.keys() & options.keys():
        raise InvalidInput(f"pattern {text}: the name already says {' and '.join(sorted(twice))}; leave the option out")
    pattern: Pattern = registry.create("prune.pattern", name, {**sizes, **options})
    return pattern


def lowest(scores: Tensor, count: int) -> Tensor:
    """bool like `scores` [groups, members]: True at exactly the `count` lowest of each group, ties by position."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.shape[1] <= SMALL_GROUP:
        return _ranks(scores) < count
    threshold = value_at_rank(scores, count - 1)
    chosen = scores <= threshold
    crowded = torch.count_nonzero(chosen, dim=1) > count  # groups with too many scores equal to the threshold
    if bool(crowded.any()):
        below, tied = scores[crowded] < threshold[crowded], scores[crowded] == threshold[crowded]
        missing = count - torch.count_nonzero(below, dim=1)[:, None]
        chosen[crowded] = below | (tied & (tied.cumsum(1, dtype=torch.int32) <= missing))
    return chosen


def value_at_rank(scores: Tensor, rank: int) -> Tensor:
    """`[groups, 1]`: the value at `rank`, counted from 0, in the ascending order of each group `[groups, members]`."""
    if scores.device.type == "cpu":  # numpy's selection is many times faster than a sort or torch.kthvalue
        return torch.from_numpy(np.partition(scores.numpy(), rank, axis=1)[:, rank : rank + 1])
    return scores.kthvalue(rank + 1, dim=1, keepdim=True).values


def _ranks(scores: Tensor) -> Tensor:
    """Each member's place in the ascending order of its group, ties by position: faster than sorting small groups."""
    members = [column.contiguous() for column in scores.unbind(1)]
    ranks = [torch.zeros(len(scores), dtype=torch.int8, device=scores.device) for _ in members]
    for later in range(len(members)):
        for earlier in range(later):
            in_order = members[earlier] <= members[later]
            ranks[later] += in_order
            ranks[earlier] += ~in_order
    return torch.stack(ranks).T


def check_scores(scores: Tensor) -> None:
    """Raise `NumericalError` when scores cannot be ordered."""
    if bool(scores.isnan().any()):
        raise NumericalError("the scores hold NaN: weights or statistics are damaged")
