"""What is special about the store in SQLite: its files, its locks, its failures, its numbers."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from attrs import evolve

from mythos_trio.core.data import Write
from mythos_trio.core.position import Epoch
from mythos_trio.core.transaction import Admit, Append, Committed, Outcome, Reason, Refused, SetTimer, Transaction
from mythos_trio.sqlite import SqliteDatabase, database
from mythos_trio.sqlite.checkpoints import BACKSTOP_PAGES, STEP_ROWS
from mythos_trio.sqlite.files import read_boot_id
from mythos_trio.sqlite.schema import APPLICATION_ID, SCHEMA
from mythos_trio.sqlite.transactions import _who_is_known
from mythos_trio.storage import ConnectionRow, Notes, StoreError, StoreUnusable
from tests.support.stores import FOREVER, NOW, Bench, SqliteKind, answer, bench

NO_NOTES = Notes({}, (), (), {})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Bench]:
    with bench(SqliteKind(), tmp_path, busy_seconds=0.1) as made:
        yield made


def message(id_: str, body: bytes = b"{}") -> Transaction:
    return Transaction([Append("#r", id_, body)])


def refused(outcomes: list[Outcome]) -> list[str | None]:
    return [outcome.reason if isinstance(outcome, Refused) else None for outcome in outcomes]


def sql(path: Path, statement: str) -> list[tuple[Any, ...]]:
    """What an operator's ``sqlite3`` sees."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(statement).fetchall()


# Numbers and epochs.


