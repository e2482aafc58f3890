"""From errors to answers: what a client is told, and with which status."""

from typing import Any

import orjson

from residual_memory.errors import (
    CorruptFile,
    DuplicateId,
    InvalidInput,
    MemoryLocked,
    MissingExtra,
    ReadOnlyMemory,
    ResidualMemoryError,
    ServerFailure,
    ShardDown,
    StorageFailure,
    UnknownId,
    cause_and_remedy,
)


class Overloaded(ResidualMemoryError):
    """More is asked than can be answered in time."""


class Stopping(ResidualMemoryError):
    """The server stops."""


class Unauthorized(ResidualMemoryError):
    """No token, or a wrong one."""


class Forbidden(ResidualMemoryError):
    """A token without the scope, or a host or origin that is not served."""


class BodyTooLarge(ResidualMemoryError):
    """A request has more bytes than are taken."""


class TooSlow(ResidualMemoryError):
    """An answer took too long."""


class NoSuchRoute(ResidualMemoryError):
    """Nothing is served at a path, or not by a method."""


_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (Unauthorized, 401),
    (Forbidden, 403),
    (ReadOnlyMemory, 403),
    (UnknownId, 404),
    (DuplicateId, 409),
    (MemoryLocked, 409),
    (NoSuchRoute, 404),
    (BodyTooLarge, 413),
    (InvalidInput, 422),
    (Overloaded, 429),
    (CorruptFile, 500),
    (ServerFailure, 500),
    (MissingExtra, 501),
    (ShardDown, 503),
    (Stopping, 503),
    (TooSlow, 503),
    (StorageFailure, 507),
)
RETRIED = frozenset({429, 503})
OURS = frozenset({500, 501, 507})  # the log says where it came from


def status_of(error: ResidualMemoryError) -> int:
    """The HTTP status that says what went wrong."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def told(error: ResidualMemoryError, path: str = "/") -> dict[str, Any]:
    """The body of a refusal: type, cause and remedy, as `resmem --json` says them.

    Under /v2 it is what that protocol has; under /v1 it has the fields of OpenAI's errors too.
    """
    if path == "/v2" or path.startswith("/v2/"):
        return {"error": str(error)}
    cause, remedy = cause_and_remedy(error)
    found = {"type": type(error).__name__, "message": str(error), "cause": cause, "remedy": remedy}
    return {"error": {**found, "param": None, "code": None} if path.startswith("/v1/") else found}


def refusal(
    error: ResidualMemoryError, path: str, retry_seconds: int, status: int | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; the status is that of the error's type where none is given."""
    status = status or status_of(error)
    headers = {"content-type": "application/json"}
    if status in RETRIED:
        headers["retry-after"] = str(retry_seconds)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return status, headers, orjson.dumps(told(error, path))
