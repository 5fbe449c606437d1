"""How a model reads a question and what probability it gives to an answer, in one pass or from its cache."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.cache.attaching import PREFIX
from sparity.errors import InvalidInput
from sparity.measure.tasks.names import Way
from sparity.models import transformers as hf
from sparity.products.float32 import float32_products


@dataclass(frozen=True)
class Asked:
    """What is to be scored: token ids of a context and of what follows.

    Attributes:
        held: so many tokens of the context are read before anything may be evicted; None = all but the last.
    """

    context: tuple[int, ...]
    answer: tuple[int, ...]
    held: int | None = None


@dataclass(frozen=True)
class Scored:
    """The log-probability of an answer, in nats, and whether greedy decoding would have written it."""

    logprob: float
    greedy: bool


def has_policy(model: Any) -> bool:
    """Whether a policy chooses what stays in the model's key-value cache."""
    return str(getattr(model.config, "_attn_implementation", "")).startswith(PREFIX)


@dataclass
class Reader:
    """Scores answers; softmax in float32, always the same batches for the same questions.

    A single pass has no cache, so a policy that evicts tokens cannot show in it. In steps, the context but its last
    token is read first, the policy evicts, and every scored token is predicted from what is left, as in a generation.

    Args:
        model: a Hugging Face causal language model.
        batch: questions per pass in the way `whole`; rows are padded on the right and the last pass is filled up.
        length: the longest sequence; None = the model's context, else 2048.
        way: how it reads; None = in steps where the model's cache has a policy.

    Attributes:
        cut: how many contexts lost tokens at their start because they were too long.
    """

    model: Any
    batch: int = 1
    length: int | None = None
    way: Way | None = None
    cut: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InvalidInput(f"batch {self.batch}: at least one question is read at a time")
        self.length = self.length or hf.context_length(self.model.config) or 2048
        if self.way is None:
            self.way = "steps" if has_policy(self.model) else "whole"
        elif self.way == "whole" and has_policy(self.model):
            raise InvalidInput(
                "the model's key-value cache has a policy, and a single pass has no cache that it could work in: "
                "read in steps"
            )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def score(self, asked: Sequence[Asked]) -> list[Scored]:
        """Of each the log-probability of its answer after its context.

        Raises:
            InvalidInput: no context, no answer, or an answer longer than the model's context.
        """
        fitted = [self._fitted(one) for one in asked]
        found: list[Scored | None] = [None] * len(fitted)
        with torch.no_grad(), hf.named_outputs(self.model), float32_products():
            for place, scored in (self._whole if self.way == "whole" else self._in_steps)(fitted):
                found[place] = scored
        return [each for each in found if each is not None]

    def fit(self, context: Sequence[int], room: int) -> tuple[int, ...]:
        """A context with room for so many tokens more; what is too long loses its start."""
        assert self.length is not None, "set at once"
        left = self.length - room
        if left < 1:
            raise InvalidInput(f"an answer of {room} tokens does not fit the model's context of {self.length}")
        if len(context) > left:
            self.cut += 1
        return tuple(context[-left:])

    def _fitted(self, one: Asked) -> Asked:
        if not one.context or not one.answer:
            raise InvalidInput("a question without a context or without an answer cannot be scored")
        context = self.fit(one.context, len(one.answer) - 1)  # the last token is predicted, never read
        held = len(context) - 1 if one.held is None else one.held - (len(one.context) - len(context))
        return Asked(context, one.answer, min(max(held, 0), len(context) - 1))

    def _whole(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Scored]]:
        """Questions with the same input share a row; long ones come first, so that memory runs out at once or never."""
        inputs: dict[tuple[int, ...], list[int]] = {}
        for place, one in enumerate(asked):
            inputs.setdefault(one.context + one.answer[:-1], []).append(place)
        order = sorted(inputs, key=lambda ids: (-len(ids), ids))
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            logits = self._logits(rows + rows[-1:] * (self.batch - len(rows)))
            for row, ids in enumerate(rows):
                for place in inputs[ids]:
                    answer = asked[place].answer
                    yield place, judged(logits[row, len(ids) - len(answer) : len(ids)], answer)

    def _logits(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """`[rows, tokens, vocabulary]`; no token sees the padding behind it."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        padded = {} if bool(real.all()) else {"attention_mask": real}
        logits: Tensor = self.model(input_ids=ids, use_cache=False, **padded).logits
        return logits

    def _in_steps(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Scored]]:
        """What questions share is read once; each answer goes on from a copy of the cache."""
        shared: dict[tuple[tuple[int, ...], int], dict[tuple[int, ...], list[int]]] = {}
        for place, one in enumerate(asked):
            assert one.held is not None, "fitted"
            answers = shared.setdefault((one.context, one.held), {})
            answers.setdefault(one.answer, []).append(place)
        for (context, held), answers in shared.items():
            past = self.read_in_steps(context[:-1], held)
            for number, (answer, places) in enumerate(answers.items()):
                own = past if number == len(answers) - 1 else copy.deepcopy(past)
                rows = []
                for token in (context[-1], *answer[:-1]):
                    out = self.model(input_ids=self._row([token]), past_key_values=own, use_cache=True)
                    own = out.past_key_values
                    rows.append(out.logits[0, -1])
                scored = judged(torch.stack(rows), answer)
                for place in places:
                    yield place, scored

    def read_in_steps(self, context: Sequence[int], held: int) -> Any:
        """The cache after a context: `held` tokens in one call, the others one by one; None for no tokens."""
        past = None
        if held:
            past = self.model(input_ids=self._row(context[:held]), use_cache=True).past_key_values
        for token in context[held:]:
            past = self.model(input_ids=self._row([token]), past_key_values=past, use_cache=True).past_key_values
        return past

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)


def judged(logits: Tensor, answer: Sequence[int]) -> Scored:
    """What logits `[answer, vocabulary]` give to the tokens of an answer; the softmax is in float32."""
    logarithms = logits.float().log_softmax(-1)
    wanted = torch.tensor(answer, device=logits.device)
    each = logarithms.gather(1, wanted[:, None])
    return Scored(float(each.sum()), bool((logarithms.argmax(-1) == wanted).all()))


@contextmanager
def greedy(model: Any, tokens: int) -> Iterator[None]:
    """Within the context the model's own generation settings are those of greedy decoding of at most so many tokens."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, use_cache=True, eos_token_id=own.eos_token_id, pad_token_id=0
    )
    try:
        yield
    finally:
        model.generation_config = own
