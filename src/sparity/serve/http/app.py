"""The routes of the server."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sparity import __version__
from sparity.errors import InvalidInput
from sparity.serve.http.body import fields_of
from sparity.serve.http.errors import Refused
from sparity.serve.http.fields import ChatFields, CompletionFields, DetokenizeFields, TokenizeFields
from sparity.serve.http.orders import Prompt, chat_prompt, completion_prompts, orders_of
from sparity.serve.http.replies import EventStream, whole
from sparity.serve.http.running import Running
from sparity.serve.http.shapes import ChatShape, Shape
from sparity.serve.served_model import ServedModel
from sparity.serve.service import Service
from sparity.visible import logger

log = logger(__name__)
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        body: bytes of a request.
        waiting: answers that may wait for a slot; a request beyond them is refused.
        seconds: within which a request must be answered.
        choices: answers that one request may ask for.
        key: that clients must show, as `Authorization: Bearer KEY`; None = anybody may ask.
    """

    body: int = 1_000_000
    waiting: int = 256
    seconds: float = 600.0
    choices: int = 128
    key: str | None = None


def create_app(service: Service, limits: Limits = Limits()) -> Starlette:  # frozen
    """The server's application; it starts the service and stops it."""
    api = Api(service, limits)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    def route(path: str, handler: Handler, method: str = "GET", open_to_all: bool = False) -> Route:
        async def answered(request: Request) -> Response:
            try:
                if not open_to_all:
                    api.check_key(request)
                return await handler(request)
            except Refused as refused:
                return refused.response

        return Route(path, answered, methods=[method])

    return Starlette(
        routes=[
            route("/v1/completions", api.completions, "POST"),
            route("/v1/chat/completions", api.chat, "POST"),
            route("/v1/models", api.models),
            route("/v1/models/{name:path}", api.model),
            route("/tokenize", api.tokenize, "POST"),
            route("/detokenize", api.detokenize, "POST"),
            route("/metrics", api.metrics),
            route("/version", api.version),
            route("/health", api.health, open_to_all=True),
        ],
        exception_handlers={HTTPException: _no_route, Exception: _fault},
        lifespan=lifespan,
    )


class Api:
    """What each route does."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self._service, self._limits = service, limits

    def check_key(self, request: Request) -> None:
        """Refuse who does not have the key."""
        wanted = self._limits.key
        shown = request.headers.get("authorization", "").encode("utf-8", "replace")
        if wanted is not None and not hmac.compare_digest(shown, f"Bearer {wanted}".encode()):
            raise Refused(401, "this server asks for its API key: Authorization: Bearer KEY", code="invalid_api_key")

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        fields = await fields_of(request, CompletionFields, self._limits.body)
        served = self._asked_for(fields.model)
        prompts = await asyncio.to_thread(completion_prompts, fields, served)
        texts = [prompt.text for prompt in prompts for _ in range(fields.n or 1)] if fields.echo else None
        shape = Shape(served, bool(fields.return_tokens_as_token_ids), fields.logprobs is not None, texts)
        return await self._answered(request, fields, served, prompts, shape)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        fields = await fields_of(request, ChatFields, self._limits.body)
        served = self._asked_for(fields.model)
        prompt = await asyncio.to_thread(chat_prompt, fields, served)
        shape = ChatShape(served, bool(fields.return_tokens_as_token_ids), bool(fields.logprobs))
        return await self._answered(request, fields, served, [prompt], shape)

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [*map(_card, self._service.models.values())]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return JSONResponse(_card(self._asked_for(request.path_params["name"])))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        fields = await fields_of(request, TokenizeFields, self._limits.body)
        served = self._asked_for(fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise Refused(400, "give either a prompt or messages", "prompt")
        if fields.messages is not None:
            try:
                ids = served.conversation([message.plain for message in fields.messages])
            except InvalidInput as error:
                raise Refused(400, str(error), "messages") from error
        else:
            ids = await asyncio.to_thread(served.encode, fields.prompt or "", fields.add_special_tokens)
        names = [served.names.name(token) for token in ids] if fields.return_token_strs else None
        context = served.execution.context
        return JSONResponse({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        fields = await fields_of(request, DetokenizeFields, self._limits.body)
        served = self._asked_for(fields.model)
        known = served.execution.vocabulary
        if any(token >= known for token in fields.tokens):
            raise Refused(400, f"tokens of {served.name} are numbers from 0 to {known - 1}", "tokens")
        return JSONResponse({"prompt": served.decode(fields.tokens)})

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def version(self, _: Request) -> Response:
        """GET /version."""
        return JSONResponse({"version": __version__})

    async def health(self, _: Request) -> Response:
        """GET /health."""
        return Response(status_code=200 if self._service.alive else 503)

    def _asked_for(self, name: str | None) -> ServedModel:
        found = self._service.route(name)
        if found is None:
            names = ", ".join(self._service.models)
            raise Refused(404, f"no such model is served; there is: {names}", "model", "model_not_found")
        return found

    async def _answered(
        self,
        request: Request,
        fields: CompletionFields | ChatFields,
        served: ServedModel,
        prompts: list[Prompt],
        shape: Shape,
    ) -> Response:
        limits = self._limits
        orders = orders_of(fields, prompts, served, limits.seconds, limits.choices)
        if not self._service.alive:
            raise Refused(503, "the server is shutting down")
        if self._service.worker.held + len(orders) > limits.waiting + served.execution.slots:
            raise Refused(
                429, "too many requests are waiting: try again later", code="queue_full", headers={"retry-after": "1"}
            )
        running = Running(orders, served, self._service.worker)
        if fields.stream:
            options = fields.stream_options
            usage = (False, False) if options is None else (options.include_usage, options.continuous_usage_stats)
            return EventStream(running, shape, len(prompts), usage)
        return await whole(request, running, shape, len(prompts))


def _card(served: ServedModel) -> dict[str, object]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "sparity",
        "root": served.name,
        "parent": None,
        "max_model_len": served.execution.context,
    }


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such route", 405: f"{request.method} is not for this route"}
    refused = Refused(error.status_code, words.get(error.status_code, error.detail))
    return JSONResponse(refused.content, error.status_code, error.headers)


async def _fault(_: Request, error: Exception) -> Response:
    log.error("a request failed: %s: %s", type(error).__name__, error)
    return Refused(500, "the server failed; its log says why").response