class Machine:
    """Starts of a store on a machine that can lose power."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.boot: str | None = "boot-1"
        self.copies = 0

    def start(self, **options: Any) -> SqliteDatabase:
        return SqliteDatabase(self.place / "store.db", boot_id=lambda: self.boot, reserve=10, **options)

    def kill(self, running: SqliteDatabase) -> None:
        """Go on with the files as they are now, as after ``kill -9``."""
        self.copies += 1
        copy = self.place.with_name(f"{self.place.name}-{self.copies}")
        shutil.copytree(self.place, copy)
        running.abandon()
        self.place = copy


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "data")


def test_after_kill_everything_is_there_and_numbers_go_on(machine: Machine) -> None:
    given: list[int] = []
    for life in range(5):
        running = machine.start()
        recovered = running.open(NOW)
        assert recovered.newest >= max(given, default=0)
        assert recovered.epochs.present == 1
        assert all(running.find_message(f"m{n}") for n in range(len(given)))
        for _ in range(7 * life):
            (outcome,) = running.commit([message(f"m{len(given)}")], NOW)
            assert isinstance(outcome, Committed)
            given.append(outcome.last)
        machine.kill(running)
    assert given == sorted(set(given))


@pytest.mark.parametrize(
    ("durability", "closed", "boot", "epochs"),
    [
        ("process", False, "boot-1", 1),
        ("process", False, "boot-2", 2),
        ("process", False, None, 2),
        ("process", True, "boot-2", 1),
        ("power", False, "boot-2", 1),
        ("power", False, None, 1),
    ],
)
def test_a_new_epoch_begins_when_the_end_may_be_lost(
    machine: Machine, durability: database.Durability, closed: bool, boot: str | None, epochs: int
) -> None:
    running = machine.start(durability=durability)
    running.open(NOW)
    running.commit([message("a")], NOW)
    if closed:
        running.close()
    else:
        machine.kill(running)
    machine.boot = boot
    running = machine.start(durability=durability)
    recovered = running.open(NOW)
    expected = [Epoch(1, 1), Epoch(2, recovered.newest + 1)][:epochs]
    assert list(recovered.epochs.all) == expected
    (outcome,) = running.commit([message("b")], NOW)
    assert isinstance(outcome, Committed)
    assert outcome.seqs == (recovered.newest + 1,)
    running.close()


def test_the_epoch_of_a_restored_copy_was_never_there_before(machine: Machine) -> None:
    """A power cut after the copy was made took the number that is next in the copy."""
    running = machine.start()
    running.open(NOW)
    copy = machine.place.with_name("copy")
    shutil.copytree(machine.place, copy)
    machine.kill(running)
    machine.boot = "boot-2"
    running = machine.start()
    cut = running.open(NOW).epochs.present
    machine.kill(running)
    machine.place = copy
    assert machine.start().new_epoch(NOW).number > cut == 2


def test_what_counts_is_the_durability_of_the_life_that_ended(machine: Machine) -> None:
    for before, after, epoch in (("process", "power", 2), ("power", "process", 2), ("process", "process", 3)):
        running = machine.start(durability=before)
        running.open(NOW)
        machine.kill(running)
        machine.boot = f"boot after {before} and {after}"
        running = machine.start(durability=after)
        assert running.open(NOW).epochs.present == epoch
        running.close()


def test_an_unknown_boot_is_never_the_same_one(machine: Machine) -> None:
    machine.boot = None
    running = machine.start()
    assert running.open(NOW).epochs.present == 1
    machine.kill(running)
    running = machine.start()
    assert running.open(NOW).epochs.present == 2
    running.close()


def test_a_restored_copy_is_told_apart_by_hand(machine: Machine, path: Path) -> None:
    running = machine.start()
    running.open(NOW)
    running.commit([message("a")], NOW)
    with pytest.raises(StoreUnusable):
        machine.start().new_epoch(NOW)
    running.close()
    assert machine.start().new_epoch(NOW) == Epoch(int(NOW * 1000), 2)
    running = machine.start()
    recovered = running.open(NOW)
    assert (recovered.epochs.present, recovered.newest, recovered.clean) == (int(NOW * 1000), 1, True)
    running.close()
    # Also if the clock stands still, or was set back.
    assert machine.start().new_epoch(NOW - 10) == Epoch(int(NOW * 1000) + 1, 2)


def test_the_machine_tells_its_boots_apart() -> None:
    assert read_boot_id() == read_boot_id()


def test_numbers_are_reserved_on_the_disk(store: Bench, tmp_path: Path) -> None:
    seen: list[str] = []
    kind = SqliteKind()
    store.db.close()
    with bench(kind, tmp_path, reserve=8) as small:
        db = writer(small)
        db.set_trace_callback(seen.append)
        for n in range(8):
            small.say("#r", f"{n}")
        db.set_trace_callback(None)
    # The next block is there before the present one runs out; it is synced, and nothing else is.
    block = [n for n, statement in enumerate(seen) if "synchronous" in statement]
    assert [seen[n].strip() for n in block] == ["PRAGMA synchronous = FULL", "PRAGMA synchronous = NORMAL"]
    assert any("reserved" in statement for statement in seen[block[0] : block[1]])
    assert seen[block[0] : block[1]].count("COMMIT") == 1


def writer(store: Bench) -> sqlite3.Connection:
    """The connection that writes: for what only it can be asked."""
    assert isinstance(store.db, SqliteDatabase)
    db = store.db._db
    assert db is not None
    return db


@pytest.mark.parametrize(("durability", "level"), [("process", 1), ("power", 2)])
def test_durability_is_how_commits_are_synced(tmp_path: Path, durability: str, level: int) -> None:
    with bench(SqliteKind(), tmp_path, durability=durability, reserve=4) as store:
        for n in range(10):
            store.say("#r", f"{n}")
        assert writer(store).execute("PRAGMA synchronous").fetchone() == (level,)
        assert writer(store).execute("PRAGMA journal_mode").fetchone() == ("wal",)


# Real processes.

WRITE_FOR_EVER = """
import sys, time
from mythos_trio.core.transaction import Append, Transaction
from mythos_trio.sqlite import SqliteDatabase

db = SqliteDatabase(sys.argv[1], reserve=50)
recovered = db.open(time.time())
print("newest", recovered.newest, flush=True)
n = 0
while True:
    batch = [Transaction([Append("#r", f"{sys.argv[2]}-{n}-{i}", b"{}")]) for i in range(3)]
    n += 1
    for outcome in db.commit(batch, time.time()):
        print(outcome.seqs[0], flush=True)
