"""What a decision costs, measured: the model with a stage applied to some of its projections, on a few sequences."""

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparity.calibration.cosine import mean_cosine
from sparity.calibration.evidence import BlockEvidence, no_evidence
from sparity.calibration.mapped import create_tensor
from sparity.errors import InvalidInput, NumericalError
from sparity.models import Block, Decoder
from sparity.pipeline.run.pass_folder import PassFolder
from sparity.products.float32 import float32_products
from sparity.quality.perplexity import exp
from sparity.stages import BlockStage, Decision, RuntimeStage, Stage

CACHE_BYTES = 1 << 30  # of blocks that stay loaded, and of edited weights that need not be made again


@dataclass(frozen=True)
class Trial:
    """The loss of one decision: KL(as it is || edited) in nats per token, and perplexity, on the same sequences."""

    kl: float
    perplexity: float


class Trials:
    """Measures decisions `{"sparsity": {projection: share}}`, each once: what was measured is kept in the folder.

    `known` gives the evidence of a block of the model as it is; without it nothing is known but the weights. A trial
    starts at the first block that it changes, from that block's own inputs; these and the model's own predictions lie
    in files of the folder.
    """

    def __init__(
        self,
        decoder: Decoder,
        stage: Stage,
        folder: PassFolder,
        tokens: Tensor,
        batch: int = 1,
        known: Callable[[Block], BlockEvidence] | None = None,
    ) -> None:
        self._decoder, self._stage, self._folder = decoder, stage, folder
        self._tokens, self._batch = tokens, batch  # [samples, length]
        self._evidence = known or no_evidence
        self._known: dict[str, list[float]] = {}
        self._edited: OrderedDict[tuple[str, float], Tensor] = OrderedDict()
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

    def measure(self, decision: Decision) -> Trial:
        """Measure one decision, or recall it.

        Raises:
            NumericalError: the edited model's loss is NaN or infinite.
        """
        changed = {name: sparsity for name, sparsity in sorted(decision["sparsity"].items()) if sparsity > 0}
        key = sha256(json.dumps([len(self._tokens), changed]).encode()).hexdigest()[:24]
        if key not in self._known:
            self._known[key] = list(self._run(changed))
            self._folder.remember("trials", self._known)
        kl, loss = self._known[key]
        return Trial(kl, exp(loss))

    def cosines(self) -> list[float]:
        """The mean cosine of each block's inputs and outputs, over all tokens, in the model as it is."""
        if not self._prepared:
            self._prepare()
        return [mean_cosine(before, after) for before, after in pairwise(self._hidden)]

    def _run(self, changed: Mapping[str, float]) -> tuple[float, float]:
        """KL and mean loss, both in nats per token."""
        if not self._prepared:
            self._prepare()
        decoder = self._decoder
        first = min((self._blocks_of[name] for name in changed), default=len(decoder))
        hidden = self._hidden[first].clone()
        for index in range(first, len(decoder)):
            with self._block(index) as block, self._applied(block, changed):
                block.run(self._inputs, hidden, into=hidden)
        divergence = loss = 0.0
        with torch.no_grad():
            for sample, ids in enumerate(self._tokens):
                logits = self._logits(sample, hidden)
                q, p = logits.log_softmax(-1), self._own[sample].to(logits.device)
                divergence += float((p.exp() * (p - q)).sum(-1).mean())
                loss += float(cross_entropy(logits, ids[1:].to(logits.device)))
        if not math.isfinite(divergence) or not math.isfinite(loss):
            raise NumericalError("the pruned model gives NaN or infinite losses; use a wider dtype (float32)")
        return divergence / len(self._tokens), loss / len(self._tokens)

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

    @contextmanager
    def _applied(self, block: Block, changed: Mapping[str, float]) -> Iterator[None]:
        """The stage applied to what is changed in a block, within the context."""
        here = {p.name: changed[p.name] for p in block.projections if p.name in changed}
        if not here:
            yield
        elif isinstance(self._stage, RuntimeStage):
            part = _with_sites_of(block, here)
            fit = self._stage.fit(self._decoder, self._evidence(part), {"sparsity": here})
            with self._stage.attach(block.module, part.sites, fit.tensors):
                yield
        elif isinstance(self._stage, BlockStage):
            with self._edited_weights(self._stage, block, here):
                yield
        else:
            raise InvalidInput(f"{self._stage.name} trains the whole model: its parts cannot be measured one by one")

    @contextmanager
    def _edited_weights(self, stage: BlockStage, block: Block, here: Mapping[str, float]) -> Iterator[None]:
        projections = {p.name: p for p in block.projections if p.name in here}
        before = {name: projection.weight.clone() for name, projection in projections.items()}
        new = {name: sparsity for name, sparsity in here.items() if (name, sparsity) not in self._edited}
        if new:
            stage.edit(self._decoder, self._evidence(_with_sites_of(block, new)), {"sparsity": new})
            made = {name: projections[name].weight.clone() for name in new}
            if any(made[name].shape != before[name].shape for name in new):
                raise InvalidInput(f"{stage.name} changes shapes: its parts cannot be measured one by one")
        for name, projection in projections.items():
            if name not in new:
                projection.write(self._edited[name, here[name]])
        for name in new:
            self._keep(name, here[name], made[name])
        try:
            yield
        finally:
            for name, projection in projections.items():
                projection.write(before[name])

    def _keep(self, name: str, sparsity: float, weight: Tensor) -> None:
        self._edited[name, sparsity] = weight
        while sum(kept.nbytes for kept in self._edited.values()) > CACHE_BYTES and len(self._edited) > 1:
            self._edited.popitem(last=False)


def _with_sites_of(block: Block, names: Collection[str]) -> Block:
    """The block with those input sites only that hold one of the projections: what is known of others is not read."""
    sites = tuple(site for site in block.sites if any(projection.name in names for projection in site.projections))
    return replace(block, sites=sites)
