"""Quantize: fewer bits for the weights of the projections; zeros stay zero."""

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.evidence import BlockEvidence, Order
from sparity.calibration.inverse_factor import factor_bytes
from sparity.errors import InvalidInput, NumericalError, suggestion
from sparity.models import Block, Decoder, Projection
from sparity.registry import register
from sparity.sections import Spec, Whole
from sparity.stages import BlockEdit, BlockStage, Change, Decision, Needs
from sparity.stages.allocation import globs_of, left_out, matched, projections
from sparity.stages.base import Estimate, ModelEvidence, Property, Workload
from sparity.static.quantize.methods.base import Quantized, check_group
from sparity.static.quantize.quantizing import Quantizing
from sparity.visible import logger

log = logger(__name__)

FP32 = 4
WORKSPACE = 7  # float32 copies of the largest matrix alive at once
SOLVER_WORKSPACE = 4  # float32 copies of the largest Gram matrix
PER_WEIGHT = 60.0  # operations: finding scales, rounding, reading it
OWN = ("method", "bits", "group", "symmetric", "grid")  # what a projection can have of its own


@register("stage", "quantize")
class Quantize(BlockStage):
    """Fewer bits for the weights of the projections; zeros stay zero.

    The checkpoint holds what the codes stand for, in the model's own type, and opens anywhere; scales and zero points
    lie beside it, in `sparity-scales`. Embeddings, norms, routers and the head stay as they are.
    """

    preserves: ClassVar[frozenset[Property]] = frozenset({"mask", "shapes"})
    records: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    method: Spec = Field("nearest", description="how weights are moved onto the grid")
    bits: Whole | None = Field(None, description="bits of a code; default 4, or what the grid has")
    group: Whole | None = Field(None, ge=1, description="neighbours of a row that share a scale; default: a whole row")
    symmetric: bool | None = Field(None, description="integers around 0, or with a zero point; default symmetric")
    grid: Spec = Field("integers", description="the values that a code can stand for")
    order: Order = Field("sequential", description="statistics after the edited blocks, or of the model before them")
    true_sequential: bool = Field(False, description="also after the edited projections of the same block")
    unseen_expert: Literal["error", "nearest", "dense"] = Field(
        "error", description="how an expert that saw no calibration token is treated"
    )
    dense: list[str] = Field(default_factory=list, description="globs of projections that stay as they are")
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="glob of projections -> its own method, bits, group, symmetric or grid"
    )

    @property
    def quantizing(self) -> Quantizing:
        """Method, grid and group, built anew.

        Raises:
            InvalidInput: unknown names or options, or bits that the grid does not have.
        """
        return Quantizing.of(self.method, self.bits, self.group, self.symmetric, self.grid)

    def of(self, name: str) -> "Quantize":
        """The stage with the options that a projection has of its own; of several globs the last one counts.

        Raises:
            InvalidInput: an option that no projection can have of its own.
        """
        found = {
            key: value for glob, own in self.overrides.items() if fnmatchcase(name, glob) for key, value in own.items()
        }
        return self._with(found) if found else self

    def _with(self, options: Mapping[str, Any]) -> "Quantize":
        for key in options:
            if key not in OWN:
                raise InvalidInput(f"overrides: {key}{suggestion(key, OWN)} (options here: {', '.join(OWN)})")
        return type(self).model_validate({**self.model_dump(exclude={"overrides"}), **options})

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        others = dict.fromkeys(self._with(own).quantizing.words for own in self.overrides.values())
        return "; some ".join((self.quantizing.words, *others))

    @property
    def how(self) -> str:
        """See `Stage.how`."""
        return self.quantizing.method.name

    @property
    def relies_on(self) -> frozenset[Property]:
        """A weight that is changed again is no longer one of its grid's values."""
        return frozenset({"mask", "shapes", "values"})

    @property
    def gram_by_rows(self) -> bool:
        """See `Stage.gram_by_rows`."""
        methods = [each.quantizing.method for each in self._every]
        return all(method.by_rows for method in methods if "gram" in method.needs)

    @property
    def _every(self) -> Sequence["Quantize"]:
        """The stage, and those with the options that some projections have of their own."""
        return self, *(self._with(own) for own in self.overrides.values())

    def needs(self) -> Needs:
        """See `Stage.needs`."""
        statistics = frozenset[str]().union(*(each.quantizing.needs for each in self._every))
        return Needs(statistics=statistics, order=self.order, true_sequential=self.true_sequential)

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """Bits per weight, with scales, zero points and codebooks, of every projection: `{"bits": {projection: bits}}`.

        Raises:
            InvalidInput: a group that does not divide a row, a glob that matches nothing, or options that contradict
                one another.
        """
        if self.true_sequential and self.order == "independent":
            raise InvalidInput(
                "true_sequential needs `order: sequential`: independent statistics see the model before the stage only"
            )
        skipped, bits = left_out(model, self.dense), {}
        for glob in self.overrides:
            matched(model, glob, "overrides")
        for _, projection in projections(model):
            if projection.name not in skipped:
                (rows, columns), own = projection.weight.shape, self.of(projection.name)
                check_group(own.group, columns, projection.name)
                bits[projection.name] = own.quantizing.bits(rows, columns)
        return {"bits": bits}

    @classmethod
    def joined(cls, model: Decoder, each: Mapping[str, Self]) -> Sequence[Self]:
        """See `Stage.joined`: one stage, with what most projections have, and the others' own options."""
        names = [projection.name for _, projection in projections(model)]
        options = {name: stage.model_dump_json(include=set(OWN)) for name, stage in each.items()}
        most = Counter(options.values()).most_common(1)[0][0]
        overrides = {
            glob: next(iter(each[name] for name in members)).model_dump(include=set(OWN))
            for other in dict.fromkeys(options.values())
            if other != most and (members := [name for name, found in options.items() if found == other])
            for glob in globs_of(members, names)
        }
        base = next(each[name] for name, found in options.items() if found == most)
        dense = globs_of([name for name in names if name not in each], names)
        own = {key: value for key, value in (("overrides", overrides), ("dense", dense)) if value}
        return [cls(**{**base.model_dump(exclude_unset=True), **own})]

    def edit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> BlockEdit:
        """See `BlockStage.edit`."""
        changes, extra = list[Change](), dict[str, Tensor]()
        for site, statistics in evidence.sites():
            for projection in site.projections:
                bits, own = decision["bits"].get(projection.name), self.of(projection.name)
                quantizing = own.quantizing
                found = None if bits is None else own._quantized(quantizing, projection, statistics, evidence.masks)
                if found is not None:
                    projection.write(found.weight)
                    extra |= {f"{projection.name}.{name}": part for name, part in recorded(quantizing, found).items()}
                changes.append(
                    Change.of(self.name, projection, evidence.block.index, bits=bits if found is not None else None)
                )
        return BlockEdit(evidence.block, tuple(changes), extra=extra)

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        changes, solving, largest, largest_input, added = list[Change](), 0.0, 0, 0, 0
        for index, projection in projections(model):
            rows, columns = projection.weight.shape
            bits = decision["bits"].get(projection.name)
            changes.append(Change.planned(self.name, projection, index, bits=bits))
            if bits is not None:
                quantizing = self.of(projection.name).quantizing
                largest, largest_input = max(largest, rows * columns), max(largest_input, columns)
                solving += 2.0 * rows * columns**2 * quantizing.method.products
                added += recorded_bytes(quantizing, rows, columns)
        solves = "gram" in self.needs().statistics
        in_copies = largest_input**2 * FP32 * SOLVER_WORKSPACE
        solver = factor_bytes(largest_input, work.in_files) if self.gram_by_rows else in_copies
        return Estimate(
            changes=tuple(changes),
            flops=PER_WEIGHT * sum(change.size for change in changes) + solving,
            memory={
                "solver": solver if solves else 0,
                "codes and scales": largest * FP32 * WORKSPACE,
            },
            runtime_bytes=added,
        )

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """Groups with more values than their codes can tell apart."""
        problems = []
        for projection in block.projections:
            weight, own = projection.weight, self.of(projection.name)
            quantizing = own.quantizing
            most = 2 ** quantizing.method.most_bits(quantizing.grid)
            if projection.name in decision["bits"] and not quantizing.method.scales_inputs:
                width = weight.numel() if quantizing.method.fits_codebook else own.group or weight.shape[1]
                groups = weight.reshape(-1, width).float().sort(1).values
                crowded = int((1 + (groups.diff(dim=1) != 0).sum(1) > most).sum())
                if crowded:
                    what = "matrices" if quantizing.method.fits_codebook else "groups"
                    problems.append(f"{projection.name}: {crowded} {what} have more than {most} values")
        return problems

    def _quantized(
        self, quantizing: Quantizing, projection: Projection, statistics: Statistics, masks: Mapping[str, Tensor]
    ) -> Quantized | None:
        """What becomes of a projection; None where it stays as it is."""
        unseen = projection.expert is not None and bool(quantizing.needs) and not statistics.tokens
        if unseen and self.unseen_expert == "error":
            raise NumericalError(
                f"{projection.name}: no calibration token was routed to this expert; calibrate on more or other text, "
                "or set `unseen_expert: nearest` or `unseen_expert: dense`"
            )
        if unseen:
            log.warning(
                "%s: no calibration token was routed to it; treated by: %s", projection.name, self.unseen_expert
            )
            if self.unseen_expert == "dense":
                return None
            quantizing = Quantizing.of("nearest", self.bits, self.group, self.symmetric, self.grid)
        weight = projection.weight.clone()
        mask = masks.get(projection.name)
        return quantizing.apply(weight, statistics, weight != 0 if mask is None else mask & (weight != 0))