"""


def start_writer(path: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(path), name], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_loses_nothing_and_lets_go(path: Path) -> None:
    given: list[int] = []
    for life in range(2):
        process = start_writer(path, f"{life}")
        assert process.stdout is not None
        with process:
            newest = int(process.stdout.readline().split()[1])
            assert newest >= max(given, default=0)
            given += [int(process.stdout.readline()) for _ in range(200)]
            if life == 0:
                with pytest.raises(StoreUnusable, match=f"in use by process {process.pid}$"):
                    SqliteDatabase(path).open(NOW)
            process.send_signal(signal.SIGKILL)
            given += [int(line) for line in process.stdout.read().split("\n")[:-1] if line]
    assert given == sorted(set(given))
    store = SqliteDatabase(path)
    recovered = store.open(NOW)
    assert recovered.clean is False
    assert recovered.newest >= given[-1]
    assert {row[0] for row in sql(path, "SELECT seq FROM messages")} >= set(given)
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    store.close()


# Files.


def test_files_are_private(tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        made = SqliteDatabase(tmp_path / "data" / "players" / "store.db")
        made.open(NOW)
        made.commit([message("a")], NOW)
    finally:
        os.umask(old_mask)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "data").rglob("*")}
    assert modes == {
        "players": 0o700,
        "store.db": 0o600,
        "store.db-wal": 0o600,
        "store.db-shm": 0o600,
        "store.db.lock": 0o600,
    }
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    made.close()
    # One that others could read is made private; a directory that was there is left as it is.
    made.path.chmod(0o644)
    made.path.parent.chmod(0o755)
    made.open(NOW)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.path.parent.stat().st_mode) == 0o755
    made.close()


def write_text(path: Path) -> None:
    path.write_text("This is my shopping list, and not a database. " * 10)


def write_other_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA application_id = 4711")
        db.execute("CREATE TABLE mine (x)")


def write_plain_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE mine (x)")


def write_wal_database(path: Path) -> None:
    source = path.with_name("source.db")
    with closing(sqlite3.connect(source)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE mine (x)")
        shutil.copy(source, path)
        shutil.copy(f"{source}-wal", f"{path}-wal")


@pytest.mark.parametrize("write", [write_text, write_other_program, write_plain_database, write_wal_database])
def test_a_file_that_is_not_ours_is_not_touched(path: Path, write: Callable[[Path], None]) -> None:
    write(path)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    mode = path.stat().st_mode
    for _ in range(2):
        with pytest.raises(StoreUnusable, match="not been touched"):
            SqliteDatabase(path).open(NOW)
    after = {file: file.read_bytes() for file in path.parent.iterdir() if file.name != "store.db.lock"}
    assert after == before
    assert path.stat().st_mode == mode


def test_a_database_without_tables_is_taken(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 0")
        db.execute("VACUUM")
    store = SqliteDatabase(path)
    store.open(NOW)
    store.close()


@pytest.mark.parametrize("place", ["directory", "no-directory", "damaged"])
def test_what_cannot_be_opened_says_so_and_can_be_tried_again(path: Path, place: str) -> None:
    if place == "directory":
        path.mkdir()
    elif place == "no-directory":
        path.parent.joinpath("file").write_text("")
        path = path.parent / "file" / "store.db"
    else:
        store = SqliteDatabase(path)
        store.open(NOW)
        store.close()
        content = bytearray(path.read_bytes())
        content[100:4096] = b"\xff" * 3996
        path.write_bytes(content)
    store = SqliteDatabase(path)
    for _ in range(2):
        with pytest.raises(StoreUnusable):
            store.open(NOW)
    if place == "directory":
        path.rmdir()
        store.open(NOW)
        store.close()


def test_two_names_of_a_file_are_one_store(store: Bench, tmp_path: Path) -> None:
    (tmp_path / "alias.db").symlink_to("store.db")
    with pytest.raises(StoreUnusable, match=f"in use by process {os.getpid()}"):
        SqliteDatabase(tmp_path / "alias.db").open(NOW)


def test_a_file_that_was_moved_away_is_noticed_and_heals(store: Bench, path: Path) -> None:
    store.say("#r")
    away = path.with_name("away.db")
    path.rename(away)
    assert "is gone" in store.refuse(message("a"), Reason.FAILED).message
    path.write_bytes(b"")
    assert "replaced" in store.refuse(message("a"), Reason.FAILED).message
    away.rename(path)
    store.commit(message("a"))


# Schema versions.

ADDED = ("ALTER TABLE sessions ADD COLUMN mood TEXT DEFAULT 'calm'", "INSERT INTO meta VALUES ('added', 2)")


def test_a_new_version_is_one_more_entry(store: Bench, path: Path) -> None:
    store.begin()
    store.db.abandon()
    newer = SqliteDatabase(path, schema=(*SCHEMA, ADDED))
    newer.open(NOW)
    assert newer.current_session("ann") is not None
    assert sql(path, "SELECT player_id, mood FROM sessions") == [("ann", "calm")]
    assert sql(path, "PRAGMA user_version") == [(len(SCHEMA) + 1,)]
    newer.close()
    newer.open(NOW)
    newer.close()
    with pytest.raises(StoreUnusable, match="newer"):
        SqliteDatabase(path).open(NOW)


def test_a_migration_that_fails_changes_nothing(store: Bench, path: Path) -> None:
    store.begin()
    store.db.abandon()
    with pytest.raises(StoreUnusable):
        SqliteDatabase(path, schema=(*SCHEMA, (*ADDED, "CREATE NONSENSE"))).open(NOW)
    store.restart()
    assert store.db.current_session("ann") is not None
    assert sql(path, "PRAGMA user_version") == [(len(SCHEMA),)]


def test_a_file_of_version_1_gets_the_games_data_and_keeps_what_it_has(tmp_path: Path) -> None:
    """The file was written by the release before the game's data."""
    path = tmp_path / "store.db"
    path.write_bytes(zlib.decompress(base64.b64decode((Path(__file__).parent / "version-1.db.b64").read_text())))
    assert sql(path, "PRAGMA user_version") == [(1,)]
    database = SqliteDatabase(path)
    recovered = database.open(NOW)
    try:
        assert sql(path, "PRAGMA user_version") == [(len(SCHEMA),)]
        assert (recovered.values, list(recovered.timers)) == ({}, [])
        session = database.current_session("ann")
        assert session is not None
        assert (session.session_id, session.channels) == ("s1", ("room",))
        kept = database.find_message("old")
        assert kept is not None
        put = Transaction(
            [Append("#room", "new", b'{"id":"new"}')],
            writes=[Write("sword", b'"ann"', 0, 1)],
            timers=[SetTimer("world", "gong", "t1", 5.0, b"null")],
        )
        (outcome,) = database.commit([put], NOW)
        assert isinstance(outcome, Committed)
        assert outcome.last > kept.seq
    finally:
        database.close()
    database = SqliteDatabase(path)
    recovered = database.open(NOW)
    database.close()
    assert recovered.values["sword"].body == b'"ann"'
    assert [timer.name for timer in recovered.timers] == ["gong"]


