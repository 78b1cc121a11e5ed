"""The reading half: sessions, their streams, and what is asked by id."""

from __future__ import annotations

import heapq
import queue
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from mythos_trio.core import names
from mythos_trio.core.position import Interval, lost_after
from mythos_trio.core.transaction import Answer
from mythos_trio.seams import rfc3339
from mythos_trio.sqlite.failures import store_errors
from mythos_trio.sqlite.tables import (
    MESSAGE_COLUMNS,
    SESSION_COLUMNS,
    find_answer,
    id_key,
    newest_session,
    posix,
    removed_of,
    roll_back,
    session_row,
)
from mythos_trio.storage import Bounds, Chunk, Expired, SessionRow, StoredMessage, StoreError

# A chunk is held in memory whole: as much as a session's log.
MAX_CHUNK_BYTES: Final = 1 << 20

# Above all numbers (contract: they are below 2^53).
NO_NUMBER: Final = 1 << 53

_READ_STREAM: Final = (
    f"SELECT {MESSAGE_COLUMNS} FROM messages WHERE target = ? AND seq > ? AND seq <= ? ORDER BY target, seq"
)


def _merge(
    db: sqlite3.Connection, intervals: Sequence[tuple[str, int, int]], limit: int
) -> tuple[list[StoredMessage], bool]:
    """The first *limit* messages of *intervals* (target, above, up to) in the order of their numbers.

    Only as much is read as is returned: an interval is opened when the stream has come to it.

    :returns: the messages, and whether there are no more.
    """
    waiting = sorted(intervals, key=lambda interval: interval[1], reverse=True)
    heads: list[tuple[int, tuple[Any, ...], sqlite3.Cursor]] = []
    messages: list[StoredMessage] = []
    size = 0
    try:
        while True:
            while waiting and (not heads or waiting[-1][1] < heads[0][0]):
                cursor = db.execute(_READ_STREAM, waiting.pop())
                row = cursor.fetchone()
                if row is not None:
                    heapq.heappush(heads, (row[0], row, cursor))
            if not heads:
                return messages, True
            if len(messages) >= limit or size > MAX_CHUNK_BYTES:
                return messages, False
            _, row, cursor = heads[0]
            # As long as this one is ahead of all others it is read alone.
            others = [head[0] for head in heads[1:3]] + [interval[1] + 1 for interval in waiting[-1:]]
            before = min(others, default=NO_NUMBER)
            while row is not None and row[0] < before and len(messages) < limit and size <= MAX_CHUNK_BYTES:
                message = message_of(row)
                messages.append(message)
                size += len(message.body)
                row = cursor.fetchone()
            if row is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (row[0], row, cursor))
    finally:
        for _, _, cursor in heads:
            cursor.close()


def message_of(row: Sequence[Any]) -> StoredMessage:
    """*row* has `MESSAGE_COLUMNS`."""
    seq, id_, target, body, stored_at = row
    return StoredMessage(seq, id_, target, body, posix(stored_at))


