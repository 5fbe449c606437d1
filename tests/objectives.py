"""Objectives of plain functions, for budgets that measure."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Objective:
    """`loss` of an allocation; the error of a block is that of what `inside` it, without which it is all.

    `asked` notes how many samples each loss was measured on, and what each block's error was.
    """

    loss: Callable[[Mapping[str, float]], float]
    inside: Callable[[int], Collection[str]] | None = None
    asked: list = field(default_factory=list)

    def __call__(self, allocation, samples=None):
        self.asked.append(samples)
        return self.loss(allocation)

    def block_error(self, block, allocation, error="token"):
        self.asked.append(error)
        names = allocation if self.inside is None else self.inside(block)
        return self.loss({name: share for name, share in allocation.items() if name in names})
