"""Hooks by which a predictor's neurons or heads are all that is left, and what it reads before them is noted."""

import threading
from typing import Any

from torch import Tensor, nn

from sparity.dynamic.activations.neuron_predictor import Predictor
from sparity.engine.modules.skips import SparseTokens


class InputNote:
    """A forward pre-hook that notes what a module reads, for a module that is called later in the same pass."""

    def __init__(self) -> None:
        self._latest = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> "InputNote":
        return InputNote()

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Note it."""
        self._latest.x = arguments[0]

    def take(self) -> Tensor:
        """What was noted in this thread, once."""
        x: Tensor = self._latest.x
        del self._latest.x
        return x


class NeuronSkip:
    """A forward hook: outputs of neurons that are not named are 0, of the tokens that are sparse.

    Args:
        predictor: of the neurons.
        rows: the part of the module's outputs that the neurons are; None is all of them.
        tokens: of the model.
        note: of what the predictor reads; None is the module's own input.
    """

    def __init__(
        self, predictor: Predictor, rows: tuple[int, int] | None, tokens: SparseTokens, note: InputNote | None = None
    ) -> None:
        self.predictor, self.rows, self.tokens, self.note = predictor, rows, tokens, note

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output, masked."""
        x = arguments[0] if self.note is None else self.note.take()
        flags = self.tokens.of(x)
        if flags is not None and not bool(flags.any()):
            return output
        skipped = ~self.predictor.keep(x)
        skipped = skipped if flags is None else skipped & flags[..., None]
        if self.rows is None:
            return output.masked_fill(skipped & ~output.isnan(), 0)
        masked = output.clone()
        part = masked[..., slice(*self.rows)]
        part.masked_fill_(skipped & ~part.isnan(), 0)
        return masked


class HeadSkip:
    """A forward pre-hook of what reads the heads' outputs: those that are not named are 0, of the sparse tokens.

    Args:
        predictor: of the heads.
        width: of a head.
        tokens: of the model.
        note: of what the predictor reads.
    """

    def __init__(self, predictor: Predictor, width: int, tokens: SparseTokens, note: InputNote) -> None:
        self.predictor, self.width, self.tokens, self.note = predictor, width, tokens, note

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The module's arguments with the input masked, or None when no token is sparse."""
        seen, x = self.note.take(), arguments[0]
        flags = self.tokens.of(seen)
        if flags is not None and not bool(flags.any()):
            return None
        skipped = ~self.predictor.keep(seen)  # [..., heads]
        skipped = skipped if flags is None else skipped & flags[..., None]
        wide = skipped.repeat_interleave(self.width, -1).view(x.shape)
        return (x.masked_fill(wide & ~x.isnan(), 0), *arguments[1:])
