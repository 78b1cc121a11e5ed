"""What can go wrong, in the words of the wire: error types, close codes, refusals."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from attrs import frozen


class ErrorType(StrEnum):
    """The ``error_type`` of HTTP errors, error replies, logs and ``/monitoring/errors``."""

    CONNECTION = "connection_error"
    SESSION = "session_error"
    AUTHENTICATION = "authentication_error"
    VALIDATION = "validation_error"
    RATE_LIMIT = "rate_limit_error"
    CAPACITY = "capacity_error"
    DELIVERY = "delivery_error"
    PERSISTENCE = "persistence_error"
    SYSTEM = "system_error"


@frozen
class Close:
    """Why a connection ends: a close code (RFC 6455, section 7.4) and what the client should do."""

    code: int
    reason: str
    error_type: ErrorType = ErrorType.CONNECTION

    @property
    def reconnect(self) -> bool:
        """Whether the client should come back: 4000-4499 yes, 4500-4999 no; ours to blame, yes."""
        return 4000 <= self.code <= 4499 or self.code in (1001, 1011)


DRAIN: Final = Close(4000, "the server is restarting", ErrorType.SYSTEM)
SLOW: Final = Close(4008, "the client did not read in time", ErrorType.DELIVERY)
BUSY: Final = Close(4009, "busy, try again", ErrorType.CAPACITY)
NO_PONG: Final = Close(4012, "no sign of life from the client", ErrorType.CONNECTION)
RATE: Final = Close(4029, "too many requests", ErrorType.RATE_LIMIT)
BAD_TOKEN: Final = Close(4500, "bad or expired token", ErrorType.AUTHENTICATION)
REPLACED: Final = Close(4501, "session replaced", ErrorType.SESSION)
REMOVED: Final = Close(4503, "removed by the operator", ErrorType.SESSION)
TOO_MANY: Final = Close(4509, "too many connections, all alive", ErrorType.CAPACITY)
BINARY: Final = Close(1003, "binary frames are not accepted", ErrorType.VALIDATION)
BAD_UTF8: Final = Close(1007, "text is not valid UTF-8", ErrorType.VALIDATION)
TOO_BIG: Final = Close(1009, "message too big", ErrorType.VALIDATION)
FAULT: Final = Close(1011, "the server made a mistake", ErrorType.SYSTEM)
TOLD_BY_GAME: Final = Close(4503, "disconnected by the game", ErrorType.SESSION)
SUPERSEDED: Final = Close(1000, "replaced by a newer connection of the client", ErrorType.CONNECTION)


class Refusal(Exception):
    """A request that is turned down, with what every plane needs to say so.

    Raised by rules and handlers, caught at the edges: an HTTP answer with *status*, an error reply
    with *error_type*, or a ``disconnect`` with *close*.
    """

    def __init__(
        self,
        error_type: ErrorType,
        message: str,
        *,
        status: int = 400,
        close: Close | None = None,
        retry_ms: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.message = message
        self.status = status
        self.close = close
        self.retry_ms = retry_ms
        self.details = details or {}


def invalid(message: str, *, status: int = 422, **details: Any) -> Refusal:
    """A ``validation_error``: the request cannot get better by trying again."""
    return Refusal(ErrorType.VALIDATION, message, status=status, details=details)


def busy(message: str, *, retry_ms: int = 2000) -> Refusal:
    """Try again later: 503 over HTTP, 4009 on a stream."""
    return Refusal(ErrorType.CAPACITY, message, status=503, close=BUSY, retry_ms=retry_ms)
