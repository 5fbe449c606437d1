"""2SSP: channels by their activations' norm, then attentions by the loss (Sandri et al. 2025, arXiv:2501.17771)."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import Decoder, InputSite
from sparity.models.cuts.depth import silence_attention, silenced
from sparity.models.cuts.kept_units import ATTENTION
from sparity.models.cuts.whole import cut_model
from sparity.models.dimensions import CHANNELS, READ_HIDDEN
from sparity.models.model_parts import ATTENTION as ATTENTION_ROLES
from sparity.registry import register
from sparity.static.structure.forward import Forward, forward
from sparity.static.structure.methods.base import Choice, Method
from sparity.static.structure.subject import Subject, run_watched
from sparity.static.structure.units import largest, stacked


@register("structure.method", "two_ssp")
@dataclass(frozen=True)
class TwoSSP(Method):
    """Remove channels in every block alike, then silence the attentions without which the loss is lowest.

    A channel's score is its mean norm in a sequence at the input of the last MLP projection. `balance` says how fast
    attention goes as the sparsity, a share of all blocks' weights, grows; the loss is that of one sequence.
    """

    balance: float = 1.5

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """The channels', and for the attentions the loss of the dense model without each."""
        channels = self._channels(subject)
        one = _first_sequence(subject)
        with forward(one) as passes:
            losses = _losses_without(passes, range(subject.depth), ())
        return {CHANNELS: channels, ATTENTION: torch.tensor([losses[index] for index in range(subject.depth)])}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        attentions, left = self._budget(subject.decoder, sparsity)
        kept: Choice = {CHANNELS: [largest(row, left).tolist() for row in self._channels(subject)]}
        gone: list[int] = []
        one = _first_sequence(replace(subject, model=cut_model(subject.model, kept)))
        with forward(one) as passes:
            for _ in range(attentions):
                losses = _losses_without(passes, [i for i in range(subject.depth) if i not in gone], gone)
                gone.append(min(losses, key=lambda index: losses[index]))
        return {**kept, ATTENTION: [index for index in range(subject.depth) if index not in gone]}

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        return {CHANNELS: self._budget(decoder, sparsity)[1]}

    def _budget(self, decoder: Decoder, sparsity: float) -> tuple[int, int]:
        """How many attentions go, and how many channels of every block stay."""
        mlp = attention = 0
        channels = set()
        for site in decoder.sites(0):
            for projection in site.projections:
                if projection.expert is not None:
                    raise InvalidInput("two_ssp has no rule for experts: use reap, or minitron")
                if projection.role in ATTENTION_ROLES:
                    attention += projection.weight.numel()
                else:
                    mlp += projection.weight.numel()
                    channels.add(projection.weight.shape[0 if projection.role in READ_HIDDEN else 1])
        (width,) = channels
        depth = len(decoder)
        gone = min(round(depth * sparsity ** (mlp / attention / self.balance)), depth) if sparsity else 0
        rest = sparsity * depth * (mlp + attention) - gone * attention  # weights that the channels must give up
        removed = max(math.floor(rest / (depth * mlp / width)), 0)
        if removed >= width:
            raise InvalidInput(f"two_ssp: a sparsity of {sparsity:g} leaves no MLP channel: lower it, or `balance`")
        return gone, width - removed

    def _channels(self, subject: Subject) -> Tensor:
        found: list[Tensor | None] = []
        for visit in subject.visits():
            total: list[Tensor] = []

            def see(site: InputSite, x: Tensor, total: list[Tensor] = total) -> None:
                total.append(x.float().norm(dim=0).cpu())

            run_watched(visit, ("down", "fc2"), see)
            found.append(torch.stack(total).mean(0))
        return stacked(found)


def _first_sequence(subject: Subject) -> Subject:
    return Subject(subject.model, subject.tokens[:1])


def _losses_without(passes: Forward, candidates: Collection[int], gone: Collection[int]) -> dict[int, float]:
    """Each attention -> the loss when it is silent, beside those that are gone for good."""
    found, hidden = {}, passes.first
    for index in gone:
        silence_attention(passes.blocks[index])
    order = range(len(passes.blocks))
    for index in order:
        if index in candidates:
            with silenced(passes.blocks[index]):
                found[index] = passes.loss(passes.run(hidden, order[index:]))
        hidden = passes.run(hidden, [index])
    return found
