"""Attention: of a prompt's attention, the blocks that a layout chooses are computed while the model runs.

Weights stay; what is saved beside them is how much each head of each block computes.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sparity.calibration.evidence import BlockEvidence
from sparity.checkpoints.runtime_data import AGAIN
from sparity.dynamic.attention.attaching import attached, check_attention
from sparity.dynamic.attention.calibrating import found_shares
from sparity.dynamic.attention.computing import Choice
from sparity.dynamic.attention.functions import layout_of
from sparity.dynamic.cache.learned import KEYS, Sizes
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Block, Decoder, InputSite, Projection
from sparity.registry import register
from sparity.sections import Number, Spec, Whole
from sparity.stages import Change, Decision, Needs, RuntimeStage
from sparity.stages.allocation import projections
from sparity.stages.base import Estimate, ModelEvidence, Property, Workload
from sparity.stages.kinds import RuntimeFit

Size = Annotated[Whole, Field(ge=1)]


@register("stage", "attention_blocks")
class AttentionStage(RuntimeStage):
    """Of a prompt's attention only the blocks that a layout chooses are computed."""

    preserves: ClassVar[frozenset[Property]] = frozenset(  # keys behind a layer are others
        {"mask", "shapes", "values", "experts"}
    )

    layout: Spec = Field("xattention", description="how the blocks are chosen")
    block: Size | list[Size] = Field(64, description="tokens of a block, or [of queries, of keys]")
    shortest: Size = Field(512, description="tokens of a text below which everything is computed")
    error: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None,
        description="how far each head's output may be from the dense one, as a share of it: its share is found on the "
        "calibration text; default: the layout's own share in every head",
    )

    @property
    def relies_on(self) -> frozenset[Property]:
        """What is calibrated holds for these weights; and one layout alone chooses."""
        return super().relies_on | {"prompts"}

    @property
    def choice(self) -> Choice:
        """The layout and the sizes of its blocks, built anew.

        Raises:
            InvalidInput: unknown, or with options that make no sense.
        """
        spec = {self.layout: {}} if isinstance(self.layout, str) else self.layout
        if len(spec) != 1:
            raise InvalidInput("attention_blocks: layout must be one name, or {name: {option: value}}")
        ((name, options),) = spec.items()
        return Choice(*layout_of(name, self.block, options or {}))

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        choice = self.choice
        sides = " x ".join(str(side) for side in sorted({*choice.size}))
        within = "" if self.error is None else f", each head within {100 * self.error:g} %"
        return f"{choice.layout.name}, blocks of {sides} tokens{within}"

    @property
    def how(self) -> str:
        """See `Stage.how`."""
        return self.choice.layout.name

    def needs(self) -> Needs:
        """The calibration text, where shares are found for an error."""
        return Needs(text=self.refines)

    @property
    def refines(self) -> bool:
        """See `RuntimeStage.refines`."""
        return self.error is not None

    def refine(
        self, model: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor], tokens: Tensor
    ) -> Mapping[str, Tensor]:
        """See `RuntimeStage.refine`: with the share of each head that the error asks for."""
        assert self.error is not None, "refines"
        shares = found_shares(model, tokens.long(), self.choice, self.error)
        return {**data, **{f"{name}.share": own for name, own in zip(_keys(sites), shares, strict=True)}}

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """What each head computes before any is calibrated: `{"share": {key projection: share}}`."""
        check_attention(model.skeleton)
        share = self._share
        return {"share": {_keys(model.sites(index))[0]: share for index in range(len(model))}}

    @property
    def _share(self) -> float:
        layout = self.choice.layout
        return float(getattr(layout, layout.share)) if layout.share else 0.0

    def fit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> RuntimeFit:
        """`KEY.share`, float64 `[heads]`; weights stay."""
        name = _keys(evidence.block.sites)[0]
        heads = Sizes.of(model.config).heads
        share = torch.full((heads,), float(decision["share"][name]), dtype=torch.float64)
        changes = (Change.of(self.name, each, evidence.block.index) for each in evidence.block.projections)
        return RuntimeFit({f"{name}.share": share}, tuple(changes))

    def attach(
        self, module: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """See `RuntimeStage.attach`; a block alone has no prompt."""
        if not hasattr(module, "config") or not hasattr(module, "base_model"):
            return nullcontext()
        model: Any = module
        heads = Sizes.of(model.config.get_text_config(decoder=True)).heads
        shares = _shares_of(sites, data, heads)
        choice = self.choice
        return attached(module, Choice(choice.layout, choice.size, tuple(shares)), self.shortest)

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        changes = tuple(Change.planned(self.name, projection, index) for index, projection in projections(model))
        return Estimate(changes=changes, runtime_bytes=8 * Sizes.of(model.config).heads * len(model))

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """Blocks whose recorded share is another than was asked for."""
        name = _keys(block.sites)[0]
        found = decision["share"].get(name)
        return [] if found == self._share else [f"{name}: recorded to compute a share of {found}, not {self._share:g}"]


def _keys(sites: Sequence[InputSite]) -> list[str]:
    """The names of the projections of keys, in the order of their blocks.

    Raises:
        InvalidInput: there is none.
    """
    projections: list[Projection] = [each for site in sites for each in site.projections if each.role in KEYS]
    if not projections:
        raise InvalidInput("attention_blocks: a block has no projection of keys")
    return [each.name for each in projections]


def _shares_of(sites: Sequence[InputSite], data: Mapping[str, Tensor], heads: int) -> list[Tensor]:
    """The shares of each block, in their order.

    Raises:
        CorruptFile: the data does not fit the blocks.
    """
    names = [f"{name}.share" for name in _keys(sites)]
    if sorted(names) != sorted(data):
        odd = sorted(set(names) ^ set(data))[0]
        raise CorruptFile(
            f"attention_blocks: the file {'lacks' if odd in names else 'holds the unknown'} {odd}; {AGAIN}"
        )
    for name, share in data.items():
        fits = share.dtype == torch.float64 and share.shape == (heads,)
        if not fits or not bool(((share >= 0) & (share <= 1)).all()):
            raise CorruptFile(
                f"attention_blocks: {name} is {share.dtype} {share.tolist()}, not {heads} shares; {AGAIN}"
            )
    return [data[name] for name in names]
