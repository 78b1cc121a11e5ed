"""The store as a whole: opening, writing, closing."""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from mythos_trio.core.data import Value
from mythos_trio.core.position import Epoch, Epochs
from mythos_trio.core.transaction import Outcome, Reason, Refused, SetTimer, Transaction
from mythos_trio.seams import rfc3339
from mythos_trio.sqlite.checkpoints import BACKSTOP_PAGES, Checkpoints
from mythos_trio.sqlite.failures import is_environment, store_error, store_errors
from mythos_trio.sqlite.files import (
    ProcessLock,
    check_ours,
    disk_free,
    file_size,
    make_directory,
    make_private,
    read_boot_id,
)
from mythos_trio.sqlite.reading import ReadingHalf
from mythos_trio.sqlite.retention import ROOM_SHARE, ROW_OVERHEAD, Cursors, Slice
from mythos_trio.sqlite.schema import APPLICATION_ID, SCHEMA, Schema
from mythos_trio.sqlite.tables import SESSION_COLUMNS, bytes_in_use, roll_back, session_row
from mythos_trio.sqlite.transactions import NOTHING_TO_REMOVE, Batch
from mythos_trio.storage import Bounds, Cleaned, Notes, Recovered, StoreError, StoreUnusable, refused

Durability: TypeAlias = Literal["process", "power"]

# Below it there is no RETURNING.
OLDEST_SQLITE: Final = (3, 35, 0)
RESERVE: Final = 65536
READERS: Final = 2
# How much may be stored before the size is looked at again, and before counts are written. (Each target takes 5 µs, in
# which commits wait; counts of the same few targets gather in memory for long.)
GROWTH_STEP: Final = 1 << 20
MAX_UNCOUNTED_TARGETS: Final = 512
MAX_UNCOUNTED: Final = 65536
# Rows that a commit removes at least while there is too much.
ROOM_SLICE: Final = 500

_COUNT: Final = """
    INSERT INTO targets (target, messages, bytes) VALUES (?, ?, ?)
    ON CONFLICT (target) DO UPDATE SET messages = messages + excluded.messages, bytes = bytes + excluded.bytes
    RETURNING messages"""
# An ended session has no presence any more, but when it was online last is told all the same.
_NOTED: Final = """
    UPDATE sessions SET
        state_since = CASE WHEN state = ? OR ended_at IS NOT NULL THEN state_since ELSE ? END,
        state = CASE WHEN ended_at IS NULL THEN ? ELSE state END,
        told = CASE WHEN ended_at IS NULL THEN ? ELSE told END,
        owed = CASE WHEN ended_at IS NULL THEN ? ELSE owed END,
        last_online = coalesce(?, last_online),
        seen = max(seen, ?)
    WHERE player_id = ? AND session_id = ?"""
_ABANDONED: Final = Refused(Reason.FAILED, "abandoned before it was stored")


