"""The body of a request: read up to a limit, then JSON with the fields that are known, and nothing else."""

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from sparity.errors import suggestion
from sparity.serve.http.errors import Refused
from sparity.serve.http.fields import UNSUPPORTED
from sparity.visible import one_line

SECONDS = 30.0  # within which a body must come
LONGEST_SHOWN = 200  # characters of what a client sent
Found = TypeVar("Found", bound=BaseModel)


async def fields_of(request: Request, kind: type[Found], limit: int) -> Found:
    """The fields of a request.

    Raises:
        Refused: it is too large or too slow, no JSON, or has other fields or values than `kind`.
    """
    try:
        raw = await asyncio.wait_for(_bytes(request, limit), SECONDS)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {SECONDS:g} seconds") from None
    return checked(parsed(raw), kind)


def parsed(raw: bytes) -> Any:
    """What JSON in UTF-8 says.

    Raises:
        Refused: it is none.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 (byte {error.start})", code="invalid_utf8") from error
    try:
        found = json.loads(text, parse_constant=_no_constant)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refused(
            400, "the body has half of a surrogate pair, which is no character", code="invalid_utf8"
        ) from error
    except RecursionError as error:
        raise Refused(400, "the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {_short(str(error))}", code="invalid_json") from error
    return found


def checked(found: Any, kind: type[Found]) -> Found:
    """The fields of a request that is JSON; those that are None count as not given.

    Raises:
        Refused: it is no object, or has a field or a value that is not known.
    """
    if not isinstance(found, dict):
        raise Refused(400, "the body must be a JSON object", code="invalid_json")
    given = dict(found)
    for name in [name for name in given if name in UNSUPPORTED and name not in kind.model_fields]:
        harmless, advice = UNSUPPORTED[name]
        if given.pop(name) not in (None, harmless):
            raise Refused(400, f"{name} is not supported: {advice}", name, "unsupported_parameter")
    unknown = next((name for name in given if name not in kind.model_fields), None)
    if unknown is not None:
        advice = suggestion(unknown, kind.model_fields)
        raise Refused(400, f'unknown field "{_short(unknown)}"{advice}', _short(unknown), "unknown_parameter")
    try:
        return kind.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _names(kind))
        raise Refused(400, f"{_short(place)}: {_short(first['msg'])}", _short(place), "invalid_value") from error


def _names(kind: type[BaseModel]) -> set[str]:
    return {*kind.model_fields, "role", "content", "text", "type", "include_usage"}


async def _bytes(request: Request, limit: int) -> bytes:
    too_large = Refused(413, f"the body has more than {limit} bytes", code="request_too_large")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > limit:
        raise too_large
    found = bytearray()
    try:
        async for part in request.stream():
            found += part
            if len(found) > limit:
                raise too_large
    except ClientDisconnect as error:
        raise Refused(400, "the client left before the body was complete") from error
    return bytes(found)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _short(text: str) -> str:
    """What a client sent, or what is said of it, in one line."""
    line = one_line(text)
    return line if len(line) <= LONGEST_SHOWN else line[:LONGEST_SHOWN] + "..."
