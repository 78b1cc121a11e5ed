"""The store in one SQLite file, for one process.

One connection writes, a few read (WAL: they never wait for each other). Every change is one SQL
transaction; a batch is one too (group commit).

Numbers are reserved ahead: a block of them is set aside in a commit that reaches the disk, and only
then handed out. After a stop that was not in order the next start goes on above the block, so no
number is ever given twice, whatever the last commits were that a power cut took with it.

What an operator may want to see is readable text (times are RFC 3339, bodies are JSON); the tables are
``sessions``, ``connections``, ``subscriptions``, ``messages``, ``answers``, ``requests`` and ``epochs``.
``targets`` keeps, per target, how much is held and the newest number that retention removed; what has
been stored since it was last written is counted in memory, and again at a start (`meta.counted`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import json
import os
import queue
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from attrs import define, field

from mythos_trio.core import names
from mythos_trio.core.position import Epoch, Epochs, Interval, lost_after
from mythos_trio.core.session import State, Told
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
from mythos_trio.seams import rfc3339
from mythos_trio.storage import (
    Bounds,
    Chunk,
    Cleaned,
    Notes,
    Recovered,
    SessionRow,
    StoredMessage,
    StoreError,
    StoreUnusable,
    refused,
)

Durability: TypeAlias = Literal["process", "power"]
Schema: TypeAlias = Sequence[Sequence[str]]

# "myth" in the file's header (SQLite file format, section 1.3.15): says that the file is ours.
APPLICATION_ID: Final = 0x6D797468
# Below it there is no RETURNING.
OLDEST_SQLITE: Final = (3, 35, 0)
RESERVE: Final = 65536
READERS: Final = 2
# A chunk is held in memory whole: as much as a session's log.
MAX_CHUNK_BYTES: Final = 1 << 20
# How much may be stored before the size is looked at again, and before counts are written.
GROWTH_STEP: Final = 1 << 20
MAX_UNCOUNTED_TARGETS: Final = 4096
MAX_UNCOUNTED: Final = 65536
# What a message's row costs beside its body: indexes, id, digest, time (measured: 150-200 bytes).
ROW_OVERHEAD: Final = 180
# Rows that a commit removes at most beyond what it makes up for; and which part of the excess goes at
# each step of growth, if that is more than the growth itself.
ROOM_SLICE: Final = 500
ROOM_SHARE: Final = 8
# A row of a connection whose session ended this long ago is stale: marks are written within 1 s.
STALE_SECONDS: Final = 60.0

VERSION_1: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    """INSERT INTO meta (name, value) VALUES
        ('clean', 1), ('next', 1), ('reserved', 0), ('counted', 0), ('commits', 0),
        ('boot_id', ''), ('durability', 'process')""",
    "CREATE TABLE epochs (number INTEGER PRIMARY KEY, first INTEGER NOT NULL, created_at TEXT NOT NULL)",
    """CREATE TABLE sessions (
        player_id TEXT NOT NULL,
        session_id TEXT NOT NULL,
        data TEXT NOT NULL DEFAULT '{}',
        created_at TEXT NOT NULL,
        ended_at TEXT,
        end_reason TEXT,
        state TEXT NOT NULL,
        state_since TEXT NOT NULL,
        last_online TEXT NOT NULL,
        start INTEGER NOT NULL,
        finish INTEGER,
        mail_from INTEGER NOT NULL,
        seen INTEGER NOT NULL,
        lost INTEGER NOT NULL DEFAULT 0,
        told TEXT NOT NULL,
        owed TEXT NOT NULL,
        PRIMARY KEY (player_id, session_id))""",
    # A player has at most one current session, whatever a bug above would do.
    "CREATE UNIQUE INDEX sessions_current ON sessions (player_id) WHERE ended_at IS NULL",
    "CREATE INDEX sessions_newest ON sessions (player_id, start)",
    "CREATE INDEX sessions_start ON sessions (start)",
    "CREATE INDEX sessions_finish ON sessions (finish)",
    "CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at IS NOT NULL",
    "CREATE INDEX sessions_offline ON sessions (state_since) WHERE state = 'offline'",
    "CREATE INDEX sessions_live ON sessions (start) WHERE state IN ('online', 'linkdead') OR owed <> ''",
    """CREATE TABLE connections (
        connection_id TEXT PRIMARY KEY,
        player_id TEXT NOT NULL,
        session_id TEXT NOT NULL,
        transport TEXT NOT NULL,
        server_id TEXT NOT NULL,
        address TEXT NOT NULL,
        created_at TEXT NOT NULL)""",
    "CREATE INDEX idx_connections_player_id ON connections (player_id)",
    "CREATE INDEX idx_connections_session_id ON connections (session_id)",
    "CREATE INDEX idx_connections_created_at ON connections (created_at)",
    """CREATE TABLE messages (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        target TEXT NOT NULL,
        body TEXT NOT NULL,
        digest BLOB,
        stored_at TEXT NOT NULL)""",
    "CREATE UNIQUE INDEX messages_id ON messages (id)",
    "CREATE INDEX messages_target ON messages (target, seq)",
    # An interval: its channel's messages with start < seq < finish (contract: subscribing and leaving
    # take numbers). `last` as `core.position.Interval.last`.
    """CREATE TABLE subscriptions (
        player_id TEXT NOT NULL,
        session_id TEXT NOT NULL,
        channel TEXT NOT NULL,
        start INTEGER NOT NULL,
        finish INTEGER,
        last INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (player_id, session_id, channel, start)) WITHOUT ROWID""",
    "CREATE INDEX subscriptions_channel ON subscriptions (channel, start)",
    "CREATE INDEX subscriptions_closed ON subscriptions (channel, last) WHERE finish IS NOT NULL",
    """CREATE TABLE answers (
        number INTEGER PRIMARY KEY,
        player_id TEXT NOT NULL,
        session_id TEXT NOT NULL,
        command_id TEXT NOT NULL,
        digest BLOB NOT NULL,
        body TEXT NOT NULL,
        stored_at TEXT NOT NULL)""",
    "CREATE UNIQUE INDEX answers_command ON answers (player_id, session_id, command_id)",
    "CREATE INDEX answers_session ON answers (player_id, session_id)",
    # Sessions whose answers clean-up has to look at: they have new ones, old ones, or have ended.
    """CREATE TABLE answered (
        player_id TEXT NOT NULL, session_id TEXT NOT NULL, PRIMARY KEY (player_id, session_id)) WITHOUT ROWID""",
    "CREATE TABLE requests (key TEXT PRIMARY KEY, digest BLOB NOT NULL, seqs TEXT NOT NULL, stored_at TEXT NOT NULL)",
    "CREATE INDEX requests_stored_at ON requests (stored_at)",
    """CREATE TABLE targets (
        target TEXT PRIMARY KEY,
        messages INTEGER NOT NULL DEFAULT 0,
        bytes INTEGER NOT NULL DEFAULT 0,
        removed INTEGER NOT NULL DEFAULT 0,
        removed_at TEXT NOT NULL DEFAULT '') WITHOUT ROWID""",
    "CREATE INDEX targets_bytes ON targets (bytes)",
)

# What makes version n of version n - 1. A new version is one more entry; entries never change.
SCHEMA: Final[Schema] = (VERSION_1,)


_INSERT_MESSAGE: Final = (
    "INSERT INTO messages (seq, id, target, body, digest, stored_at) VALUES (?, ?, ?, CAST(? AS TEXT), ?, ?)"
)
# Bodies are text for operators and bytes for us: the cast saves decoding and encoding.
_MESSAGE_COLUMNS: Final = "seq, id, target, CAST(body AS BLOB), stored_at"
_READ_STREAM: Final = (
    f"SELECT {_MESSAGE_COLUMNS} FROM messages WHERE target = ? AND seq > ? AND seq <= ? ORDER BY target, seq"
)
_SESSION_COLUMNS: Final = (
    "player_id, session_id, start, mail_from, seen, lost, state, told, owed,"
    " created_at, last_online, ended_at, end_reason"
)
_COUNT: Final = """
    INSERT INTO targets (target, messages, bytes) VALUES (?, ?, ?)
    ON CONFLICT (target) DO UPDATE SET messages = messages + excluded.messages, bytes = bytes + excluded.bytes
    RETURNING messages"""
_REMOVED: Final = """
    INSERT INTO targets (target, removed, removed_at) VALUES (:target, :newest, :now)
    ON CONFLICT (target) DO UPDATE SET
        messages = max(messages - :count, 0), bytes = max(bytes - :size, 0),
        removed = max(removed, excluded.removed), removed_at = excluded.removed_at"""
_MARK: Final = """
    UPDATE sessions SET
        state_since = CASE WHEN state = :state OR ended_at IS NOT NULL THEN state_since ELSE :now END,
        state = CASE WHEN ended_at IS NULL THEN :state ELSE 'ended' END,
        told = :told, owed = :owed
    WHERE player_id = :player_id AND session_id = :session_id"""
_FOLD: Final = """
    UPDATE sessions SET lost = max(lost, gone.last)
    FROM (SELECT player_id, session_id, max(last) AS last FROM subscriptions
          WHERE channel = ? AND finish IS NOT NULL AND last <= ? GROUP BY player_id, session_id) AS gone
    WHERE sessions.player_id = gone.player_id AND sessions.session_id = gone.session_id"""

_ABANDONED: Final = Refused(Reason.FAILED, "abandoned before it was stored")
_NOTHING_TO_REMOVE: Final = "the store has reached MAX_STORE_BYTES, and no message is left that could be removed"

# The environment's failures (SQLite result codes): no transaction of the batch is to blame.
_ENVIRONMENT: Final = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOTADB,
    }
)


def read_boot_id() -> str | None:
    """What changes whenever the machine starts; None where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    except OSError:
        return None