def test_the_file_says_whose_it_is(store: Bench, path: Path) -> None:
    assert sql(path, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert path.read_bytes()[68:72] == b"myth"


# What an operator sees.


def test_the_tables_can_be_asked_by_hand(store: Bench, path: Path) -> None:
    store.begin()
    store.switch("ann", "s1", "s2")
    store.join("room", session_id="s2")
    store.say("#room", "a", '{"id":"a","content":"café"}'.encode())
    store.db.note(Notes({}, [ConnectionRow("c1", "ann", "s2", "sse", "srv", "::1", NOW)], [], {}))
    newest = "SELECT session_id, data FROM sessions WHERE player_id = 'ann' ORDER BY created_at DESC LIMIT 1"
    assert sql(path, newest) == [("s2", "{}")]
    assert sql(path, "SELECT session_id, ended_at, end_reason FROM sessions WHERE ended_at IS NOT NULL") == [
        ("s1", "2026-01-01T00:00:00.000Z", "replaced")
    ]
    assert sql(path, "SELECT * FROM connections WHERE player_id = 'ann'") == [
        ("c1", "ann", "s2", "sse", "srv", "::1", "2026-01-01T00:00:00.000Z")
    ]
    assert sql(path, "SELECT json_extract(body, '$.content'), stored_at FROM messages") == [
        ("café", "2026-01-01T00:00:00.000Z")
    ]
    names = {row[1] for row in sql(path, "PRAGMA index_list(connections)")}
    assert names >= {"idx_connections_player_id", "idx_connections_session_id", "idx_connections_created_at"}
    figures = store.db.figures()
    assert (figures["driver"], figures["messages"], figures["sessions"], figures["current_sessions"]) == (
        "sqlite3",
        1,
        2,
        1,
    )
    assert figures["file_bytes"] + figures["wal_bytes"] > 0
    assert figures["disk_free_bytes"] > 0


def test_the_row_of_a_first_session_has_the_players_data(store: Bench, path: Path) -> None:
    store.commit(Transaction(writes=[Write("player/ann", b'{"hp":1}', 0, 1)]))
    commits = store.db.figures()["commits"]
    comers = [("ann", 0), ("bob", 0), ("ann", 0), ("cid", 1), ("cid", 0)]
    store.try_(*(Transaction(admit=Admit(name, None, "s1", mail, "absent", "")) for name, mail in comers))
    assert store.db.figures()["commits"] == commits + 1, "not one by one, after an error"
    found = sql(path, "SELECT player_id, data, created_at, state, state_since, last_online, owed FROM sessions")
    then = "2026-01-01T00:00:00.000Z"
    assert sorted(found) == [
        (name, data, then, "online", then, then, "")
        for name, data in (("ann", '{"hp":1}'), ("bob", "{}"), ("cid", "{}"))
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT seq FROM messages WHERE target = '' AND seq > 1 AND seq <= 9 ORDER BY target, seq",
        "SELECT player_id FROM sessions WHERE state IN ('online', 'linkdead') OR owed <> '' ORDER BY start",
        "SELECT player_id FROM sessions WHERE state = 'offline' AND state_since < '' ORDER BY state_since LIMIT 9",
        "SELECT player_id FROM sessions WHERE ended_at < '' ORDER BY ended_at LIMIT 9",
        "SELECT seen FROM sessions WHERE player_id = '' ORDER BY start DESC LIMIT 1",
        "SELECT player_id FROM sessions ORDER BY start DESC LIMIT 9",
        "SELECT number FROM answers WHERE player_id = '' AND session_id = '' ORDER BY number DESC LIMIT 1 OFFSET 9",
        "SELECT -bytes, target FROM targets WHERE messages > 0 ORDER BY bytes DESC LIMIT 32",
        "SELECT key FROM requests WHERE stored_at < '' LIMIT 9",
        "DELETE FROM subscriptions WHERE channel = '' AND finish IS NOT NULL AND last <= 1",
    ],
)
def test_what_runs_often_reads_no_whole_table(store: Bench, path: Path, statement: str) -> None:
    plan = [row[3] for row in sql(path, f"EXPLAIN QUERY PLAN {statement}")]
    assert not [step for step in plan if "TEMP B-TREE" in step]
    assert all(step.startswith("SEARCH") or "USING" in step for step in plan), plan


