"""What a shape must reach: tokens per second of decoding and of a prompt, and bytes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sparity.engine.kernels.prepared import MANY
from sparity.errors import InvalidInput
from sparity.measure.show import numbers
from sparity.memory import as_bytes

Goal = Literal["decode", "prefill", "bytes"]
TOKENS: Mapping[str, int] = {"decode": 1, "prefill": MANY}  # that the seconds of a goal are for


@dataclass(frozen=True)
class Least:
    """A speed: a multiple of the dense model's, or tokens per second."""

    value: float
    multiple: bool

    @classmethod
    def of(cls, option: str, written: str) -> "Least":
        """From what users write: "1.5x" or "40 tokens/s".

        Raises:
            InvalidInput: it is not written so.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(x|tokens/s)\s*", written)
        if not match or float(match[1]) <= 0:
            raise InvalidInput(f'{option} {written}: write it as "1.5x" (of dense) or as "40 tokens/s"')
        return cls(float(match[1]), match[2] == "x")

    def seconds(self, dense: float, tokens: int) -> float:
        """The most that so many tokens may take, where the dense model takes `dense`."""
        return dense / self.value if self.multiple else tokens / self.value

    @property
    def words(self) -> str:
        """Such as "1.5x" or "40 tokens/s"."""
        return f"{self.value:g}x" if self.multiple else f"{self.value:g} tokens/s"


@dataclass(frozen=True)
class Limits:
    """The least speed of decoding and of a prompt, and the most bytes of a plain checkpoint; all given ones hold."""

    decode: Least | None = None
    prefill: Least | None = None
    bytes: int | None = None

    @classmethod
    def of(cls, at_least: str | None, prefill: str | None, at_most: int | str | None) -> "Limits":
        """From what users write, see `study.plan_shape`.

        Raises:
            InvalidInput: nothing is given, or not written as it should be.
        """
        if at_least is None and prefill is None and at_most is None:
            raise InvalidInput('a limit is missing: --at-least "1.5x", --prefill "1.3x" or --at-most "100MB"')
        return cls(
            None if at_least is None else Least.of("--at-least", at_least),
            None if prefill is None else Least.of("--prefill", prefill),
            None if at_most is None else _most(at_most),
        )

    @property
    def timed(self) -> bool:
        """Whether a speed is asked for."""
        return self.decode is not None or self.prefill is not None

    @property
    def goals(self) -> tuple[Goal, ...]:
        """What is limited."""
        given: dict[Goal, object] = {"decode": self.decode, "prefill": self.prefill, "bytes": self.bytes}
        return tuple(goal for goal, limit in given.items() if limit is not None)

    @property
    def words(self) -> str:
        """In a few words, such as "decode 1.5x and 100.0 MB"."""
        said = [f"{goal} {limit.words}" for goal, limit in self._speeds.items()]
        return " and ".join([*said, *([] if self.bytes is None else [f"at most {numbers.size(self.bytes)}"])])

    def most(self, dense: Mapping[Goal, float]) -> dict[Goal, float]:
        """Goal -> the most seconds, or bytes, that a shape may cost, where the dense model costs `dense`."""
        found: dict[Goal, float] = {
            goal: limit.seconds(dense[goal], TOKENS[goal]) for goal, limit in self._speeds.items()
        }
        return found if self.bytes is None else {**found, "bytes": float(self.bytes)}

    @property
    def _speeds(self) -> dict[Goal, Least]:
        given: dict[Goal, Least | None] = {"decode": self.decode, "prefill": self.prefill}
        return {goal: limit for goal, limit in given.items() if limit is not None}


def _most(written: int | str) -> int:
    try:
        return as_bytes(written)
    except InvalidInput as error:
        raise InvalidInput(f"--at-most: {error}") from error
