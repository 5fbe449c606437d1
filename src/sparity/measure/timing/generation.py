"""One timed generation: what `model.generate` takes, token by token."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import transformers as hf

STREAMED = {"num_beams": 1, "num_return_sequences": 1}  # all that a streamer takes, whatever the model's own file asks


@dataclass(frozen=True)
class Timed:
    """Seconds to the first token, and seconds per token after it: the median, so that one stall does not count."""

    first_token: float
    token: float


class Stamps:
    """A streamer for `generate` that notes when each token came; the prompt comes first and is no token."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._prompt_came = False
        self.begun = clock()
        self.times: list[float] = []

    def put(self, ids: Tensor) -> None:
        """`ids` [batch, prompt], then [batch] for each new token."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        self.times.append(self._clock())
        self.receive(ids)

    def receive(self, ids: Tensor) -> None:
        """What else is done with new tokens [batch]; nothing here."""

    def end(self) -> None:
        """The last token came."""

    def timed(self) -> Timed:
        """What was measured; at least two tokens must have come."""
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return Timed(self.times[0] - self.begun, statistics.median(steps))


def time_generation(model: Any, ids: Tensor, tokens: int) -> Timed:
    """Greedy generation of `tokens` tokens after the first one; no token ends it earlier, whatever the model asks for.

    Args:
        model: a transformers causal language model.
        ids: prompts of one length [batch, prompt].
        tokens: number of tokens after the first, at least 1.
    """
    device = next(model.parameters()).device
    stamps = Stamps()
    with torch.no_grad(), hf.named_outputs(model), _plain_greedy(model, tokens + 1):
        model.generate(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            streamer=stamps,
        )
    return stamps.timed()


@contextmanager
def _plain_greedy(model: Any, tokens: int) -> Iterator[None]:
    """Within the context the model generates so many tokens greedily; its own configuration asks for nothing."""
    from transformers import GenerationConfig

    never = model.config.get_text_config().vocab_size  # the id of no token
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=never, pad_token_id=0, use_cache=True, **STREAMED
    )
    try:
        yield
    finally:
        model.generation_config = own


def prompts(ids: Tensor, batch: int, prompt: int) -> Tensor:
    """Windows of a text [batch, prompt], one after another and from the start again where it ends."""
    return ids.repeat(-(-batch * prompt // len(ids)))[: batch * prompt].view(batch, prompt)


def check_context(what: str, config: Any, prompt: int, tokens: int) -> None:
    """Raise `InvalidInput`, which begins with `what`, when prompt and new tokens are more than a model's context."""
    context = hf.context_length(config)
    if context and prompt + tokens > context:
        raise InvalidInput(
            f"{what}: a prompt of {prompt} and {tokens} new tokens do not fit the model's context of {context} tokens: "
            "lower one of them"
        )
