"""How answers go out: as one JSON object, or as a stream of events; and what happens when the client leaves."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sparity.serve.http.errors import Refused
from sparity.serve.http.running import Running
from sparity.serve.http.shapes import Shape
from sparity.serve.sequence import Piece

QUIET = 15.0  # seconds without a token, after which a comment shows that the stream lives


async def whole(request: Request, running: Running, shape: Shape, prompts: int) -> Response:
    """The answers as one object, once all are there.

    Raises:
        Refused: see `Running.pieces`.
    """
    pieces: list[list[Piece]] = [[] for _ in running.answers]

    async def gather() -> None:
        async for index, piece in running.pieces():
            pieces[index].append(piece)

    try:
        if not await _unless_left(request.receive, gather):
            return Response(status_code=499)  # nobody reads it
    finally:
        running.close()
    return JSONResponse(shape.whole(running.answers, pieces, prompts))


class EventStream(Response):
    """The answers in server-sent events as they come, `[DONE]` last.

    Args:
        running: the answers.
        shape: of the events.
        prompts: of the request.
        with_usage: whether an event tells the usage at the end, and whether every event does.
    """

    def __init__(self, running: Running, shape: Shape, prompts: int, with_usage: tuple[bool, bool]) -> None:
        super().__init__(
            status_code=200,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._running, self._shape, self._prompts, self._with_usage = running, shape, prompts, with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def write() -> None:
            async for event in self._events():
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _unless_left(receive, write)
        finally:
            self._running.close()

    async def _events(self) -> AsyncIterator[str]:
        shape, answers, begun = self._shape, self._running.answers, set[int]()
        last, every = self._with_usage
        pieces, coming = aiter(self._running.pieces()), asyncio.Future[tuple[int, Piece]]()
        try:
            while True:
                coming = asyncio.ensure_future(anext(pieces))
                while not (await asyncio.wait({coming}, timeout=QUIET))[0]:
                    yield ": still at work\n\n"
                index, piece = coming.result()
                first = index not in begun
                begun.add(index)
                found = [*(shape.opening(index) if first else ()), shape.chunk(index, answers[index], piece, first)]
                for event in found:
                    usage = {"usage": shape.closing(answers, self._prompts)["usage"] if every else None}
                    yield _event(event | (usage if last or every else {}))
        except StopAsyncIteration:
            if last:
                yield _event(shape.closing(answers, self._prompts))
        except Refused as refused:
            yield _event(refused.content)
        finally:
            coming.cancel()
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


async def _unless_left(receive: Receive, work: Callable[[], Awaitable[None]]) -> bool:
    """Do some work unless the client leaves meanwhile -> whether it was done."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work()), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        working.cancel()
        leaving.cancel()
