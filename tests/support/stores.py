"""Stores for tests: every kind that there is, and short words for what is done to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from attrs import evolve

from mythos_trio.core.names import EVERYONE
from mythos_trio.core.transaction import (
    Answer,
    Append,
    Begin,
    Committed,
    Effect,
    End,
    Outcome,
    PresenceMark,
    Reason,
    Refused,
    Request,
    Subscribe,
    Transaction,
    Unsubscribe,
)
from mythos_trio.sqlite import SqliteDatabase
from mythos_trio.storage import Bounds, Chunk, Cleaned, Database, Recovered

NOW = 1_767_225_600.0  # 2026-01-01T00:00:00Z
FOREVER = Bounds(message_seconds=1e9, message_count=10**9, session_seconds=1e9, store_bytes=1 << 40)
ANYBODY = EVERYONE
A_LOT = 2**53 - 1


class Kind(Protocol):
    """A kind of store. *place* is its own directory: the same place is the same store."""

    name: str

    def make(self, place: Path, **options: Any) -> Database: ...


class SqliteKind:
    name = "sqlite"

    def make(self, place: Path, **options: Any) -> Database:
        return SqliteDatabase(place / "store.db", **options)


KINDS: Sequence[Kind] = (SqliteKind(),)


class Bench:
    """One store on a bench: its clock is a number, its commits are one line."""

    def __init__(self, kind: Kind, place: Path, **options: Any) -> None:
        self._kind = kind
        self._place = place
        self._options = options
        self._ids = (f"m{n}" for n in itertools.count(1))
        self.now = NOW
        self.db: Database = kind.make(place, **options)
        self.recovered: Recovered = self.db.open(self.now)

    def crash(self) -> Recovered:
        """End as ``kill -9`` does, and start again."""
        self.db.abandon()
        return self._start()

    def restart(self) -> Recovered:
        self.db.close()
        return self._start()

    def _start(self) -> Recovered:
        self.db = self._kind.make(self._place, **self._options)
        self.recovered = self.db.open(self.now)
        return self.recovered

    # Committing.

    def try_(self, *transactions: Transaction) -> list[Outcome]:
        return self.db.commit(transactions, self.now)

    def commit(self, transaction: Transaction) -> Committed:
        (outcome,) = self.try_(transaction)
        assert isinstance(outcome, Committed), outcome
        return outcome

    def refuse(self, transaction: Transaction, reason: str) -> Refused:
        (outcome,) = self.try_(transaction)
        assert isinstance(outcome, Refused), outcome
        assert outcome.reason == reason
        return outcome

    def do(self, *effects: Effect, **more: Any) -> Committed:
        return self.commit(Transaction(list(effects), **more))

    def say(self, target: str, id: str | None = None, body: bytes = b"{}", digest: bytes | None = None) -> int:
        """:returns: the message's number."""
        return self.do(Append(target, id or next(self._ids), body, digest)).seqs[0]

    def begin(self, player_id: str = "ann", session_id: str = "s1", mail_from: int = 0, state: str = "online") -> int:
        mark = PresenceMark(player_id, session_id, state, "present", "")
        return self.do(Begin(player_id, session_id, mail_from), presence=[mark]).seqs[0]

    def switch(self, player_id: str, old: str, new: str, mail_from: int = 0) -> Committed:
        return self.do(End(player_id, old, "replaced"), Begin(player_id, new, mail_from))

    def mark(self, player_id: str, session_id: str, state: str, told: str = "present", owed: str = "") -> None:
        self.do(presence=[PresenceMark(player_id, session_id, state, told, owed)])

    def join(self, channel: str, player_id: str = "ann", session_id: str = "s1") -> int:
        return self.do(Subscribe(player_id, session_id, channel)).seqs[0]

    def leave(self, channel: str, player_id: str = "ann", session_id: str = "s1") -> int:
        return self.do(Unsubscribe(player_id, session_id, channel)).seqs[0]

    # Looking.

    def read(self, after: int = 0, player_id: str = "ann", session_id: str = "s1", upto: int = A_LOT) -> Chunk:
        return self.db.read(player_id, session_id, after, upto, 10**6)

    def stream(self, after: int = 0, player_id: str = "ann", session_id: str = "s1") -> list[int]:
        """The numbers of the session's messages after *after*."""
        return [message.seq for message in self.read(after, player_id, session_id).messages]

    def clean(self, bounds: Bounds = FOREVER, slice_rows: int = 500) -> Cleaned:
        """Clean up to the end: the sum of all slices."""
        total = Cleaned()
        for _ in range(10_000):
            cleaned = self.db.clean(self.now, bounds, slice_rows=slice_rows)
            total = evolve(total, **{name: getattr(total, name) + getattr(cleaned, name) for name in COUNTS})
            if not cleaned.more:
                return total
        raise AssertionError("clean-up does not come to an end")


COUNTS = ("messages", "sessions", "answers", "subscriptions", "requests", "connections", "expired_mail")


@contextmanager
def bench(kind: Kind, place: Path, **options: Any) -> Iterator[Bench]:
    made = Bench(kind, place, **options)
    try:
        yield made
    finally:
        made.db.abandon()


def answer(command_id: str, *, session_id: str = "s1", body: bytes = b'{"ok":true}', digest: bytes = b"d") -> Answer:
    return Answer("ann", session_id, command_id, digest, body)


__all__ = [
    "ANYBODY",
    "A_LOT",
    "FOREVER",
    "KINDS",
    "NOW",
    "Bench",
    "Kind",
    "Reason",
    "Request",
    "SqliteKind",
    "answer",
    "bench",
]
