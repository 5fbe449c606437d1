"""Text that appears as it is generated."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparity.measure.timing.generation import Stamps

UNFINISHED = "\ufffd"  # what a tokenizer shows for the first bytes of a character


class TextStream(Stamps):
    """A streamer for `generate`, batch 1, that writes each piece of text once its characters are whole.

    Attributes:
        ids: the new tokens so far.
        text: what was written so far.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._from, self._written = 0, 0  # text is decoded from the last piece on: how a token reads depends on it
        self.ids: list[int] = []
        self.text = ""
        super().__init__()

    def receive(self, ids: Tensor) -> None:
        """One new token [1]."""
        self.ids += ids.flatten().tolist()
        if not self._decode(self._from, len(self.ids)).endswith(UNFINISHED):
            self._write_new()

    def end(self) -> None:
        """Write what is still held back, a character that stays unfinished among it."""
        self._write_new()

    def _write_new(self) -> None:
        before, now = self._decode(self._from, self._written), self._decode(self._from, len(self.ids))
        piece = now.removeprefix(before)
        self._from, self._written = self._written, len(self.ids)
        self.text += piece
        self._write(piece)

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self.ids[start:end], skip_special_tokens=True)
        return text