def recorded(quantizing: Quantizing, found: Quantized) -> dict[str, Tensor]:
    """What is kept of a projection beside its weight, by name.

    `scales` and, where integers have zero points, `zeros`, both `[out, groups]`; of methods that scale inputs
    `input_scales` [in]; of methods that mix bits `bits` [groups]; of methods that find the values of a matrix, these
    alone, `codebook` [2^bits], the last again where there are fewer.
    """
    if found.codebook is not None:
        missing = 2**quantizing.grid.bits - len(found.codebook)
        return {"codebook": torch.cat([found.codebook, found.codebook[-1:].expand(missing)])}
    kept = {"scales": found.scales.to(quantizing.grid.stored_scale)}
    if quantizing.grid.zero_bits:
        kept["zeros"] = found.zeros.to(torch.uint8)
    if quantizing.method.scales_inputs:
        columns = found.weight.shape[1]
        kept["input_scales"] = torch.ones(columns) if found.input_scales is None else found.input_scales
    if quantizing.method.mixes_bits:
        grids = found.grids if len(found.grids) > 1 else found.grids * found.scales.shape[1]
        kept["bits"] = torch.tensor([grid.bits for grid in grids], dtype=torch.uint8)
    return kept


def recorded_bytes(quantizing: Quantizing, rows: int, columns: int) -> int:
    """The bytes of that."""
    if quantizing.method.fits_codebook:
        return int(2**quantizing.grid.bits * FP32)
    groups = columns // (quantizing.group or columns)
    each = quantizing.grid.stored_scale.itemsize + bool(quantizing.grid.zero_bits)
    scaled, mixed = quantizing.method.scales_inputs, quantizing.method.mixes_bits
    return rows * groups * each + scaled * columns * FP32 + mixed * groups
