"""What a heal is: numbers that are added to the outputs behind skipped activations, so that less is lost."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sparity.dynamic.activations.method_data import Layout
from sparity.dynamic.activations.places import Kind, Place
from sparity.engine.modules.skips import SparseTokens
from sparity.models.block import in_features

PREFIX = "heal_"  # of its tensors beside those of the method


@dataclass(frozen=True)
class Spot:
    """A module whose outputs are corrected: the last one that a place saves.

    Attributes:
        place: whose activations are skipped.
        module: what reads them.
    """

    place: Place
    module: nn.Module

    @property
    def inputs(self) -> int:
        """The channels that it reads."""
        return in_features(self.module)

    @property
    def outputs(self) -> int:
        """The channels that it gives, of all projections that it holds."""
        held = self.place.reads if self.place.kind in ("input", "hidden") else self.place.saves[-1:]
        return sum(projection.weight.shape[0] for projection in held)


class Heal(ABC):
    """A frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    takes: ClassVar[tuple[Kind, ...]]  # kinds of places behind which it can work

    @abstractmethod
    def fit(self, model: Any, spots: Sequence[Spot], skipping: SparseTokens, tokens: Tensor) -> list[dict[str, Tensor]]:
        """The data of every spot, from a model that skips activations.

        Args:
            model: a transformers causal language model; its weights do not change.
            spots: of all its blocks.
            skipping: what says which of its tokens are sparse.
            tokens: token ids `[samples, length]`.
        """

    @abstractmethod
    def layout(self, spot: Spot) -> Layout:
        """The names, types and shapes of a spot's data."""

    @abstractmethod
    def nbytes(self, spot: Spot) -> int:
        """The bytes of a spot's data."""

    @abstractmethod
    def correction(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What is added to the outputs `[..., out]` for what the module is given before any of it is skipped."""


def spot_of(place: Place) -> Spot:
    """Where what a place skips is missed."""
    return Spot(place, place.module if place.kind in ("input", "hidden") else place.saves[-1].module)


class Correction:
    """Adds a heal's correction to a module's outputs, of the tokens that are sparse; no fast path knows it."""

    def __init__(self, heal: Heal, tensors: Mapping[str, Tensor], skipping: SparseTokens) -> None:
        self.heal, self.tensors, self.skipping = heal, dict(tensors), skipping
        self._given: list[Tensor] = []

    def see(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook in front of those that skip: note what the module is given."""
        self._given[:] = arguments[:1]

    def add(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook: the output, corrected."""
        x = self._given.pop()
        flags = self.skipping.of(x)
        if flags is not None and not bool(flags.any()):
            return output
        self.tensors = {name: tensor.to(x.device) for name, tensor in self.tensors.items()}
        corrected = output + self.heal.correction(self.tensors, x).to(output.dtype)
        return corrected if flags is None else corrected.where(flags[..., None], output)


@contextmanager
def corrected(module: nn.Module, correction: Correction) -> Iterator[None]:
    """Correct a module's outputs until the context closes."""
    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(correction.see, prepend=True).remove)
        hooks.callback(module.register_forward_hook(correction.add).remove)
        yield
