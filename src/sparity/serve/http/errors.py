"""What a request is told that cannot be answered, in OpenAI's form."""

from typing import Any

from starlette.responses import JSONResponse

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class Refused(Exception):  # an answer, not a fault
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one line for the client.
        param: the field that it is about.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def content(self) -> dict[str, Any]:
        """As OpenAI's servers say it."""
        kind = KINDS.get(self.status, "Error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code or self.status}}

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.content, self.status, self.headers)
