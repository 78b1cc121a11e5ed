"""What the server asks of a store, whichever one it is.

`Database` is the blocking interface that a store implements (`mythos_trio.sqlite`); `Storage` is
the same for the event loop: it owns the threads in which the database's calls run. Both have one
writer: calls of `commit`, `note` and `clean` never overlap.

Rules live in `mythos_trio.core`; a store only stores, and checks again in the commit what only it
can know (ids, keys, answers that are there already).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from attrs import frozen

from mythos_trio.core.position import Epochs
from mythos_trio.core.transaction import Answer, Outcome, Transaction


class StoreError(Exception):
    """The store cannot do it now (locked, full, gone). *full* tells a full disk from the rest."""

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class StoreUnusable(Exception):
    """The store cannot be opened at all: held by another process, not ours, too new. Exit code 4."""


@frozen
class SessionRow:
    """A stored session. Times are POSIX seconds."""

    player_id: str
    session_id: str
    start: int
    """Its number in the order; messages to everyone with larger numbers are its own."""
    mail_from: int
    """Messages to the player with larger numbers are its own."""
    seen: int
    lost: int
    """The newest number among closed intervals that are gone for good (see `Interval.lost`)."""
    state: str
    told: str
    owed: str
    created_at: float
    last_online: float
    ended_at: float | None = None
    end_reason: str | None = None
    channels: tuple[str, ...] = ()
    """Open subscriptions, in the order of their numbers."""


@frozen
class StoredMessage:
    seq: int
    id: str
    target: str
    body: bytes
    stored_at: float


@frozen
class Chunk:
    """A part of a session's stream: all of it after the asked number up to *complete_to*.

    *lost* is the newest number that retention has taken from this session after the asked one, 0 if
    it has taken none (`position.lost_after`).
    """

    messages: Sequence[StoredMessage]
    complete_to: int
    lost: int = 0


@frozen
class Recovered:
    """What a start finds.

    *sessions*: those that were online or link-dead, and those that have ended or are offline but
    owe presence. *newest*: no number up to it will be given out again.
    """

    epochs: Epochs
    newest: int
    sessions: Sequence[SessionRow]
    clean: bool
    """Whether the store was closed in order."""


@frozen
class ConnectionRow:
    """One open connection, as an operator's SQL sees it. *opened_at*: POSIX seconds."""

    connection_id: str
    player_id: str
    session_id: str
    transport: str
    server_id: str
    address: str
    opened_at: float


@frozen
class Notes:
    """What is written behind: it may be late by a second, and a crash may lose it."""

    seen: Mapping[tuple[str, str], int]
    """(player_id, session_id) → mark."""
    opened: Sequence[ConnectionRow]
    closed: Sequence[str]
    """Connection ids."""
    last_online: Mapping[tuple[str, str], float]


@frozen
class Cleaned:
    """What one slice of clean-up removed; *more* if there is more to do."""

    messages: int = 0
    sessions: int = 0
    answers: int = 0
    subscriptions: int = 0
    requests: int = 0
    connections: int = 0
    expired_mail: int = 0
    """Of *messages*, those to a player that the player's session had not seen."""
    more: bool = False


@frozen
class Bounds:
    """Retention, from the settings. Seconds, counts and bytes."""

    message_seconds: float
    message_count: int
    session_seconds: float
    store_bytes: int
    answer_count: int = 1000
    answer_seconds: float = 600.0


class Database(Protocol):
    """The blocking interface. One thread calls the writing half, others the reading half."""

    # Writing half.

    def open(self, now: float) -> Recovered: ...
    def close(self) -> None:
        """Store that all was closed in order, and let go of the store."""
        ...

    def commit(self, batch: Sequence[Transaction], now: float) -> list[Outcome]:
        """All of *batch* in one commit, in order, each transaction all or nothing.

        A transaction that is refused does not touch the others. If the commit itself fails, every
        outcome is ``Refused(FAILED | FULL)``, and nothing of it is stored.
        """
        ...

    def note(self, notes: Notes) -> None: ...
    def clean(self, now: float, bounds: Bounds, *, slice_rows: int = 500) -> Cleaned: ...

    # Reading half.

    def read(self, player_id: str, session_id: str, after: int, upto: int, limit: int) -> Chunk: ...
    def current_session(self, player_id: str) -> SessionRow | None:
        """The newest session of the player if it has not ended."""
        ...

    def find_session(self, player_id: str, session_id: str) -> SessionRow | None: ...
    def last_seen(self, player_id: str) -> int:
        """The mark of the player's newest session, ended or not; 0 if there was none."""
        ...

    def find_answer(self, player_id: str, session_id: str, command_id: str) -> Answer | None: ...
    def find_message(self, message_id: str) -> StoredMessage | None: ...
    def find_expired(self, message_id: str) -> bool:
        """Whether a message with this id was stored once and retention has removed it; False if
        that cannot be known."""
        ...

    def receivers(self, message: StoredMessage, limit: int) -> tuple[list[SessionRow], int]:
        """The sessions whose stream has the message, at most *limit*, and their number."""
        ...

    def sessions(self, player_id: str | None, limit: int) -> list[SessionRow]: ...
    def figures(self) -> dict[str, Any]:
        """Measured values for ``/health/detailed``: sizes, rows, the newest number."""
        ...


class Storage:
    """To be written: see the module's docstring."""
