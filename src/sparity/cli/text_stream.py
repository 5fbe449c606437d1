"""Text that appears as it is generated."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparity.measure.timing.generation import Stamps
from sparity.serve.growing_text import GrowingText


class TextStream(Stamps):
    """A streamer for `generate`, batch 1, that writes each piece of text once its characters are whole.

    Attributes:
        ids: the new tokens so far.
        text: what was written so far.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self._growing, self._write = GrowingText(tokenizer), write
        self.text = ""
        super().__init__()

    @property
    def ids(self) -> list[int]:
        """See the class."""
        return self._growing.ids

    def receive(self, ids: Tensor) -> None:
        """One new token [1]."""
        self._show(self._growing.add(ids.flatten().tolist()))

    def end(self) -> None:
        """Write what is still held back, a character that stays unfinished among it."""
        self._show(self._growing.rest())

    def _show(self, piece: str) -> None:
        self.text += piece
        if piece:
            self._write(piece)