class SqliteDatabase(ReadingHalf):
    """See the package's docstring; implements `mythos_trio.storage.Database`.

    :param path: of the file; it and its directory are made.
    :param durability: ``"process"``: a commit survives `kill -9`; ``"power"``: it survives a power cut.
    :param reserve: how many numbers are set aside at once; that many at most are skipped by a start
        after a stop that was not in order.
    :param lock_seconds: how long to wait for another process to close the store; then it cannot be used.
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
        lock_seconds: float = 0.0,
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
        self._lock_seconds = lock_seconds
        self._busy_seconds = busy_seconds
        self._reader_count = readers
        self._schema = schema
        self._boot_id = boot_id
        self._connect = connect
        self._lock = ProcessLock(Path(f"{self.path}.lock"))
        self._db: sqlite3.Connection | None = None
        self._readers: queue.LifoQueue[sqlite3.Connection] | None = None
        self._checkpoints: Checkpoints | None = None
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
        self._cursors = Cursors()
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
            make_directory(self.path.parent)
            self._lock.take(self._lock_seconds)
            check_ours(self.path)
            self._open_writer()
            recovered = self._recover(now)
            self._open_readers()
            make_private(self.path)
        except StoreUnusable:
            self.abandon()
            raise
        except (OSError, sqlite3.Error, StoreError) as error:
            self.abandon()
            raise StoreUnusable(f"{self.path} cannot be opened: {error}") from error
        except BaseException:
            self.abandon()
            raise
        return recovered

    def new_epoch(self, now: float) -> Epoch:
        """
        Begin a new epoch in a store that nobody has open: it is a copy that was restored.

        Its number is the time in milliseconds since 1970: since the copy was made there may have been epochs of
        which it knows nothing, and one whose number came again would be the same one to clients that have seen it.

        :raises StoreUnusable: it cannot be opened.
        :raises StoreError: it cannot be written.
        """
        self.open(now)
        try:
            with store_errors(), self._transaction(fsync=True) as db:
                return self._insert_epoch(db, now, least=int(now * 1000))
        finally:
            self.close()

    def close(self) -> None:
        if self._db is None:
            return
        try:
            with store_errors(), self._transaction(fsync=True) as db:
                self._write_counts(db)
                self._put(db, clean=1, next=self._next)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the store without saying that it was closed in order, as `kill -9` does."""
        closed = self._close_readers()
        checkpoints, self._checkpoints = self._checkpoints, None
        if checkpoints is not None and not checkpoints.close(self._busy_seconds):
            closed = False
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()
        if checkpoints is not None and closed:
            checkpoints.close_file()
        self._lock.let_go()
        self._forget()

    def _close_readers(self) -> bool:
        """Whether that is all of them: one that is still reading in its thread is left to it."""
        readers, self._readers = self._readers, None
        if readers is None:
            return True
        closed = 0
        for _ in range(self._reader_count):
            with contextlib.suppress(queue.Empty, sqlite3.Error):
                readers.get(timeout=self._busy_seconds).close()
                closed += 1
        return closed == self._reader_count

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
        make_private(self.path)
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
            f"wal_autocheckpoint = {BACKSTOP_PAGES}",
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
                roll_back(db)
                raise

    def _open_readers(self) -> None:
        self._readers = queue.LifoQueue()
        for _ in range(self._reader_count):
            reader = self._open_connection()
            self._readers.put(reader)
            reader.execute("PRAGMA query_only = ON")
            reader.execute("PRAGMA cache_size = -8192")
        self._checkpoints = Checkpoints(self._open_connection(), self.path)

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
            db.execute("DELETE FROM data WHERE value IS NULL")
            self._recount(db)
            self._write_counts(db)
            self._put(db, clean=0, reserved=reserved, boot_id=boot_id, durability=self.durability)
        self._has_written_counts()
        self._reserved = reserved
        epochs = Epochs(tuple(Epoch(*row) for row in db.execute("SELECT number, first FROM epochs ORDER BY number")))
        self._epoch = epochs.present
        rows = db.execute(
            f"SELECT {SESSION_COLUMNS} FROM sessions WHERE state IN ('online', 'linkdead') OR owed <> '' ORDER BY start"
        ).fetchall()
        sessions = [session_row(db, row) for row in rows]
        values = {
            key: Value(body.encode(), version)
            for key, body, version in db.execute("SELECT key, value, version FROM data")
        }
        timers = [
            SetTimer(owner, name, id_, seconds, value.encode())
            for owner, name, id_, seconds, value in db.execute("SELECT owner, name, id, seconds, value FROM timers")
        ]
        return Recovered(epochs, newest, sessions, clean, values, timers)

    def _insert_epoch(self, db: sqlite3.Connection, now: float, *, least: int = 1) -> Epoch:
        number = max(least, db.execute("SELECT coalesce(max(number), 0) + 1 FROM epochs").fetchone()[0])
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
                roll_back(db)
                raise
            try:
                db.execute("COMMIT")
            except sqlite3.Error:
                roll_back(db)
                if not self._has_happened(db, number):
                    raise
            if self._checkpoints is not None:
                self._checkpoints.committed(db)
        finally:
            if fsync:
                # If this fails, later commits are slower than they need to be.
                with contextlib.suppress(sqlite3.Error):
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
        roll_back(db)

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
            self._provide_numbers(sum(transaction.numbers for transaction in batch))
            return self._store(batch, now)
        except StoreError as error:
            return [refused(error) for _ in batch]
        except (sqlite3.Error, OSError) as error:
            if len(batch) == 1 or is_environment(error):
                return [refused(store_error(error)) for _ in batch]
        except (ValueError, TypeError, OverflowError) as error:
            # What SQLite says of values that it cannot hold.
            if len(batch) == 1:
                return [Refused(Reason.FAILED, f"it cannot be stored: {error}")]
        # One of them is to blame: the others must not suffer.
        return [outcome for transaction in batch for outcome in self._commit([transaction], now)]

    def _store(self, batch: Sequence[Transaction], now: float) -> list[Outcome]:
        with self._transaction() as db:
            work = Batch(db, self._next, rfc3339(now), self._full)
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
        if self._checkpoints is not None:
            self._checkpoints.finish(self._writer)
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
        over = bytes_in_use(self._writer) - self.max_store_bytes
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
            work = Slice(db, now, bounds, max(ROOM_SLICE, 2 * grown // ROW_OVERHEAD))
            removable = work.make_room(self._debt)
        self._has_written_counts()
        self._debt = max(self._debt - work.removed_bytes, 0)
        self._full = not removable and bytes_in_use(self._writer) > self.max_store_bytes

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
        with store_errors():
            with self._transaction():
                pass
            if self._full and bytes_in_use(self._writer) > self.max_store_bytes:
                raise StoreError(NOTHING_TO_REMOVE, full=True)

    def note(self, notes: Notes) -> None:
        with store_errors(), self._transaction() as db:
            self._note(db, notes)

    @staticmethod
    def _note(db: sqlite3.Connection, notes: Notes) -> None:
        where = "player_id = ? AND session_id = ?"
        # Who leaves has all three, as a rule: in one update that is 4 µs, in two it was 6.
        online = {key: rfc3339(at) for key, at in notes.last_online.items()}
        marks = dict(notes.seen)
        db.executemany(
            _NOTED,
            [
                (
                    mark.state,
                    rfc3339(at),
                    mark.state,
                    mark.told,
                    mark.owed,
                    online.pop(key, None),
                    marks.pop(key, 0),
                    *key,
                )
                for key, (mark, at) in notes.presence.items()
            ],
        )
        db.executemany(
            f"UPDATE sessions SET seen = ? WHERE {where} AND seen < ?",
            [(seen, *key, seen) for key, seen in marks.items()],
        )
        db.executemany(
            f"UPDATE sessions SET last_online = ? WHERE {where}",
            [(at, *key) for key, at in online.items()],
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

    @property
    def checkpoint_due(self) -> bool:
        return self._checkpoints is not None and self._checkpoints.due

    def checkpoint(self) -> None:
        checkpoints = self._checkpoints
        if checkpoints is None:
            raise StoreError("the database is not open")
        with store_errors():
            checkpoints.run()

    def clean(self, now: float, bounds: Bounds, *, slice_rows: int = 500) -> Cleaned:
        with store_errors():
            self.max_store_bytes = bounds.store_bytes
            with self._transaction() as db:
                self._write_counts(db)
                self._survey(db, bounds.message_count)
                work = Slice(db, now, bounds, slice_rows)
                over = list(self._over)
                cursors = Cursors(self._cursors.answered, self._cursors.targets)
                self._clean(work, over, cursors)
            self._has_written_counts()
            self._cursors = cursors
            for target in work.within:
                del self._over[target]
        return work.cleaned(more=work.left <= 0)

    @staticmethod
    def _clean(work: Slice, over: Sequence[str], cursors: Cursors) -> None:
        """The kinds in their order, until the slice is used up."""
        slice_rows = work.left
        steps: Sequence[Callable[[], object]] = (
            work.remove_old,
            lambda: work.remove_beyond_count(over),
            lambda: work.make_room(max(bytes_in_use(work.db) - work.bounds.store_bytes, 0) // ROOM_SHARE),
            lambda: work.remove_answers(cursors),
            work.forget_sessions,
            work.remove_requests,
            work.forget_expired,
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

    def figures(self) -> dict[str, Any]:
        """``bytes_in_use`` is what ``max_store_bytes`` bounds; ``messages`` is not exact while commits go on."""
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
            in_use = bytes_in_use(db)
        counts["messages"] += sum(messages for messages, _ in self._uncounted.copy().values())
        return {
            "driver": "sqlite3",
            "path": str(self.path),
            "sqlite_version": sqlite3.sqlite_version,
            "schema_version": len(self._schema),
            "durability": self.durability,
            "bytes_in_use": in_use,
            "max_store_bytes": self.max_store_bytes,
            "file_bytes": file_size(self.path),
            "wal_bytes": file_size(Path(f"{self.path}-wal")),
            "disk_free_bytes": disk_free(self.path.parent),
            "epoch": self._epoch,
            "newest": self._next - 1,
            "reserved": self._reserved,
            "commits": self._commits,
            **counts,
        }
