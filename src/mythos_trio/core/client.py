"""The rules of a client: what to take of two connections, what a refusal asks for, how long to wait.

The counterpart of what the server promises (contract, section 4); the same for every client of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from attrs import define, frozen

from mythos_trio.core.errors import Refusal
from mythos_trio.core.position import Gap, Position, parse_position

FIRST_DELAY: Final = 0.5
LONGEST_DELAY: Final = 30.0


@frozen
class Outcome:
    """How a connection, or the attempt at one, came to its end.

    *refused*: this transport is not wanted; *over*: the session is not.
    """

    why: str
    code: int | None = None
    retry_ms: int | None = None
    refused: bool = False
    over: bool = False


@define
class Merge:
    """One number and one epoch for all connections: what has been taken, each message once.

    *epoch* is 0 as long as nothing is known. Entering a newer epoch the number is lowered to the
    gap's ``shared`` if it is larger; else what is not larger than the number is dropped.
    """

    epoch: int = 0
    number: int = 0
    _told: Position | None = None

    @property
    def position(self) -> Position | None:
        return Position(self.epoch, self.number) if self.epoch else None

    def opened(self, named: Position | None, epoch: int, start: Position) -> bool:
        """A connection was welcomed in *epoch*, and starts after *start*.

        :param named: the position that was named when it was opened.
        :returns: False if messages could be missed: it has to be opened again, with a position.
        """
        if not self.epoch:
            self.epoch, self.number = epoch, start.seq
            return True
        # One that names nothing starts after what *some* connection has surely got: perhaps beyond what
        # we have taken, and without being told of another epoch.
        return named is not None or (epoch == self.epoch and start.seq <= self.number)

    def message(self, epoch: int, seq: int) -> bool:
        """Whether a numbered message of a connection of *epoch* is new; it then counts as taken."""
        if epoch != self.epoch or seq <= self.number:
            return False
        self.number = seq
        return True

    def passed(self, epoch: int, seq: int) -> None:
        """Everything up to *seq* has come on a connection of *epoch*."""
        if epoch == self.epoch:
            self.number = max(self.number, seq)

    def gap(self, gap: Gap) -> bool:
        """What a gap changes; whether it has to be told to the application."""
        match gap.reason:
            case "epoch":
                if gap.position.epoch <= self.epoch:
                    return False
                shared = gap.position.seq if gap.shared is None else gap.shared
                self.epoch, self.number = gap.position.epoch, min(self.number, shared)
                return True
            case "future":
                # The server knows less than we do: we have to go on from where it is. By then another
                # connection may have done so.
                if self.position is None or self.position < gap.after:
                    return False
                self.epoch, self.number = gap.position.epoch, gap.position.seq
                return True
        if gap.position.epoch != self.epoch or gap.position.seq <= self.number:
            return False
        # Both connections tell the same loss.
        if self._told is not None and gap.position <= self._told:
            return False
        self._told = gap.position
        return True


def parse_gap(message: Mapping[str, Any]) -> Gap:
    """:raises ValueError: it is not one."""
    try:
        shared = message.get("shared")
        return Gap(
            parse_position(message["after"]),
            parse_position(message["position"]),
            str(message["reason"]),
            int(shared) if shared is not None else None,
        )
    except (KeyError, TypeError, ValueError, Refusal) as error:
        raise ValueError(f"not a gap: {error!r}") from error


class Backoff:
    """Doubling waits with jitter; what the server asks for wins."""

    def __init__(self) -> None:
        self._delay = FIRST_DELAY

    def good(self) -> None:
        self._delay = FIRST_DELAY

    def next(self, jitter: float, retry_ms: int | None = None) -> float:
        """Seconds to wait. Who was asked to come back begins anew: the server knows when it will be there, and a
        try that fails then is the first.

        :param jitter: 0.5 to 1: many clients that were cut off at once must not come back at once.
        """
        if retry_ms is not None:
            self._delay = FIRST_DELAY
            return max(0.0, retry_ms / 1000)
        delay, self._delay = self._delay, min(self._delay * 2, LONGEST_DELAY)
        return delay * jitter


def of_disconnect(message: Mapping[str, Any]) -> Outcome:
    """What a ``disconnect`` asks for."""
    code, retry_ms = message.get("code"), message.get("retry_ms")
    return of_code(
        code if isinstance(code, int) else None,
        str(message.get("reason") or "disconnected by the server"),
        retry_ms if isinstance(retry_ms, int) else None,
    )


def of_code(code: int | None, reason: str, retry_ms: int | None = None) -> Outcome:
    """4000-4499: come back. 4500-4999: do not; 4509 is about this connection only."""
    final = code is not None and 4500 <= code <= 4999
    text = reason if code is None else f"{reason} ({code})"
    return Outcome(text, code, retry_ms, refused=code == 4509, over=final and code != 4509)


def of_status(status: int, headers: Mapping[str, str], body: bytes) -> Outcome:
    """What an HTTP status instead of a stream asks for."""
    retry = headers.get("retry-after", "")
    retry_ms = int(retry) * 1000 if re.fullmatch(r"[0-9]{1,6}", retry) else None
    if status == 204:
        return Outcome("the server does not want this connection back (204)", refused=True)
    refused = 400 <= status < 500 and status not in (408, 425, 429)
    return Outcome(f"{_error_message(body) or 'refused'} ({status})", None, retry_ms, refused=refused)


def _error_message(body: bytes) -> str:
    return str(json_object(body).get("message", ""))


def json_object(body: bytes) -> dict[str, Any]:
    """What *body* holds; empty if that is no JSON object."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError):
        return {}
    return value if isinstance(value, dict) else {}
