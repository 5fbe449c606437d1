"""A conversation with one model, turn by turn, in the thread that calls."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sparity.errors import InvalidInput
from sparity.serve.sampling import Sampling
from sparity.serve.sequence import Answer, Order, Piece
from sparity.serve.served_model import ServedModel


@dataclass(frozen=True)
class Turn:
    """What one answer came to.

    Attributes:
        text: of it.
        tokens: in it.
        reused: tokens of the conversation so far that were not read again.
        seconds: that it took.
    """

    text: str
    tokens: int
    reused: int
    seconds: float


class Conversation:
    """Messages to and from a model.

    Args:
        served: the model.
        system: what it is told first; None = nothing.
        sampling: how its tokens are chosen; the same in each turn.
        most: tokens of an answer at most.
    """

    def __init__(self, served: ServedModel, system: str | None, sampling: Sampling, most: int) -> None:
        self.served, self._system, self._sampling, self._most = served, system, sampling, most
        self._messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def say(self, text: str, show: Callable[[str], object]) -> Turn:
        """The model's answer, which `show` gets in pieces; where it is interrupted, what there is of it counts.

        Raises:
            InvalidInput: the conversation has become too long, or the template refuses it; it is then as it was before.
        """
        served = self.served
        asked = [*self._messages, {"role": "user", "content": text}]
        prompt = tuple(served.conversation(asked))
        room = served.execution.context - len(prompt)
        if room < 1:
            raise InvalidInput(
                f"the conversation has {len(prompt)} tokens, and {served.name} takes {served.execution.context}: "
                "/reset begins a new one"
            )
        pieces: list[Piece] = []

        def emit(piece: Piece) -> None:
            pieces.append(piece)
            show(piece.text)

        order = Order(prompt=prompt, sampling=self._sampling, most=min(self._most, room))
        answer, begun = Answer(order, served.tokenizer, served.ends, emit), time.perf_counter()
        served.scheduler.submit(answer)
        try:
            while served.scheduler.step():
                pass
        except KeyboardInterrupt:
            served.scheduler.cancel(answer)
        if pieces and pieces[-1].finish == "error":
            raise InvalidInput(pieces[-1].message or "the model failed")
        said = "".join(piece.text for piece in pieces)
        self._messages = [*asked, {"role": "assistant", "content": said}]
        return Turn(said, answer.made, answer.reused, time.perf_counter() - begun)
