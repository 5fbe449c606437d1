"""Angular distance: the run of blocks whose ends lie closest goes (Gromov et al. 2024, arXiv:2403.17887)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparity.errors import InvalidInput
from sparity.models.dimensions import DEPTH
from sparity.registry import register
from sparity.static.structure.depth import DepthMethod, hidden_states, removed_count, run_of_blocks
from sparity.static.structure.methods.base import Choice
from sparity.static.structure.subject import Subject


@register("structure.method", "angular")
@dataclass(frozen=True)
class Angular(DepthMethod):
    """Score a block by the angle between the last token's states before it and behind the `run` blocks from it on.

    The angle is arccos(cosine) / pi, its mean over sequences. As many neighbours as the sparsity says go together, from
    the first block whose run turns least. A block from which no whole run is left scores infinity.
    """

    run: int = 1

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        if not 1 <= self.run <= subject.depth:
            raise InvalidInput(f'angular, option "run": from 1 to {subject.depth} blocks, not {self.run}')
        return {DEPTH: distances(subject, self.run)}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        count = removed_count(subject.depth, sparsity, subject.depth - 1, "angular")
        if not count:
            return {DEPTH: list(range(subject.depth))}
        first = int(distances(subject, count).argmin())
        return {DEPTH: run_of_blocks(first, count, subject.depth)}


def distances(subject: Subject, count: int) -> Tensor:
    """The angular distance over `count` blocks from each block on, `[blocks]`; infinity where so many do not follow."""
    last = [hidden[:, -1].float() for hidden in hidden_states(subject)]  # [samples, hidden] each
    found = torch.full((subject.depth,), math.inf)
    for index in range(subject.depth - count + 1):
        cosine = cosine_similarity(last[index], last[index + count], dim=-1).clamp(-1, 1)
        found[index] = float((cosine.arccos() / math.pi).mean())
    return found
