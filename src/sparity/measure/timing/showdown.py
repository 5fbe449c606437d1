"""The end of the demo: dense and sparse models of one origin decode in turns, and each answers the same questions.

All of ours run in bfloat16, the sparse ones packed in memory; peers run as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparity.measure.data.report import Contestant
from sparity.measure.timing.answers import answers
from sparity.measure.timing.contenders import Contender, held_bytes
from sparity.measure.timing.generation import Timed, time_generation
from sparity.measure.timing.interleave import take_turns
from sparity.measure.timing.speed import pace

PROMPT, TOKENS, ROUNDS = 32, 32, 3
ANSWER = 32  # tokens


@dataclass(frozen=True)
class Entrant:
    """A model in memory that can be timed and asked.

    Attributes:
        kind: dense, sparse or a peer.
        generate: times the greedy generation of so many tokens after ids `[1, prompt]`.
        answer: what it says to each prompt; None where another entrant with the same weights says it.
    """

    name: str
    kind: str
    perplexity: float
    weight_bytes: int
    generate: Callable[[Tensor, int], Timed]
    answer: Callable[[Sequence[str]], dict[str, str]] | None


def our_entrants(
    dense: tuple[Path, float], sparse: Mapping[str, tuple[Path, float]], tokenizer: Any
) -> Iterator[Entrant]:
    """The dense model in transformers and on the engine, and every sparse one on the engine.

    Args:
        dense: the folder of the dense model and its perplexity.
        sparse: folder and perplexity of each sparse one, by name.
        tokenizer: of all of them.
    """
    folder, perplexity = dense
    field = [
        (Contender("dense, in transformers", folder, "transformers"), perplexity),
        (Contender("dense, on the engine", folder, "dense"), perplexity),
        *((Contender(name, place, "engine"), found) for name, (place, found) in sparse.items()),
    ]
    for contender, found in field:
        model = contender.open()
        yield Entrant(
            contender.name,
            "sparse" if contender.how == "engine" else "dense",
            found,
            held_bytes(model),
            partial(time_generation, model),
            None if contender.how == "transformers" else partial(_ask, model, tokenizer),
        )


def showdown(entrants: Sequence[Entrant], tokenizer: Any, prompts: Sequence[str]) -> tuple[Contestant, ...]:
    """Time all of them in turns, then ask them."""
    ids = torch.tensor([(tokenizer("\n".join(prompts), verbose=False)["input_ids"] * PROMPT)[:PROMPT]])
    times = take_turns([partial(one.generate, ids, TOKENS) for one in entrants], ROUNDS)
    return tuple(
        Contestant(
            one.name,
            pace(measured, 1).decode,
            one.perplexity,
            one.kind,
            one.weight_bytes,
            one.answer(prompts) if one.answer else {},
        )
        for one, measured in zip(entrants, times, strict=True)
    )


def _ask(model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, str]:
    return answers(model, tokenizer, prompts, ANSWER)
