"""The text of tokens that come one after another, and the stop strings in it."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer shows for the first bytes of a character


class GrowingText:
    """Text in pieces, each as soon as its characters are whole.

    Attributes:
        ids: the tokens so far.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._from, self._written = 0, 0  # text is decoded from the last piece on: how a token reads depends on it
        self.ids: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        """Some new tokens -> the text that is whole with them, which may be none."""
        self.ids += ids
        return "" if self._decode(self._from, len(self.ids)).endswith(UNFINISHED) else self.rest()

    def rest(self) -> str:
        """What is still held back, a character that stays unfinished among it."""
        before, now = self._decode(self._from, self._written), self._decode(self._from, len(self.ids))
        self._from, self._written = self._written, len(self.ids)
        return now.removeprefix(before)

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self.ids[start:end], skip_special_tokens=True)
        return text


class Stops:
    """Strings that end a text.

    Args:
        strings: none of them empty.
        kept: whether the one that ended the text stays in it.
    """

    def __init__(self, strings: Sequence[str], kept: bool = False) -> None:
        self._strings, self._kept = strings, kept

    def end(self, text: str, known: int) -> int | None:
        """Where `text` ends by a stop string; its first `known` characters hold none. None where it goes on."""
        found = []
        for stop in self._strings:
            at = text.find(stop, max(known - len(stop) + 1, 0))
            if at >= 0:
                found.append((at, at + len(stop)))
        if not found:
            return None
        start, end = min(found)
        return end if self._kept else start

    def safe(self, text: str) -> int:
        """How many of the first characters of `text` no stop string can take back, whatever comes behind."""
        longest = 0
        for stop in self._strings:
            most = min(len(stop) - 1, len(text))
            longest = max(longest, next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0))
        return len(text) - longest
