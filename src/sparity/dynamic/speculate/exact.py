"""Exact mode: the sparse model drafts, the dense one checks, and the answer is the dense one's, token for token.

Both are the same weights: a draft skips input channels, or reads only some pages of the key-value cache, and a check
does not (self-speculation; Leviathan et al. 2023, arXiv:2211.17192, for greedy decoding). The checked keys and values
take the place of the drafted ones in the cache.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from sparity.dynamic.cache.attaching import RUN
from sparity.dynamic.cache.converting import layers_of
from sparity.dynamic.cache.policies.keep_all import KeepAll
from sparity.engine.decoding import model as decoding
from sparity.engine.modules.skips import tokens_of
from sparity.errors import InvalidInput, wrong_input

MOST_DRAFTED = 31  # with the token before them, what the fast path takes in one call


class Streamer(Protocol):
    """What transformers' streamers are."""

    def put(self, value: Tensor) -> None:
        """The prompt, then each new token."""

    def end(self) -> None:
        """The last token came."""


@dataclass(frozen=True)
class ExactAnswer:
    """Tokens, and what drafting them came to.

    Attributes:
        ids: the prompt and the new tokens, `[1, tokens]`.
        drafted: tokens that were drafted.
        accepted: those of them that the check confirmed.
        checks: dense passes after the prompt's.
    """

    ids: Tensor
    drafted: int
    accepted: int
    checks: int

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were confirmed; 0 where none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@wrong_input()
def generate_exact(
    model: Any,
    input_ids: Any,
    *,
    max_new_tokens: int,
    draft: int = 4,
    eos_token_id: int | Collection[int] | None = None,
    streamer: Streamer | None = None,
) -> ExactAnswer:
    """Greedy tokens of the dense model, at the price of a sparse one where its drafts are right.

    On the engine they are those of its greedy decoding bit for bit. With pages the model's own code runs, whose calls
    of several tokens differ in the last bits from those of one: tokens are the same unless two are as likely as that.

    Args:
        model: a causal language model on the engine (`sparity.attach`) that skips activations: loaded with such a
            stage, or within `sparity.with_activations`. Or any model that reads pages of a cache that holds
            everything as it is: within `sparity.cache(model, "quest")`.
        input_ids: the prompt, `[tokens]` or `[1, tokens]`.
        max_new_tokens: at most so many, 1 or more.
        draft: tokens drafted before each check, 1 to 31; fewer where drafts fail, see below.
        eos_token_id: tokens that end an answer; None = those of the model's generation configuration.
        streamer: given the prompt `[1, tokens]`, then every new token `[1]` as soon as it is certain, as transformers'
            `generate` does.

    The draft is shortened to one more than was accepted after a failure, and grows by one after a full success.

    Raises:
        InvalidInput: a model that skips neither activations nor pages, or skips activations without the fast path;
            a cache that has lost something; another batch than 1.

    Example:
        >>> import sparity, torch
        >>> from sparity.dynamic.speculate.exact import generate_exact
        >>> model, ids = sparity.load("zoo:llama", dtype="bfloat16"), torch.arange(64).view(2, 32)
        >>> dense = sparity.attach(model).generate(ids[:1], max_new_tokens=8, do_sample=False)
        >>> with sparity.with_activations(model, ids, method="teal", sparsity=0.3):
        ...     print(torch.equal(generate_exact(model, ids[0], max_new_tokens=8).ids, dense))
        True
    """
    tokens = _drafting(model)
    if not 1 <= draft <= MOST_DRAFTED:
        raise InvalidInput(f"draft {draft}: draft 1 to {MOST_DRAFTED} tokens at a time")
    if max_new_tokens < 1:
        raise InvalidInput(f"max_new_tokens {max_new_tokens}: ask for 1 or more")
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != 1 or not ids.shape[1] or ids.is_floating_point():
        raise InvalidInput(
            f"exact mode takes one prompt of whole numbers, [tokens] or [1, tokens], not {list(ids.shape)}"
        )
    ends = _ends(model, eos_token_id)
    cache, answer = DynamicCache(config=model.config.get_text_config(decoder=True)), list[int]()
    drafted = accepted = checks = 0
    if streamer is not None:
        streamer.put(ids)
    with torch.no_grad():
        with tokens.dense():
            answer += _picked(model, ids, cache, 1)
        _tell(streamer, answer)
        size = draft
        while len(answer) < max_new_tokens and answer[-1] not in ends:
            length = cache.get_seq_length()
            guess = [answer[-1]]
            for _ in range(min(size, max_new_tokens - len(answer) - 1)):
                guess += _picked(model, torch.tensor([guess[-1:]]), cache, 1)
            _take_back(cache, cache.get_seq_length() - length)
            with tokens.dense():
                picked = _picked(model, torch.tensor([guess]), cache, len(guess))
            right = next((i for i, (a, b) in enumerate(zip(guess[1:], picked, strict=False)) if a != b), len(guess) - 1)
            kept = picked[: right + 1]
            cut = next((i + 1 for i, token in enumerate(kept) if token in ends), len(kept))
            answer += kept[:cut]
            _tell(streamer, kept[:cut])
            drafted, accepted, checks = drafted + len(guess) - 1, accepted + right, checks + 1
            _take_back(cache, len(guess) - right - 1)
            size = min(size + 1, draft) if right == len(guess) - 1 else max(min(right + 1, draft), 1)
    if streamer is not None:
        streamer.end()
    return ExactAnswer(torch.cat([ids, torch.tensor([answer])], 1), drafted, accepted, checks)


def _drafting(model: Any) -> Any:
    """What leaves something out of a draft; within its `dense()` nothing is.

    Raises:
        InvalidInput: nothing does, or a check could not be dense.
    """
    tokens, run = tokens_of(model), getattr(model, RUN, None)
    if tokens is not None and run is not None:
        raise InvalidInput("exact mode drafts with skipped activations or with pages of the cache, not with both")
    if run is not None:
        if run.reader is None or run.codec is not None or type(run.policy) is not KeepAll:
            raise InvalidInput(
                "exact mode checks with everything, and this cache does not hold it as it is: take "
                'sparity.cache(model, "quest")'
            )
        if not all(layers_of(model)):
            raise InvalidInput("exact mode takes drafts back, which layers with a sliding window cannot")
        return run
    if tokens is None:
        raise InvalidInput(
            "exact mode drafts with skipped activations, and this model skips none: load one with an `activations` "
            "stage, or call it within sparity.with_activations"
        )
    if reason := decoding.declines(model):
        raise InvalidInput(f"exact mode needs decoding whose bits do not depend on the draft: {reason}; sparity.attach")
    return tokens


def _tell(streamer: Streamer | None, answer: Collection[int]) -> None:
    if streamer is not None:
        for token in answer:
            streamer.put(torch.tensor([token]))


def _picked(model: Any, ids: Tensor, cache: DynamicCache, count: int) -> list[int]:
    """The likeliest token after each of the last `count` ids `[1, new]`, which the cache holds afterwards."""
    logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=count).logits
    return [int(token) for token in logits[0, -count:].float().argmax(-1)]


def _take_back(cache: DynamicCache, count: int) -> None:
    if count:
        cache.crop(-count)


def _ends(model: Any, given: int | Collection[int] | None) -> frozenset[int]:
    found = model.generation_config.eos_token_id if given is None else given
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)
