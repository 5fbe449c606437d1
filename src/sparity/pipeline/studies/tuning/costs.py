"""What every choice costs at every unit: seconds of this machine's kernels, or bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparity.engine.attach import attached
from sparity.engine.kernels import native
from sparity.engine.kernels.call_time import call_seconds
from sparity.engine.kernels.fastest import declines
from sparity.engine.kernels.native_weight import TAKES
from sparity.engine.kernels.prepared import MANY
from sparity.engine.kernels.smallest import smallest_format
from sparity.errors import InvalidInput
from sparity.formats import Format, build_format
from sparity.formats.storage.values import nonzero
from sparity.measure.timing.generation import Timed, prompts, time_generation
from sparity.models import Decoder
from sparity.pipeline.run.job import Job
from sparity.pipeline.studies.tuning.applied_choices import AppliedChoices
from sparity.pipeline.studies.tuning.menu import Choice
from sparity.pipeline.studies.tuning.units import Unit

Goal = Literal["tokens/s", "prefill", "bytes"]
ROUNDS, TOKENS, PROMPT = 3, 16, 64  # of the dense model's generation


@dataclass(frozen=True)
class Price:
    """What a choice costs at a unit, in seconds per token (of a prompt: per call) or bytes, and the format for it."""

    cost: float
    format: str


Prices = Mapping[tuple[str, str], Price]  # by unit and choice


def prices(
    decoder: Decoder,
    units: Sequence[Unit],
    choices: Sequence[Choice],
    applied: AppliedChoices,
    goal: Goal,
    tell: Callable[[int, int], None],
) -> Prices:
    """Every choice's price at every unit; units of one role and the same shapes share that of the first of them.

    Raises:
        InvalidInput: speed is the goal, and the compiled kernels cannot run the model.
        SparityError: the machine is too busy to time its kernels.
    """
    if goal != "bytes":
        check_kernels(decoder.dtype, "maximise bytes")
    alike: dict[tuple[object, ...], list[Unit]] = {}
    for unit in units:
        alike.setdefault((unit.role, unit.matrices), []).append(unit)
    found: dict[tuple[str, str], Price] = {}
    for done, same in enumerate(alike.values(), 1):
        with decoder.block(same[0].block) as block:
            for choice in choices:
                product = same[0].products[0]
                weights = applied.weights(block, choice.name, product)
                together = torch.cat([weights[name] for name in product])
                skipped = applied.skipped(choice.name, product[0])
                price = _price(together, list(weights.values()), choice, skipped, goal)
                if price is not None:
                    times = len(same[0].products) * (1.0 if goal == "bytes" else same[0].visits)
                    for unit in same:
                        found[unit.name, choice.name] = Price(price.cost * times, price.format)
        tell(done, len(alike))
    return found


def check_kernels(dtype: torch.dtype, instead: str) -> None:
    """Raise `InvalidInput` where no compiled kernels can run a model of this type; `instead` is what can be done."""
    if reason := native.unavailable():
        raise InvalidInput(f"there is no speed to choose for without the compiled kernels: {reason}")
    if dtype != torch.bfloat16:
        raise InvalidInput(
            f"the kernels take bfloat16, not {str(dtype).removeprefix('torch.')}: pass --dtype bfloat16, or {instead}"
        )


def _price(weight: Tensor, parts: Sequence[Tensor], choice: Choice, skipped: float, goal: Goal) -> Price | None:
    """Of one product; None where nothing can run it."""
    encoding = choice.encoding
    if goal == "bytes":
        form = smallest_format(weight, encoding)
        return Price(float(sum(form.pack(part, encoding).nbytes for part in parts)), form.name)
    batch = 1 if goal == "tokens/s" else MANY
    taken = {
        name: call_seconds(form.pack(weight, encoding), native.threads(), batch, skipped)
        for name, form in _formats(weight, choice, skipped).items()
    }
    if not taken:
        return None
    best = min(taken, key=lambda name: taken[name])
    return Price(taken[best], best)


def _formats(weight: Tensor, choice: Choice, skipped: float) -> dict[str, Format]:
    """Those whose kernels multiply what a choice leaves."""
    every = {form: build_format(form) for form, values in sorted(TAKES) if values == choice.encoding.name}
    by_row = {name: form for name, form in every.items() if not form.by_channel}
    kept = int(torch.count_nonzero(nonzero(weight)))
    able = {
        name: form for name, form in by_row.items() if declines(by_row, name, weight, choice.encoding, kept) is None
    }
    return {**able, **{name: form for name, form in every.items() if form.by_channel and skipped > 0}}


@dataclass(frozen=True)
class Whole:
    """The dense model: its cost, and the part of it that no choice changes; in seconds or bytes."""

    cost: float
    rest: float

    def gain(self, cost: float) -> float:
        """How many times as fast, or as small, a model is whose units cost `cost`."""
        return self.cost / (self.rest + cost)


def whole_of(job: Job, goal: Goal, units: Sequence[Unit], found: Prices, as_it_is: str) -> Whole:
    """The dense model beside its units: timed as a whole on the engine, or its bytes in the type that it is run in."""
    inside = sum(found[unit.name, as_it_is].cost for unit in units)
    if goal == "bytes":
        numbers = sum(torch.Size(shape).numel() for shape in job.decoder.source.shapes().values())
        total = float(numbers * job.decoder.dtype.itemsize)
    else:
        text = job.texts[0].ids
        timed = time_dense(job.dense_model(), prompts(text, 1, min(PROMPT, len(text))))
        total = min(each.token if goal == "tokens/s" else each.first_token for each in timed)
    return Whole(max(total, inside), max(total - inside, 0.0))


def time_dense(model: Any, prompt: Tensor) -> list[Timed]:
    """A dense model in memory timed as a whole on the engine; `prompt` [1, tokens]."""
    with attached(model, form="dense") as model:
        return [time_generation(model, prompt, TOKENS) for _ in range(ROUNDS)]