def _result_code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code; None if it was the Python module that complained."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _store_error(error: sqlite3.Error | OSError) -> StoreError:
    if isinstance(error, OSError):
        return StoreError(f"the database failed: {error}", full=error.errno in (errno.ENOSPC, errno.EDQUOT))
    return StoreError(f"the database failed: {error}", full=_result_code(error) == sqlite3.SQLITE_FULL)


def _posix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# Files.


def _make_directory(directory: Path) -> None:
    """Make *directory* and what is missing above it, private to the user; what exists stays as it is."""
    if not directory.is_dir():
        _make_directory(directory.parent)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)


def _make_private(path: Path) -> None:
    """Nobody but the user may read or write the database; SQLite gives its other files the same mode."""
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_IMODE(name.stat().st_mode) != 0o600:
                name.chmod(0o600)


def _check_ours(path: Path) -> None:
    """
    Look at the file without SQLite, which would change it.

    :raises StoreUnusable: it holds something, and that is not ours.
    """
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return
    if not head:
        return
    if not head.startswith(b"SQLite format 3\0"):
        raise StoreUnusable(f"{path} is not an SQLite database; it has not been touched")
    application_id = int.from_bytes(head[68:72], "big")
    if application_id != APPLICATION_ID and not (application_id == 0 and _is_empty(path)):
        raise StoreUnusable(
            f"{path} is the database of another program (application_id {application_id:#x}); it has not been touched"
        )


def _is_empty(path: Path) -> bool:
    """Whether a database has no tables: somebody's `sqlite3 FILE` that made nothing yet."""
    if Path(f"{path}-wal").exists() or Path(f"{path}-journal").exists():
        return False
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as db:
        return bool(db.execute("SELECT count(*) = 0 FROM sqlite_master").fetchone()[0])


class _ProcessLock:
    """Keeps a second process out. The kernel lets go of it however the process ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def take(self) -> None:
        """
        :raises StoreUnusable: another process has it.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            who = f"process {holder}" if holder else "another process"
            raise StoreUnusable(f"{self._path.with_suffix('')} is in use by {who}") from None
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def let_go(self) -> None:
        # The file stays: removing it would let two others lock two different files.
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
            os.close(fd)


