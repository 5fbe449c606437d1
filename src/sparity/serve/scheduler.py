"""Which answers get a token next: requests join and leave between two steps, and prompts come in chunks.

An answer is a function of its order alone: the execution gives a token the same bits whatever comes with it, the draws
of an answer are its own, and what is reused of other texts is what would have been computed.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable

from sparity.errors import InvalidInput, NumericalError, SparityError
from sparity.serve.execution.base import Execution, Part
from sparity.serve.prefixes import Prefixes
from sparity.serve.sequence import Answer
from sparity.visible import logger

log = logger(__name__)


class Scheduler:
    """Answers on one execution; one thread calls it.

    Args:
        execution: which computes them.
        prefixes: of texts that were read before; None = nothing is reused.
        finished: is called with each answer that ended.

    Attributes:
        waiting: answers without a slot, the first to come first.
        running: answers with one, by slot.
    """

    def __init__(
        self,
        execution: Execution,
        prefixes: Prefixes | None = None,
        finished: Callable[[Answer], object] = lambda answer: None,
    ) -> None:
        self.execution, self.prefixes, self.finished = execution, prefixes, finished
        self.waiting: deque[Answer] = deque()
        self.running: dict[int, Answer] = {}
        self.queried = self.hits = 0  # tokens that were looked for among the prefixes, and found
        self.tokens = 0  # computed by the last step

    def submit(self, answer: Answer) -> None:
        """Let an answer wait for a slot.

        Raises:
            InvalidInput: it does not fit, or has tokens that the model does not know.
        """
        most, context = len(answer.ids) + answer.order.most, self.execution.context
        if most > context or not answer.ids:
            raise InvalidInput(f"{most} tokens with the answer; there is room for {context}, and 1 is needed")
        if not all(0 <= token < self.execution.vocabulary for token in answer.ids):
            raise InvalidInput(f"tokens are numbers from 0 to {self.execution.vocabulary - 1}")
        self.waiting.append(answer)

    def cancel(self, answer: Answer) -> None:
        """Forget an answer that nobody waits for any more; nothing is said."""
        if answer in self.waiting:
            self.waiting.remove(answer)
        elif answer.slot is not None and self.running.get(answer.slot) is answer:
            self._leave(answer)

    def step(self) -> bool:
        """Compute the next tokens -> whether there was anything to do."""
        self._expire()
        self._admit()
        turns = self._turns()
        self.tokens = sum(len(part.ids) for part, _ in turns)
        if not turns:
            return False
        try:
            found = self.execution.run([part for part, _ in turns])
        except (SparityError, RuntimeError, MemoryError, ValueError, IndexError) as error:
            log.error("a step failed, with its %d answers: %s", len(turns), error)
            for _, answer in turns:
                self._end(answer, f"the model failed: {type(error).__name__}")
            return True
        for (part, answer), logits in zip(turns, found, strict=True):
            answer.computed += len(part.ids)
            try:
                if answer.computed == len(answer.order.prompt):
                    self._keep(answer)
                if part.wanted:
                    answer.see(part.start + len(part.ids) - part.wanted, logits)
            except NumericalError as error:
                answer.corrupted = True
                self._end(answer, str(error))
                continue
            if answer.finish is not None:
                self._keep(answer)
                self._leave(answer)
                self.finished(answer)
        return True

    def stop(self, message: str) -> None:
        """End all answers by a fault."""
        for answer in [*self.waiting, *self.running.values()]:
            self._end(answer, message)
        self.waiting.clear()

    def _expire(self) -> None:
        now = time.monotonic()
        for answer in [*self.waiting, *self.running.values()]:
            if answer.order.deadline is not None and answer.order.deadline <= now:
                self.cancel(answer)
                answer.end("timeout", "the time for this request is over")
                self.finished(answer)

    def _admit(self) -> None:
        free = (slot for slot in range(self.execution.slots) if slot not in self.running)
        for slot in list(free):
            if not self.waiting:
                return
            answer = self.waiting.popleft()
            answer.slot, answer.taken = slot, time.monotonic()
            self.running[slot] = answer

    def _turns(self) -> list[tuple[Part, Answer]]:
        """A token of each answer that goes on, and what room is left for the prompts that came first."""
        most = self.execution.most
        going = [answer for answer in self.running.values() if len(answer.ids) - answer.computed == 1]
        reading = [answer for answer in self.running.values() if len(answer.ids) - answer.computed != 1]
        room = None if most is None else most - len(going)
        turns = [self._turn(answer, 1) for answer in going]
        for answer in sorted(reading, key=lambda one: one.taken):
            if room is None:  # whole prompts, one in each step, and what is forced as if it had been chosen
                return [*turns, self._turn(answer, 1 if answer.computed else len(answer.order.prompt))]
            if room <= 0:
                break
            if answer.computed == 0:
                self._restore(answer)
            turns.append(self._turn(answer, min(room, len(answer.ids) - answer.computed)))
            room -= len(turns[-1][0].ids)
        return turns

    def _turn(self, answer: Answer, tokens: int) -> tuple[Part, Answer]:
        start, order = answer.computed, answer.order
        ids = answer.ids[start : start + tokens]
        end = start + len(ids)
        wanted = int(end == len(answer.ids))
        if answer.wanted_from is not None and start < len(order.prompt) + len(order.forced):
            wanted = max(end - max(answer.wanted_from, start), 0)
        assert answer.slot is not None, "it runs"
        return Part(answer.slot, ids, start, len(order.prompt), order.scored, wanted), answer

    def _restore(self, answer: Answer) -> None:
        if self.prefixes is None or answer.slot is None:
            return
        order, wanted_from = answer.order, answer.wanted_from
        most = len(answer.ids) - 1 if wanted_from is None else wanted_from
        most = self.execution.shareable(most, len(order.prompt), order.scored)
        answer.reused = answer.computed = self.prefixes.restore(answer.slot, answer.ids, most)
        self.queried += len(order.prompt)
        self.hits += answer.reused

    def _keep(self, answer: Answer) -> None:
        if self.prefixes is not None and answer.slot is not None:
            order = answer.order
            most = self.execution.shareable(answer.computed, len(order.prompt), order.scored)
            self.prefixes.keep(answer.slot, answer.ids, most)

    def _end(self, answer: Answer, message: str) -> None:
        self._leave(answer)
        answer.end("error", message)
        self.finished(answer)

    def _leave(self, answer: Answer) -> None:
        if answer.slot is not None and self.running.pop(answer.slot, None) is not None:
            self.execution.free(answer.slot)
            answer.slot = None


def run_to_end(scheduler: Scheduler, answers: Iterable[Answer]) -> None:
    """Work on some answers until all have ended."""
    for answer in answers:
        scheduler.submit(answer)
    while scheduler.step():
        pass
