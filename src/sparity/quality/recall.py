"""What a model still knows of a context when its cache has been compressed: prefill, compress, then ask.

Perplexity of a text that is scored in one call cannot see what a cache holds. Here the context is read first, with
whatever is attached to the model, and each question is put to a copy of the cache that this leaves: its tokens but
the last in one call, then that and those of the answer one by one, as in decoding.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sparity.errors import InvalidInput, wrong_input


@dataclass(frozen=True)
class Question:
    """What is asked of a context.

    Attributes:
        asked: token ids, as the text goes on behind the context.
        answer: token ids that follow.
        distance: tokens between what answers it and the end of the context.
    """

    asked: tuple[int, ...]
    answer: tuple[int, ...]
    distance: int


@dataclass(frozen=True)
class Context:
    """Token ids, and what is asked of them."""

    tokens: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Recalled:
    """How answers came out.

    Attributes:
        right: of each question whether every token of the answer was the most likely one.
        losses: mean negative log-likelihood of each answer's tokens, in nats.
        distances: see `Question`.
        nbytes: of the caches when the contexts had been read, on average.
    """

    right: tuple[bool, ...]
    losses: tuple[float, ...]
    distances: tuple[int, ...]
    nbytes: float

    @property
    def share(self) -> float:
        """The share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def loss(self) -> float:
        """The mean loss."""
        return sum(self.losses) / len(self.losses)

    def by_distance(self, bounds: Sequence[int]) -> list[float | None]:
        """The share of right answers whose distance is below each bound and not below the one before; None = none."""
        found, low = list[float | None](), 0
        for high in bounds:
            here = [right for right, far in zip(self.right, self.distances, strict=True) if low <= far < high]
            found.append(sum(here) / len(here) if here else None)
            low = high
        return found


@wrong_input()
def recall(model: Any, contexts: Sequence[Context], *, query_aware: bool = False) -> Recalled:
    """Read contexts, compress, and score answers.

    Args:
        model: a Hugging Face causal language model, with what is attached to it (`sparity.cache`).
        contexts: one or more, each with one question or more.
        query_aware: read each question with its context, so that what is kept may depend on it. Such figures are
            higher, and say nothing of a cache that serves several questions.

    Raises:
        InvalidInput: no context or question, or an answer of no tokens.
    """
    if not contexts or any(not each.questions or not each.tokens for each in contexts):
        raise InvalidInput("recall needs contexts with tokens and at least one question each")
    if any(not question.answer or not question.asked for each in contexts for question in each.questions):
        raise InvalidInput("every question has tokens, and so has its answer")
    right, losses, distances, nbytes = list[bool](), list[float](), list[int](), list[int]()
    for context in contexts:
        past = None if query_aware else _read(model, context.tokens)
        for question in context.questions:
            start = _read(model, (*context.tokens, *question.asked[:-1])) if past is None else copy.deepcopy(past)
            nbytes.append(bytes_of(start))
            if past is not None and len(question.asked) > 1:
                _read(model, question.asked[:-1], start)
            logits = _one_by_one(model, (question.asked[-1], *question.answer[:-1]), start)
            answer = torch.tensor(question.answer, device=logits.device)
            right.append(bool((logits.argmax(-1) == answer).all()))
            losses.append(float(-logits.log_softmax(-1).gather(1, answer[:, None]).mean()))
            distances.append(question.distance)
    return Recalled(tuple(right), tuple(losses), tuple(distances), sum(nbytes) / len(nbytes))


def bytes_of(cache: Any) -> int:
    """Bytes of what a transformers cache holds of keys and values, with policies or without."""
    total = 0
    for layer in cache.layers:
        own = getattr(layer, "nbytes", None)
        held: list[Tensor] = [layer.keys, layer.values] if own is None and layer.get_seq_length() else []
        total += sum(states.nbytes for states in held) if own is None else int(own)
    return total


def _one_by_one(model: Any, tokens: Sequence[int], past: DynamicCache) -> Tensor:
    """Logits after each of some tokens, float32 `[tokens, words]`, which are read as decoding reads them."""
    found = []
    with torch.no_grad():
        for token in tokens:
            ids = torch.tensor([[token]], device=model.device)
            found.append(model(input_ids=ids, past_key_values=past).logits[0, -1].float())
    return torch.stack(found)


def _read(model: Any, tokens: Sequence[int], past: DynamicCache | None = None) -> DynamicCache:
    past = DynamicCache(config=model.config.get_text_config(decoder=True)) if past is None else past
    with torch.no_grad():
        model(input_ids=torch.tensor([list(tokens)], device=model.device), past_key_values=past, logits_to_keep=1)
    return past
