"""What shapes cost: bytes by their tensors, seconds by this machine's kernels and the dense model's own time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparity.engine.kernels import native
from sparity.engine.kernels.call_time import call_seconds
from sparity.engine.kernels.prepared import MANY
from sparity.formats import build_encoding, build_format
from sparity.measure.timing.generation import prompts
from sparity.models.cuts.whole import cut_model
from sparity.models.dimensions import DEPTH
from sparity.pipeline.studies.shapes.axes import Axis
from sparity.pipeline.studies.shapes.limits import Goal
from sparity.pipeline.studies.shapes.tensors import Layout, Sizes
from sparity.pipeline.studies.tuning.costs import time_dense

INPUTS: Mapping[Goal, int] = {"decode": 1, "prefill": MANY}  # of every product of a block; of the head always one
Clock = Callable[[int, int, int], float]  # rows, columns and inputs of a product -> seconds


def kernel_seconds(rows: int, columns: int, inputs: int) -> float:
    """Of a dense matrix `[rows, columns]` in bfloat16 by the compiled kernels, timed once and remembered."""
    weight = torch.ones(rows, columns, dtype=torch.bfloat16)
    return call_seconds(build_format("dense").pack(weight, build_encoding("same")), native.threads(), inputs)


@dataclass(frozen=True)
class Rest:
    """Seconds that no matrix takes: for each block (attention, norms, Python), and once."""

    block: float
    once: float


@dataclass(frozen=True)
class Costs:
    """Seconds per token, seconds of a prompt of `MANY` tokens, and bytes, of any sizes.

    `rests` has the goals of speed that are known.
    """

    layout: Layout
    rests: Mapping[Goal, Rest] = field(default_factory=dict)
    clock: Clock = kernel_seconds

    def __call__(self, sizes: Sizes) -> dict[Goal, float]:
        """Of a shape."""
        found: dict[Goal, float] = {goal: self._seconds(sizes, goal) for goal in self.rests}
        return {**found, "bytes": float(self.layout.bytes(sizes))}

    def _seconds(self, sizes: Sizes, goal: Goal) -> float:
        inside, head = matrix_seconds(self.layout, sizes, INPUTS[goal], self.clock)
        depth = sizes.get(DEPTH, self.layout.depth)
        return depth * (inside + self.rests[goal].block) + head + self.rests[goal].once


def matrix_seconds(layout: Layout, sizes: Sizes, inputs: int, clock: Clock) -> tuple[float, float]:
    """Of the matrices of a block, and of the head for its one input."""
    head = layout.head_matrix(sizes)
    inside = sum(clock(rows, columns, inputs) for rows, columns in layout.matrices(sizes))
    return inside, clock(*head, 1) if head else 0.0


def rest_of(whole: float, half: float | None, depth: int, inside: float, head: float) -> Rest:
    """What the matrices leave of a measured dense model.

    Args:
        whole: seconds of the model.
        half: the same of its first `depth // 2` blocks; None for a single block.
        depth: its blocks.
        inside: seconds of the matrices of one block.
        head: of the head.
    """
    left = max(whole - head - depth * inside, 0.0)
    if half is None:
        return Rest(0.0, left)
    block = (whole - half) / (depth - depth // 2) - inside
    block = min(max(block, 0.0), left / depth)
    return Rest(block, left - depth * block)


def measured_rests(model: Any, layout: Layout, ids: torch.Tensor, clock: Clock) -> dict[Goal, Rest]:
    """Of decoding and of a prompt: the dense model timed on the engine, and with half of its blocks."""
    sizes, depth = dict(layout.wholes), layout.depth
    prompt = prompts(ids, 1, MANY)
    times = [time_dense(model, prompt)]
    if depth > 1:
        times.append(time_dense(cut_model(model, {DEPTH: range(depth // 2)}), prompt))
    found: dict[Goal, Rest] = {}
    for goal, inputs in INPUTS.items():
        taken = [min(one.token if goal == "decode" else one.first_token for one in timed) for timed in times]
        half = taken[1] if depth > 1 else None
        found[goal] = rest_of(taken[0], half, depth, *matrix_seconds(layout, sizes, inputs, clock))
    return found


def priced(axes: Sequence[Axis], layout: Layout, clock: Clock, tell: Callable[[int, int], None]) -> Clock:
    """A clock that has timed every matrix that a combination of sizes has, and is told how it gets on."""
    wanted: dict[tuple[int, int, int], None] = {}
    for sizes in _pairs(axes):
        head = layout.head_matrix(sizes)
        wanted.update({(*shape, inputs): None for shape in layout.matrices(sizes) for inputs in INPUTS.values()})
        wanted.update({(*head, 1): None} if head else {})
    known: dict[tuple[int, int, int], float] = {}
    for done, key in enumerate(wanted, 1):
        known[key] = clock(*key)
        tell(done, len(wanted))
    return lambda rows, columns, inputs: known[rows, columns, inputs]


def _pairs(axes: Sequence[Axis]) -> list[dict[str, int]]:
    """Sizes in which every matrix occurs: a matrix has two lengths, so two axes at a time."""
    wholes = {axis.name: axis.whole for axis in axes}
    return [
        {**wholes, one.name: a, other.name: b} for one in axes for other in axes for a in one.sizes for b in other.sizes
    ]
