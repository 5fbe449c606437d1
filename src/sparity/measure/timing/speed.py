"""Decode speed and time to first token, the models taking turns so that the machine's noise hits all."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sparity.engine import attach
from sparity.engine.decoding.model import has_fast_path
from sparity.engine.kernels import native
from sparity.errors import InvalidInput
from sparity.measure.data.report import Baseline, Pace, Speed, Spread
from sparity.measure.timing.generation import Timed, check_context, prompts, time_generation
from sparity.measure.timing.interleave import ratios, spread, take_turns


def compare_speed(
    dense: Any, sparse: Any, token_ids: Tensor, prompt: int, tokens: int, rounds: int = 5, batch: int = 1
) -> Speed:
    """Time greedy generation of `tokens` tokens after a prompt of `prompt` tokens and the first token.

    Each round times `generate` of both models, in alternating order; one round more is run first and not counted. Where
    the sparse model runs on the engine, each round also times the dense one there, if `engine_declines` allows it; the
    dense weights are in memory once.

    Raises:
        InvalidInput: the prompt and the new tokens do not fit the text or the model's context.
    """
    check_context("speed", dense.config, prompt, tokens)
    if len(token_ids) < prompt:
        raise InvalidInput(f"speed: the text has {len(token_ids)} tokens, less than a prompt of {prompt}")
    ids = prompts(token_ids, batch, prompt)
    turns = [partial(time_generation, model, ids, tokens) for model in (dense, sparse)]
    if has_fast_path(sparse) and engine_declines(dense) is None:
        turns.append(partial(_time_on_engine, dense, ids, tokens))
    dense_times, sparse_times, *engine_times = take_turns(turns, rounds)
    decode, first_token = _faster(dense_times, sparse_times)
    return Speed(
        prompt,
        tokens,
        rounds,
        dense=pace(dense_times, batch),
        sparse=pace(sparse_times, batch),
        decode_ratio=decode,
        first_token_ratio=first_token,
        batch=batch,
        engine_dense=Baseline(pace(engine_times[0], batch), *_faster(engine_times[0], sparse_times))
        if engine_times
        else None,
    )


def engine_declines(dense: Any) -> str | None:
    """Why a dense model cannot be timed both in transformers and on the engine, or None when it can."""
    if reason := native.unavailable():
        return f"no compiled kernels: {reason}"
    return "it runs on the engine already" if has_fast_path(dense) else attach.declines(dense)


def pace(times: Sequence[Timed], batch: int) -> Pace:
    """What the rounds of one model say: seconds to the first token, and tokens per second of the whole batch."""
    return Pace(spread([time.first_token for time in times]), spread([batch / time.token for time in times]))


def _faster(slow: Sequence[Timed], fast: Sequence[Timed]) -> tuple[Spread, Spread]:
    """How much faster the second decodes and comes to its first token, round by round."""
    return (
        ratios([time.token for time in slow], [time.token for time in fast]),
        ratios([time.first_token for time in slow], [time.first_token for time in fast]),
    )


def _time_on_engine(dense: Any, ids: Tensor, tokens: int) -> Timed:
    with attach.attached(dense, form="dense"):
        return time_generation(dense, ids, tokens)
