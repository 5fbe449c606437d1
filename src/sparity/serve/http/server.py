"""A socket, and the server behind it until it is told to stop."""

import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from sparity.errors import InvalidInput

GRACE = 30  # seconds in which requests may still be answered once the server is told to stop
BACKLOG = 2048  # connections that may wait


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InvalidInput: there is no such address, or somebody listens there already.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        raise InvalidInput(
            f"cannot listen at {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
    return found


def run(app: Starlette, host: str, port: int, greet: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM: then no request is taken any more, and those that run have `GRACE` seconds.

    Args:
        app: from `create_app`.
        host: and `port`, 0 for a free one.
        greet: is called with the address once somebody listens.

    Raises:
        InvalidInput: see `bind`.
    """
    listening = bind(host, port)
    shown, number = listening.getsockname()[:2]
    greet(f"http://{f'[{shown}]' if ':' in shown else shown}:{number}")
    server_of(app).run(sockets=[listening])


def server_of(app: Starlette) -> uvicorn.Server:
    """The server of an application, which logs nothing of its own but faults."""
    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="error", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="on", ws="none"
        )
    )
