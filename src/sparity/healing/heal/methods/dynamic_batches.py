"""Dynamic batches: more text, most of the domains that lag behind (Xia et al. 2024, arXiv:2310.06694)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.healing.heal.guard import apart
from sparity.healing.heal.methods.base import Healed, Task, Training
from sparity.registry import register
from sparity.training.fine_tune.mixture import Mixture, SharesKept, updated_shares
from sparity.training.fine_tune.steps import next_token_loss, train_blocks


@register("heal.method", "dynamic_batches")
@dataclass(frozen=True)
class DynamicBatches(Training):
    """Fine-tuning with the mask frozen, each domain in a share of the batches that follows how far its loss lags.

    The domains are those of the calibration text, whose sequences take turns. The last fourth of each one's says its
    loss before every `every` steps. A domain lags by its loss less its target, and not less than 0, as in the paper.

    Attributes:
        domains: their names, in the order of the calibration text.
        targets: the loss of each domain that is to be reached, in nats per token; without any, the dense model's.
        shares: of each domain at the start; without any, equal ones.
        every: steps between two updates of the shares.
        speed: how strongly a lag of a nat moves them.
        floor: what is shared out equally.
        reference: a domain that is ahead lags by a negative number, as in the authors' code.
    """

    domains: tuple[str, ...] = field(kw_only=True)
    targets: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    every: int = 50
    speed: float = 1.0
    floor: float = 1e-4
    reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.domains)) < max(len(self.domains), 2):
            raise InvalidInput("dynamic_batches: name two domains or more of the calibration text, each once")
        for name, given in (("targets", self.targets), ("shares", self.shares)):
            if given and len(given) != len(self.domains):
                raise InvalidInput(
                    f"dynamic_batches: {len(given)} {name} are given for {len(self.domains)} domains: give one for each"
                )
        if self.shares and (min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6):
            raise InvalidInput("dynamic_batches: shares must be positive and sum to 1")
        if self.every < 1 or not 0 <= self.speed < float("inf") or not 0 <= self.floor <= 1:
            raise InvalidInput("dynamic_batches: every must be 1 or more, speed 0 or more, floor in [0, 1]")

    def heal(self, task: Task) -> Healed:
        """See `Method.heal`."""
        if not self.steps:
            return Healed()
        learned, judging = self._apart(task)
        targets = torch.tensor(self.targets) if self.targets else losses(task.dense, judging)
        start = torch.tensor(self.shares or [1 / len(self.domains)] * len(self.domains), dtype=torch.float64)
        mixture = Mixture([len(each) for each in learned], self.batch, self.every, [start])
        work = SharesKept(task.work, mixture.shares)

        def loss(ids: Tensor, step: int) -> Tensor:
            if mixture.updates(step):
                excess = losses(task.model, judging) - targets
                excess = excess if self.reference else excess.clamp_min(0)
                mixture.shares.append(updated_shares(mixture.shares[-1], excess, self.speed, self.floor))
            chosen = [learned[domain][number] for domain, number in mixture.of_step(step)]
            return next_token_loss(task.model, torch.stack(chosen))

        course = train_blocks(
            task.model, task.masks, task.tokens, work, loss,
            steps=self.steps, rate=self.rate, batch=self.batch, stops=True,
        )  # fmt: skip
        healed = self.healed(course)
        curves = {
            f"share of {name}": {1 + at * self.every: float(shares[place]) for at, shares in enumerate(mixture.shares)}
            for place, name in enumerate(self.domains)
        }
        return Healed({**healed.curves, **curves}, healed.notes)

    def _apart(self, task: Task) -> tuple[list[Tensor], list[Tensor]]:
        """Of each domain the sequences to learn from, and those that say its loss."""
        places = torch.arange(len(task.tokens)) if task.places is None else torch.as_tensor(task.places)
        parts = [task.tokens[places % len(self.domains) == domain] for domain in range(len(self.domains))]
        for name, part in zip(self.domains, parts, strict=True):
            if len(part) < 2:
                raise InvalidInput(
                    f"dynamic_batches: {len(part)} sequences of {name} are too few to learn from some and judge by "
                    "others: give more calibration samples"
                )
        pairs = [apart(part) for part in parts]
        return [learned for learned, _ in pairs], [judging for _, judging in pairs]


@torch.no_grad()
def losses(model: Any, domains: Sequence[Tensor]) -> Tensor:
    """The mean cross-entropy of the next token on each domain's sequences `[samples, length]`, float64 `[domains]`."""
    means = [torch.stack([next_token_loss(model, ids[None]).double() for ids in part]).mean() for part in domains]
    return torch.stack(means).cpu()
