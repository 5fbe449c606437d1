"""Who is told how a run gets on."""

from typing import Protocol


class Progress(Protocol):
    """Told how a run gets on."""

    def phase(self, words: str) -> None:
        """A new phase begins."""

    def block(self, done: int, total: int, seconds: float) -> None:
        """A block was committed."""


class Silence:
    """A progress that says nothing."""

    def phase(self, words: str) -> None:
        """See `Progress`."""

    def block(self, done: int, total: int, seconds: float) -> None:
        """See `Progress`."""
