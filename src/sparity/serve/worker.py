"""The thread that computes: everything else hands it answers and takes back pieces."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from sparity.errors import InvalidInput
from sparity.serve.scheduler import Scheduler
from sparity.serve.sequence import Answer
from sparity.visible import logger

log = logger(__name__)
CLOSED = "the server is shutting down"


class Worker(threading.Thread):
    """Steps of some schedulers in turns, as long as there is anything to do.

    Args:
        schedulers: which nobody else calls.
        spare: is called between the steps -> whether it gave them something to do.
        stepped: is called after each step with its scheduler.
    """

    def __init__(
        self,
        schedulers: Sequence[Scheduler],
        spare: Callable[[], bool] = lambda: False,
        stepped: Callable[[Scheduler], object] = lambda scheduler: None,
    ) -> None:
        super().__init__(name="sparity-worker", daemon=True)
        self._schedulers, self._spare, self._stepped = schedulers, spare, stepped
        self._inbox: deque[tuple[Callable[[Answer], object], Answer]] = deque()
        self._news, self._open = threading.Condition(), True

    @property
    def held(self) -> int:
        """Answers that wait or are worked on."""
        with self._news:
            inside = sum(len(scheduler.waiting) + len(scheduler.running) for scheduler in self._schedulers)
            return len(self._inbox) + inside

    def submit(self, scheduler: Scheduler, answers: Sequence[Answer]) -> None:
        """Hand over answers, from any thread; they fit (see `Scheduler.submit`)."""
        self._tell(scheduler.submit, answers)

    def cancel(self, scheduler: Scheduler, answers: Sequence[Answer]) -> None:
        """Let go of answers that nobody waits for, from any thread."""
        self._tell(scheduler.cancel, [answer for answer in answers if answer.finish is None])

    def close(self) -> None:
        """End all answers and the thread."""
        with self._news:
            self._open = False
            self._news.notify()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """See the class."""
        while True:
            with self._news:
                while self._inbox:
                    act, answer = self._inbox.popleft()
                    try:
                        act(answer)
                    except InvalidInput as error:
                        answer.end("error", str(error))
                if not self._open:
                    break
            busy = False
            for scheduler in self._schedulers:
                try:
                    if scheduler.step():
                        busy = True
                        self._stepped(scheduler)
                except Exception:  # a fault of ours must not end the server
                    log.exception("a step failed")
                    scheduler.stop("the server failed; its log says why")
            busy = self._spare() or busy
            with self._news:
                if not (busy or self._inbox) and self._open:
                    self._news.wait()
        for scheduler in self._schedulers:
            scheduler.stop(CLOSED)

    def _tell(self, act: Callable[[Answer], object], answers: Sequence[Answer]) -> None:
        with self._news:
            if not self._open:
                for answer in answers:
                    answer.end("error", CLOSED)
                return
            self._inbox.extend((act, answer) for answer in answers)
            self._news.notify()
