"""What a scheduler asks of whatever computes tokens: the next tokens of some sequences, each as if it came alone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """The next tokens of one sequence.

    Attributes:
        slot: where the sequence is kept.
        ids: the tokens.
        start: how many tokens of it were computed before.
        prompt: how many tokens it has that belong to its prompt; run-time stages treat those otherwise.
        scored: whether its text is scored, as `sparity eval` scores one, rather than gone on from.
        wanted: of how many of `ids`, the last ones, the logits are wanted.
    """

    slot: int
    ids: Sequence[int]
    start: int
    prompt: int
    scored: bool
    wanted: int


class Execution(ABC):
    """A model with room for some sequences.

    Attributes:
        slots: how many sequences there is room for; each has a number below.
        context: the most tokens of one.
        vocabulary: how many tokens the model knows.
        most: tokens that are computed at a time, of all sequences; None where a prompt must come as a whole.
        words: how tokens are computed, and why.
    """

    slots: int
    context: int
    vocabulary: int
    most: int | None
    words: str

    @abstractmethod
    def run(self, parts: Sequence[Part]) -> list[Tensor]:
        """Of each part the logits `[wanted, vocabulary]` in float32.

        A part's result is the same bits whatever other parts come with it, and however its sequence is cut into parts.
        """

    @abstractmethod
    def free(self, slot: int) -> None:
        """Forget the sequence of a slot."""

    def shareable(self, tokens: int, prompt: int, scored: bool) -> int:
        """How many of a sequence's first tokens leave keys and values that hold for any sequence that begins so."""
        return 0

    def read(self, slot: int, start: int, end: int) -> Any:
        """A copy of the keys and values of the tokens from `start` to `end`."""
        raise NotImplementedError

    def write(self, slot: int, start: int, block: Any) -> None:
        """Put what `read` gave into a slot, from the token `start` on."""
        raise NotImplementedError

    def block_bytes(self, tokens: int) -> int:
        """What a copy of the keys and values of so many tokens takes."""
        return 0
