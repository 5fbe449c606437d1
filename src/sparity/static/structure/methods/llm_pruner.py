"""LLM-Pruner: parts by what the loss would change without their weights (Ma et al. 2023, arXiv:2305.11627)."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparity.calibration.gradients import check_length, gather_gradients, gradient_file, read_gradients
from sparity.errors import InvalidInput
from sparity.models import Block, Decoder
from sparity.models.dimensions import Dimension
from sparity.registry import register
from sparity.static.structure.methods.base import Choice, Method
from sparity.static.structure.subject import Subject
from sparity.static.structure.taylor_groups import folded, join
from sparity.static.structure.units import largest, rows_of, stacked

ORDER = {role: place for place, role in enumerate(("k", "gate", "fc1", "qkv", "q", "up", "v", "o", "down", "fc2"))}
NEEDS = frozenset({"gradient", "gradient_square"})


@register("structure.method", "llm_pruner")
@dataclass(frozen=True)
class LLMPruner(Method):
    """Score a group of coupled rows and columns by the Taylor expansion of the loss around their weights.

    Groups are MLP channels and heads, each a connected component of the dependencies between projections. `taylor` says
    how a tensor's part counts: the sum of |w g| (`param_first`), of |w H w| (`param_second`), of |w g - w H w / 2|
    (`param_mix`), or |sum of w g| (`vectorize`); `grouping` how the tensors of a group are joined.
    """

    taylor: Literal["param_first", "param_second", "param_mix", "vectorize"] = "param_first"
    grouping: Literal["sum", "mean", "max", "prod", "first", "second"] = "sum"
    keep_first: int | None = None
    keep_last: int | None = None
    reference: bool = False

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        check_length(subject.tokens)
        found: dict[str, list[Tensor | None]] = {}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            gather_gradients(subject.decoder, subject.tokens, sorted(NEEDS), folder)
            for block in subject.blocks():
                gradients = read_gradients(gradient_file(folder, block.index), block, NEEDS)
                for dimension in subject.family.dimensions(block.module, block.name, subject.config):
                    score = self._of(dimension, block, gradients)
                    found.setdefault(dimension.name, [None] * subject.depth)[block.index] = score
        return {dimension: stacked(rows) for dimension, rows in found.items()}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        first, last = self._spared(subject.depth)
        kept: Choice = {}
        for name, scores in self.scores(subject).items():
            rows = rows_of(scores)
            left = [
                {each.name: _left(each, sparsity) for each in subject.decoder.dimensions(i)} for i in range(len(rows))
            ]
            kept[name] = [
                largest(row, left[index][name]).tolist()
                if row is not None and first <= index < subject.depth - last
                else None
                for index, row in enumerate(rows)
            ]
        return kept

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        if any(self._spared(len(decoder))):
            raise InvalidInput(
                "llm_pruner spares the first and last blocks, so that blocks differ, which no stock configuration can "
                "say: set `keep_first: 0` and `keep_last: 0`, or `shapes: ragged` of the stage"
            )
        return {each.name: _left(each, sparsity) for each in decoder.dimensions(0)}

    def sizes_on_average(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes_on_average`."""
        return replace(self, keep_first=0, keep_last=0).sizes(decoder, sparsity)

    def _spared(self, depth: int) -> tuple[int, int]:
        """How many blocks at either end stay whole: of 32 the first 4 and the last 2."""
        first = round(depth / 8) if self.keep_first is None else self.keep_first
        last = round(depth / 16) if self.keep_last is None else self.keep_last
        if first < 0 or last < 0 or first + last > depth:
            raise InvalidInput(f"llm_pruner cannot spare {first} and {last} of {depth} blocks")
        return first, last

    def _of(self, dimension: Dimension, block: Block, gradients: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The score of each unit of one dimension."""
        projections = {projection.name: projection for projection in block.projections}
        cuts = sorted(dimension.cuts, key=lambda cut: ORDER[projections[cut.projection].role])
        lines = []  # of each tensor the importance of its rows or columns
        for cut in cuts:
            known = gradients[cut.projection]
            salience = self._salience(projections[cut.projection].weight.float(), known)
            axis = 1 if cut.axis == "rows" else 0
            line = salience.sum(axis).abs() if self.taylor == "vectorize" else salience.abs().sum(axis)
            lines.append(line.cpu())
        narrow = min(len(line) for line in lines)
        stack = torch.stack([folded(line, narrow, dimension, self.reference) for line in lines])
        joined = join(stack, self.grouping)
        return joined.view(dimension.size, -1).sum(1)

    def _salience(self, weight: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        first = weight * known["gradient"]
        second = weight * known["gradient_square"] * weight
        if self.taylor == "param_second":
            return second
        return first - 0.5 * second if self.taylor == "param_mix" else first


def _left(dimension: Dimension, sparsity: float) -> int:
    """How many units stay, as the code counts: `int(rows * (1 - sparsity))` rows would, and no head goes in part."""
    width = min(cut.width for cut in dimension.cuts)
    rows = dimension.size * width
    return max(dimension.size - (rows - int(rows * (1 - sparsity))) // width, 1)
