"""A linear map in place of removed blocks (ReplaceMe, Shopkhoev et al. 2025, arXiv:2505.02819; arXiv:2605.15491)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import DEPTH
from sparity.registry import register
from sparity.static.structure.depth import DepthMethod, hidden_states, removed_count, run_of_blocks
from sparity.static.structure.least_squares import least_squares, mlp_outputs
from sparity.static.structure.methods.base import Choice, Restructured
from sparity.static.structure.subject import Subject
from sparity.static.structure.wrapped import Mapped


@register("structure.method", "linear_map")
@dataclass(frozen=True)
class LinearMap(DepthMethod):
    """Remove the run of blocks that turns the stream least, and fit a linear map to what it did, by least squares.

    `into: mlp` multiplies the map into the last MLP projection of the block before: a stock model, no weight more.
    `into: stream` maps the whole stream at the cut: one matrix more, in memory only. `ridge` is that share of the mean
    diagonal, added to the normal equations. A block's score is one minus the cosine over the `run` blocks from it on.
    """

    into: Literal["mlp", "stream"] = "mlp"
    ridge: float = 1e-4
    run: int = 1

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        if not 1 <= self.run < subject.depth:
            raise InvalidInput(f'linear_map, option "run": from 1 to {subject.depth - 1} blocks, not {self.run}')
        return {DEPTH: self._turns(hidden_states(subject), self.run)}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return {DEPTH: self._run(subject, hidden_states(subject), sparsity)[1]}

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """See `Method.restructure`."""
        states = hidden_states(subject)
        first, left = self._run(subject, states, sparsity)
        smaller = cut_model(subject.model, {DEPTH: left})
        count = subject.depth - len(left)
        if count and self.into == "mlp":
            self._into_mlp(subject, smaller, states, first, count)
        elif count:
            self._into_stream(subject, smaller, states, first, count)
        return Restructured(smaller, {DEPTH: left})

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        if self.into == "stream":
            raise InvalidInput(
                "linear_map puts a matrix between blocks, which no stock configuration can say: set `into: mlp` "
                "(sparity.restructure gives the other in memory)"
            )
        return super().sizes(decoder, sparsity)

    def _run(self, subject: Subject, states: list[Tensor], sparsity: float) -> tuple[int, list[int]]:
        """The first block that goes, and those that stay."""
        count = removed_count(subject.depth, sparsity, subject.depth - 1, "linear_map")
        if not count:
            return 0, list(range(subject.depth))
        first = int(self._turns(states, count).argmin())
        return first, run_of_blocks(first, count, subject.depth)

    def _turns(self, states: list[Tensor], count: int) -> Tensor:
        """One minus the cosine over `count` blocks from each on; infinity where there is no place for the map."""
        depth = len(states) - 1
        found = torch.full((depth,), math.inf)
        for index in range(1 if self.into == "mlp" else 0, depth - count + 1):
            cosine = cosine_similarity(states[index].float(), states[index + count].float(), dim=-1)
            found[index] = 1 - float(cosine.mean())
        return found

    def _into_mlp(self, subject: Subject, smaller: nn.Module, states: list[Tensor], first: int, count: int) -> None:
        """With M what the MLP before the cut adds, T: (stream - M) + M T = the stream behind the removed blocks."""
        with subject.decoder.block(first - 1) as block:
            given = mlp_outputs(subject, block, states[first - 1]).double()
            rest = states[first].double() - given
            matrix = least_squares(given, states[first + count].double() - rest, self.ridge)
        changed = blocks_of(smaller, subject.family)[first - 1]
        for projection in changed.projections:
            if projection.role in ("down", "fc2"):
                projection.write(matrix.T @ projection.weight.double())
                bias = getattr(projection.module, "bias", None)
                if bias is not None and projection.expert is None:
                    bias.data.copy_(bias.double() @ matrix)
        inputs, found = subject.decoder.inputs(subject.tokens[:1], 1), torch.empty_like(states[0][:1])
        changed.run(inputs, states[first - 1][:1], into=found)
        expected = rest[:1] + given[:1] @ matrix
        if float((found.double() - expected).norm()) > 0.1 * float(expected.norm()):
            raise InvalidInput(
                f"linear_map: {changed.name} does not add what its MLP gives to the stream as it is (a norm lies "
                "between): set `into: stream`"
            )

    def _into_stream(self, subject: Subject, smaller: Any, states: list[Tensor], first: int, count: int) -> None:
        before, behind = states[first].double(), states[first + count].double()
        added = least_squares(before, behind - before, self.ridge).to(states[0].dtype)
        blocks = smaller.get_submodule(subject.family.blocks)
        place = max(first - 1, 0)
        blocks[place] = Mapped(blocks[place], added, before=first == 0)