class ReadingHalf:
    """The reading half of `mythos_trio.storage.Database`, on connections of its own."""

    _readers: queue.LifoQueue[sqlite3.Connection] | None = None
    _busy_seconds: float

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A reader that sees one state of the database throughout."""
        readers = self._readers
        if readers is None:
            raise StoreError("the database is not open")
        try:
            db = readers.get(timeout=self._busy_seconds)
        except queue.Empty:
            raise StoreError("the database's readers are all busy") from None
        try:
            with store_errors():
                db.execute("BEGIN")
                yield db
        finally:
            roll_back(db)
            if self._readers is readers:
                readers.put(db)
            else:
                db.close()  # the store was closed meanwhile, without waiting for this one

    def read(self, player_id: str, session_id: str, after: int, upto: int, limit: int) -> Chunk:
        with self._reading() as db:
            row = db.execute(
                "SELECT start, finish, mail_from, lost FROM sessions WHERE player_id = ? AND session_id = ?",
                (player_id, session_id),
            ).fetchone()
            if row is None:
                return Chunk((), upto)
            start, finish, mail_from, lost = row
            intervals = [Interval(names.to_player(player_id), mail_from), Interval(names.EVERYONE, start)]
            # A closed interval matters for messages and for gaps only up to its `last`.
            subscriptions = db.execute(
                "SELECT channel, start, finish, last FROM subscriptions"
                " WHERE player_id = ? AND session_id = ? AND (finish IS NULL OR last > ?)",
                (player_id, session_id, after),
            )
            intervals += [Interval(names.to_channel(channel), *rest) for channel, *rest in subscriptions.fetchall()]
            removed = {target: removed_of(db, target) for target in {interval.target for interval in intervals}}
            lost = max(
                lost if lost > after else 0,
                lost_after([(interval, removed[interval.target]) for interval in intervals], after),
            )
            newest = upto if finish is None else min(upto, finish)
            wanted = [
                (i.target, max(i.start, after), newest if i.end is None else min(newest, i.end)) for i in intervals
            ]
            messages, complete = _merge(db, [part for part in wanted if part[1] < part[2]], max(limit, 1))
        return Chunk(messages, upto if complete else messages[-1].seq, lost)

    def current_session(self, player_id: str) -> SessionRow | None:
        with self._reading() as db:
            row = newest_session(db, player_id, SESSION_COLUMNS)
            session = None if row is None else session_row(db, row)
        return session if session is not None and session.ended_at is None else None

    def find_session(self, player_id: str, session_id: str) -> SessionRow | None:
        with self._reading() as db:
            row = db.execute(
                f"SELECT {SESSION_COLUMNS} FROM sessions WHERE player_id = ? AND session_id = ?",
                (player_id, session_id),
            ).fetchone()
            return None if row is None else session_row(db, row)

    def last_seen(self, player_id: str) -> int:
        with self._reading() as db:
            row = newest_session(db, player_id, "seen")
            return 0 if row is None else int(row[0])

    def expired_sessions(self, now: float, bounds: Bounds, limit: int) -> list[tuple[str, str]]:
        with self._reading() as db:
            return db.execute(
                "SELECT player_id, session_id FROM sessions WHERE state = 'offline' AND state_since < ?"
                " ORDER BY state_since LIMIT ?",
                (rfc3339(max(now - bounds.message_seconds, 0)), limit),
            ).fetchall()

    def find_answer(self, player_id: str, session_id: str, command_id: str) -> Answer | None:
        with self._reading() as db:
            return find_answer(db, player_id, session_id, command_id)

    def find_message(self, message_id: str) -> StoredMessage | None:
        with self._reading() as db:
            row = db.execute(f"SELECT {MESSAGE_COLUMNS} FROM messages WHERE id = ?", (message_id,)).fetchone()
            return None if row is None else message_of(row)

    def find_expired(self, message_id: str) -> Expired | None:
        with self._reading() as db:
            row = db.execute(
                "SELECT seq, target, removed_at FROM expired WHERE key = ? ORDER BY number DESC LIMIT 1",
                (id_key(message_id),),
            ).fetchone()
            return None if row is None else Expired(row[0], row[1], posix(row[2]))

    def receivers(self, message: StoredMessage, limit: int) -> tuple[list[SessionRow], int]:
        columns = ", ".join(f"s.{column.strip()}" for column in SESSION_COLUMNS.split(","))
        values: Mapping[str, object] = {"seq": message.seq, "name": message.target[1:], "limit": limit}
        if message.target.startswith("#"):
            source = (
                "subscriptions AS i JOIN sessions AS s ON s.player_id = i.player_id AND s.session_id = i.session_id"
                " WHERE i.channel = :name AND i.start < :seq AND (i.finish IS NULL OR i.finish > :seq)"
            )
        else:
            whose = "s.player_id = :name AND s.mail_from" if message.target.startswith("@") else "s.start"
            source = f"sessions AS s WHERE {whose} < :seq AND (s.finish IS NULL OR s.finish > :seq)"
        with self._reading() as db:
            count = db.execute(f"SELECT count(*) FROM {source}", values).fetchone()[0]
            rows = db.execute(f"SELECT {columns} FROM {source} ORDER BY s.start LIMIT :limit", values).fetchall()
            return [session_row(db, row) for row in rows], count

    def sessions(self, player_id: str | None, limit: int) -> list[SessionRow]:
        where, values = ("", ()) if player_id is None else ("WHERE player_id = ?", (player_id,))
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {SESSION_COLUMNS} FROM sessions {where} ORDER BY start DESC LIMIT ?", (*values, limit)
            ).fetchall()
            return [session_row(db, row) for row in rows]
