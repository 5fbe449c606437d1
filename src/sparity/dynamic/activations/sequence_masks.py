"""Masks that a sequence's own prompt decides, and that then hold for the tokens that follow it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparity.dynamic.activations.method_data import in_front, skips_nothing
from sparity.dynamic.activations.methods.base import Method
from sparity.dynamic.activations.places import Kind, Place, Where
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import InvalidInput

SCORED = 0.25


class SequenceRule(ABC):
    """What is counted of a prompt, and what follows from it. Sums add up: prompts may come in pieces."""

    @abstractmethod
    def empty(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The sums over no tokens, a row for each sequence."""

    @abstractmethod
    def add(self, sums: Tensor, x: Tensor, counted: Tensor) -> None:
        """Count the activations `x` [rows, tokens, in] of the tokens that `counted` [rows, tokens] names, in place."""

    @abstractmethod
    def decide(self, sums: Tensor) -> Tensor:
        """`[rows, ...]`: what the prompts decide."""

    @abstractmethod
    def keep(self, decided: Tensor, x: Tensor) -> Tensor:
        """`x` [rows, tokens, in] -> bool like it, True where a channel counts."""


@dataclass
class Note:
    """Of one place: the sums while a prompt comes in, then what it decided."""

    sums: Tensor | None = None
    decided: Tensor | None = None


class SequenceSkip:
    """A forward pre-hook that learns from prompts and skips channels of the tokens after them.

    Args:
        rule: how.
        place: its name.
        scored: of a text that is scored, the share at its start that is taken for the prompt.
        tokens: of the model.
    """

    def __init__(self, rule: SequenceRule, place: str, scored: float, tokens: SparseTokens) -> None:
        self.rule, self.place, self.scored, self.tokens = rule, place, scored, tokens

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The module's arguments with the input masked, or None when no token is sparse.

        Raises:
            InvalidInput: the prompt was not seen, or the cache's rows are others than then.
        """
        flags, call = self.tokens.of(arguments[0]), self.tokens.sequences(arguments[0])
        rows, fresh = call.real.shape
        x = arguments[0].reshape(rows, fresh, -1)
        learned = call.learned(self.scored)
        note: Note = call.kept.setdefault(self.place, Note())
        if bool(learned.any()):
            if note.sums is None:  # a prompt begins, the first or that of a later turn
                note.sums, note.decided = self.rule.empty(rows, x.shape[-1], x.device), None
            self._check(rows, note.sums)
            self.rule.add(note.sums, x, learned.to(x.device))
        sparse = ~learned if flags is None else flags.reshape(rows, fresh).cpu() & ~learned
        if not bool(sparse.any()):
            return None
        if note.sums is not None:
            note.decided = self.rule.decide(note.sums)
            note.sums = None
        if note.decided is None:
            raise InvalidInput(
                f"{self.place}: the cache holds a prompt whose activations were not seen: hand the prompt in with an "
                "empty cache to the model that is sparse"
            )
        self._check(rows, note.decided)
        skipped = ~self.rule.keep(note.decided, x) & sparse[..., None].to(x.device)
        return (x.masked_fill(skipped, 0).view(arguments[0].shape), *arguments[1:])

    def _check(self, rows: int, known: Tensor) -> None:
        if len(known) != rows:
            raise InvalidInput(
                f"{self.place}: the cache has {rows} rows, and had {len(known)} when the prompts were seen; a mask per "
                "sequence cannot follow: hand in every row's prompt again"
            )


@dataclass(frozen=True)
class SequenceMethod(Method):
    """A method whose masks come from each sequence's own prompt.

    Attributes:
        scored: of a text that is scored, the share at its start that is taken for the prompt and stays dense.
    """

    scored: float = SCORED
    where: ClassVar[Where] = "hidden"
    takes: ClassVar[tuple[Kind, ...]] = ("hidden",)

    def __post_init__(self) -> None:
        if not 0 < self.scored < 1:
            raise InvalidInput(f"{self.name}: scored {self.scored} must lie between 0 and 1")

    @abstractmethod
    def rule(self, tensors: Mapping[str, Tensor], columns: int, what: str) -> SequenceRule:
        """The rule that the data stands for.

        Raises:
            CorruptFile: the data does not fit.
        """

    @contextmanager
    def attach(self, place: Place, tensors: Mapping[str, Tensor], tokens: SparseTokens) -> Iterator[None]:
        """See `Method.attach`.

        Raises:
            CorruptFile: as there.
            InvalidInput: prompts are to be sparse.
        """
        if skips_nothing(tensors):
            yield
            return
        rule = self.rule(tensors, place.columns, place.name)
        if tokens.prompt == "sparse":
            raise InvalidInput(f"activations: {self.name} learns from the prompt, which is dense: leave `prompt` out")
        with in_front(place.module, SequenceSkip(rule, place.name, self.scored, tokens)):
            yield

    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Method.mask`: what each sample, as a prompt, decides, for its own tokens."""
        if skips_nothing(tensors):
            return torch.ones_like(x, dtype=torch.bool)
        rule = self.rule(tensors, x.shape[-1], "x")
        sums = rule.empty(len(x), x.shape[-1], x.device)
        rule.add(sums, x, torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device))
        return rule.keep(rule.decide(sums), x)


@dataclass(frozen=True)
class FixedNeurons(SequenceRule):
    """The neurons with the largest sums, the same for all tokens after the prompt; of equal ones the first.

    Attributes:
        kept: how many.
    """

    kept: int

    def empty(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """See `SequenceRule.empty`: float64 `[rows, in]`."""
        return torch.zeros(rows, columns, dtype=torch.float64, device=device)

    def decide(self, sums: Tensor) -> Tensor:
        """See `SequenceRule.decide`: bool `[rows, in]`."""
        order = sums.argsort(dim=-1, descending=True, stable=True)[:, : self.kept]
        return torch.zeros_like(sums, dtype=torch.bool).scatter(-1, order, True)

    def keep(self, decided: Tensor, x: Tensor) -> Tensor:
        """See `SequenceRule.keep`; NaN counts."""
        return decided[:, None] | x.isnan()
