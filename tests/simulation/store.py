"""The disk, and what is true.

`Recorded` is the product's store; it tells `Truth` of every commit. A power cut, or a backup that is put back, ends a
`Branch` of history: the next one has its beginning in common with it. What of it is left is not made up: it is the
file and as much of SQLite's log as had been forced to the disk, or a bit more (`Platter`).
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import trio
from attrs import define, field, frozen

from mythos_trio.core.transaction import Committed, Outcome, Transaction
from mythos_trio.sqlite import SqliteDatabase
from mythos_trio.storage import Bounds, Cleaned, Notes, Recovered, StoreError
from tests.support.model import Fact, History, SessionFacts, Violation

P = ParamSpec("P")
T = TypeVar("T")

# PRAGMA synchronous: each commit is on the disk before it counts.
FULL: Final = 2


@define(eq=False)
class Branch:
    """One line of the store's history. *uids*: a fact keeps its own in all branches that have it."""

    number: int = 1
    history: History = field(factory=History)
    uids: dict[int, int] = field(factory=dict)
    stored_at: dict[int, float] = field(factory=dict)
    gone_at: dict[int, float] = field(factory=dict)
    _streams: dict[tuple[str, str], tuple[int, list[Fact]]] = field(factory=dict)

    def stream(self, session: SessionFacts) -> list[Fact]:
        """All of the session, also what retention has taken."""
        key = session.player, session.id
        known = self._streams.get(key)
        if known is None or known[0] != self.history.newest:
            known = self._streams[key] = self.history.newest, self.history.stream(session)
        return known[1]


@frozen
class Event:
    """Something that was stored, so that a branch can be made again up to there."""

    at: float
    committed: Sequence[tuple[Transaction, Committed]] = ()
    uids: Sequence[dict[int, int]] = ()
    removed: frozenset[int] = frozenset()


@define(eq=False)
class Truth:
    """*wrong*: is told of what a commit breaks."""

    wrong: Callable[[Violation], None]
    branch: Branch = field(factory=Branch)
    branches: list[Branch] = field(factory=list)
    events: list[Event] = field(factory=list)
    _next_uid: int = 1

    def __attrs_post_init__(self) -> None:
        self.branches.append(self.branch)

    def committed(self, pairs: Sequence[tuple[Transaction, Committed]]) -> None:
        uids = []
        for _, outcome in pairs:
            new = {seq: 0 for index, seq in enumerate(outcome.seqs) if index not in outcome.duplicates}
            for seq in new:
                new[seq], self._next_uid = self._next_uid, self._next_uid + 1
            uids.append(new)
        event = Event(trio.current_time(), pairs, uids)
        self.events.append(event)
        self._apply(self.branch, event)

    def removed(self, held: Collection[int]) -> None:
        """Retention has left no more than *held*."""
        history = self.branch.history
        gone = history.messages.keys() - history.removed - set(held)
        if gone:
            event = Event(trio.current_time(), removed=frozenset(gone))
            self.events.append(event)
            self._apply(self.branch, event)

    def fork(self, events: Sequence[Event]) -> Branch:
        """Nothing but *events* has ever happened."""
        self.events = list(events)
        self.branch = Branch(self.branch.number + 1)
        for event in self.events:
            self._apply(self.branch, event)
        self.branches.append(self.branch)
        return self.branch

    def _apply(self, branch: Branch, event: Event) -> None:
        history = branch.history
        for (transaction, outcome), uids in zip(event.committed, event.uids, strict=True):
            try:
                history.commit(transaction, outcome)
            except Violation as violation:
                self.wrong(violation)
            branch.uids |= {seq: uid for seq, uid in uids.items() if seq in history.messages}
            branch.stored_at |= dict.fromkeys(uids, event.at)
        history.removed |= event.removed
        branch.gone_at |= dict.fromkeys(event.removed, event.at)


@frozen
class Wal:
    """SQLite's log as a reader finds it: which beginning it has, and how far it is good (SQLite's file format, section
    4.1). When all of it has been written back the next commit begins it anew: the file keeps its length."""

    salt: bytes = b""
    size: int = 0

    @classmethod
    def of(cls, path: Path) -> Wal:
        data = path.read_bytes() if path.exists() else b""
        if len(data) < 32:
            return cls()
        salt, frame = data[16:24], 24 + int.from_bytes(data[8:12], "big")
        end = 32
        while data[end + 8 : end + 16] == salt:
            end += frame
        return cls(salt, end)


@frozen
class Mark:
    """After a commit: SQLite's log, how much had happened, whether it was forced to the disk."""

    wal: Wal
    events: int
    forced: bool


@frozen
class Copy:
    """The files as they were, and how much had happened."""

    file: bytes
    wal: bytes
    events: int


