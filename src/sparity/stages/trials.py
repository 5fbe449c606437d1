"""What a decision costs, measured: the model with a stage applied to some of its projections, on a few sequences."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparity.calibration.cosine import mean_cosine
from sparity.calibration.evidence import BlockEvidence, no_evidence
from sparity.calibration.mapped import create_tensor
from sparity.errors import NumericalError
from sparity.models import Block, BlockInputs, Decoder
from sparity.products.float32 import float32_products
from sparity.quality.block_error import BLOCK_ERRORS
from sparity.quality.perplexity import exp
from sparity.stages.applied import Applied
from sparity.stages.base import Decision, Stage

CACHE_BYTES = 1 << 30  # of blocks that stay loaded
KEPT_EVERY = 32  # errors of a block between two writes: each is found again in no time


@dataclass(frozen=True)
class Trial:
    """The loss of one decision: KL(as it is || edited) in nats per token, and perplexity, on the same sequences."""

    kl: float
    perplexity: float


class Memory(Protocol):
    """Where trials keep what they found, and files while they work."""

    @property
    def state(self) -> Path:
        """A folder."""

    def remember(self, name: str, value: dict[str, Any]) -> None:
        """Keep a JSON object by its name."""

    def recall(self, name: str) -> dict[str, Any] | None:
        """What `remember` kept, or None."""


class Applies(Protocol):
    """Changes some projections of a block for a while."""

    def on(self, block: Block, changed: Mapping[str, Any]) -> AbstractContextManager[None]:
        """The block, within the context, with what a decision says of its projections."""


class Trials:
    """Measures decisions `{"sparsity": {projection: share}}`, each once: what was measured is kept in the folder.

    What `Applies` something but is no stage says itself what a decision's values mean; those that count as False change
    nothing. `known` gives the evidence of a block of the model as it is; without it nothing is known but the weights.
    A trial starts at the first block that it changes, from that block's own inputs; these and the model's own
    predictions lie in files of the folder.
    """

    def __init__(
        self,
        decoder: Decoder,
        stage: Stage | Applies,
        folder: Memory,
        tokens: Tensor,
        batch: int = 1,
        known: Callable[[Block], BlockEvidence] | None = None,
    ) -> None:
        self._decoder, self._folder = decoder, folder
        self._tokens, self._batch = tokens, batch  # [samples, length]
        self.applied: Applies = Applied(decoder, stage, known or no_evidence) if isinstance(stage, Stage) else stage
        self._known: dict[str, list[float]] = {}
        self._errors: dict[int, dict[str, float]] = {}  # by block, where they were asked for
        blocks = range(len(decoder))
        self._blocks_of = {p.name: i for i in blocks for site in decoder.sites(i) for p in site.projections}
        self._blocks: dict[int, Block] = {}
        self._open = ExitStack()
        self._prepared = False
        remembered = folder.recall("trials")
        if remembered is not None:
            self._known = dict(remembered)

    def __enter__(self) -> "Trials":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def measure(self, decision: Decision, samples: int | None = None) -> Trial:
        """Measure one decision, or recall it; on the first `samples` sequences, or on all.

        Raises:
            NumericalError: the edited model's loss is NaN or infinite.
        """
        changed = _changed(decision)
        count = len(self._tokens) if samples is None else min(samples, len(self._tokens))
        key = _key([count, changed])
        if key not in self._known:
            self._known[key] = list(self._run(changed, count))
            self._folder.remember("trials", self._known)
        kl, loss = self._known[key]
        return Trial(kl, exp(loss))

    def block_error(self, index: int, decision: Decision, error: str = "token") -> float:
        """How far the output of one block moves when its inputs are the model's own, mean over sequences, or recalled.

        `error` is one of `quality.block_error`; what the decision says of other blocks makes no difference.

        Raises:
            NumericalError: it is NaN or infinite.
        """
        changed = {name: share for name, share in _changed(decision).items() if self._blocks_of[name] == index}
        if index not in self._errors:
            self._errors[index] = self._folder.recall(f"trial-errors-{index}") or {}
        known, key = self._errors[index], _key([len(self._tokens), error, changed])
        if key not in known:
            known[key] = self._moved(index, changed, BLOCK_ERRORS[error])
            if len(known) % KEPT_EVERY == 0:
                self._folder.remember(f"trial-errors-{index}", known)
        return known[key]

    def cosines(self) -> list[float]:
        """The mean cosine of each block's inputs and outputs, over all tokens, in the model as it is."""
        if not self._prepared:
            self._prepare()
        return [mean_cosine(before, after) for before, after in pairwise(self._hidden)]

    def _moved(self, index: int, changed: Mapping[str, float], error: Callable[[Tensor, Tensor], float]) -> float:
        if not self._prepared:
            self._prepare()
        dense = self._hidden[index + 1]
        found = torch.empty_like(dense)
        with self._block(index) as block, self.applied.on(block, changed):
            block.run(self._inputs, self._hidden[index], into=found)
        moved = sum(error(*pair) for pair in zip(dense, found, strict=True)) / len(dense)
        if not math.isfinite(moved):
            raise NumericalError("a block gives NaN or infinite outputs; use a wider dtype (float32)")
        return moved

    def _run(self, changed: Mapping[str, float], samples: int) -> tuple[float, float]:
        """KL and mean loss, both in nats per token."""
        if not self._prepared:
            self._prepare()
        decoder = self._decoder
        first = min((self._blocks_of[name] for name in changed), default=len(decoder))
        hidden, inputs = self._hidden[first][:samples].clone(), self._inputs_for(samples)
        for index in range(first, len(decoder)):
            with self._block(index) as block, self.applied.on(block, changed):
                block.run(inputs, hidden, into=hidden)
        divergence = loss = 0.0
        with torch.no_grad():
            for sample, ids in enumerate(self._tokens[:samples]):
                logits = self._logits(sample, hidden)
                q, p = logits.log_softmax(-1), self._own[sample].to(logits.device)
                divergence += float((p.exp() * (p - q)).sum(-1).mean())
                loss += float(cross_entropy(logits, ids[1:].to(logits.device)))
        if not math.isfinite(divergence) or not math.isfinite(loss):
            raise NumericalError("the pruned model gives NaN or infinite losses; use a wider dtype (float32)")
        return divergence / samples, loss / samples

    def _prepare(self) -> None:
        decoder, tokens = self._decoder, self._tokens
        shape = decoder.hidden_shape(tokens)
        state = self._folder.state
        self._hidden = [
            create_tensor(state / f"trial-inputs-{index}.bin", shape, decoder.dtype)
            for index in range(len(decoder) + 1)
        ]
        self._inputs = replace(decoder.inputs(tokens, self._batch, self._hidden[0]), hidden=torch.empty(0))
        for index in range(len(decoder)):
            with self._block(index) as block:
                block.run(self._inputs, self._hidden[index], into=self._hidden[index + 1])
        self._head = decoder.head()
        vocabulary = int(decoder.config.vocab_size)
        self._own = create_tensor(
            state / "trial-log-probabilities.bin", (len(tokens), tokens.shape[1] - 1, vocabulary), torch.float32
        )
        with torch.no_grad():
            for sample in range(len(tokens)):
                self._own[sample] = self._logits(sample, self._hidden[-1]).log_softmax(-1)
        self._prepared = True

    def _inputs_for(self, samples: int) -> BlockInputs:
        """What blocks are given beside hidden states, for a last batch as small as so many samples leave."""
        rest = samples % self._batch
        if rest and rest not in self._inputs.arguments:
            arguments = self._decoder.inputs(self._tokens[:rest], rest).arguments
            self._inputs = replace(self._inputs, arguments={**self._inputs.arguments, **arguments})
        return self._inputs

    def _logits(self, sample: int, hidden: Tensor) -> Tensor:
        """Predictions `[length - 1, vocabulary]` in float32."""
        part = hidden[sample : sample + 1].to(self._decoder.device)
        with float32_products():
            return self._head(self._tokens[sample : sample + 1], part)[0, :-1].float()

    @contextmanager
    def _block(self, index: int) -> Iterator[Block]:
        """The block as it is; all stay in memory when there is room for all."""
        decoder = self._decoder
        inside = sum(projection.weight.numel() for site in decoder.sites(index) for projection in site.projections)
        if inside * decoder.dtype.itemsize * len(decoder) > CACHE_BYTES:
            with decoder.block(index) as block:
                yield block
            return
        if index not in self._blocks:
            self._blocks[index] = self._open.enter_context(decoder.block(index))
        yield self._blocks[index]


def _changed(decision: Decision) -> dict[str, Any]:
    return {name: share for name, share in sorted(decision["sparsity"].items()) if share}


def _key(measured: list[object]) -> str:
    return sha256(json.dumps(measured).encode()).hexdigest()[:24]
