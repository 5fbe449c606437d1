"""How the next token is chosen from logits: greedily, or by one number drawn per token."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.errors import NumericalError


@dataclass(frozen=True)
class Sampling:
    """What decides each token.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens that come to this share are drawn from.
        top_k: so many of the likeliest are; 0 = all.
        min_p: those at least this share as likely as the likeliest are.
        repetition_penalty: divides positive logits of tokens that were there, and multiplies negative ones.
        presence_penalty: taken off the logits of tokens that the answer has.
        frequency_penalty: the same, as often as the answer has them.
        logit_bias: added to the logits of tokens.
        seed: of the draws, any whole number; the same request with the same seed gets the same answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0


class Chooser:
    """Chooses the tokens of one answer, one after another."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._prompt = set(prompt) if sampling.repetition_penalty != 1 else set[int]()
        self._answer: Counter[int] = Counter()
        self._draws = torch.Generator().manual_seed(sampling.seed % 2**63)

    def choose(self, logits: Tensor, banned: Collection[int] = ()) -> int:
        """The next token, from `logits` [vocabulary] in float32, which stay as they are.

        Raises:
            NumericalError: they are not numbers.
        """
        if not bool(logits.max() < torch.inf) or bool(logits.isnan().any()):
            raise NumericalError("the model gave logits that are NaN or infinite")
        changed = self._changed(logits, banned)
        likeliest = int((changed == changed.max()).nonzero()[0])
        chosen = likeliest if self.sampling.temperature == 0 else self._drawn(changed)
        self._answer[chosen] += 1
        return chosen

    def _changed(self, logits: Tensor, banned: Collection[int]) -> Tensor:
        asked, found = self.sampling, logits.clone()
        seen = torch.tensor(sorted(self._prompt | self._answer.keys()), dtype=torch.int64)
        if asked.repetition_penalty != 1 and len(seen):
            held = found[seen]
            found[seen] = torch.where(held > 0, held / asked.repetition_penalty, held * asked.repetition_penalty)
        for token, times in self._answer.items():
            found[token] -= asked.presence_penalty + asked.frequency_penalty * times
        for token, bias in asked.logit_bias:
            found[token] += bias
        if banned:
            found[sorted(banned)] = -torch.inf
        return found

    def _drawn(self, logits: Tensor) -> int:
        asked = self.sampling
        shares = torch.softmax((logits - logits.max()).double() / asked.temperature, 0)
        order: Tensor | None = None
        if asked.top_p < 1 or asked.top_k:
            shares, order = shares.sort(descending=True, stable=True)
            if asked.top_k:
                shares = shares[: asked.top_k]
            if asked.top_p < 1:  # those before which the others do not come to the share yet
                before = shares.cumsum(0) - shares
                shares = shares[: max(int((before < asked.top_p * shares.sum()).sum()), 1)]
        shares = torch.where(shares >= asked.min_p * shares.max(), shares, 0.0)
        reached = shares.cumsum(0)
        drawn = torch.rand(1, generator=self._draws, dtype=torch.float64) * reached[-1]
        at = int(torch.searchsorted(reached, drawn, right=True).clamp(max=len(shares) - 1))
        while not shares[at]:  # rounded onto the end
            at -= 1
        return at if order is None else int(order[at])
