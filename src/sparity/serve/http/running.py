"""The answers of one request while they are worked on, as they come to the thread of its connection."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from sparity.serve.http.errors import Refused
from sparity.serve.sequence import Answer, Order, Piece
from sparity.serve.served_model import ServedModel
from sparity.serve.worker import Worker


class Running:
    """Answers of which pieces come in; to be closed in any case, so that nobody works for a client that left.

    Args:
        orders: of each choice.
        served: the model.
        worker: which computes.
    """

    def __init__(self, orders: Sequence[Order], served: ServedModel, worker: Worker) -> None:
        self._served, self._worker = served, worker
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.answers = [self._answer(index, order) for index, order in enumerate(orders)]
        worker.submit(served.scheduler, self.answers)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The choice and its next piece, until all have ended.

        Raises:
            Refused: a choice ended for want of time, or by a fault.
        """
        going = len(self.answers)
        while going:
            index, piece = await self._pieces.get()
            if piece.finish == "timeout":
                raise Refused(504, piece.message or "no time is left", code="timeout")
            if piece.finish == "error":
                raise Refused(500, piece.message or "the model failed")
            going -= piece.finish is not None
            yield index, piece

    def close(self) -> None:
        """Let go of what is still worked on."""
        self._worker.cancel(self._served.scheduler, self.answers)

    def _answer(self, index: int, order: Order) -> Answer:
        def emit(piece: Piece) -> None:  # in the worker's thread
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        return Answer(order, self._served.tokenizer, self._served.ends, emit)