def test_to_ask_who_is_known_reads_no_whole_table(store: Bench, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {_who_is_known(2)}", ["x"] * 4)]
    searched = [step for step in plan if step.startswith("SEARCH")]
    scanned = [step for step in plan if step.startswith("SCAN")]
    assert len(searched) == 3
    assert not [step for step in scanned if "CONSTANT" not in step and "subquery" not in step.lower()], plan


# Bad days.


def test_a_lock_of_another_program_is_waited_for_and_told(store: Bench, path: Path) -> None:
    store.say("#r", "before")
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        outcome = store.refuse(message("a"), Reason.FAILED)
        assert "locked" in outcome.message
        assert 0.1 <= time.monotonic() - began < 1
        for call in (store.db.probe, lambda: store.db.note(NO_NOTES), store.clean):
            with pytest.raises(StoreError, match="locked"):
                call()
        assert store.db.find_message("before") is not None
        assert refused(store.try_(message("b"), message("c"))) == [Reason.FAILED] * 2
        shell.execute("ROLLBACK")
    store.db.probe()
    assert refused(store.try_(message("a"), message("b"))) == [None, None]


def test_a_locked_store_does_not_start(store: Bench, path: Path) -> None:
    store.db.abandon()
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnusable, match="locked"):
            SqliteDatabase(path, busy_seconds=0.05).open(NOW)
    store.restart()


