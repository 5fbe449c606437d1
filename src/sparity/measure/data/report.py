"""The report: plain data that becomes JSON, a table, a page and a model card. `docs/format.md` describes the JSON."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sparity.measure.data import outcome
from sparity.measure.data.plain import plain
from sparity.measure.data.task_comparison import TaskComparison
from sparity.stages.change import Change

FORMAT = 2


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements with the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """One text: perplexity of both models, KL in nats per token, share of equal top-1 predictions."""

    text: str
    window: int
    tokens: int
    dense_perplexity: float
    perplexity: float
    change: float  # of perplexity, relative to dense
    grade: str
    kl: float
    top1: float


@dataclass(frozen=True)
class Pace:
    """Speed of one model: seconds to the first token and tokens per second after it."""

    first_token: Spread
    decode: Spread


@dataclass(frozen=True)
class Baseline:
    """A dense model beside the sparse one; ratios, round by round, are above 1 where sparse is faster."""

    pace: Pace
    decode_ratio: Spread
    first_token_ratio: Spread


@dataclass(frozen=True)
class Speed:
    """Both models timed in turns within one run; ratios, round by round, are above 1 where sparse is faster.

    `dense` runs in transformers, and the ratios are to it. `engine_dense` is the same model on the engine's own dense
    kernels, in the same rounds, where the sparse one runs there too. `decode` counts the tokens of the whole batch.
    """

    prompt: int
    tokens: int
    rounds: int
    dense: Pace
    sparse: Pace
    decode_ratio: Spread
    first_token_ratio: Spread
    batch: int = 1
    engine_dense: Baseline | None = None


@dataclass(frozen=True)
class Effort:
    """What the stages themselves cost: wall time, peak resident memory of the process, calibration tokens."""

    seconds: float
    peak_memory: int
    calibration_tokens: int
    threads: int
    seconds_per_block: tuple[float, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A loss of a stage that trained: in `values` what it was in the steps of `steps`, counted from 1."""

    stage: str
    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """One limit of a recipe's `accept` section and what was reached."""

    limit: str
    reached: str
    passed: bool


@dataclass(frozen=True)
class Candidate:
    """One sparse model beside the dense one.

    Attributes:
        name: what was done, in a few words.
        recipe: what was asked for.
        stages: what each stage did, in a few words.
        target: the share of zeros that was asked for, over the projections that had such a target; None without any.
        sparsity: the share of zeros over the projections that have some or had such a target; 0 without any.
        model_sparsity: the share of zeros over all parameters that are left.
        parameters: how many are left.
        bytes_dense: of the dense model's weight files.
        bytes_sparse: of the weight files now, with the data of run-time stages.
        changes: what every stage did to every projection.
        runtime: the stages whose data is used while the model runs, by name.
        curves: the losses of the stages that trained.
        tasks: beside the dense model, item by item.
    """

    name: str
    recipe: dict[str, Any]
    stages: tuple[str, ...]
    target: float | None
    sparsity: float
    model_sparsity: float
    parameters: int
    bytes_dense: int
    bytes_sparse: int
    changes: tuple[Change, ...]
    effort: Effort
    quality: tuple[Quality, ...] = ()
    speed: Speed | None = None
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    batched: tuple[Speed, ...] = ()  # at the batch sizes after the first
    runtime: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    tasks: tuple[TaskComparison, ...] = ()

    @cached_property
    def totals(self) -> outcome.Totals:
        """What every projection is after all stages, and what that amounts to."""
        return outcome.Totals.of(self.changes)

    @property
    def speeds(self) -> tuple[Speed, ...]:
        """The speed at every batch size that was measured."""
        return (*((self.speed,) if self.speed else ()), *self.batched)


@dataclass(frozen=True)
class LargerModel:
    """Speed alone, of a random model too large for a processor's caches; bytes are those of its weights in memory."""

    parameters: int
    sparsity: float  # of the matrices of its blocks
    bytes_dense: int
    bytes_sparse: int
    speed: Speed | None
    skipped: str | None = None  # why it was not measured


@dataclass(frozen=True)
class Contestant:
    """A model as it is run: its decode speed in tokens/s, its perplexity, and what it answers.

    Attributes:
        weight_bytes: of its weights in memory; 0 where nobody asked.
        kind: dense, sparse or a peer.
        answers: by prompt.
    """

    name: str
    rate: Spread
    perplexity: float
    kind: str
    weight_bytes: int = 0
    answers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """One or more sparse versions of one model, measured in one run on one machine."""

    model: str
    architecture: str
    parameters: int
    blocks: int
    dtype: str
    machine: dict[str, Any]
    candidates: tuple[Candidate, ...]
    larger: LargerModel | None = None  # of `sparity demo`
    contestants: tuple[Contestant, ...] = ()  # of `sparity demo`: timed in turns, after the candidates
    format: int = field(default=FORMAT)

    @property
    def accepted(self) -> bool:
        """Whether every limit of every recipe was kept."""
        return all(verdict.passed for candidate in self.candidates for verdict in candidate.verdicts)

    def left(self, candidate: Candidate) -> float | None:
        """The share of the parameters that a candidate has left; None where no shape changed."""
        return candidate.parameters / self.parameters if candidate.totals.reshaped and self.parameters else None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists; numbers that are not finite become their names as text."""
        content: dict[str, Any] = plain(dataclasses.asdict(self))
        return content