# What a transaction does to the tables.


class _Refusing(Exception):
    """Carries the outcome of a transaction that is to leave no trace."""

    def __init__(self, reason: str, message: str, answer: Answer | None = None) -> None:
        super().__init__(message)
        self.outcome = Refused(reason, message, answer)


def _is_plain(transaction: Transaction) -> bool:
    """Whether it does nothing but append."""
    if transaction.answer is not None or transaction.request is not None or transaction.presence:
        return False
    return all(type(effect) is Append for effect in transaction.effects)


def _adds(transaction: Transaction) -> bool:
    """Whether it makes the store larger: ends, leavings and marks may pass when it is full."""
    if transaction.answer is not None or transaction.request is not None:
        return True
    return any(isinstance(effect, (Append, Begin, Subscribe)) for effect in transaction.effects)


@define
class _Batch:
    """Applies transactions inside one SQL transaction. *next* is the next free number; *stored* are
    (target, bytes) of the new messages, for the counts."""

    db: sqlite3.Connection
    next: int
    now: str
    full: bool
    stored: list[tuple[str, int]] = field(factory=list)

    def apply(self, batch: Sequence[Transaction]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        run: list[Transaction] = []
        for transaction in batch:
            if _is_plain(transaction):
                run.append(transaction)
            else:
                outcomes += self._run(run)
                outcomes.append(self._one(transaction))
                run = []
        return outcomes + self._run(run)

    def _run(self, run: Sequence[Transaction]) -> list[Outcome]:
        """Several transactions that only append, in one go; if an id is there already, one by one."""
        if self.full:
            return [self._one(transaction) for transaction in run]
        number = first = self.next
        rows = []
        outcomes: list[Outcome] = []
        for transaction in run:
            start = number
            for effect in transaction.effects:
                assert isinstance(effect, Append)  # for the type checker: see `_is_plain`
                rows.append((number, effect.id, effect.target, effect.body, effect.digest, self.now))
                number += 1
            outcomes.append(Committed(tuple(range(start, number)), number - 1))
        try:
            self.db.executemany(_INSERT_MESSAGE, rows)
        except sqlite3.IntegrityError:
            self.db.execute("DELETE FROM messages WHERE seq >= ?", (first,))
            return [self._one(transaction) for transaction in run]
        self.next = number
        self.stored += [(row[2], len(row[3])) for row in rows]
        return outcomes

    def _one(self, transaction: Transaction) -> Outcome:
        number, stored = self.next, len(self.stored)
        self.db.execute("SAVEPOINT one")
        try:
            outcome: Outcome = self._apply(transaction)
        except _Refusing as refusal:
            self.db.execute("ROLLBACK TO one")
            self.next = number
            del self.stored[stored:]
            outcome = refusal.outcome
        self.db.execute("RELEASE one")
        return outcome

    def _apply(self, transaction: Transaction) -> Committed:
        if transaction.request is not None:
            seqs = self._find_request(transaction.request, len(transaction.effects))
            if seqs is not None:
                return Committed(seqs, self.next - 1, frozenset(range(len(seqs))))
        if transaction.answer is not None:
            self._check_answer(transaction.answer)
        if self.full and _adds(transaction):
            raise _Refusing(Reason.FULL, _NOTHING_TO_REMOVE)
        duplicates: set[int] = set()
        done = tuple(self._do(effect, index, duplicates) for index, effect in enumerate(transaction.effects))
        if transaction.answer is not None:
            self._insert_answer(transaction.answer)
        for mark in transaction.presence:
            self._mark(mark)
        if transaction.request is not None:
            key, digest = transaction.request.key, transaction.request.digest
            self.db.execute("INSERT INTO requests VALUES (?, ?, ?, ?)", (key, digest, json.dumps(done), self.now))
        return Committed(done, self.next - 1, frozenset(duplicates))

    def _do(self, effect: Effect, index: int, duplicates: set[int]) -> int:
        """:returns: the effect's number."""
        if isinstance(effect, Append):
            first = self._find_duplicate(effect)
            if first is not None:
                duplicates.add(index)
                return first
        number, self.next = self.next, self.next + 1
        match effect:
            case Append(target, id_, body, digest):
                self.db.execute(_INSERT_MESSAGE, (number, id_, target, body, digest, self.now))
                self.stored.append((target, len(body)))
            case Subscribe(player_id, session_id, channel):
                self._subscribe(player_id, session_id, channel, number)
            case Unsubscribe(player_id, session_id, channel):
                start = _open_interval(self.db, player_id, session_id, channel)
                if start is not None:
                    _close_interval(self.db, player_id, session_id, channel, start, number)
            case Begin():
                self._begin(effect, number)
            case End(player_id, session_id, reason):
                if not _end_session(self.db, player_id, session_id, reason, number, self.now):
                    raise _Refusing(Reason.ENDED, f"{session_id} is not a current session of {player_id}")
        return number

    def _find_duplicate(self, append: Append) -> int | None:
        """The number of the message with the same id, target and content; None if the id is new."""
        row = self.db.execute("SELECT seq, target, digest FROM messages WHERE id = ?", (append.id,)).fetchone()
        if row is None:
            return None
        seq, target, digest = row
        if append.digest is None or target != append.target or digest != append.digest:
            raise _Refusing(Reason.CONFLICT, f"the id {append.id!r} is that of another message")
        return int(seq)

    def _find_request(self, request: Request, effects: int) -> tuple[int, ...] | None:
        """The numbers that the same request got when it was new; None if it is new.

        They are kept with the key, for its messages may be gone before it.
        """
        row = self.db.execute("SELECT digest, seqs FROM requests WHERE key = ?", (request.key,)).fetchone()
        if row is None:
            return None
        seqs = json.loads(row[1])
        if row[0] != request.digest or len(seqs) != effects:
            raise _Refusing(Reason.KEY, f"the Idempotency-Key {request.key!r} is that of another request")
        return tuple(seqs)

    def _check_answer(self, answer: Answer) -> None:
        found = _find_answer(self.db, answer.player_id, answer.session_id, answer.command_id)
        if found is not None:
            raise _Refusing(Reason.ANSWERED, f"the command {answer.command_id!r} has its answer", found)

    def _insert_answer(self, answer: Answer) -> None:
        self.db.execute(
            "INSERT INTO answers (player_id, session_id, command_id, digest, body, stored_at)"
            " VALUES (?, ?, ?, ?, CAST(? AS TEXT), ?)",
            (answer.player_id, answer.session_id, answer.command_id, answer.digest, answer.body, self.now),
        )
        self.db.execute("INSERT OR IGNORE INTO answered VALUES (?, ?)", (answer.player_id, answer.session_id))

    def _mark(self, mark: PresenceMark) -> None:
        self.db.execute(
            _MARK,
            {
                "player_id": mark.player_id,
                "session_id": mark.session_id,
                "state": mark.state,
                "told": mark.told,
                "owed": mark.owed,
                "now": self.now,
            },
        )

    def _subscribe(self, player_id: str, session_id: str, channel: str, number: int) -> None:
        # A transaction is committed whatever becomes of its session: for one that has ended in the
        # meantime there is nothing to subscribe.
        current = self.db.execute(
            "SELECT 1 FROM sessions WHERE player_id = ? AND session_id = ? AND ended_at IS NULL",
            (player_id, session_id),
        ).fetchone()
        if current and _open_interval(self.db, player_id, session_id, channel) is None:
            self.db.execute(
                "INSERT INTO subscriptions (player_id, session_id, channel, start) VALUES (?, ?, ?, ?)",
                (player_id, session_id, channel, number),
            )

    def _begin(self, begin: Begin, number: int) -> None:
        pair = (begin.player_id, begin.session_id)
        if self.db.execute("SELECT 1 FROM sessions WHERE player_id = ? AND session_id = ?", pair).fetchone():
            raise _Refusing(Reason.ENDED, f"the session {begin.session_id} has existed; it cannot begin again")
        newest = _newest_session(self.db, begin.player_id, "ended_at, created_at")
        if newest is not None and newest[0] is None:
            raise _Refusing(Reason.ENDED, f"{begin.player_id} has another current session")
        # Operators take the newest `created_at` for the current session, also if the clock was set back.
        created_at = self.now
        if newest is not None and newest[1] >= created_at:
            created_at = rfc3339(_posix(newest[1]) + 0.0011)
        self.db.execute(
            "INSERT INTO sessions (player_id, session_id, created_at, state, state_since, last_online,"
            " start, mail_from, seen, told, owed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '')",
            (
                *pair,
                created_at,
                State.ONLINE,
                self.now,
                self.now,
                number,
                begin.mail_from,
                begin.mail_from,
                Told.ABSENT,
            ),
        )


def _newest_session(db: sqlite3.Connection, player_id: str, columns: str) -> tuple[Any, ...] | None:
    found: tuple[Any, ...] | None = db.execute(
        f"SELECT {columns} FROM sessions WHERE player_id = ? ORDER BY start DESC LIMIT 1", (player_id,)
    ).fetchone()
    return found


def _find_answer(db: sqlite3.Connection, player_id: str, session_id: str, command_id: str) -> Answer | None:
    row = db.execute(
        "SELECT digest, CAST(body AS BLOB) FROM answers WHERE player_id = ? AND session_id = ? AND command_id = ?",
        (player_id, session_id, command_id),
    ).fetchone()
    return None if row is None else Answer(player_id, session_id, command_id, *row)


def _open_interval(db: sqlite3.Connection, player_id: str, session_id: str, channel: str) -> int | None:
    """The start of the session's open subscription of *channel*."""
    row = db.execute(
        "SELECT start FROM subscriptions"
        " WHERE player_id = ? AND session_id = ? AND channel = ? AND finish IS NULL ORDER BY start DESC LIMIT 1",
        (player_id, session_id, channel),
    ).fetchone()
    return None if row is None else int(row[0])


def _removed(db: sqlite3.Connection, target: str) -> int:
    """The newest number of *target* that retention took; 0 if it took none."""
    row = db.execute("SELECT removed FROM targets WHERE target = ?", (target,)).fetchone()
    return 0 if row is None else int(row[0])


def _close_interval(
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
    removed = _removed(db, target)
    if removed > start:
        db.execute(
            "UPDATE sessions SET lost = max(lost, ?) WHERE player_id = ? AND session_id = ?",
            (removed, player_id, session_id),
        )


def _end_session(db: sqlite3.Connection, player_id: str, session_id: str, reason: str, number: int, now: str) -> bool:
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
        _close_interval(db, player_id, session_id, channel, start, number)
    db.execute("INSERT OR IGNORE INTO answered VALUES (?, ?)", (player_id, session_id))
    return True


# Retention.


@define
class _Cursors:
    """How far passes over whole tables have come; they go on in the next slice."""

    answered: tuple[str, str] = ("", "")
    targets: str = ""


@define
class _Slice:
    """One slice of clean-up inside one SQL transaction. *left* is how many rows it may still touch."""

    db: sqlite3.Connection
    next: int
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
    removed_bytes: int = 0
    """Of messages, with what their rows cost."""
    ended: list[tuple[str, str]] = field(factory=list)
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
            ended=tuple(self.ended),
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
        self.db.execute("DELETE FROM messages WHERE seq <= ?", (rows[-1][0],))
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
            self.db.execute("DELETE FROM messages WHERE target = ? AND seq <= ?", (target, rows[-1][0]))
            self._account(target, rows)
        return len(rows)

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
            row = _newest_session(self.db, target[1:], "seen")
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

    def expire_sessions(self) -> None:
        """End those that have been offline for `Bounds.message_seconds`."""
        rows = self.db.execute(
            "SELECT player_id, session_id FROM sessions WHERE state = 'offline' AND state_since < ?"
            " ORDER BY state_since LIMIT ?",
            (self._before(self.bounds.message_seconds), max(self.left, 0)),
        ).fetchall()
        for player_id, session_id in rows:
            _end_session(self.db, player_id, session_id, "expired", self.next, rfc3339(self.now))
            self.next += 1
        self.ended += rows
        self.sessions += len(rows)
        self.left -= len(rows)

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

    def remove_answers(self, cursors: _Cursors) -> None:
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

    def sweep_targets(self, cursors: _Cursors, rows: int) -> None:
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


def _bytes_in_use(db: sqlite3.Connection) -> int:
    """Bytes of the file that hold something."""
    pages: int = db.execute("PRAGMA page_count").fetchone()[0] - db.execute("PRAGMA freelist_count").fetchone()[0]
    return pages * int(db.execute("PRAGMA page_size").fetchone()[0])


# Reading.


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
            message = _message(row)
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


def _session_row(db: sqlite3.Connection, row: Sequence[Any]) -> SessionRow:
    """*row* has `_SESSION_COLUMNS`."""
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
        created_at=_posix(created),
        last_online=_posix(online),
        ended_at=None if ended is None else _posix(ended),
        end_reason=end_reason,
        channels=tuple(channel for (channel,) in channels),
    )


def _message(row: Sequence[Any]) -> StoredMessage:
    """*row* has `_MESSAGE_COLUMNS`."""
    seq, id_, target, body, stored_at = row
    return StoredMessage(seq, id_, target, body, _posix(stored_at))


class SqliteDatabase:
    """See the module's docstring; implements `mythos_trio.storage.Database`.

    :param path: of the file; it and its directory are made.
    :param durability: ``"process"``: a commit survives `kill -9`; ``"power"``: it survives a power cut.
    :param reserve: how many numbers are set aside at once; that many at most are skipped by a start
        after a stop that was not in order.
    :param busy_seconds: how long a call waits for another program's lock, and for a free reader.
    :param max_store_bytes: of bytes in use: beyond them `commit` makes room.
    :param boot_id: what tells one start of the machine from another (see `read_boot_id`).
    :param connect: as `sqlite3.connect`; tests make it fail.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Durability = "process",
        reserve: int = RESERVE,
        busy_seconds: float = 2.0,
        max_store_bytes: int = 1 << 30,
        readers: int = READERS,
        schema: Schema = SCHEMA,
        boot_id: Callable[[], str | None] = read_boot_id,
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect,
    ) -> None:
        # Two names of one file must not be two stores.
        self.path = Path(os.path.realpath(path))
        self.durability: Durability = durability
        self.max_store_bytes = max_store_bytes
        self._reserve = reserve
        self._busy_seconds = busy_seconds
        self._reader_count = readers
        self._schema = schema
        self._boot_id = boot_id
        self._connect = connect
        self._lock = _ProcessLock(Path(f"{self.path}.lock"))
        self._db: sqlite3.Connection | None = None
        self._readers: queue.LifoQueue[sqlite3.Connection] | None = None
        self._file: tuple[int, int] | None = None
        self._forget()

    def _forget(self) -> None:
        """Everything that is known of an open store."""
        self._next = 1
        self._reserved = 0
        self._commits = 0
        self._in_doubt: int | None = None
        self._epoch = 0
        # Counts that `targets` does not have yet, of messages with numbers above `_counted`.
        self._uncounted: dict[str, list[int]] = {}
        self._counted = 0
        # Targets that may hold more than `_count_bound`, the bound of the last clean-up.
        self._over: dict[str, None] = {}
        self._count_bound: int | None = None
        self._cursors = _Cursors()
        # What was stored since the size was looked at; what is to be removed since then.
        self._grown: int | None = None
        self._debt = 0
        self._full = False

    # Opening and closing.

    def open(self, now: float) -> Recovered:
        if self._db is not None:
            raise StoreUnusable(f"{self.path} is open already")
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StoreUnusable(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 or newer is needed")
        try:
            _make_directory(self.path.parent)
            self._lock.take()
            _check_ours(self.path)
            self._open_writer()
            recovered = self._recover(now)
            self._open_readers()
            _make_private(self.path)
        except StoreUnusable:
            self._let_go()
            raise
        except (OSError, sqlite3.Error, StoreError) as error:
            self._let_go()
            raise StoreUnusable(f"{self.path} cannot be opened: {error}") from error
        except BaseException:
            self._let_go()
            raise
        return recovered

    def new_epoch(self, now: float) -> Epoch:
        """
        Begin a new epoch in a store that nobody has open: it is a copy that was restored.

        :raises StoreUnusable: it cannot be opened.
        :raises StoreError: it cannot be written.
        """
        self.open(now)
        try:
            with self._errors(), self._transaction(fsync=True) as db:
                return self._insert_epoch(db, now)
        finally:
            self.close()

    def close(self) -> None:
        if self._db is None:
            return
        try:
            with self._errors(), self._transaction(fsync=True) as db:
                self._write_counts(db)
                self._put(db, clean=1, next=self._next)
        finally:
            self._let_go()

    def abandon(self) -> None:
        """Let go of the store without closing it in order: the next start recovers, as after ``kill -9``."""
        self._let_go()

    def _let_go(self) -> None:
        readers, self._readers = self._readers, None
        if readers is not None:
            for _ in range(self._reader_count):
                # One that is still reading in its thread is left to it.
                with contextlib.suppress(queue.Empty, sqlite3.Error):
                    readers.get(timeout=self._busy_seconds).close()
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()
        self._lock.let_go()
        self._forget()

    def _open_connection(self) -> sqlite3.Connection:
        return self._connect(
            str(self.path),
            isolation_level=None,
            check_same_thread=False,
            timeout=self._busy_seconds,
            cached_statements=256,
        )

    def _open_writer(self) -> None:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        _make_private(self.path)
        db = self._db = self._open_connection()
        # The schema comes before WAL: so the file's header says from its first byte that it is ours.
        self._migrate(db)
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise StoreUnusable(f"{self.path}: this file system cannot carry SQLite's WAL (journal mode {mode})")
        for pragma in (
            "cache_size = -32768",
            "temp_store = MEMORY",
            "secure_delete = FAST",
            # 16 MB: index pages that many commits touch are written back once. Beyond 64 MB it is cut.
            "wal_autocheckpoint = 4096",
            "journal_size_limit = 67108864",
            f"synchronous = {self._synchronous}",
        ):
            db.execute(f"PRAGMA {pragma}").fetchall()
        status = self.path.stat()
        self._file = (status.st_dev, status.st_ino)

    @property
    def _synchronous(self) -> str:
        return "FULL" if self.durability == "power" else "NORMAL"

    def _migrate(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(self._schema):
            raise StoreUnusable(
                f"{self.path} was written by a newer mythos-trio (schema version {version}, known: {len(self._schema)})"
            )
        for number, statements in enumerate(self._schema[version:], version + 1):
            db.execute("BEGIN EXCLUSIVE")
            try:
                for statement in statements:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {number}")
                db.execute("COMMIT")
            except BaseException:
                self._roll_back(db)
                raise

    def _open_readers(self) -> None:
        self._readers = queue.LifoQueue()
        for _ in range(self._reader_count):
            reader = self._open_connection()
            self._readers.put(reader)
            reader.execute("PRAGMA query_only = ON")
            reader.execute("PRAGMA cache_size = -8192")

    def _recover(self, now: float) -> Recovered:
        db = self._writer
        meta = dict(db.execute("SELECT name, value FROM meta"))
        clean = bool(meta["clean"])
        newest: int = meta["next"] - 1 if clean else meta["reserved"]
        self._next = newest + 1
        self._commits = meta["commits"]
        self._counted = meta["counted"]
        boot_id = self._boot_id() or ""
        same_boot = boot_id != "" and boot_id == meta["boot_id"]
        reserved = newest + self._reserve
        with self._transaction(fsync=True):
            # What the process had committed is in the file, unless the machine has gone down since.
            unknown_end = not clean and meta["durability"] != "power" and not same_boot
            if unknown_end or not db.execute("SELECT 1 FROM epochs").fetchone():
                self._insert_epoch(db, now)
            db.execute("DELETE FROM connections")
            self._recount(db)
            self._write_counts(db)
            self._put(db, clean=0, reserved=reserved, boot_id=boot_id, durability=self.durability)
        self._has_written_counts()
        self._reserved = reserved
        epochs = Epochs(tuple(Epoch(*row) for row in db.execute("SELECT number, first FROM epochs ORDER BY number")))
        self._epoch = epochs.present
        rows = db.execute(
            f"SELECT {_SESSION_COLUMNS} FROM sessions"
            " WHERE state IN ('online', 'linkdead') OR owed <> '' ORDER BY start"
        ).fetchall()
        return Recovered(epochs, newest, [_session_row(db, row) for row in rows], clean)

    def _insert_epoch(self, db: sqlite3.Connection, now: float) -> Epoch:
        number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM epochs").fetchone()[0]
        db.execute("INSERT INTO epochs VALUES (?, ?, ?)", (number, self._next, rfc3339(now)))
        return Epoch(number, self._next)

    def _recount(self, db: sqlite3.Connection) -> None:
        """What was stored after the counts were last written; at most about `MAX_UNCOUNTED` rows."""
        rows = db.execute(
            "SELECT target, count(*), sum(length(CAST(body AS BLOB))) FROM messages WHERE seq > ? GROUP BY target",
            (self._counted,),
        )
        self._uncounted = {target: [messages, size] for target, messages, size in rows.fetchall()}

    @staticmethod
    def _put(db: sqlite3.Connection, **values: int | str) -> None:
        db.executemany("UPDATE meta SET value = ? WHERE name = ?", [(value, name) for name, value in values.items()])

    # Writing.

    @property
    def _writer(self) -> sqlite3.Connection:
        if self._db is None:
            raise StoreError("the database is not open")
        return self._db

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's and the system's errors as `StoreError`."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise _store_error(error) from error

    @contextmanager
    def _transaction(self, *, fsync: bool = False) -> Iterator[sqlite3.Connection]:
        """One SQL transaction: what is done inside is committed, or an error says that it is not.

        :param fsync: it is on the disk afterwards, and with it all that was committed before.
        """
        db = self._writer
        self._check_usable(db)
        if fsync:
            db.execute("PRAGMA synchronous = FULL")
        try:
            db.execute("BEGIN IMMEDIATE")
            # Counted in the commit itself: if the commit reports a failure, this tells what is true.
            self._commits += 1
            number = self._commits
            try:
                yield db
                self._put(db, commits=number)
            except BaseException:
                self._roll_back(db)
                raise
            try:
                db.execute("COMMIT")
            except sqlite3.Error:
                self._roll_back(db)
                if not self._has_happened(db, number):
                    raise
        finally:
            if fsync:
                db.execute(f"PRAGMA synchronous = {self._synchronous}")

    def _check_usable(self, db: sqlite3.Connection) -> None:
        if self._in_doubt is not None:
            if db.execute("SELECT value FROM meta WHERE name = 'commits'").fetchone()[0] == self._in_doubt:
                # It was refused, and its messages were not delivered: memory and store differ.
                raise StoreError("a commit that was reported as failed is stored: the server has to be started again")
            self._in_doubt = None
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise StoreError(f"the database file {self.path} is gone") from None
        if (status.st_dev, status.st_ino) != self._file:
            raise StoreError(f"the database file {self.path} has been replaced")
        self._roll_back(db)

    @staticmethod
    def _roll_back(db: sqlite3.Connection) -> None:
        """End an open transaction. If that fails too, the next one tries again before it begins."""
        if db.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")

    def _has_happened(self, db: sqlite3.Connection, number: int) -> bool:
        """Whether the commit with this number is stored, although it has reported a failure."""
        until = time.monotonic() + self._busy_seconds
        while True:
            try:
                return bool(db.execute("SELECT value FROM meta WHERE name = 'commits'").fetchone()[0] == number)
            except sqlite3.Error as error:
                if time.monotonic() >= until:
                    self._in_doubt = number
                    raise StoreError(f"the outcome of a commit is not known: {error}") from error
                time.sleep(0.05)

    def commit(self, batch: Sequence[Transaction], now: float) -> list[Outcome]:
        # Read once: the event loop may set it at any time.
        passed_over = [transaction.abandoned for transaction in batch]
        live = [transaction for transaction, gone in zip(batch, passed_over, strict=True) if not gone]
        outcomes = iter(self._commit(live, now) if live else ())
        return [_ABANDONED if gone else next(outcomes) for gone in passed_over]

    def _commit(self, batch: Sequence[Transaction], now: float) -> list[Outcome]:
        try:
            self._keep_house(now)
            self._provide_numbers(sum(len(transaction.effects) for transaction in batch))
            return self._store(batch, now)
        except StoreError as error:
            return [refused(error) for _ in batch]
        except (sqlite3.Error, OSError) as error:
            if len(batch) == 1 or isinstance(error, OSError) or _result_code(error) in _ENVIRONMENT:
                return [refused(_store_error(error)) for _ in batch]
        except (ValueError, TypeError, OverflowError) as error:
            # What SQLite says of values that it cannot hold.
            if len(batch) == 1:
                return [Refused(Reason.FAILED, f"it cannot be stored: {error}")]
        # One of them is to blame: the others must not suffer.
        return [outcome for transaction in batch for outcome in self._commit([transaction], now)]

    def _store(self, batch: Sequence[Transaction], now: float) -> list[Outcome]:
        with self._transaction() as db:
            work = _Batch(db, self._next, rfc3339(now), self._full)
            outcomes = work.apply(batch)
            # Before the commit: if that fails its numbers are burnt, for it may still come to light.
            self._next = work.next
        uncounted, grown = self._uncounted, self._grown or 0
        for target, size in work.stored:
            count = uncounted.get(target)
            if count is None:
                uncounted[target] = [1, size]
            else:
                count[0] += 1
                count[1] += size
            grown += size
        self._grown = grown + len(work.stored) * ROW_OVERHEAD
        return outcomes

    def _provide_numbers(self, count: int) -> None:
        """See to it that *count* numbers may be given out."""
        left = self._reserved - self._next + 1
        if left >= max(count, self._reserve // 4):
            return
        try:
            self._reserve_numbers(count)
        except (StoreError, sqlite3.Error, OSError):
            # There are some left: what is wrong will show in the commit itself.
            if left < count:
                raise

    def _reserve_numbers(self, count: int) -> None:
        reserved = self._next - 1 + count + self._reserve
        with self._transaction(fsync=True) as db:
            self._put(db, reserved=reserved)
        self._reserved = reserved

    def _keep_house(self, now: float) -> None:
        """What has to be done every so often, before a commit."""
        if len(self._uncounted) > MAX_UNCOUNTED_TARGETS or self._next - self._counted > MAX_UNCOUNTED:
            with self._transaction() as db:
                self._write_counts(db)
            self._has_written_counts()
        # Counting pages costs 10 µs: often enough is every so many bytes, and whenever it is tight.
        if self._debt or self._full or self._grown is None or self._grown > self._growth_step:
            self._make_room(now)

    @property
    def _growth_step(self) -> int:
        return min(GROWTH_STEP, self.max_store_bytes // 64)

    def _make_room(self, now: float) -> None:
        """Beyond `max_store_bytes`: remove more than was added, in slices, until it is below again."""
        over = _bytes_in_use(self._writer) - self.max_store_bytes
        grown = self._grown or 0
        self._grown = 0
        if over <= 0:
            self._debt, self._full = 0, False
            return
        if grown > self._growth_step or not self._debt:
            self._debt += max(grown + grown // 4, over // ROOM_SHARE, ROW_OVERHEAD)
        # The bound of bytes is all that counts here.
        bounds = Bounds(0, 0, 0, self.max_store_bytes)
        with self._transaction() as db:
            self._write_counts(db)
            work = _Slice(db, self._next, now, bounds, max(ROOM_SLICE, 2 * grown // ROW_OVERHEAD))
            removable = work.make_room(self._debt)
        self._has_written_counts()
        self._debt = max(self._debt - work.removed_bytes, 0)
        self._full = not removable and _bytes_in_use(self._writer) > self.max_store_bytes

    # Counts.

    def _write_counts(self, db: sqlite3.Connection) -> None:
        """Add what was counted in memory to `targets`. After the commit: `_has_written_counts`."""
        bound = self._count_bound
        for target, (messages, size) in self._uncounted.items():
            held = db.execute(_COUNT, (target, messages, size)).fetchone()[0]
            if bound is not None and held > bound:
                self._over[target] = None
        self._put(db, counted=self._next - 1)

    def _has_written_counts(self) -> None:
        self._uncounted = {}
        self._counted = self._next - 1

    # Other writes.

    def probe(self) -> None:
        with self._errors():
            with self._transaction():
                pass
            if self._full and _bytes_in_use(self._writer) > self.max_store_bytes:
                raise StoreError(_NOTHING_TO_REMOVE, full=True)

    def note(self, notes: Notes) -> None:
        with self._errors():
            with self._transaction() as db:
                self._note(db, notes)
                self._write_counts(db)
            self._has_written_counts()

    @staticmethod
    def _note(db: sqlite3.Connection, notes: Notes) -> None:
        where = "player_id = ? AND session_id = ?"
        db.executemany(
            f"UPDATE sessions SET seen = ? WHERE {where} AND seen < ?",
            [(seen, *key, seen) for key, seen in notes.seen.items()],
        )
        db.executemany(
            f"UPDATE sessions SET last_online = ? WHERE {where}",
            [(rfc3339(at), *key) for key, at in notes.last_online.items()],
        )
        db.executemany(
            "INSERT OR REPLACE INTO connections"
            " (connection_id, player_id, session_id, transport, server_id, address, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (c.connection_id, c.player_id, c.session_id, c.transport, c.server_id, c.address, rfc3339(c.opened_at))
                for c in notes.opened
            ],
        )
        db.executemany("DELETE FROM connections WHERE connection_id = ?", [(id_,) for id_ in notes.closed])

    def clean(self, now: float, bounds: Bounds, *, slice_rows: int = 500) -> Cleaned:
        with self._errors():
            self.max_store_bytes = bounds.store_bytes
            self._provide_numbers(slice_rows)
            with self._transaction() as db:
                self._write_counts(db)
                self._survey(db, bounds.message_count)
                work = _Slice(db, self._next, now, bounds, slice_rows)
                over = list(self._over)
                cursors = _Cursors(self._cursors.answered, self._cursors.targets)
                self._clean(work, over, cursors)
                self._next = work.next
            self._has_written_counts()
            self._cursors = cursors
            for target in work.within:
                del self._over[target]
        return work.cleaned(more=work.left <= 0)

    @staticmethod
    def _clean(work: _Slice, over: Sequence[str], cursors: _Cursors) -> None:
        """The kinds in their order, until the slice is used up."""
        slice_rows = work.left
        steps: Sequence[Callable[[], object]] = (
            work.remove_old,
            lambda: work.remove_beyond_count(over),
            lambda: work.make_room(max(_bytes_in_use(work.db) - work.bounds.store_bytes, 0) // ROOM_SHARE),
            work.expire_sessions,
            lambda: work.remove_answers(cursors),
            work.forget_sessions,
            work.remove_requests,
            work.remove_connections,
            lambda: work.sweep_targets(cursors, slice_rows),
        )
        for step in steps:
            if work.left <= 0:
                return
            step()

    def _survey(self, db: sqlite3.Connection, bound: int) -> None:
        """Find all targets above a bound that is new; later ones are found where they are counted."""
        if bound == self._count_bound:
            return
        rows = db.execute("SELECT target FROM targets WHERE messages > ?", (bound,))
        self._over = dict.fromkeys(target for (target,) in rows.fetchall())
        self._count_bound = bound

    # Reading.

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
            with self._errors():
                db.execute("BEGIN")
                yield db
        finally:
            self._roll_back(db)
            readers.put(db)

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
            removed = {target: _removed(db, target) for target in {interval.target for interval in intervals}}
            lost = max(
                lost if lost > after else 0,
                lost_after([(interval, removed[interval.target]) for interval in intervals], after),
            )
            newest = upto if finish is None else min(upto, finish)
            wanted = [
                (i.target, max(i.start, after), newest if i.end is None else min(newest, i.end)) for i in intervals
            ]
            messages, complete = _merge(db, [part for part in wanted if part[1] < part[2]], limit)
        return Chunk(messages, upto if complete else messages[-1].seq, lost)

    def current_session(self, player_id: str) -> SessionRow | None:
        with self._reading() as db:
            row = _newest_session(db, player_id, _SESSION_COLUMNS)
            session = None if row is None else _session_row(db, row)
        return session if session is not None and session.ended_at is None else None

    def find_session(self, player_id: str, session_id: str) -> SessionRow | None:
        with self._reading() as db:
            row = db.execute(
                f"SELECT {_SESSION_COLUMNS} FROM sessions WHERE player_id = ? AND session_id = ?",
                (player_id, session_id),
            ).fetchone()
            return None if row is None else _session_row(db, row)

    def last_seen(self, player_id: str) -> int:
        with self._reading() as db:
            row = _newest_session(db, player_id, "seen")
            return 0 if row is None else int(row[0])

    def find_answer(self, player_id: str, session_id: str, command_id: str) -> Answer | None:
        with self._reading() as db:
            return _find_answer(db, player_id, session_id, command_id)

    def find_message(self, message_id: str) -> StoredMessage | None:
        with self._reading() as db:
            row = db.execute(f"SELECT {_MESSAGE_COLUMNS} FROM messages WHERE id = ?", (message_id,)).fetchone()
            return None if row is None else _message(row)

    def find_expired(self, message_id: str) -> bool:
        """Ids are forgotten with their messages: it cannot be known."""
        return False

    def receivers(self, message: StoredMessage, limit: int) -> tuple[list[SessionRow], int]:
        columns = ", ".join(f"s.{column.strip()}" for column in _SESSION_COLUMNS.split(","))
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
            return [_session_row(db, row) for row in rows], count

    def sessions(self, player_id: str | None, limit: int) -> list[SessionRow]:
        where, values = ("", ()) if player_id is None else ("WHERE player_id = ?", (player_id,))
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {_SESSION_COLUMNS} FROM sessions {where} ORDER BY start DESC LIMIT ?", (*values, limit)
            ).fetchall()
            return [_session_row(db, row) for row in rows]

    def figures(self) -> dict[str, Any]:
        """``bytes_in_use`` is what ``max_store_bytes`` bounds; ``messages`` may be a second behind."""
        with self._reading() as db:
            counts = {
                name: db.execute(f"SELECT {what} FROM {table}").fetchone()[0]
                for name, what, table in (
                    ("messages", "coalesce(sum(messages), 0)", "targets"),
                    ("targets", "count(*)", "targets"),
                    ("sessions", "count(*)", "sessions"),
                    ("current_sessions", "count(*)", "sessions WHERE ended_at IS NULL"),
                    ("connections", "count(*)", "connections"),
                )
            }
            in_use = _bytes_in_use(db)
        return {
            "driver": "sqlite3",
            "path": str(self.path),
            "sqlite_version": sqlite3.sqlite_version,
            "schema_version": len(self._schema),
            "durability": self.durability,
            "bytes_in_use": in_use,
            "max_store_bytes": self.max_store_bytes,
            "file_bytes": _size(self.path),
            "wal_bytes": _size(Path(f"{self.path}-wal")),
            "disk_free_bytes": _free(self.path.parent),
            "epoch": self._epoch,
            "newest": self._next - 1,
            "reserved": self._reserved,
            "commits": self._commits,
            **counts,
        }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _free(directory: Path) -> int | None:
    """Bytes that this user may still write on the directory's disk; None if it cannot be known."""
    try:
        disk = os.statvfs(directory)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize
