"""What sparsity costs, measured: the dense model with some of its projections pruned, on a few sequences."""

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparity.calibration import Statistics
from sparity.calibration.cosine import mean_cosine
from sparity.calibration.mapped import create_tensor
from sparity.calibration.store import StatisticsStore
from sparity.errors import NumericalError
from sparity.models import Block, InputSite
from sparity.models.block import Projection
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.passes import pruned_weight
from sparity.pipeline.run.run_folder import RunFolder
from sparity.quality.perplexity import exp

CACHE_BYTES = 1 << 30  # of blocks that stay loaded, and of pruned weights that need not be pruned again


@dataclass(frozen=True)
class Trial:
    """The loss of one allocation: KL(dense || pruned) in nats per token, and perplexity, both on the same sequences."""

    kl: float
    perplexity: float


class Trials:
    """Measures allocations, each once: what was measured is kept in the run's folder.

    The statistics are those of the dense model. A trial starts at the first block that it changes, from that block's
    dense inputs; these and the dense logits lie in files of the folder.
    """

    def __init__(self, job: Job, folder: RunFolder, store: StatisticsStore | None, tokens: Tensor) -> None:
        self._job, self._folder, self._store = job, folder, store
        self._tokens = tokens  # [samples, length]
        self._known: dict[str, list[float]] = {}
        self._pruned: OrderedDict[tuple[str, float], Tensor] = OrderedDict()
        blocks = range(len(job.decoder))
        self._blocks_of = {p.name: i for i in blocks for site in job.decoder.sites(i) for p in site.projections}
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

    def kl(self, shares: Mapping[str, float]) -> float:
        """The KL divergence of one allocation: projection -> fraction to remove; others stay dense."""
        return self.measure(shares).kl

    def measure(self, shares: Mapping[str, float]) -> Trial:
        """Measure one allocation, or recall it.

        Raises:
            NumericalError: the pruned model's loss is NaN or infinite.
        """
        changed = {name: share for name, share in sorted(shares.items()) if share > 0}
        key = sha256(json.dumps([len(self._tokens), changed]).encode()).hexdigest()[:24]
        if key not in self._known:
            trial = self._run(changed)
            self._known[key] = list(trial)
            self._folder.remember("trials", self._known)
        kl, loss = self._known[key]
        return Trial(kl, exp(loss))

    def cosines(self) -> list[float]:
        """The mean cosine of each dense block's inputs and outputs, over all tokens."""
        if not self._prepared:
            self._prepare()
        return [mean_cosine(before, behind) for before, behind in pairwise(self._hidden)]

    def _run(self, changed: Mapping[str, float]) -> tuple[float, float]:
        """KL and mean loss, both in nats per token."""
        if not self._prepared:
            self._prepare()
        decoder = self._job.decoder
        first = min((self._blocks_of[name] for name in changed), default=len(decoder))
        hidden = self._hidden[first].clone()
        for index in range(first, len(decoder)):
            with self._block(index) as block:
                dense = self._prune(block, changed)
                block.run(self._inputs, hidden, into=hidden)
                for projection, weight in dense:
                    projection.write(weight)
        divergence = loss = 0.0
        with torch.no_grad():
            for sample, ids in enumerate(self._tokens):
                logits = self._logits(sample, hidden)
                q, p = logits.log_softmax(-1), self._dense[sample].to(logits.device)
                divergence += float((p.exp() * (p - q)).sum(-1).mean())
                loss += float(cross_entropy(logits, ids[1:].to(logits.device)))
        if not math.isfinite(divergence) or not math.isfinite(loss):
            raise NumericalError("the pruned model gives NaN or infinite losses; use a wider dtype (float32)")
        return divergence / len(self._tokens), loss / len(self._tokens)

    def _prepare(self) -> None:
        decoder, tokens = self._job.decoder, self._tokens
        batch = self._job.recipe.calibration.batch if self._job.recipe.calibration else 1
        shape = decoder.hidden_shape(tokens)
        state = self._folder.state
        self._hidden = [
            create_tensor(state / f"trial-inputs-{index}.bin", shape, decoder.dtype)
            for index in range(len(decoder) + 1)
        ]
        self._inputs = replace(decoder.inputs(tokens, batch, self._hidden[0]), hidden=torch.empty(0))
        for index in range(len(decoder)):
            with self._block(index) as block:
                block.run(self._inputs, self._hidden[index], into=self._hidden[index + 1])
        self._head = decoder.head()
        vocabulary = int(decoder.config.vocab_size)
        self._dense = create_tensor(
            state / "trial-log-probabilities.bin", (len(tokens), tokens.shape[1] - 1, vocabulary), torch.float32
        )
        with torch.no_grad():
            for sample in range(len(tokens)):
                self._dense[sample] = self._logits(sample, self._hidden[-1]).log_softmax(-1)
        self._prepared = True

    def _logits(self, sample: int, hidden: Tensor) -> Tensor:
        """Predictions `[length - 1, vocabulary]` in float32."""
        part = hidden[sample : sample + 1].to(self._job.decoder.device)
        return self._head(self._tokens[sample : sample + 1], part)[0, :-1].float()

    @contextmanager
    def _block(self, index: int) -> Iterator[Block]:
        """The dense block; all stay in memory when there is room for all."""
        decoder = self._job.decoder
        inside = sum(projection.weight.numel() for site in decoder.sites(index) for projection in site.projections)
        if inside * decoder.dtype.itemsize * len(decoder) > CACHE_BYTES:
            with decoder.block(index) as block:
                yield block
            return
        if index not in self._blocks:
            self._blocks[index] = self._open.enter_context(decoder.block(index))
        yield self._blocks[index]

    def _prune(self, block: Block, changed: Mapping[str, float]) -> list[tuple[Projection, Tensor]]:
        """Prune what is changed in a block; the projections with their dense weights."""
        dense = []
        for site in block.sites:
            statistics: Statistics | None = None
            for projection in site.projections:
                share = changed.get(projection.name, 0.0)
                if not share:
                    continue
                found = self._pruned.get((projection.name, share))
                if found is None:
                    statistics = statistics or self._statistics(block, site)
                    known = statistics.with_gradients(self._gradients(block).get(projection.name, {}))
                    found = pruned_weight(self._job, projection.name, projection.weight.clone(), known, share)
                    self._keep(projection.name, share, found)
                dense.append((projection, projection.weight.clone()))
                projection.write(found)
        return dense

    def _statistics(self, block: Block, site: InputSite) -> Statistics:
        if self._store is None:
            return Statistics.gather(site.name, ())
        return self._store.read(block, site)

    def _gradients(self, block: Block) -> Mapping[str, Mapping[str, Tensor]]:
        wanted = self._job.gradients | self._job.regional
        return self._store.gradients(block, wanted) if wanted and self._store is not None else {}

    def _keep(self, name: str, share: float, weight: Tensor) -> None:
        self._pruned[name, share] = weight
        while sum(kept.nbytes for kept in self._pruned.values()) > CACHE_BYTES and len(self._pruned) > 1:
            self._pruned.popitem(last=False)
