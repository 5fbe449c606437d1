"""Batches drawn from several domains in shares that follow their losses: dynamic batch loading (arXiv:2310.06694)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sparity.stages.kinds import Workspace

SHARES = "mixture.shares"  # of a checkpoint: every domain's share after each update


def updated_shares(shares: Tensor, excess: Tensor, speed: float = 1.0, floor: float = 1e-4) -> Tensor:
    """Shares that move towards the domains that lag behind: (1 - c) softmax(log w + eta d) + c / n, `[domains]`.

    Args:
        shares: w `[domains]`, which sum to 1.
        excess: d `[domains]`, each domain's loss less the one that it should have.
        speed: eta.
        floor: c, of which every domain keeps an equal part.
    """
    moved = torch.softmax(shares.double().log() + speed * excess.double(), 0)
    return (1 - floor) * moved + floor / len(shares)


@dataclass
class Mixture:
    """Which sequence of which domain comes next.

    Each goes to the domain whose sequences so far lag most behind its shares, and is that domain's next, or its first
    after its last: no chance is involved.

    Attributes:
        counts: sequences that each domain has.
        batch: sequences per step.
        every: steps between two updates of the shares.
        shares: float64 `[domains]` of the first `every` steps, of the next, and so on.
    """

    counts: Sequence[int]
    batch: int
    every: int
    shares: list[Tensor]
    _step: int = field(default=0, init=False)
    _due: Tensor = field(init=False, repr=False)
    _taken: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._due, self._taken = torch.zeros(len(self.counts), dtype=torch.float64), [0] * len(self.counts)

    def updates(self, step: int) -> bool:
        """Whether the shares are to be updated before a step, from 0."""
        return step > 0 and step % self.every == 0 and len(self.shares) == step // self.every

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """Domain and number of each sequence of a step, from 0. Steps are asked for in order; some may be left out."""
        while self._step < step:
            self._draw()
        return self._draw()

    def _draw(self) -> list[tuple[int, int]]:
        shares, found = self.shares[self._step // self.every], []
        for _ in range(self.batch):
            self._due += shares
            domain = int((self._due - torch.tensor(self._taken)).argmax())
            found.append((domain, self._taken[domain] % self.counts[domain]))
            self._taken[domain] += 1
        self._step += 1
        return found


@dataclass
class SharesKept:
    """A workspace whose checkpoints hold the shares of a mixture too. See `Workspace`."""

    work: Workspace
    shares: list[Tensor]
    folder: Path = field(init=False)
    blocks: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.folder, self.blocks = self.work.folder, self.work.blocks
        if (last := self.work.last()) is not None:
            self.shares[:] = last[1][SHARES].unbind()

    def dense(self) -> nn.Module:
        """See `Workspace.dense`."""
        return self.work.dense()

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Workspace.save`."""
        self.work.save(step, {**tensors, SHARES: torch.stack(self.shares)})

    def last(self) -> tuple[int, dict[str, Tensor]] | None:
        """See `Workspace.last`."""
        return self.work.last()

    def progress(self, done: int, total: int) -> None:
        """See `Workspace.progress`."""
        self.work.progress(done, total)