def test_a_full_disk_refuses_and_heals(store: Bench) -> None:
    store.begin()
    db = writer(store)
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages + 2}")
    batch = [message(f"{n}", b"x" * 3000) for n in range(20)]
    assert refused(store.try_(*batch)) == [Reason.FULL] * 20
    assert refused(store.try_(batch[0])) == [None]
    with pytest.raises(StoreError) as caught:
        store.db.note(Notes({}, [ConnectionRow(f"{n}" * 900, "a", "b", "c", "d", "e", NOW) for n in range(9)], [], {}))
    assert caught.value.full
    assert not db.in_transaction
    db.execute("PRAGMA max_page_count = 100000")
    assert refused(store.try_(*batch[1:])) == [None] * 19
    # The numbers of what failed may be gone, but none was given twice.
    assert len({seq for (seq,) in db.execute("SELECT seq FROM messages")}) == 20


class FailingConnection(sqlite3.Connection):
    """Fails as told: at COMMIT, before or after it has happened, and at the look that follows."""

    fail = ""
    looks_fail = False

    def execute(self, statement: str, /, *values: Any) -> sqlite3.Cursor:
        if statement == "COMMIT" and self.fail:
            if self.fail == "after":
                super().execute("COMMIT")
            raise sqlite3.OperationalError("disk I/O error")
        if self.looks_fail and statement.startswith("SELECT value FROM meta"):
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(statement, *values)


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[tuple[Bench, FailingConnection]]:
    def connect(*arguments: Any, **more: Any) -> sqlite3.Connection:
        return sqlite3.connect(*arguments, factory=FailingConnection, **more)

    with bench(SqliteKind(), tmp_path, connect=connect, busy_seconds=0.1) as made:
        db = writer(made)
        assert isinstance(db, FailingConnection)
        yield made, db


def test_a_commit_that_failed_has_not_happened(failing: tuple[Bench, FailingConnection]) -> None:
    store, db = failing
    store.begin()
    db.fail = "before"
    assert refused(store.try_(message("a"), message("b"))) == [Reason.FAILED] * 2
    assert store.db.find_message("a") is None
    with pytest.raises(StoreError):
        store.db.probe()
    db.fail = ""
    # Its numbers are burnt.
    assert store.commit(message("a")).seqs[0] > 3


def test_a_commit_that_says_it_failed_may_have_happened(failing: tuple[Bench, FailingConnection]) -> None:
    store, db = failing
    store.begin()
    db.fail = "after"
    assert store.commit(message("a")).seqs == (2,)
    store.db.note(Notes({("ann", "s1"): 5}, [], [], {}))
    db.fail = ""
    assert store.db.last_seen("ann") == 5
    assert store.commit(message("b")).seqs == (3,)
    store.crash()
    assert store.clean(evolve(FOREVER, message_count=0)).messages == 2


