"""Free answers: greedy generation that ends at a stop string."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparity.measure.tasks.reading import Reader, greedy
from sparity.models import transformers as hf


def answer(
    reader: Reader, tokenizer: Any, context: Sequence[int], held: int | None, stop: Sequence[str], most: int
) -> str:
    """What the model writes after a context, without the stop string; one text at a time, since padding changes bits.

    Args:
        reader: the model, and how it reads.
        tokenizer: its tokenizer.
        context: token ids of the prompt.
        held: so many of them are read before anything may be evicted; None = the whole prompt, as `generate` does.
        stop: the text ends before the first of them; empty ones do not count.
        most: tokens at most.
    """
    fitted = reader.fit(context, most)
    ends = Stops(tokenizer, len(fitted), [each for each in stop if each])
    ids = torch.tensor([list(fitted)], device=reader.device)
    past = None
    if held is not None and reader.way == "steps":
        with torch.no_grad(), hf.named_outputs(reader.model):
            past = reader.read_in_steps(fitted[:-1], min(max(held - len(context) + len(fitted), 0), len(fitted) - 1))
    with torch.no_grad(), hf.named_outputs(reader.model), greedy(reader.model, most):
        out = reader.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=past, stopping_criteria=[ends]
        )
    return ends.before(ends.text(out[0]))


class Stops:
    """A stopping criterion: one of the strings stands in the new text, across tokens too."""

    def __init__(self, tokenizer: Any, prompt: int, strings: Sequence[str]) -> None:
        self._tokenizer, self._prompt, self._strings = tokenizer, prompt, strings

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Of each row `[batch, tokens]` whether it ends."""
        ended = [any(string in self.text(row) for string in self._strings) for row in ids]
        return torch.tensor(ended, device=ids.device)

    def text(self, row: Tensor) -> str:
        """The new text of a row of ids."""
        text: str = self._tokenizer.decode(row[self._prompt :], skip_special_tokens=True)
        return text

    def before(self, text: str) -> str:
        """A text up to the first stop string."""
        return text[: min((text.index(string) for string in self._strings if string in text), default=len(text))]
