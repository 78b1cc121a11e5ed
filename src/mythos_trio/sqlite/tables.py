"""Questions and changes of the tables that more than one module needs."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final

from mythos_trio.core import names
from mythos_trio.core.session import SessionRow, State
from mythos_trio.core.transaction import Answer

# Bodies are text for operators and bytes for us: the cast saves decoding and encoding.
MESSAGE_COLUMNS: Final = "seq, id, target, CAST(body AS BLOB), stored_at"
SESSION_COLUMNS: Final = (
    "player_id, session_id, start, mail_from, seen, lost, state, told, owed,"
    " created_at, last_online, ended_at, end_reason"
)


# Of what is read together many rows were stored together.
@lru_cache(maxsize=256)
def posix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def roll_back(db: sqlite3.Connection) -> None:
    """End an open transaction. If that fails too, the next one tries again before it begins."""
    if db.in_transaction:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")


def newest_session(db: sqlite3.Connection, player_id: str, columns: str) -> tuple[Any, ...] | None:
    found: tuple[Any, ...] | None = db.execute(
        f"SELECT {columns} FROM sessions WHERE player_id = ? ORDER BY start DESC LIMIT 1", (player_id,)
    ).fetchone()
    return found


def session_row(db: sqlite3.Connection, row: Sequence[Any]) -> SessionRow:
    """*row* has `SESSION_COLUMNS`."""
    player_id, session_id, start, mail_from, seen, lost, state, told, owed, created, online, ended, end_reason = row
    channels = db.execute(
        "SELECT channel FROM subscriptions WHERE player_id = ? AND session_id = ? AND finish IS NULL ORDER BY start",
        (player_id, session_id),
    )
    return SessionRow(
        player_id,
        session_id,
        start,
        mail_from,
        seen,
        lost,
        state,
        told,
        owed,
        created_at=posix(created),
        last_online=posix(online),
        ended_at=None if ended is None else posix(ended),
        end_reason=end_reason,
        channels=tuple(channel for (channel,) in channels),
    )


def find_answer(db: sqlite3.Connection, player_id: str, session_id: str, command_id: str) -> Answer | None:
    row = db.execute(
        "SELECT digest, CAST(body AS BLOB) FROM answers WHERE player_id = ? AND session_id = ? AND command_id = ?",
        (player_id, session_id, command_id),
    ).fetchone()
    return None if row is None else Answer(player_id, session_id, command_id, *row)


def open_interval(db: sqlite3.Connection, player_id: str, session_id: str, channel: str) -> int | None:
    """The start of the session's open subscription of *channel*."""
    row = db.execute(
        "SELECT start FROM subscriptions"
        " WHERE player_id = ? AND session_id = ? AND channel = ? AND finish IS NULL ORDER BY start DESC LIMIT 1",
        (player_id, session_id, channel),
    ).fetchone()
    return None if row is None else int(row[0])


def removed_of(db: sqlite3.Connection, target: str) -> int:
    """The newest number of *target* that retention took; 0 if it took none."""
    row = db.execute("SELECT removed FROM targets WHERE target = ?", (target,)).fetchone()
    return 0 if row is None else int(row[0])


def close_interval(
    db: sqlite3.Connection, player_id: str, session_id: str, channel: str, start: int, finish: int
) -> None:
    """Close an open interval; what holds nothing any more is not kept, only the number lost with it."""
    target = names.to_channel(channel)
    key = (player_id, session_id, channel, start)
    last = db.execute("SELECT max(seq) FROM messages WHERE target = ? AND seq > ?", (target, start)).fetchone()[0]
    if last is not None:
        db.execute(
            "UPDATE subscriptions SET finish = ?, last = ?"
            " WHERE player_id = ? AND session_id = ? AND channel = ? AND start = ?",
            (finish, last, *key),
        )
        return
    db.execute("DELETE FROM subscriptions WHERE player_id = ? AND session_id = ? AND channel = ? AND start = ?", key)
    removed = removed_of(db, target)
    if removed > start:
        db.execute(
            "UPDATE sessions SET lost = max(lost, ?) WHERE player_id = ? AND session_id = ?",
            (removed, player_id, session_id),
        )


def end_session(db: sqlite3.Connection, player_id: str, session_id: str, reason: str, number: int, now: str) -> bool:
    """Whether it was a current session that has now ended, with all its subscriptions."""
    ended = db.execute(
        "UPDATE sessions SET ended_at = ?, end_reason = ?, finish = ?, state = ?, state_since = ?"
        " WHERE player_id = ? AND session_id = ? AND ended_at IS NULL",
        (now, reason, number, State.ENDED, now, player_id, session_id),
    ).rowcount
    if not ended:
        return False
    subscriptions = db.execute(
        "SELECT channel, start FROM subscriptions WHERE player_id = ? AND session_id = ? AND finish IS NULL",
        (player_id, session_id),
    ).fetchall()
    for channel, start in subscriptions:
        close_interval(db, player_id, session_id, channel, start, number)
    db.execute("INSERT OR IGNORE INTO answered VALUES (?, ?)", (player_id, session_id))
    return True


def bytes_in_use(db: sqlite3.Connection) -> int:
    """Bytes of the file that hold something."""
    pages: int = db.execute("PRAGMA page_count").fetchone()[0] - db.execute("PRAGMA freelist_count").fetchone()[0]
    return pages * int(db.execute("PRAGMA page_size").fetchone()[0])


def id_key(message_id: str) -> int:
    """64 bits for a message's id, to remember it by when the message is gone: among 200,000 of them another id has
    the same with a chance of one in 10^14."""
    return int.from_bytes(blake2b(message_id.encode(), digest_size=8).digest(), "big", signed=True)
