"""The rounds of a training that begins several times: one workspace for each, within that of the whole."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparity.stages.kinds import Workspace

NUMBER, STEP, BEFORE = "round.number", "round.step", "round.losses"
MASK, REWOUND = "round.mask.", "round.rewound."


@dataclass
class Round:
    """A course of training among several; see `Workspace`.

    Attributes:
        work: of the whole training.
        number: of the round, from 0.
        steps: of every round.
        masks: projection -> bool `[out, in]`, of this round.
        rewound: the weights that tickets are put back to, by `weight.NAME`.
        losses: of every step of the rounds before, and of this one when it is over.
        begin: step and tensors with which the round begins; None for the model as it is.
        resumed: step and tensors of a checkpoint of this round, from which a killed training goes on.
        folder: see `Workspace`.
        blocks: see `Workspace`.
    """

    work: Workspace
    number: int
    steps: int
    masks: Mapping[str, Tensor]
    rewound: dict[str, Tensor] = field(repr=False)
    losses: list[float]
    begin: tuple[int, dict[str, Tensor]] | None = field(default=None, repr=False)
    resumed: tuple[int, dict[str, Tensor]] | None = field(default=None, repr=False)
    folder: Path = field(init=False)
    blocks: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.folder, self.blocks = self.work.folder, self.work.blocks

    @classmethod
    def begun(cls, work: Workspace, steps: int, masks: Mapping[str, Tensor], weights: dict[str, Tensor]) -> "Round":
        """The first round, or the one that a killed training was in.

        Args:
            work: of the whole training.
            steps: of every round.
            masks: of the first round.
            weights: those before the first step, by `weight.NAME`.
        """
        last = work.last()
        if last is None:
            return cls(work, 0, steps, masks, dict(weights), [])
        _, tensors = last
        number, step = int(tensors[NUMBER]), int(tensors[STEP])
        parts = {
            start: {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            for start in (MASK, REWOUND)
        }
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("round.")}
        kept = {name: mask.to(masks[name].device) for name, mask in parts[MASK].items()}
        return cls(work, number, steps, kept, parts[REWOUND], tensors[BEFORE].tolist(), resumed=(step, own))

    def dense(self) -> nn.Module:
        """See `Workspace.dense`."""
        return self.work.dense()

    def last(self) -> tuple[int, dict[str, Tensor]] | None:
        """See `Workspace.last`: of this round, or what it begins with."""
        return self.resumed or self.begin

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Workspace.save`."""
        beside = {
            NUMBER: torch.tensor(self.number),
            STEP: torch.tensor(step),
            BEFORE: torch.tensor(self.losses[: self.number * self.steps], dtype=torch.float64),
            **{f"{MASK}{name}": mask.contiguous() for name, mask in self.masks.items()},
            **{f"{REWOUND}{name}": weight for name, weight in self.rewound.items()},
        }
        self.work.save(self.number * self.steps + step, {**tensors, **beside})

    def progress(self, done: int, total: int) -> None:
        """See `Workspace.progress`."""
        self.work.progress(self.number * self.steps + done, (self.number + 1) * self.steps)

    def courses(self) -> Iterator[dict[int, float]]:
        """Step, from 1 -> loss, of each round."""
        for start in range(0, len(self.losses), max(self.steps, 1)):
            yield dict(enumerate(self.losses[start : start + self.steps], 1))


def weights_in(trained: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of parameters, by the names of a checkpoint: `weight.NAME`."""
    return {f"weight.{name}": parameter.data.clone() for name, parameter in trained.items()}
