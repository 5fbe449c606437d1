"""What a policy is shown of a layer, row by row without padding, and what its choice means for the slots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.rotary import Rotary
from sparity.dynamic.cache.run import Run
from sparity.dynamic.cache.seen import Seen
from sparity.dynamic.cache.store import Holding, padded
from sparity.errors import InvalidInput


@dataclass(frozen=True)
class Known:
    """What is known of an attention module; see `Seen`."""

    scaling: float
    softcap: float | None
    output_weight: Tensor | None
    rotary: Rotary | None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None


def rows_apart(store: Holding, real: Tensor) -> list[list[int]]:
    """Rows that can be chosen for together: all where every head holds the same number and nothing is padding."""
    every = list(range(store.rows))
    return [every] if store.even is not None and bool(real.all()) else [[row] for row in every]


class Held:
    """Some rows of a store.

    Args:
        store: with the new tokens.
        rows: all, or one.
        real: bool `[rows, length]`, what of each text is no padding.
        query: `[rows, heads, new, width]`.
        known: of the module.

    Raises:
        InvalidInput: tokens of some heads became padding.
    """

    def __init__(self, store: Holding, rows: list[int], real: Tensor, query: Tensor, known: Known) -> None:
        self.store, self.rows, self.real = store, rows, real[rows[0]]
        if len(rows) == store.rows and store.even is not None:
            keys, values, places, mass = store.views()
            held = self.real[places.long().cpu()]
        else:
            keys, values, places, mass, present = padded(store, rows[0])
            held = self.real[places.long().cpu()] & present.cpu()
        self.places, self.held = places, held
        counts = held.sum(-1)
        most = int(counts.max())
        if not bool((counts == most).all()):  # heads of one row differ
            self.absent: Tensor | None = ~held
        else:
            self.absent = None
            index = held.nonzero()[:, -1].view(*held.shape[:2], most).to(keys.device)
            keys, values, places = (
                x
                if most == held.shape[-1]
                else x.gather(2, index[(...,) + (None,) * (x.ndim - 3)].expand(*index.shape, *x.shape[3:]))
                for x in (keys, values, places)
            )
            mass = mass if mass is None or most == held.shape[-1] else mass.gather(2, index)
        new = min(query.shape[2], most)
        self.ranks = (self.real.cumsum(0) - 1)[places.long().cpu()]  # among the real tokens of the text
        self.seen = Seen(
            query[rows][:, :, query.shape[2] - new :].detach(),
            keys,
            values,
            known.scaling,
            known.softcap,
            None if self.absent is None else held.to(keys.device),
            mass,
            known.output_weight,
            known.rotary,
            known.learned,
            int(self.real.sum()),
            None if known.hidden is None else known.hidden[rows][:, query.shape[2] - new :],
        )

    def accumulate(self, policy: Policy) -> None:
        """Add what the new queries paid, once."""
        mass = policy.score(self.seen)
        self.seen = replace(self.seen, mass=mass, queries=self.seen.queries[:, :, :0], hidden=None)
        for number, row in enumerate(self.rows):
            full = mass[number]
            if self.absent is None:
                full = torch.zeros(self.held.shape[1:], device=mass.device)
                full[self.held[number].to(mass.device)] = mass[number].flatten()
            lengths = self.store.lengths[row * self.store.heads :][: self.store.heads]
            self.store.set_mass(row, [each[len(each) - int(own) :] for each, own in zip(full, lengths, strict=True)])

    def kept(self, run: Run, layer: int, budgets: Sequence[int]) -> list[Tensor]:
        """The slots that stay, bool `[slots]` of each head of each row, on the CPU; padding goes.

        Args:
            run: whose policy chooses.
            layer: of the model.
            budgets: tokens of each head.
        """
        if self.absent is not None and not run.ragged(layer):
            raise InvalidInput("the attention mask hides tokens that it showed before: give the one of the whole text")
        chosen, found = self._chosen(run, budgets[0]), list[Tensor]()
        for budget in {*budgets} - {budgets[0]}:
            heads = [head for head, each in enumerate(budgets) if each == budget]
            chosen[:, heads] = self._chosen(run, budget)[:, heads]
        for number, row in enumerate(self.rows):
            for head in range(self.store.heads):
                held = self.held[number, head]
                mask = torch.zeros_like(held)
                mask[held] = chosen[number, head] if self.absent is None else chosen[number, head][held]
                own = int(self.store.lengths[row * self.store.heads + head])
                found.append(mask[mask.shape[0] - own :])
        return found

    def _chosen(self, run: Run, budget: int) -> Tensor:
        """What stays where every head has one budget, bool `[rows, heads, slots]` on the CPU."""
        first, last = run.protected(budget)
        shielded = (self.ranks < first) | (self.ranks >= int(self.real.sum()) - last)
        if self.absent is not None:
            shielded = shielded & ~self.absent
        return run.policy.select(self.seen, budget, shielded.to(self.seen.keys.device)).cpu()
