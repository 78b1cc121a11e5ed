"""What goes when it is old or too much, in slices."""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Sequence
from typing import Final

from attrs import define, field

from mythos_trio.seams import rfc3339
from mythos_trio.sqlite.tables import id_key, newest_session
from mythos_trio.storage import Bounds, Cleaned

# What a message's row costs beside its body: indexes, id, digest, time (measured: 150-200 bytes).
ROW_OVERHEAD: Final = 180
# Which part of what is too much goes at once, if that is more than what has been added.
ROOM_SHARE: Final = 8
# A row of a connection whose session ended this long ago is stale: marks are written within 1 s.
STALE_SECONDS: Final = 60.0
# Of removed messages so many are remembered, if they take no more than this part of MAX_STORE_BYTES.
MAX_EXPIRED: Final = 200_000
EXPIRED_SHARE: Final = 64
EXPIRED_BYTES: Final = 100

_REMOVED: Final = """
    INSERT INTO targets (target, removed, removed_at) VALUES (:target, :newest, :now)
    ON CONFLICT (target) DO UPDATE SET
        messages = max(messages - :count, 0), bytes = max(bytes - :size, 0),
        removed = max(removed, excluded.removed), removed_at = excluded.removed_at"""
_FOLD: Final = """
    UPDATE sessions SET lost = max(lost, gone.last)
    FROM (SELECT player_id, session_id, max(last) AS last FROM subscriptions
          WHERE channel = ? AND finish IS NOT NULL AND last <= ? GROUP BY player_id, session_id) AS gone
    WHERE sessions.player_id = gone.player_id AND sessions.session_id = gone.session_id"""


@define
class Cursors:
    """How far passes over whole tables have come; they go on in the next slice."""

    answered: tuple[str, str] = ("", "")
    targets: str = ""


