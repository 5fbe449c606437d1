"""Decode speed and time to first token, the models taking turns so that the machine's noise hits both."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.measure.report import Pace, Speed, Spread


def compare_speed(dense: Any, sparse: Any, token_ids: Tensor, prompt: int, tokens: int, rounds: int = 5) -> Speed:
    """Time greedy generation of `tokens` tokens after a prompt of `prompt` tokens, batch 1.

    Each round times both models, in alternating order; one round more is run first and not counted.

    Raises:
        InvalidInput: the prompt and the new tokens do not fit the text or the model's context.
    """
    context = getattr(dense.config, "max_position_embeddings", None)
    if context and prompt + tokens > context:
        raise InvalidInput(f"speed: {prompt} + {tokens} tokens do not fit the model's context of {context} tokens")
    if len(token_ids) < prompt:
        raise InvalidInput(f"speed: the text has {len(token_ids)} tokens, less than a prompt of {prompt}")
    ids = token_ids[:prompt][None]
    timings: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for number in range(rounds + 1):
        order = (0, 1) if number % 2 else (1, 0)
        measured = {which: _generate((dense, sparse)[which], ids, tokens) for which in order}
        if number:
            for which in (0, 1):
                timings[which].append(measured[which])
    (dense_first, dense_rate), (sparse_first, sparse_rate) = (tuple(zip(*times, strict=True)) for times in timings)
    return Speed(
        prompt,
        tokens,
        rounds,
        dense=Pace(spread(dense_first), spread(dense_rate)),
        sparse=Pace(spread(sparse_first), spread(sparse_rate)),
        decode_ratio=spread([s / d for s, d in zip(sparse_rate, dense_rate, strict=True)]),
        first_token_ratio=spread([d / s for s, d in zip(sparse_first, dense_first, strict=True)]),
    )


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest."""
    return Spread(statistics.median(values), min(values), max(values))


def _generate(model: Any, ids: Tensor, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second at the median time per token after it."""
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad():
        start = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        current = output.logits[:, -1:].argmax(-1)
        int(current)  # waits for the device
        first = begun = time.perf_counter()
        steps = []
        for _ in range(tokens):
            output = model(input_ids=current, past_key_values=output.past_key_values, use_cache=True)
            current = output.logits[:, -1:].argmax(-1)
            int(current)
            ended = time.perf_counter()
            steps.append(ended - begun)
            begun = ended
    return first - start, 1 / statistics.median(steps)  # the median, so that one stall of the machine does not count
