"""A dense model that scores a sample of the sparse model's answers, and takes over when they are too far from it.

An answer is read again by both models, token by token as it was given, and the divergence of the sparse model's
distribution from the dense one's, KL(dense || sparse) in nats per token, is a number of the evidence. The alarm sends
new requests to the dense model. Its answers are scored in the same way, until there is evidence that the sparse model
is near enough again.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.serve.guard.evidence import Above, Below, Evidence
from sparity.serve.sampling import Sampling
from sparity.serve.sequence import Answer, Order
from sparity.serve.served_model import ServedModel
from sparity.visible import logger

log = logger(__name__)
MOST_WAITING = 32  # answers that are to be scored; more are let go
MOST_TOKENS = 256  # of an answer that are scored, its first ones


@dataclass(frozen=True)
class Bounds:
    """When a guard acts.

    Attributes:
        share: of the answers that are scored.
        kl: nats per token that the mean of an answer may be from the dense model.
        alarm: the probability of an alarm, ever, while the mean is within `kl`.
        back: the probability of a return while it is not.
    """

    share: float = 0.02
    kl: float = 0.1
    alarm: float = 0.01
    back: float = 0.01


class Guard:
    """Which of two models answers.

    Args:
        sparse: the model that is guarded.
        dense: the one that it is compared with, of the same name and with the same tokens.
        bounds: when it acts.

    Attributes:
        serving: the model that new requests go to.
        scored: answers so far.
        alarms: and returns, so far.
        total: nats per token, added up over the answers that were scored.
        evidence: the last; an alarm, or a return, is one over its probability.

    Raises:
        InvalidInput: the two models do not have the same tokens, or the dense one takes fewer.
    """

    def __init__(self, sparse: ServedModel, dense: ServedModel, bounds: Bounds) -> None:
        sparse.kind, dense.kind = "sparse", "dense"
        dense.check_stands_in(sparse)
        self.sparse, self.dense, self.bounds = sparse, dense, bounds
        self.serving = sparse
        self.scored = self.alarms = self.returns = 0
        self.total, self.evidence = 0.0, 0.0
        self._test: Evidence = Above(bounds.kl)
        self._draws = random.Random()  # which answers are scored is nobody's to know
        self._waiting: deque[Order] = deque()
        self._busy = False

    def finished(self, answer: Answer) -> None:
        """An answer of either model ended; it may be scored."""
        order = answer.order
        if answer.finish not in ("stop", "length") or not answer.made or order.forced or order.scored:
            return
        if len(self._waiting) < MOST_WAITING and self._draws.random() < self.bounds.share:
            made = tuple(answer.ids[len(order.prompt) :][:MOST_TOKENS])
            self._waiting.append(Order(prompt=order.prompt, sampling=Sampling(), most=0, forced=made))

    def go_on(self) -> bool:
        """Begin to score the next answer, if none is being scored -> whether that was done."""
        if self._busy or not self._waiting:
            return False
        self._busy, order, held = True, self._waiting.popleft(), dict[int, Tensor]()
        divergences: list[float] = []

        def keep(start: int, logits: Tensor) -> None:
            held.update(enumerate(logits.log_softmax(-1), start))

        def compare(start: int, logits: Tensor) -> None:
            for at, row in enumerate(logits.log_softmax(-1), start):
                dense = held.pop(at)
                divergences.append(float((dense.exp() * (dense - row)).nansum()))

        def and_then() -> None:
            self._read(self.sparse, order, compare, lambda: self._score(divergences[: len(order.forced)]))

        self._read(self.dense, order, keep, and_then)
        return True

    def _read(
        self, served: ServedModel, order: Order, observe: Callable[[int, Tensor], object], done: Callable[[], object]
    ) -> None:
        def emit(piece: object) -> None:
            if answer.finish == "length":
                done()
            else:  # it failed: that is no evidence of quality
                self._busy = False

        answer = Answer(order, served.tokenizer, served.ends, emit, observe)
        served.scheduler.submit(answer)

    def _score(self, divergences: list[float]) -> None:
        self._busy = False
        kl = max(float(torch.tensor(divergences).double().mean()), 0.0)
        self.scored += 1
        self.total += kl
        self.evidence = float(self._test.add(kl))
        if isinstance(self._test, Above) and self.evidence >= 1 / self.bounds.alarm:
            self.alarms += 1
            self.serving, self._test = self.dense, Below(self.bounds.kl)
            log.warning(
                "answers are more than %g nats per token from the dense model, which takes over", self.bounds.kl
            )
        elif isinstance(self._test, Below) and self.evidence >= 1 / self.bounds.back:
            self.returns += 1
            self.serving, self._test = self.sparse, Above(self.bounds.kl)
            log.warning("the sparse model is within %g nats per token again, and takes over", self.bounds.kl)
