"""NAEE: the experts that together change a block's output least, all sets tried (Lu et al. 2024, arXiv:2402.14800)."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from sparity.calibration import Visit
from sparity.errors import InvalidInput
from sparity.models.cuts.experts import experts_module, top_k
from sparity.models.dimensions import EXPERTS
from sparity.registry import register
from sparity.static.structure.expert_methods import ExpertMethod
from sparity.static.structure.experts import expert_output, watched_routes
from sparity.static.structure.methods.base import Choice
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import stacked


@register("structure.method", "naee")
@dataclass(frozen=True)
class NAEE(ExpertMethod):
    """Try every set of experts of the wanted size in every block; the one whose output is nearest to all stays.

    The error is the Frobenius norm of each sequence's difference, summed, over up to `tokens` tokens of the dense
    model, with the router restricted to the set. An expert's score is the error when it alone is missing. More than
    `sets` sets are refused.
    """

    tokens: int = 4096
    sets: int = 20000

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        found = []
        for visit in subject.visits():
            known = _Layer.of(visit, top_k(subject.config), self.tokens)
            visit.finish()
            found.append(None if known is None else known.leave_one_out())
        return {EXPERTS: stacked(found)}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        left = self.sizes(subject.decoder, sparsity)[EXPERTS]
        chosen: list[list[int] | None] = []
        for visit in subject.visits():
            known = _Layer.of(visit, top_k(subject.config), self.tokens)
            visit.finish()
            chosen.append(None if known is None else list(self._best(known, left)))
        return {EXPERTS: chosen}

    def _best(self, layer: "_Layer", left: int) -> tuple[int, ...]:
        total = len(layer.outputs)
        if math.comb(total, left) > self.sets:
            raise InvalidInput(
                f"naee would try {math.comb(total, left):,} sets of {left} of {total} experts, more than `sets`, "
                f"{self.sets:,}: raise it, or rank experts with reap"
            )
        return min(combinations(range(total), left), key=layer.error)


@dataclass(frozen=True)
class _Layer:
    """One block's experts on its tokens: outputs `[experts, tokens, hidden]`, logits `[tokens, experts]`."""

    outputs: Tensor
    logits: Tensor
    visited: int  # experts per token
    renormalised: bool  # whether the router's weights of a token sum to one
    lengths: list[int]  # of the sequences

    @classmethod
    def of(cls, visit: Visit, visited: int, most: int) -> "_Layer | None":
        """From a pass of its own through the block; None for a dense one."""
        experts = experts_module(visit.block)
        if experts is None:
            return None
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def see(hidden: Tensor, chosen: Tensor, weights: Tensor, logits: Tensor) -> None:
            seen.append((hidden, weights, logits))

        with torch.no_grad(), watched_routes(visit.block, see):
            visit.block.run(visit.inputs, visit.hidden)
            hidden, weights, logits = (torch.cat(parts)[:most] for parts in zip(*seen, strict=True))
            starts = range(0, len(hidden), len(seen[0][0]))
            outputs = torch.stack([expert_output(experts, expert, hidden) for expert in range(logits.shape[1])])
        one = torch.ones(len(weights), device=weights.device)
        lengths = [min(len(seen[0][0]), len(hidden) - start) for start in starts]
        renormalised = bool(torch.allclose(weights.float().sum(-1), one, atol=1e-2))
        return cls(outputs, logits, visited, renormalised, lengths)

    def output(self, kept: tuple[int, ...]) -> Tensor:
        """The layer's output `[tokens, hidden]` when the router knows only these experts."""
        places = torch.tensor(kept, device=self.logits.device)
        weights, chosen = self.logits[:, places].softmax(-1).topk(self.visited, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True) if self.renormalised else weights
        mixed = torch.zeros_like(self.logits).scatter_(1, places[chosen], weights)  # [tokens, experts]
        return torch.einsum("te,eth->th", mixed, self.outputs)

    @cached_property
    def _dense(self) -> Tensor:
        return self.output(tuple(range(len(self.outputs))))

    def error(self, kept: tuple[int, ...]) -> float:
        """How far that is from the output of all."""
        difference = self._dense - self.output(kept)
        return sum((float(part.norm()) for part in torch.split(difference, self.lengths)), 0.0)

    def leave_one_out(self) -> Tensor:
        """The error without each expert alone; infinity where a token would not find enough others."""
        total = len(self.outputs)
        if total <= self.visited:
            return torch.full((total,), math.inf)
        return torch.tensor([self.error(tuple(set(range(total)) - {expert})) for expert in range(total)])
