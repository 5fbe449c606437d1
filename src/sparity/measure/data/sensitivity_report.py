"""What sparsity costs in each part of a model: the data of `sensitivity.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparity.measure.data.plain import plain

FORMAT = 1


@dataclass(frozen=True)
class Sensitivity:
    """One part made sparse alone, to one sparsity; the shares are of the whole model's parameters and FLOPs."""

    part: str  # layer, attention or mlp
    name: str
    block: int | None  # None: all blocks
    role: str
    projections: tuple[str, ...]
    parameters: float
    flops: float
    sparsity: float
    kl: float  # nats per token
    perplexity: float
    change: float  # of perplexity, relative to dense


@dataclass(frozen=True)
class BlockFacts:
    """A block of the dense model: the mean cosine of its inputs and outputs, and the tokens that each expert saw."""

    block: int
    cosine: float
    expert_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SensitivityReport:
    """All measurements, on one text."""

    model: str
    architecture: str
    method: str
    ratios: tuple[float, ...]
    text: str
    tokens: int
    dense_perplexity: float
    rows: tuple[Sensitivity, ...]
    blocks: tuple[BlockFacts, ...]
    recipe: Mapping[str, Any]
    machine: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of `sensitivity.json`."""
        content: dict[str, Any] = plain({"format": FORMAT, **dataclasses.asdict(self)})
        return content

    def of(self, part: str, sparsity: float | None = None) -> list[Sensitivity]:
        """The rows of one kind of part, at one sparsity or at all."""
        return [row for row in self.rows if row.part == part and sparsity in (None, row.sparsity)]
