"""Decode speed and time to first token, the models taking turns so that the machine's noise hits both."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sparity.errors import InvalidInput
from sparity.measure.generating import Timed, check_context, prompts, time_generation
from sparity.measure.report import Pace, Speed
from sparity.measure.turns import ratios, spread, take_turns


def compare_speed(
    dense: Any, sparse: Any, token_ids: Tensor, prompt: int, tokens: int, rounds: int = 5, batch: int = 1
) -> Speed:
    """Time greedy generation of `tokens` tokens after a prompt of `prompt` tokens and the first token.

    Each round times `generate` of both models, in alternating order; one round more is run first and not counted.

    Raises:
        InvalidInput: the prompt and the new tokens do not fit the text or the model's context.
    """
    check_context(dense.config, prompt, tokens)
    if len(token_ids) < prompt:
        raise InvalidInput(f"speed: the text has {len(token_ids)} tokens, less than a prompt of {prompt}")
    ids = prompts(token_ids, batch, prompt)
    turns = [partial(time_generation, model, ids, tokens) for model in (dense, sparse)]
    dense_times, sparse_times = take_turns(turns, rounds)
    return Speed(
        prompt,
        tokens,
        rounds,
        dense=pace(dense_times, batch),
        sparse=pace(sparse_times, batch),
        decode_ratio=ratios([time.token for time in dense_times], [time.token for time in sparse_times]),
        first_token_ratio=ratios(
            [time.first_token for time in dense_times], [time.first_token for time in sparse_times]
        ),
        batch=batch,
    )


def pace(times: Sequence[Timed], batch: int) -> Pace:
    """What the rounds of one model say: seconds to the first token, and tokens per second of the whole batch."""
    return Pace(spread([time.first_token for time in times]), spread([batch / time.token for time in times]))
