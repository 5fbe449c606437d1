"""ShortGPT: blocks that turn the hidden states least go (Men et al. 2024, arXiv:2403.03853)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparity.models.dimensions import DEPTH
from sparity.registry import register
from sparity.static.structure.depth import DepthMethod
from sparity.static.structure.methods.base import Choice
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import blocks_left, largest


@register("structure.method", "shortgpt")
@dataclass(frozen=True)
class ShortGPT(DepthMethod):
    """Score a block by its influence: one minus the mean cosine between the hidden states before and behind it.

    One forward pass. With `reference` the cosine of a token whose state is zero counts 0.5, as in the authors' code.
    """

    reference: bool = False

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        found = []
        for visit in subject.visits():
            before = visit.hidden.clone()
            visit.finish()
            found.append(1 - self._mean_cosine(before, visit.hidden))
        return {DEPTH: torch.tensor(found)}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return {DEPTH: largest(self.scores(subject)[DEPTH], blocks_left(subject.depth, sparsity)).tolist()}

    def _mean_cosine(self, before: Tensor, after: Tensor) -> float:
        total = 0.0
        for a, b in zip(before, after, strict=True):  # [tokens, hidden]
            cosine = cosine_similarity(a.float(), b.float(), dim=-1)
            if self.reference:
                silent = (a == 0).all(-1) | (b == 0).all(-1)
                cosine = torch.where(silent, 0.5, cosine)
            total += float(cosine.mean())
        return total / len(before)