@pytest.mark.parametrize("happened", [True, False])
def test_an_outcome_that_nobody_knows(failing: tuple[Bench, FailingConnection], happened: bool) -> None:
    store, db = failing
    store.begin()
    db.fail, db.looks_fail = "after" if happened else "before", True
    assert "not known" in store.refuse(message("a"), Reason.FAILED).message
    store.refuse(message("b"), Reason.FAILED)
    db.fail, db.looks_fail = "", False
    if happened:
        # Nobody was sent it, so what is in memory is not what is stored: only a start helps.
        assert "started again" in store.refuse(message("c"), Reason.FAILED).message
        with pytest.raises(StoreError):
            store.db.probe()
        store.crash()
        assert store.db.find_message("a") is not None
    store.commit(message("c"))


# Growth.


def test_counts_are_written_every_so_often(store: Bench, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(database, "MAX_UNCOUNTED", 20)
    monkeypatch.setattr(database, "MAX_UNCOUNTED_TARGETS", 5)
    for n in range(30):
        store.say("#r", f"{n}")
    assert sql(path, "SELECT messages FROM targets")[0][0] >= 20
    for n in range(10):
        store.say(f"#r{n}", f"x{n}")
    assert len(sql(path, "SELECT * FROM targets")) > 5
    store.crash()
    assert sum(row[0] for row in sql(path, "SELECT messages FROM targets")) == 40


def test_a_long_life_leaves_a_sound_file(store: Bench, path: Path) -> None:
    store.begin()
    for n in range(60):
        store.join(f"room{n % 3}")
        store.try_(*[message(f"{n}-{i}", b"x" * 200) for i in range(20)])
        store.say(f"#room{n % 3}")
        store.refuse(Transaction([Append("#r", f"x{n}", b"y"), Append("#r", f"{n}-1", b"z")]), Reason.CONFLICT)
        store.do(answer=answer(f"{n}"))
        store.leave(f"room{n % 3}")
        store.now += 1
        store.db.clean(store.now, evolve(FOREVER, message_count=50, message_seconds=20, answer_count=10))
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    counted = dict(sql(path, "SELECT target, messages FROM targets WHERE messages > 0"))
    assert counted == dict(sql(path, "SELECT target, count(*) FROM messages GROUP BY target"))
    sizes = dict(sql(path, "SELECT target, bytes FROM targets WHERE messages > 0"))
    assert sizes == dict(sql(path, "SELECT target, sum(length(body)) FROM messages GROUP BY target"))


def test_a_store_that_is_still_held_can_be_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "mythos.db"
    holder = SqliteDatabase(path)
    holder.open(0.0)
    with pytest.raises(StoreUnusable, match="in use by process"):
        SqliteDatabase(path, lock_seconds=0.05).open(0.0)
    timer = threading.Timer(0.1, holder.abandon)
    timer.start()
    try:
        follower = SqliteDatabase(path, lock_seconds=20.0)
        follower.open(0.0)
        follower.close()
    finally:
        timer.join()


# Checkpoints.


def fill(store: Bench, start: int, count: int) -> None:
    for first in range(start, start + count, 100):
        store.try_(*(message(f"{n}-{'x' * 90}") for n in range(first, first + 100)))


def log_file(store: Bench) -> int:
    assert isinstance(store.db, SqliteDatabase)
    return Path(f"{store.db.path}-wal").stat().st_size


def test_a_checkpoint_beside_the_writer_is_a_step_when_enough_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(SqliteKind(), tmp_path) as store:
        said: list[str] = []
        checkpoints = store.db._checkpoints  # type: ignore[attr-defined]
        checkpoints._keeper.set_trace_callback(said.append)
        due: list[bool] = []
        for rows in (0, STEP_ROWS - 100, 100, 0):
            fill(store, 1000 * len(due), rows)
            due.append(store.db.checkpoint_due)
            store.db.checkpoint()
        assert due == [False, False, True, False]
        assert len(said) == 1
    assert not store.db.checkpoint_due


def test_a_long_log_begins_anew_while_commits_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mythos_trio.sqlite.checkpoints.LONG_PAGES", 600)
    with bench(SqliteKind(), tmp_path) as store:
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(0.001):
                store.db.checkpoint()

        keeper = threading.Thread(target=keep)
        keeper.start()
        sizes = []
        try:
            for n in range(0, 40_000, 400):
                fill(store, n, 400)
                sizes.append(log_file(store))
        finally:
            stop.set()
            keeper.join()
        assert max(sizes) < BACKSTOP_PAGES * 4096 / 4
        assert store.db.find_message(f"39999-{'x' * 90}") is not None
        assert store.db.find_message(f"0-{'x' * 90}") is not None


def test_the_writer_has_little_to_sync_when_the_log_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the steps have written is on the disk before; SQLite does that only when everything is in its place."""
    monkeypatch.setattr("mythos_trio.sqlite.checkpoints.LONG_PAGES", 400)
    done: list[str] = []
    monkeypatch.setattr(
        "mythos_trio.sqlite.checkpoints._sync", lambda file: done.append(os.readlink(_descriptor(file)))
    )
    with bench(SqliteKind(), tmp_path) as store:
        fill(store, 0, STEP_ROWS + 100)
        store.db.checkpoint()
        assert not done
        fill(store, 10_000, STEP_ROWS + 4000)
        store.db.checkpoint()
        assert set(done) == {str(store.db.path)}  # type: ignore[attr-defined]
        size = log_file(store)
        store.try_(message("after"))
        fill(store, 20_000, 1000)
        assert log_file(store) == size


def test_a_long_log_that_a_step_beside_the_writer_keeps_busy_begins_anew_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mythos_trio.sqlite.checkpoints.LONG_PAGES", 400)
    with bench(SqliteKind(), tmp_path) as store:
        fill(store, 0, 4000)
        store.db.checkpoint()
        checkpoints, writer = store.db._checkpoints, store.db._writer  # type: ignore[attr-defined]
        busy = MagicMock()
        busy.execute.return_value.fetchone.return_value = (1, -1, -1)
        checkpoints.finish(busy)
        said: list[str] = []
        writer.set_trace_callback(said.append)
        checkpoints.finish(writer)
        checkpoints.finish(writer)
        assert len(said) == 1
        size = log_file(store)
        fill(store, 10_000, 400)
        assert log_file(store) == size


def _descriptor(file: int) -> str:
    return f"/proc/self/fd/{file}"


def test_the_file_of_the_checkpoints_is_closed_after_all_connections(tmp_path: Path) -> None:
    """Closing it lets go of the locks of all of them."""
    with bench(SqliteKind(), tmp_path) as store:
        path = str(store.db.path)  # type: ignore[attr-defined]
        assert path in _open_files()
        store.db.close()
        assert path not in _open_files()


def test_a_reader_that_is_not_through_keeps_the_file_of_the_checkpoints_open(tmp_path: Path) -> None:
    with bench(SqliteKind(), tmp_path, busy_seconds=0.01) as store:
        reader = store.db._readers.get()  # type: ignore[attr-defined]
        file = store.db._checkpoints._file  # type: ignore[attr-defined]
        store.db.abandon()
        assert os.readlink(_descriptor(file)) == str(store.db.path)  # type: ignore[attr-defined]
        reader.close()
        os.close(file)


def _open_files() -> list[str]:
    files = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of this listing
            files.append(os.readlink(_descriptor(int(name))))
    return files


def test_without_anybody_who_calls_for_checkpoints_the_log_is_bounded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mythos_trio.sqlite.database.BACKSTOP_PAGES", 600)
    with bench(SqliteKind(), tmp_path) as store:
        fill(store, 0, 10_000)
        assert log_file(store) < 1200 * 4096


def test_a_checkpoint_that_fails_harms_no_commit(failing: tuple[Bench, FailingConnection]) -> None:
    store, _ = failing
    checkpoints = store.db._checkpoints  # type: ignore[attr-defined]
    checkpoints._keeper.close()
    fill(store, 0, STEP_ROWS + 100)
    with pytest.raises(StoreError):
        store.db.checkpoint()
    store.commit(message("a"))
    store.db.close()
    with pytest.raises(StoreError):
        store.db.checkpoint()
