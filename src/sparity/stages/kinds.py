"""The kinds of stages: what each does to a model, and with what.

A block stage edits the weights of one block at a time, a model stage trains the whole model, a shape stage makes a
smaller one of it, a run-time stage adds data that is used while the model runs and leaves the weights alone.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from sparity.calibration.evidence import BlockEvidence
from sparity.models import Block, Decoder, InputSite
from sparity.stages.base import Decision, Property, Stage
from sparity.stages.change import Change


@dataclass(frozen=True)
class BlockEdit:
    """What a stage did to one block.

    Attributes:
        block: the block after the edit; its projections are found anew where shapes changed.
        changes: one per projection that the stage had to do with.
        kept: dimension -> the indices of its units that stay, where the stage cut it.
        notes: sentences about what the stage met, which a run logs; trials of edits do not.
        extra: of a stage that `records`, tensors by `PROJECTION.NAME` that are kept beside the weights.
    """

    block: Block
    changes: tuple[Change, ...]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


class BlockStage(Stage):
    """Edits weights with one block in memory."""

    edits_rest: ClassVar[bool] = False  # whether embedding, last norm or head are edited too
    records: ClassVar[bool] = False  # whether tensors about the edit are kept beside the weights
    # whether `edit` goes through `evidence.sites()` once, to the end, and edits each site's projections in place by
    # what it sees there: then several processes may share a block's sites out
    apart: ClassVar[bool] = False

    @abstractmethod
    def edit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> BlockEdit:
        """Edit `evidence.block` in place. Zeros that `evidence.masks` names must stay where the mask is preserved."""

    def edit_rest(self, rest: Mapping[str, Tensor], decision: Decision) -> Mapping[str, Tensor]:
        """The stored tensors outside the blocks, by name."""
        return rest


@dataclass(frozen=True)
class RuntimeFit:
    """What a run-time stage found in one block.

    Attributes:
        tensors: its data, by `SITE.NAME`.
        changes: what will be skipped.
        carried: what the fit of the next block wants to know, which finds it as `BlockEvidence.before`.
    """

    tensors: Mapping[str, Tensor]
    changes: tuple[Change, ...] = ()
    carried: Mapping[str, Tensor] = field(default_factory=dict)


class RuntimeStage(Stage):
    """Adds data that is used while the model runs; weights stay as they are."""

    preserves: ClassVar[frozenset[Property]] = frozenset({"mask", "shapes", "values", "tokens", "prompts", "experts"})

    @property
    def relies_on(self) -> frozenset[Property]:
        """What was fitted to the weights holds for these weights only."""
        return frozenset({"mask", "shapes", "values"})

    @abstractmethod
    def fit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> RuntimeFit:
        """The data of one block; tensors called `NAME.PART` rest on the share of NAME alone."""

    def zeroes(self, module: nn.Module, sites: Sequence[InputSite]) -> frozenset[str]:
        """Which activations of MLPs it sets to zero: `gate_output`, `hidden`, or `neurons` before they are computed.

        Also `experts`, of which it skips some. One that names any can be attached to a single block.
        """
        return frozenset()

    @property
    def refines(self) -> bool:
        """Whether the data is gone over once more with the whole model, by `refine`; its `needs` name trials then."""
        return False

    def refine(
        self, model: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor], tokens: Tensor
    ) -> Mapping[str, Tensor]:
        """The data of all blocks, gone over with the whole model in memory; the same bits each time.

        Args:
            model: a transformers model, which is left as it was.
            sites: its input sites.
            data: what `fit` gave for its blocks.
            tokens: calibration tokens `[samples, length]`.
        """
        return data

    @abstractmethod
    def attach(
        self, module: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Let a model use the data, until the context closes: then it is what it was, bit for bit.

        Args:
            module: a loaded transformers model, or one of its blocks.
            sites: its input sites.
            data: what `fit` gave for its blocks.

        Raises:
            CorruptFile: the data does not fit the sites.
        """


class Workspace(Protocol):
    """Where a model stage keeps its checkpoints, and what it may look at beside the model.

    Attributes:
        folder: where large files may lie until the training is over.
        blocks: which of the dense model's blocks each block of the model was.
    """

    folder: Path
    blocks: Sequence[int]

    def dense(self) -> nn.Module:
        """The dense model that the run began with, which nobody else holds."""

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the last checkpoint."""

    def last(self) -> tuple[int, dict[str, Tensor]] | None:
        """The step and tensors of the last checkpoint, or None."""

    def progress(self, done: int, total: int) -> None:
        """Say how far the training is."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves beside the weights.

    Attributes:
        curves: name -> step, from 1 -> loss.
        notes: sentences for the report, which a run also logs.
        found: what joins the decision, as JSON.
        runtime: tensors by `SITE.NAME` that are used while the model runs; the stage has an `attach` then.
    """

    curves: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    found: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


class ModelStage(Stage):
    """Trains the whole model, in steps."""

    keeps_zeros: ClassVar[bool] = False  # whether zeros stay that no stage of the recipe has made

    def config_changes(self, model: Decoder) -> Mapping[str, Any]:
        """The attributes of the configuration that the training changes, with their new values."""
        return {}

    @abstractmethod
    def train(self, model: nn.Module, masks: Mapping[str, Tensor], tokens: Tensor, work: Workspace) -> Trained | None:
        """Change the model's weights in place; what it leaves beside them, if anything.

        Args:
            model: a transformers model with gradients switched on.
            masks: projection -> bool `[out, in]`, True where a weight may be other than zero.
            tokens: calibration tokens `[samples, length]`.
            work: keeps what a killed training needs to go on; the result must be the same bit for bit.
        """


@dataclass(frozen=True)
class Reshaped:
    """A model of another shape, and which units are left in it: dimension -> indices per block, or of the model."""

    model: nn.Module
    kept: Mapping[str, Any]


class ShapeStage(Stage):
    """Makes another model of the whole one, in memory: fewer blocks, a smaller hidden size, fewer experts."""

    @abstractmethod
    def after(self, model: Decoder, decision: Decision) -> Decoder:
        """See `Stage.after`."""

    @abstractmethod
    def reshape(self, model: nn.Module, tokens: Tensor | None, decision: Decision) -> Reshaped:
        """The smaller model, whose shapes are those of `after`; `model` is not changed.

        Args:
            model: a transformers model.
            tokens: calibration tokens `[samples, length]`.
            decision: what was decided.
        """
