"""Models timed beside each other at several batch sizes, interleaved where memory allows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.measure.data import machine
from sparity.measure.data.bench_report import BenchReport, Ratio, Runner, Timing
from sparity.measure.show.sentences_bench import describe_products
from sparity.measure.timing import memory_fit, peak_memory
from sparity.measure.timing.contenders import Contender, held_bytes, slow_note, stored_bytes
from sparity.measure.timing.generation import Timed, check_context, prompts, time_generation
from sparity.measure.timing.interleave import ratios, spread, take_turns
from sparity.measure.timing.speed import pace
from sparity.models import transformers as hf

IN_TURNS = (
    "There was no room in memory for all contenders at once: each ran all its rounds alone, one after another, so a "
    "ratio compares rounds that were minutes apart."
)


@dataclass(frozen=True)
class Protocol:
    """What each contender generates in each round: `tokens` after the first, from prompts of `prompt` tokens."""

    prompt: int = 512
    tokens: int = 64
    rounds: int = 5
    batches: tuple[int, ...] = (1, 8, 32)


def bench(every: Sequence[Contender], ids: Tensor, protocol: Protocol, phase: Callable[[str], None]) -> BenchReport:
    """Time every contender; the last one is the subject.

    Args:
        every: at least one.
        ids: a text to take prompts from [tokens].
        protocol: lengths, rounds and batch sizes.
        phase: told what begins.

    Raises:
        InvalidInput: the lengths do not fit a model's context, the ids are not in its vocabulary, or no batch fits
            into memory.
    """
    configs = [hf.read_config(contender.folder) for contender in every]
    for contender, config in zip(reversed(every), reversed(configs), strict=True):  # the model itself is named first
        check_context(f"bench, {contender.name}", config, protocol.prompt, protocol.tokens)
        hf.check_vocabulary(ids, config, "bench")
    chosen = _fit(every, configs, protocol)
    notes = [*filter(None, [describe_products()]), *([] if chosen.together else [IN_TURNS])]
    peaks = {}
    for contender in every:
        phase(f"measuring the memory of {contender.name}")
        peaks[contender.name] = peak_memory.peak_memory(contender, chosen.batches, protocol.prompt, protocol.tokens)
    times: dict[tuple[str, int], list[Timed]] = {}
    runners = []
    for group in [every] if chosen.together else [[contender] for contender in every]:
        phase(f"timing {', '.join(contender.name for contender in group)}")
        models = [contender.open() for contender in group]
        for contender, model in zip(group, models, strict=True):
            runners.append(Runner(contender.name, contender.computed, held_bytes(model)))
            notes += filter(None, [slow_note(contender, model)])
        times |= _time(group, models, ids, protocol, chosen.batches)
        del models, model
    return BenchReport(
        model=every[-1].name,
        architecture=(configs[-1].architectures or ["unknown"])[0],
        prompt=protocol.prompt,
        tokens=protocol.tokens,
        rounds=protocol.rounds,
        threads=torch.get_num_threads(),
        interleaved=chosen.together,
        runners=tuple(runners),
        timings=tuple(
            Timing(name, batch, pace(found, batch), spread([time.token for time in found]), peaks[name][batch])
            for (name, batch), found in times.items()
        ),
        ratios=tuple(_ratios(every, times, chosen.batches)),
        skipped=chosen.skipped,
        notes=tuple(notes),
        machine=machine.describe(),
    )


def _fit(every: Sequence[Contender], configs: Sequence[Any], protocol: Protocol) -> memory_fit.Fit:
    work = {
        batch: max(memory_fit.working_bytes(config, batch, protocol.prompt, protocol.tokens) for config in configs)
        for batch in protocol.batches
    }
    weights = [stored_bytes(contender) for contender in every]
    chosen = memory_fit.fit(weights, work, memory_fit.available_memory())
    if not chosen.batches:
        raise InvalidInput(f"bench: no batch fits into memory: {chosen.skipped[0].reason}")
    return chosen


def _time(
    group: Sequence[Contender], models: Sequence[Any], ids: Tensor, protocol: Protocol, batches: Sequence[int]
) -> dict[tuple[str, int], list[Timed]]:
    times = {}
    for batch in batches:
        rows = prompts(ids, batch, protocol.prompt)
        turns = [partial(time_generation, model, rows, protocol.tokens) for model in models]
        for contender, found in zip(group, take_turns(turns, protocol.rounds), strict=True):
            times[contender.name, batch] = found
    return times


def _ratios(
    every: Sequence[Contender], times: dict[tuple[str, int], list[Timed]], batches: Sequence[int]
) -> Iterator[Ratio]:
    for batch in batches:
        subject = times[every[-1].name, batch]
        for opponent in every[:-1]:
            other = times[opponent.name, batch]
            yield Ratio(
                opponent.name,
                batch,
                decode=ratios([time.token for time in other], [time.token for time in subject]),
                first_token=ratios([time.first_token for time in other], [time.first_token for time in subject]),
            )
