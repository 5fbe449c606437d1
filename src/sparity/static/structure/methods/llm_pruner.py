"""LLM-Pruner: parts by what the loss would change without their weights (Ma et al. 2023, arXiv:2305.11627)."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparity.calibration.gradients import check_length, gather_gradients, gradient_file, read_gradients
from sparity.models import Block
from sparity.models.dimensions import Dimension
from sparity.registry import register
from sparity.static.structure.methods.base import Choice
from sparity.static.structure.subject import Subject
from sparity.static.structure.taylor_groups import folded, join
from sparity.static.structure.units import largest, rows_of, stacked
from sparity.static.structure.whole_ends import WholeEnds

ORDER = {role: place for place, role in enumerate(("k", "gate", "fc1", "qkv", "q", "up", "v", "o", "down", "fc2"))}
NEEDS = frozenset({"gradient", "gradient_square"})


@register("structure.method", "llm_pruner")
@dataclass(frozen=True)
class LLMPruner(WholeEnds):
    """Score a group of coupled rows and columns by the Taylor expansion of the loss around their weights.

    Groups are MLP channels and heads, each a connected component of the dependencies between projections. `taylor` says
    how a tensor's part counts: the sum of |w g| (`param_first`), of |w H w| (`param_second`), of |w g - w H w / 2|
    (`param_mix`), or |sum of w g| (`vectorize`); `grouping` how the tensors of a group are joined.
    """

    taylor: Literal["param_first", "param_second", "param_mix", "vectorize"] = "param_first"
    grouping: Literal["sum", "mean", "max", "prod", "first", "second"] = "sum"
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
        cut = self.cut_blocks(subject.depth)
        kept: Choice = {}
        for name, scores in self.scores(subject).items():
            rows = rows_of(scores)
            left = [
                {each.name: self.left(each, sparsity) for each in subject.decoder.dimensions(i)}
                for i in range(len(rows))
            ]
            kept[name] = [
                largest(row, left[index][name]).tolist() if row is not None and index in cut else None
                for index, row in enumerate(rows)
            ]
        return kept

    def usual(self, depth: int) -> tuple[int, int]:
        """See `WholeEnds.usual`: of 32 blocks the first 4 and the last 2."""
        return round(depth / 8), round(depth / 16)

    def left(self, dimension: Dimension, sparsity: float) -> int:
        """See `WholeEnds.left`: as the code counts, `int(rows * (1 - sparsity))` rows would; no head goes in part."""
        width = min(cut.width for cut in dimension.cuts)
        rows = dimension.size * width
        return max(dimension.size - (rows - int(rows * (1 - sparsity))) // width, 1)

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
