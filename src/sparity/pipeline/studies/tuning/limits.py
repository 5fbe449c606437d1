"""What a tuned model may lose, and must gain."""

import math
import re
from dataclasses import dataclass
from typing import Any

from sparity.errors import InvalidInput
from sparity.recipe import Accept


@dataclass(frozen=True)
class Limits:
    """The largest relative rise of perplexity, the largest KL in nats per token, and the least gain."""

    perplexity: float | None = None
    kl: float | None = None
    least: float | None = None

    @classmethod
    def of(cls, max_ppl: str | None, max_kl: float | None, at_least: str | None) -> "Limits":
        """From what users write: "+5%", 0.1, "1.5x".

        Raises:
            InvalidInput: neither limit is given, or one is not written like that.
        """
        if max_ppl is None and max_kl is None:
            raise InvalidInput('a limit is missing: --max-ppl "+5%", --max-kl 0.1, or both')
        if max_ppl is not None and not re.fullmatch(r"\+?\d+(\.\d+)?%", max_ppl):
            raise InvalidInput(f'--max-ppl {max_ppl}: write it as "+5%"')
        if max_kl is not None and not (math.isfinite(max_kl) and max_kl >= 0):
            raise InvalidInput(f"--max-kl {max_kl}: nats per token, 0 or more")
        if at_least is not None and not re.fullmatch(r"\d+(\.\d+)?x", at_least):
            raise InvalidInput(f'--at-least {at_least}: write it as "1.5x"')
        rise = None if max_ppl is None else float(max_ppl.strip("+%")) / 100
        return cls(rise, max_kl, None if at_least is None else float(at_least.rstrip("x")))

    @property
    def words(self) -> str:
        """In a few words, such as "perplexity +5 %"."""
        rise = None if self.perplexity is None else f"perplexity +{100 * self.perplexity:g} %"
        return " and ".join(filter(None, (rise, None if self.kl is None else f"KL {self.kl:g}")))

    @property
    def accept(self) -> dict[str, Any]:
        """The section of a recipe that says the same."""
        found: dict[str, Any] = {} if self.perplexity is None else {"perplexity": f"+{100 * self.perplexity:.10g}%"}
        section = Accept.model_validate(found if self.kl is None else {**found, "kl": self.kl})
        return section.model_dump(exclude_unset=True)

    def excess(self, change: float, kl: float) -> float:
        """How much of the limits is used, 1 being all of one; a rise of perplexity and a KL."""
        return max(_used(change, self.perplexity), _used(kl, self.kl))


def _used(found: float, limit: float | None) -> float:
    if limit is None or found <= 0:
        return 0.0
    return found / limit if limit > 0 else math.inf
