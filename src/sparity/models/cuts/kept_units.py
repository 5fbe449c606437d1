"""What stays of a model, as a caller says it: dimension -> indices per block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models.dimensions import DEPTH, EXPERTS, HIDDEN

ATTENTION = "attention"  # the blocks whose attention stays
OF_MODEL = (HIDDEN, DEPTH, ATTENTION)  # one choice for the whole model


@dataclass(frozen=True)
class Kept:
    """What stays of a model.

    Attributes:
        blocks: of each block the dimensions that are cut, with the int64 indices of the units that stay.
        hidden: the numbers of the residual stream that stay; None for all.
        depth: the blocks that stay; None for all.
        attention: the blocks whose attention stays; None for all.
        experts: of each block the experts that stay, None for all; empty when no block is cut so.
    """

    blocks: tuple[Mapping[str, Tensor], ...]
    hidden: Tensor | None = None
    depth: Tensor | None = None
    attention: Tensor | None = None
    experts: tuple[Tensor | None, ...] = field(default=())

    @classmethod
    def read(cls, kept: Mapping[str, Any], blocks: int) -> "Kept":
        """From dimension -> indices per block, as `sparity.cut` takes them.

        Raises:
            InvalidInput: something that is no choice of units, or not one per block.
        """
        if not isinstance(kept, Mapping):
            raise InvalidInput(f"kept maps dimensions to the indices that stay, it is no {type(kept).__name__}")
        of_model: dict[str, Tensor] = {}
        of_blocks: list[dict[str, Tensor]] = [{} for _ in range(blocks)]
        experts: list[Tensor | None] = [None] * blocks
        for name, units in kept.items():
            if name in OF_MODEL:
                of_model[name] = _of_model(name, units, blocks)
                continue
            for index, chosen in enumerate(_per_block(name, units, blocks)):
                if chosen is None:
                    continue
                if name == EXPERTS:
                    experts[index] = chosen
                else:
                    of_blocks[index][name] = chosen
        return cls(
            tuple(of_blocks),
            of_model.get(HIDDEN),
            of_model.get(DEPTH),
            of_model.get(ATTENTION),
            tuple(experts) if any(each is not None for each in experts) else (),
        )


def _vector(name: str, units: Any) -> Tensor:
    try:
        found = torch.as_tensor(units)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"kept, {name}: {units!r} are no indices ({error})") from error
    if found.ndim != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        kind = f"{found.dtype} {list(found.shape)}".removeprefix("torch.")
        raise InvalidInput(f"kept, {name}: the units that stay are a vector of whole numbers, not {kind}")
    return found.to("cpu", torch.int64)


def _per_block(name: str, units: Any, blocks: int) -> list[Tensor | None]:
    if not isinstance(units, Sequence | Tensor) or isinstance(units, str) or len(units) != blocks:
        given = len(units) if isinstance(units, Sequence | Tensor) else type(units).__name__
        raise InvalidInput(
            f"kept, {name}: give the indices that stay for each of the {blocks} blocks, None for one that keeps all, "
            f"not {given}"
        )
    return [None if each is None else _vector(name, each) for each in units]


def _of_model(name: str, units: Any, blocks: int) -> Tensor:
    """One vector, or the same vector for each block."""
    nested = isinstance(units, Tensor) and units.ndim == 2
    nested |= isinstance(units, Sequence) and len(units) > 0 and isinstance(units[0], Sequence | Tensor)
    nested = nested and not (isinstance(units, Sequence) and isinstance(units[0], Tensor) and units[0].ndim == 0)
    if not nested:
        return _vector(name, units)
    rows = [each for each in _per_block(name, units, blocks) if each is not None]
    if name != HIDDEN or not rows or any(not torch.equal(rows[0], row) for row in rows):
        raise InvalidInput(
            f"kept, {name}: all blocks share one choice, so give one vector of indices"
            + (" (the blocks' vectors differ)" if name == HIDDEN else "")
        )
    return rows[0]
