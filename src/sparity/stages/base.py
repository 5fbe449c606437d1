"""What a stage is: an item `{name: options}` of a recipe's `stages`.

`kinds` has what each kind of stage does to a model. Nothing outside a stage's own file asks which stage it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self

from sparity.calibration.evidence import BlockEvidence, Order
from sparity.errors import InvalidInput
from sparity.models import Block, Decoder
from sparity.sections import Section
from sparity.stages.change import Change

# zeros stay zero; every projection keeps its shape; weights stay; the cache keeps the tokens that it keeps, prompts are
# computed by the blocks that they are, and tokens visit the experts that they do
Property = Literal["mask", "shapes", "values", "tokens", "prompts", "experts"]
Decision = dict[str, Any]  # JSON: budgets, kept indices, thresholds


@dataclass(frozen=True)
class Needs:
    """What a stage reads.

    Attributes:
        statistics: of each block's inputs, gathered when the block is reached.
        gradients: of the loss, of the model that the stage's pass opens.
        decision: statistics of that whole model, read before anything is decided.
        repeated: whether those are read more than once, so that they are kept on disk.
        trials: on how many calibration sequences deciding measures how the model does with some decision; 0 is none.
        text: whether the calibration tokens themselves are read.
        sequences: whether blocks are run on single calibration sequences, beside the passes that gather statistics.
        order: whether `statistics` see the edits to the blocks before (sequential) or not (independent).
        true_sequential: whether they also see the edits to earlier projections of the same block.
    """

    statistics: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    decision: frozenset[str] = frozenset()
    repeated: bool = False
    trials: int = 0
    text: bool = False
    sequences: bool = False
    order: Order = "sequential"
    true_sequential: bool = False

    @property
    def calibration(self) -> bool:
        """Whether any calibration tokens are needed."""
        return bool(self.statistics or self.gradients or self.decision or self.trials or self.text or self.sequences)

    @property
    def opened_model(self) -> bool:
        """Whether something is read of the model as the pass opens it: then no edit may come before in the pass."""
        independent = self.order == "independent" and bool(self.statistics)
        return bool(self.gradients or self.decision or self.trials or independent)


@dataclass(frozen=True)
class Workload:
    """How much calibration there is: `samples` sequences of `length` tokens, `batch` at a time.

    With `in_files` Gram matrices and their factors lie in files.
    """

    samples: int
    length: int
    batch: int = 1
    in_files: bool = False

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.samples * self.length


@dataclass(frozen=True)
class Estimate:
    """What a stage will take and leave, predicted from shapes.

    Attributes:
        changes: one per projection, with the target in place of what will be realised.
        flops: multiplications and additions of the stage's own work, forward passes not counted.
        memory: bytes at once, by what takes them.
        disk: bytes in the run's folder while it works, by what takes them.
        runtime_bytes: of the data that the stage adds beside the weights.
    """

    changes: tuple[Change, ...] = ()
    flops: float = 0.0
    memory: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)
    runtime_bytes: int = 0


class ModelEvidence(Protocol):
    """What is known of the whole model that a pass opens, for decisions."""

    def blocks(self) -> Iterator[BlockEvidence]:
        """Every block with the statistics that the stage's `needs.decision` names; may be called again."""

    def trial(self, decision: Decision, samples: int | None = None) -> float:
        """KL to the model as it is, in nats per token, when the stage is applied with a decision.

        Measured on the first `samples` of the `needs.trials` calibration sequences, or on all of them.
        """

    def block_error(self, block: int, decision: Decision, error: str = "token") -> float:
        """How far the output of one block moves on the inputs it has in the model as it is.

        `error` is one of `quality.block_error`; what is decided for other blocks makes no difference.
        """


class Stage(Section, ABC):
    """One step of a recipe; its fields are the step's options."""

    name: ClassVar[str]
    preserves: ClassVar[frozenset[Property]] = frozenset()
    rewrites: ClassVar[bool] = (
        False  # matrices are not the dense model's any more: others for the same outputs, or added to
    )

    @property
    def compares(self) -> bool:
        """Whether matrices are held against those of the model that the recipe begins with."""
        return False

    @property
    def gram_by_rows(self) -> bool:
        """Whether all that it reads of a Gram matrix is its factor's rows, in order: both may lie in files then."""
        return False

    @property
    def relies_on(self) -> frozenset[Property]:
        """What later stages must preserve for this one's result to stay what it is."""
        return frozenset()

    @property
    @abstractmethod
    def words(self) -> str:
        """What the stage does in a few words, such as "wanda, 50 %, unstructured"."""

    @property
    def how(self) -> str:
        """How it chooses, without how much, such as "wanda + sparsegpt"."""
        return self.name

    @property
    def zeros_lie(self) -> str | None:
        """In words, the pattern of the zeros that the stage makes; None where it makes none."""
        return None

    @property
    def only_sparsity(self) -> float | None:
        """The only share that the stage can remove from a projection, or None when it can remove any."""
        return None

    @abstractmethod
    def needs(self) -> Needs:
        """What the stage reads."""

    def reads(self) -> Mapping[str, str]:
        """Option -> file that it names beside the model and the text; a run with another content is another run."""
        return {}

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """What is settled once per run, before the first block.

        Without evidence, which is only there once work has begun, it is a draft: targets stand in for what is not known
        yet, and whatever can be refused is.

        Raises:
            InvalidInput: the stage does not fit the model.
        """
        return {}

    @classmethod
    def joined(cls, model: Decoder, each: Mapping[str, Self]) -> Sequence[Self]:
        """As few stages as possible that do to every projection of `each` what its own stage would, and nothing else.

        Raises:
            InvalidInput: the stage cannot be given to some projections alone.
        """
        raise InvalidInput(f"{cls.name} cannot be given to some projections alone: leave it out of the choices")

    def sizes(self, model: Decoder, decision: Decision) -> Sequence[Mapping[str, int]]:
        """Of each block the dimensions that the stage changes with their new sizes."""
        return [{} for _ in range(len(model))]

    def after(self, model: Decoder, decision: Decision) -> Decoder:
        """The model that the stage leaves, in shapes only where they change."""
        return model.resized(self.sizes(model, decision))

    @property
    def ragged(self) -> bool:
        """Whether blocks may get sizes of their own, which `after` then knows on average."""
        return False

    @abstractmethod
    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """Predict the stage's work and result from shapes; no weight is read."""

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """What is wrong with a block of a finished model, in sentences that begin with the projection's name."""
        return []