@define
class Slice:
    """One slice of clean-up inside one SQL transaction. *left* is how many rows it may still touch."""

    db: sqlite3.Connection
    now: float
    bounds: Bounds
    left: int
    messages: int = 0
    sessions: int = 0
    answers: int = 0
    subscriptions: int = 0
    requests: int = 0
    connections: int = 0
    expired_mail: int = 0
    remembers: bool = True
    """Whether the ids of what is removed are remembered."""
    removed_bytes: int = 0
    """Of messages, with what their rows cost."""
    within: list[str] = field(factory=list)
    """Targets that are found to have no more messages than they may."""

    def cleaned(self, *, more: bool) -> Cleaned:
        return Cleaned(
            messages=self.messages,
            sessions=self.sessions,
            answers=self.answers,
            subscriptions=self.subscriptions,
            requests=self.requests,
            connections=self.connections,
            expired_mail=self.expired_mail,
            more=more,
        )

    def _before(self, seconds: float) -> str:
        return rfc3339(max(self.now - seconds, 0))

    # Messages.

    def remove_old(self) -> None:
        """Messages older than `Bounds.message_seconds`: the oldest numbers of the store."""
        cutoff, now = self._before(self.bounds.message_seconds), rfc3339(self.now)
        rows = self.db.execute(
            "SELECT seq, target, length(CAST(body AS BLOB)), stored_at FROM messages ORDER BY seq LIMIT ?", (self.left,)
        )
        taken: list[tuple[int, str, int]] = []
        expired = 0
        for seq, target, size, stored_at in rows:
            if cutoff <= stored_at <= now:
                break
            taken.append((seq, target, size))
            # A time in the future says that the clock was set back: the message is as old as its
            # neighbours, and must not keep them.
            if stored_at < cutoff:
                expired = len(taken)
        rows.close()
        self._remove_first(taken[:expired])

    def _remove_first(self, rows: Sequence[tuple[int, str, int]]) -> None:
        """Remove the oldest messages of the store: all of *rows* (seq, target, bytes)."""
        if not rows:
            return
        self._delete("seq <= ?", rows[-1][0])
        by_target: dict[str, list[tuple[int, int]]] = {}
        for seq, target, size in rows:
            by_target.setdefault(target, []).append((seq, size))
        for target, gone in by_target.items():
            self._account(target, gone)

    def remove_beyond_count(self, targets: Sequence[str]) -> None:
        """The oldest of *targets* beyond `Bounds.message_count`."""
        for target in targets:
            if self.left <= 0:
                return
            row = self.db.execute("SELECT messages FROM targets WHERE target = ?", (target,)).fetchone()
            excess = 0 if row is None else row[0] - self.bounds.message_count
            if excess <= self.left:
                self.within.append(target)
            if excess > 0:
                self._remove_oldest(target, min(excess, self.left))

    def make_room(self, need: int) -> bool:
        """Remove *need* bytes of messages (with what their rows cost): the oldest of the largest targets.

        Pages become free only when neighbouring messages are gone too, so what is removed is counted
        by itself: who counts pages would go on until far too much is gone.

        :returns: False if there is nothing that could be removed.
        """
        self.remembers = False  # it is to make room
        # -bytes: the largest is the heap's first.
        largest = self.db.execute(
            "SELECT -bytes, target, messages FROM targets WHERE messages > 0 ORDER BY bytes DESC LIMIT 32"
        ).fetchall()
        heapq.heapify(largest)
        before = self.removed_bytes
        while self.left > 0 and self.removed_bytes - before < need:
            if not largest:
                return self._remove_any()
            size, target, messages = largest[0]
            row_bytes = ROW_OVERHEAD - size // messages
            rows = min((need + before - self.removed_bytes) // row_bytes + 1, messages // 4 + 1, self.left)
            gone = self._remove_oldest(target, rows)
            if 0 < gone < messages:
                heapq.heapreplace(largest, (size - size * gone // messages, target, messages - gone))
            else:
                heapq.heappop(largest)
        return True

    def _remove_any(self) -> bool:
        """The oldest of all: for when the largest are used up."""
        rows = self.db.execute(
            "SELECT seq, target, length(CAST(body AS BLOB)) FROM messages ORDER BY seq LIMIT ?", (self.left,)
        ).fetchall()
        self._remove_first(rows)
        return bool(rows)

    def _remove_oldest(self, target: str, count: int) -> int:
        rows = self.db.execute(
            "SELECT seq, length(CAST(body AS BLOB)) FROM messages WHERE target = ? ORDER BY seq LIMIT ?",
            (target, count),
        ).fetchall()
        if rows:
            self._delete("target = ? AND seq <= ?", target, rows[-1][0])
            self._account(target, rows)
        return len(rows)

    def _delete(self, where: str, *values: object) -> None:
        """Delete messages, and remember their ids, so that it can be said that they have expired."""
        if not self.remembers:
            self.db.execute(f"DELETE FROM messages WHERE {where}", values)
            return
        gone = self.db.execute(f"DELETE FROM messages WHERE {where} RETURNING id, seq, target", values).fetchall()
        now = rfc3339(self.now)
        self.db.executemany(
            "INSERT INTO expired (key, seq, target, removed_at) VALUES (?, ?, ?, ?)",
            [(id_key(id_), seq, target, now) for id_, seq, target in gone],
        )

    def _account(self, target: str, gone: Sequence[tuple[int, int]]) -> None:
        """Remember what the removal of *gone*, (seq, bytes) of the oldest of *target*, means."""
        newest = gone[-1][0]
        size = sum(size for _, size in gone)
        self.left -= len(gone)
        self.messages += len(gone)
        self.removed_bytes += size + len(gone) * ROW_OVERHEAD
        self.db.execute(
            _REMOVED,
            {
                "target": target,
                "newest": newest,
                "count": len(gone),
                "size": size,
                "now": rfc3339(self.now),
            },
        )
        if target.startswith("@"):
            row = newest_session(self.db, target[1:], "seen")
            seen = 0 if row is None else row[0]
            self.expired_mail += sum(seq > seen for seq, _ in gone)
        elif target.startswith("#"):
            self._fold(target[1:], newest)

    def _fold(self, channel: str, removed: int) -> None:
        """Closed intervals whose messages are all gone are kept as one number of their session."""
        self.db.execute(_FOLD, (channel, removed))
        self.subscriptions += self.db.execute(
            "DELETE FROM subscriptions WHERE channel = ? AND finish IS NOT NULL AND last <= ?", (channel, removed)
        ).rowcount

    # Sessions and what belongs to them.

    def forget_sessions(self) -> None:
        """Delete those that ended `Bounds.session_seconds` ago."""
        rows = self.db.execute(
            "SELECT player_id, session_id FROM sessions WHERE ended_at < ? ORDER BY ended_at LIMIT ?",
            (self._before(self.bounds.session_seconds), max(self.left, 0)),
        ).fetchall()
        for pair in rows:
            for table in ("sessions", "subscriptions", "answers", "answered"):
                self.db.execute(f"DELETE FROM {table} WHERE player_id = ? AND session_id = ?", pair)
        self.sessions += len(rows)
        self.left -= len(rows)

    def remove_answers(self, cursors: Cursors) -> None:
        """Answers of ended sessions, and of others those that are both old and beyond the count."""
        rows = self.db.execute(
            "SELECT player_id, session_id FROM answered WHERE (player_id, session_id) > (?, ?)"
            " ORDER BY player_id, session_id LIMIT ?",
            (*cursors.answered, max(self.left, 0)),
        ).fetchall()
        for pair in rows:
            if self.left <= 0:
                return
            if self._remove_answers_of(pair):
                cursors.answered = pair
        if self.left > 0:
            cursors.answered = ("", "")

    def _remove_answers_of(self, pair: tuple[str, str]) -> bool:
        """:returns: whether the slice was large enough."""
        where = "player_id = ? AND session_id = ?"
        row = self.db.execute(f"SELECT ended_at IS NULL FROM sessions WHERE {where}", pair).fetchone()
        live = row is not None and row[0]
        beyond: int | None = None
        if live:
            found = self.db.execute(
                f"SELECT number FROM answers WHERE {where} ORDER BY number DESC LIMIT 1 OFFSET ?",
                (*pair, self.bounds.answer_count),
            ).fetchone()
            beyond = 0 if found is None else found[0]
        numbers = self._removable_answers(pair, beyond)
        self.db.executemany("DELETE FROM answers WHERE number = ?", [(number,) for number in numbers])
        complete = len(numbers) < self.left
        self.answers += len(numbers)
        self.left -= max(len(numbers), 1)
        # Nothing to do any more, before the session has a new answer. What is beyond the count but
        # still young is looked at again.
        if complete and (not live or beyond == 0):
            self.db.execute(f"DELETE FROM answered WHERE {where}", pair)
        return complete

    def _removable_answers(self, pair: tuple[str, str], beyond: int | None) -> list[int]:
        """The oldest answers of a session: all, or those up to *beyond* that are old enough."""
        old = self._before(self.bounds.answer_seconds)
        rows = self.db.execute(
            "SELECT number FROM answers WHERE player_id = :player_id AND session_id = :session_id"
            " AND (:beyond IS NULL OR (number <= :beyond AND stored_at < :old)) ORDER BY number LIMIT :left",
            {"player_id": pair[0], "session_id": pair[1], "beyond": beyond, "old": old, "left": self.left},
        )
        return [row[0] for row in rows.fetchall()]

    # The rest.

    def remove_requests(self) -> None:
        gone = self.db.execute(
            "DELETE FROM requests WHERE key IN (SELECT key FROM requests WHERE stored_at < ? LIMIT ?)",
            (self._before(self.bounds.message_seconds), max(self.left, 0)),
        ).rowcount
        self.requests += gone
        self.left -= gone

    def forget_expired(self) -> None:
        """Of what has been removed only the newest is remembered, and no longer than an ended session."""
        most = min(MAX_EXPIRED, self.bounds.store_bytes // EXPIRED_SHARE // EXPIRED_BYTES)
        newest = self.db.execute("SELECT max(number) FROM expired").fetchone()[0] or 0
        forget = self._before(self.bounds.session_seconds)
        rows = self.db.execute(
            "SELECT number, removed_at FROM expired ORDER BY number LIMIT ?", (max(self.left, 0),)
        ).fetchall()
        gone = [(number,) for number, removed_at in rows if number <= newest - most or removed_at < forget]
        self.db.executemany("DELETE FROM expired WHERE number = ?", gone)
        self.left -= len(gone)

    def remove_connections(self) -> None:
        """Rows of connections whose session has ended long ago: there should be none."""
        gone = self.db.execute(
            "DELETE FROM connections WHERE connection_id IN (SELECT c.connection_id FROM connections AS c"
            " JOIN sessions AS s ON s.player_id = c.player_id AND s.session_id = c.session_id"
            " WHERE s.ended_at < ? LIMIT ?)",
            (self._before(STALE_SECONDS), max(self.left, 0)),
        ).rowcount
        self.connections += gone
        self.left -= gone

    def sweep_targets(self, cursors: Cursors, rows: int) -> None:
        """Forget `removed` of targets that no session can ask about any more.

        A channel's: nobody has an interval in it (who subscribes later starts above it). A player's:
        there is no session left, and the removal is as old as an ended session's memory. One pass over
        the table takes many clean-ups; nothing depends on how soon.
        """
        found = self.db.execute(
            "SELECT target, messages, removed_at FROM targets WHERE target > ? ORDER BY target LIMIT ?",
            (cursors.targets, rows),
        ).fetchall()
        cursors.targets = found[-1][0] if len(found) == rows else ""
        forget = self._before(self.bounds.session_seconds)
        for target, messages, removed_at in found:
            if messages == 0 and self._nobody_asks(target, removed_at < forget):
                self.db.execute(
                    "DELETE FROM targets WHERE target = ?1 AND NOT EXISTS (SELECT 1 FROM messages WHERE target = ?1)",
                    (target,),
                )

    def _nobody_asks(self, target: str, long_ago: bool) -> bool:
        if target.startswith("#"):
            sql = "SELECT 1 FROM subscriptions WHERE channel = ? LIMIT 1"
        elif target.startswith("@") and long_ago:
            sql = "SELECT 1 FROM sessions WHERE player_id = ? LIMIT 1"
        else:
            return False
        return self.db.execute(sql, (target[1:],)).fetchone() is None