@define(eq=False)
class Platter:
    """The files of the store at *path*, and what a power cut would leave of them."""

    path: Path
    truth: Truth
    marks: list[Mark] = field(factory=list)
    forced: bool = False
    """Whether one of the commits of the call at hand was."""
    _file: tuple[int, int] = (0, 0)

    @property
    def wal(self) -> Path:
        return Path(f"{self.path}-wal")

    def opened(self) -> None:
        """A new life begins: opening has forced all that there is to the disk."""
        self.marks = []
        self._file = self._stamp()
        self.mark()

    def mark(self) -> None:
        """A call that writes is over."""
        self.marks.append(Mark(Wal.of(self.wal), len(self.truth.events), self.forced))
        self.forced = False

    def checkpointed(self) -> None:
        """Some of the log has been written back: SQLite has forced all of the log to the disk before, and after it the
        file (its documentation of WAL, "Checkpointing"). The log stays as it is until it begins anew."""
        self._file = self._stamp()
        self.forced = True
        self.mark()

    def copy(self) -> Copy:
        """All of it, as an operator copies it, or as the machine's memory still holds it."""
        if self._stamp() != self._file:
            raise RuntimeError("SQLite has written its log back: what a power cut leaves is not known")
        return Copy(self.path.read_bytes(), self.wal.read_bytes(), len(self.truth.events))

    def after_power_cut(self, chance: random.Random) -> Copy:
        """The log up to some commit, not before the last one that was forced to the disk."""
        last = max((index for index, mark in enumerate(self.marks) if mark.forced), default=0)
        mark = self.marks[chance.randint(last, len(self.marks) - 1)]
        whole = self.copy()
        # If the log has begun anew since then, all of the former one is in the file.
        same = mark.wal.salt == Wal.of(self.wal).salt
        return Copy(whole.file, whole.wal[: mark.wal.size] if same else b"", mark.events)

    def put_back(self, copy: Copy) -> None:
        for end in ("", "-wal", "-shm"):
            Path(f"{self.path}{end}").unlink(missing_ok=True)
        self.path.write_bytes(copy.file)
        if copy.wal:
            self.wal.write_bytes(copy.wal)

    def _stamp(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size


class Recorded(SqliteDatabase):
    """The store, which tells of each commit."""

    truth: Truth
    platter: Platter

    @contextmanager
    def _transaction(self, *, fsync: bool = False) -> Iterator[sqlite3.Connection]:
        with super()._transaction(fsync=fsync) as db:
            # What SQLite itself says, and not what the server means to have.
            if db.execute("PRAGMA synchronous").fetchone()[0] == FULL:
                self.platter.forced = True
            yield db

    def open(self, now: float) -> Recovered:
        recovered = super().open(now)
        self.platter.opened()
        return recovered

    def commit(self, batch: Sequence[Transaction], now: float) -> list[Outcome]:
        outcomes = super().commit(batch, now)
        pairs = zip(batch, outcomes, strict=True)
        self.truth.committed([(done, outcome) for done, outcome in pairs if isinstance(outcome, Committed)])
        self.platter.mark()
        return outcomes

    def note(self, notes: Notes) -> None:
        super().note(notes)
        self.platter.mark()

    def checkpoint(self) -> None:
        due = self.checkpoint_due
        super().checkpoint()
        if due:  # what the file system says of the file's time is 4 ms old, and that is a long time here
            self.platter.checkpointed()

    def clean(self, now: float, bounds: Bounds, *, slice_rows: int = 500) -> Cleaned:
        cleaned = super().clean(now, bounds, slice_rows=slice_rows)
        if cleaned.messages:
            with closing(sqlite3.connect(self.path)) as db:
                self.truth.removed({seq for (seq,) in db.execute("SELECT seq FROM messages")})
        self.platter.mark()
        return cleaned


@define(eq=False)
class Disk:
    """A `mythos_trio.storage.Runner` in the event loop: it takes its time before and after each call."""

    chance: random.Random
    truth: Truth
    slow: float = 0.0
    failing: str = ""
    """Why writes are refused; ``full…`` is a full disk."""
    blind: bool = False
    """Reads fail as well."""
    hangs: str = ""
    """``before`` a commit is made, or ``after`` it."""
    on_commit: Callable[[], None] | None = None
    """Done once, when the next commit has been made and nobody knows."""
    trouble_at: float = -1e9
    """When it last had a bad day."""
    mended: trio.Event = field(factory=trio.Event)
    _writer: trio.Lock = field(factory=trio.Lock)

    @property
    def well(self) -> bool:
        return not (self.slow or self.failing or self.blind or self.hangs)

    def mend(self) -> None:
        if not self.well:
            self.trouble_at = trio.current_time()
        self.slow, self.failing, self.blind, self.hangs = 0.0, "", False, ""
        self.mended.set()
        self.mended = trio.Event()

    async def write(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._writer:
            await self._wait()
            await self._hang("before")
            if self.failing:
                raise StoreError(self.failing, full=self.failing.startswith("full"))
            events = len(self.truth.events)
            result = call(*args, **kwargs)
            if self.on_commit is not None and len(self.truth.events) > events:
                then, self.on_commit = self.on_commit, None
                then()
            await self._hang("after")
            await self._wait()
            return result

    async def read(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        await self._wait()
        if self.blind:
            raise StoreError("it cannot be read, on purpose")
        result = call(*args, **kwargs)
        await self._wait()
        return result

    async def aside(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        await trio.lowlevel.checkpoint()
        return call(*args, **kwargs)

    async def _hang(self, where: str) -> None:
        while self.hangs == where:
            await self.mended.wait()

    async def _wait(self) -> None:
        if self.slow:
            await trio.sleep(self.chance.random() * self.slow)
        elif self.chance.random() < 0.5:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(self.chance.choice((0.001, 0.005, 0.02)))


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()
