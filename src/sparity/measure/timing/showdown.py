"""The end of the demo: dense and sparse models of one origin decode in turns, and each answers the same questions.

All of them run in bfloat16, the sparse ones packed in memory.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from sparity.measure.data.report import Contestant
from sparity.measure.timing.answers import answers
from sparity.measure.timing.contenders import Contender, held_bytes
from sparity.measure.timing.generation import time_generation
from sparity.measure.timing.interleave import take_turns
from sparity.measure.timing.speed import pace
from sparity.models.loading import load_tokenizer

PROMPT, TOKENS, ROUNDS = 32, 32, 3
ANSWER = 32  # tokens


def showdown(
    dense: tuple[Path, float], sparse: Mapping[str, tuple[Path, float]], prompts: Sequence[str]
) -> tuple[Contestant, ...]:
    """Time the dense model in transformers and on the engine, and every sparse one on the engine, in turns.

    Args:
        dense: the folder of the dense model and its perplexity.
        sparse: folder and perplexity of each sparse one, by name.
        prompts: what each is asked; the dense one on the engine only.
    """
    folder, perplexity = dense
    field = [
        (Contender("dense, in transformers", folder, "transformers"), perplexity),
        (Contender("dense, on the engine", folder, "dense"), perplexity),
        *((Contender(name, place, "engine"), found) for name, (place, found) in sparse.items()),
    ]
    models = [contender.open() for contender, _ in field]
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([(tokenizer("\n".join(prompts), verbose=False)["input_ids"] * PROMPT)[:PROMPT]])
    times = take_turns([partial(time_generation, model, ids, TOKENS) for model in models], ROUNDS)
    return tuple(
        Contestant(
            contender.name,
            pace(measured, 1).decode,
            found,
            "sparse" if contender.how == "engine" else "dense",
            held_bytes(model),
            {} if contender.how == "transformers" else answers(model, tokenizer, prompts, ANSWER),
        )
        for (contender, found), model, measured in zip(field, models, times, strict=True)
    )
