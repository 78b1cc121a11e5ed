"""What the server asks of a store, whichever one it is.

`Database` is the blocking interface that a store implements (`mythos_trio.sqlite`); `Storage` is
the same for the event loop: it owns the threads in which the database's calls run. Both have one
writer: calls of `commit`, `note` and `clean` never overlap.

Rules live in `mythos_trio.core`; a store only stores, and checks again in the commit what only it
can know (ids, keys, answers that are there already).
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import trio
from attrs import define, field, frozen

from mythos_trio.bell import Bell
from mythos_trio.core.data import Value
from mythos_trio.core.position import Epochs
from mythos_trio.core.session import SessionRow as SessionRow  # a part of this interface
from mythos_trio.core.transaction import (
    Answer,
    Append,
    Committed,
    Outcome,
    PresenceMark,
    Reason,
    Refused,
    SetTimer,
    Transaction,
)
from mythos_trio.seams import Clock

P = ParamSpec("P")
T = TypeVar("T")

# A weight of 110 against 1,024 (sched(7)).
ASIDE_NICENESS: Final = 10


class StoreError(Exception):
    """The store cannot do it now (locked, full, gone). *full* tells a full disk from the rest."""

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class StoreUnusable(Exception):
    """The store cannot be opened at all: held by another process, not ours, too new. Exit code 4."""


class StoredMessage(NamedTuple):
    """A tuple: hundreds are read for each player that comes back."""

    seq: int
    id: str
    target: str
    body: bytes
    stored_at: float


@frozen
class Expired:
    """What is left of a message that retention has removed. *removed_at*: POSIX seconds."""

    seq: int
    target: str
    removed_at: float


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
    values: Mapping[str, Value] = field(factory=dict)
    """The game's data, all of it."""
    timers: Sequence[SetTimer] = ()


@define  # not frozen: made for each connection, and to set a field would take three times as long
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
    presence: Mapping[tuple[str, str], tuple[PresenceMark, float]] = field(factory=dict)
    """Marks with which nothing is owed, and since when they hold (POSIX seconds)."""


@frozen
class Cleaned:
    """What one slice of clean-up removed; *more* if there is more to do.

    *sessions* are those that ended `Bounds.session_seconds` ago.
    """

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
    """Retention, from the settings. Seconds, counts (of a target, of a session's answers) and bytes."""

    message_seconds: float
    message_count: int
    session_seconds: float
    store_bytes: int
    answer_count: int = 1000
    answer_seconds: float = 600.0


class Database(Protocol):
    """The blocking interface. One thread at a time calls the writing half, others the reading half.

    Everything but `open` and `commit` raises `StoreError` when it cannot be done now.
    """

    # Writing half.

    def open(self, now: float) -> Recovered:
        """Take the store, and begin a new life of it if need be.

        :raises StoreUnusable: it cannot be opened at all, and has not been touched.
        """
        ...

    def close(self) -> None:
        """Store that all was closed in order, and let go of the store. Idempotent.

        It lets go also if that cannot be stored; then it raises, and the next start recovers.
        """
        ...

    def abandon(self) -> None:
        """Let go of the store without a word, as `kill -9` does. Idempotent."""
        ...

    def commit(self, batch: Sequence[Transaction], now: float) -> list[Outcome]:
        """All of *batch* in one commit, in order, each transaction all or nothing.

        A transaction that is refused does not touch the others. If the commit itself fails, every
        outcome is ``Refused(FAILED | FULL)``, and nothing of it is stored. Never raises for what
        the store or a transaction is to blame for.
        """
        ...

    def probe(self) -> None:
        """A tiny write, to learn whether writing works."""
        ...

    def note(self, notes: Notes) -> None: ...
    def clean(self, now: float, bounds: Bounds, *, slice_rows: int = 500) -> Cleaned:
        """One slice of clean-up in one short commit: about *slice_rows* rows are removed."""
        ...

    # Beside both.

    @property
    def checkpoint_due(self) -> bool:
        """Whether `checkpoint` has something to do. Any thread; costs nothing."""
        ...

    def checkpoint(self) -> None:
        """A step of what the store has put off so that commits are quick; mostly there is nothing to do."""
        ...

    # Reading half.

    def read(self, player_id: str, session_id: str, after: int, upto: int, limit: int) -> Chunk:
        """The session's stream with numbers above *after*, not above *upto*: at most *limit* messages
        (and a bounded number of bytes, but at least one message if there is one)."""
        ...

    def current_session(self, player_id: str) -> SessionRow | None:
        """The newest session of the player if it has not ended."""
        ...

    def find_session(self, player_id: str, session_id: str) -> SessionRow | None: ...
    def last_seen(self, player_id: str) -> int:
        """The mark of the player's newest session, ended or not; 0 if there was none."""
        ...

    def expired_sessions(self, now: float, bounds: Bounds, limit: int) -> list[tuple[str, str]]:
        """(player_id, session_id) of sessions that have been offline for `Bounds.message_seconds`.

        Ending them is for who knows whether the player is coming back in this moment.
        """
        ...

    def find_answer(self, player_id: str, session_id: str, command_id: str) -> Answer | None: ...
    def find_message(self, message_id: str) -> StoredMessage | None: ...
    def find_expired(self, message_id: str) -> Expired | None:
        """What is remembered of a message that was stored once and that retention has removed; None if
        there was none such, or it is not remembered any more."""
        ...

    def receivers(self, message: StoredMessage, limit: int) -> tuple[list[SessionRow], int]:
        """The sessions whose stream has the message, at most *limit*, and their number."""
        ...

    def sessions(self, player_id: str | None, limit: int) -> list[SessionRow]: ...
    def figures(self) -> dict[str, Any]:
        """Measured values for ``/health/detailed``: sizes, rows, the newest number."""
        ...


class Runner(Protocol):
    """Where the database's calls run. Calls of `write` never overlap, and run in the order in which
    they were made; `read` may run beside them, and beside both one call of `aside`, which may take long."""

    async def write(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def read(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def aside(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


@define(eq=False)
class _Job:
    """A call on its way through a thread. *done* is set in the event loop."""

    call: Callable[[], Any]
    token: trio.lowlevel.TrioToken
    done: trio.Event = field(factory=trio.Event)
    value: Any = None
    error: BaseException | None = None
    left: bool = False
    """Nobody waits for it any more."""

    def run(self) -> None:
        try:
            self.value = self.call()
        except BaseException as error:  # noqa: ASYNC103 - it is handed to who waits
            self.error = error

    def finish(self) -> None:
        with suppress(trio.RunFinishedError):
            self.token.run_sync_soon(self.done.set)


class _Threads:
    """Threads that take calls from one queue, until `close`.

    `trio.to_thread` costs four times as much a call (a limiter, a context, the thread's name): a fifth of
    what a publication cost in all.
    """

    def __init__(self, name: str, count: int, *, niceness: int = 0) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=_work, args=(self._jobs, niceness), name=f"{name}-{number}", daemon=True).start()

    async def run(self, call: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        job = _Job(call, trio.lowlevel.current_trio_token())
        self._jobs.put(job)
        try:
            await job.done.wait()
        except trio.Cancelled:
            job.left = True
            raise
        if job.error is not None:
            raise job.error
        return cast(T, job.value)

    def close(self) -> None:
        """They end when they are through with what has been asked."""
        for _ in range(self._count):
            self._jobs.put(None)


def _work(jobs: queue.SimpleQueue[_Job | None], niceness: int) -> None:
    if niceness:
        _be_nice(niceness)
    while (job := jobs.get()) is not None:
        if not job.left:
            job.run()
        job.finish()
        del job  # or its result is kept until the next one comes


def _be_nice(niceness: int) -> None:
    """Lower the priority of the calling thread. Linux has one for each thread (setpriority(2), "C library/kernel
    differences"); where it is the process's, it stays as it is."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


class ThreadRunner:
    """One writer thread, *readers* reader threads, and one for what is done aside: nobody waits for that, so it has
    what the others leave of the processor, and at least a tenth of what each of them has (`ASIDE_NICENESS`).

    A cancelled call is left behind at once, so that a disk that hangs cannot keep the process; the
    thread goes on, and the next write waits for it.
    """

    def __init__(self, readers: int = 2) -> None:
        self._writer = _Threads("store-writer", 1)
        self._readers = _Threads("store-reader", readers)
        self._aside = _Threads("store-aside", 1, niceness=ASIDE_NICENESS)

    async def write(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._writer.run(partial(call, *args, **kwargs))

    async def read(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._readers.run(partial(call, *args, **kwargs))

    async def aside(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._aside.run(partial(call, *args, **kwargs))

    def close(self) -> None:
        """Nothing may be asked afterwards."""
        self._writer.close()
        self._readers.close()
        self._aside.close()


class InlineRunner:
    """Runs the calls in the event loop: virtual time does not know of threads.

    *hook* is awaited before each call of `write` or `read`, with its name: it may sleep (a slow disk), or
    raise `StoreError` (a broken one).
    """

    def __init__(self, hook: Callable[[str], Awaitable[None]] | None = None) -> None:
        self.hook = hook
        self._writer = trio.Lock()

    async def write(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._writer:
            await self._wait("write")
            return call(*args, **kwargs)

    async def read(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        await self._wait("read")
        return call(*args, **kwargs)

    async def aside(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        await trio.lowlevel.checkpoint()
        return call(*args, **kwargs)

    async def _wait(self, kind: str) -> None:
        if self.hook is None:
            await trio.lowlevel.checkpoint()
        else:
            await self.hook(kind)


class _Call(Generic[T]):
    """A call that can be taken back as long as its thread has not begun it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._free = threading.Lock()

    def __call__(self) -> T | None:
        return self._call() if self._take() else None

    def withdraw(self) -> bool:
        """Whether it will never run; False if it runs, or has run."""
        return self._take()

    def _take(self) -> bool:
        return self._free.acquire(blocking=False)


class Storage:
    """A `Database` for the event loop, and what health has to know of it.

    A commit that was cancelled while it ran has an outcome that nobody knows: what is in memory may
    no longer be what is stored. So after it nothing is committed any more; a new start recovers.
    """

    def __init__(self, database: Database, runner: Runner, clock: Clock) -> None:
        self._database = database
        self._runner = runner
        self._clock = clock
        self._broken: str | None = None
        self._under_way: list[float] = []
        self._written = Bell()
        """Rings when something was written that makes a checkpoint due."""
        self.trouble: str | None = None
        """Why the newest write failed; None if it worked."""
        self.last_commit_ms: float | None = None
        """From asking to knowing, of the newest commit that worked."""
        self.commits = 0
        self.messages = 0

    @property
    def writing_seconds(self) -> float:
        """How long the commit or probe that is under way has taken so far; 0 if none is."""
        return trio.current_time() - min(self._under_way) if self._under_way else 0.0

    # Writing half.

    async def open(self) -> Recovered:
        """
        :raises StoreUnusable: it cannot be opened at all.
        """
        return await self._runner.write(self._database.open, self._clock.now())

    async def close(self) -> None:
        """
        :raises StoreError: it was not closed in order; the next start recovers.
        """
        if self._broken is not None:
            # The thread that was left behind still has the database in its hands.
            raise StoreError(f"not closed in order: {self._broken}")
        await self._runner.write(self._database.close)

    async def commit(self, batch: Sequence[Transaction]) -> list[Outcome]:
        """All of *batch* in one commit: see `Database.commit`. Never raises `StoreError`."""
        if self._broken is not None:
            return [Refused(Reason.FAILED, self._broken) for _ in batch]
        began = trio.current_time()
        call = _Call(partial(self._database.commit, batch, self._clock.now()))
        try:
            with self._measured():
                outcomes = await self._runner.write(call)
        except trio.Cancelled:
            if not call.withdraw():
                self.trouble = self._broken = "a commit was abandoned, and its outcome is not known"
            raise
        except StoreError as error:
            self.trouble = str(error)
            return [refused(error) for _ in batch]
        if outcomes is None:
            raise RuntimeError("a commit was withdrawn, and yet its outcome asked for")
        self._tell_written()
        self._account(batch, outcomes, (trio.current_time() - began) * 1000)
        return outcomes

    async def probe(self) -> None:
        """
        Write something tiny: `trouble` heals, or a lock is noticed, without traffic.

        :raises StoreError: writing does not work now.
        """
        with self._measured():
            await self._write(self._database.probe)
        self.trouble = self._broken

    async def note(self, notes: Notes) -> None:
        await self._write(self._database.note, notes)

    async def wait_checkpoint_due(self) -> None:
        """Until `checkpoint` has something to do. One task may wait."""
        while not self._database.checkpoint_due:
            await self._written.wait()

    async def checkpoint(self) -> None:
        """
        :raises StoreError: it cannot be done now. Nothing is lost by that, and a write tells of the trouble.
        """
        await self._runner.aside(self._database.checkpoint)

    async def clean(self, bounds: Bounds, *, slice_rows: int = 500) -> Cleaned:
        return await self._write(self._database.clean, self._clock.now(), bounds, slice_rows=slice_rows)

    async def _write(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            result = await self._runner.write(call, *args, **kwargs)
        except StoreError as error:
            self.trouble = str(error)
            raise
        self._tell_written()
        return result

    def _tell_written(self) -> None:
        if self._database.checkpoint_due:
            self._written.ring()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        began = trio.current_time()
        self._under_way.append(began)
        try:
            yield
        finally:
            self._under_way.remove(began)

    def _account(self, batch: Sequence[Transaction], outcomes: Sequence[Outcome], ms: float) -> None:
        failures = [o for o in outcomes if isinstance(o, Refused) and o.reason in (Reason.FAILED, Reason.FULL)]
        if not outcomes or all(transaction.abandoned for transaction in batch):
            return
        if len(failures) == len(outcomes):
            self.trouble = failures[-1].message
            return
        self.trouble = None
        self.last_commit_ms = ms
        self.commits += 1
        for transaction, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Committed):
                appends = sum([type(effect) is Append for effect in transaction.effects])
                self.messages += appends - len(outcome.duplicates)

    # Reading half.

    async def read(self, player_id: str, session_id: str, after: int, upto: int, limit: int) -> Chunk:
        return await self._runner.read(self._database.read, player_id, session_id, after, upto, limit)

    async def current_session(self, player_id: str) -> SessionRow | None:
        return await self._runner.read(self._database.current_session, player_id)

    async def find_session(self, player_id: str, session_id: str) -> SessionRow | None:
        return await self._runner.read(self._database.find_session, player_id, session_id)

    async def last_seen(self, player_id: str) -> int:
        return await self._runner.read(self._database.last_seen, player_id)

    async def expired_sessions(self, bounds: Bounds, limit: int) -> list[tuple[str, str]]:
        return await self._runner.read(self._database.expired_sessions, self._clock.now(), bounds, limit)

    async def find_answer(self, player_id: str, session_id: str, command_id: str) -> Answer | None:
        return await self._runner.read(self._database.find_answer, player_id, session_id, command_id)

    async def find_message(self, message_id: str) -> StoredMessage | None:
        return await self._runner.read(self._database.find_message, message_id)

    async def find_expired(self, message_id: str) -> Expired | None:
        return await self._runner.read(self._database.find_expired, message_id)

    async def receivers(self, message: StoredMessage, limit: int) -> tuple[list[SessionRow], int]:
        return await self._runner.read(self._database.receivers, message, limit)

    async def sessions(self, player_id: str | None, limit: int) -> list[SessionRow]:
        return await self._runner.read(self._database.sessions, player_id, limit)

    async def figures(self) -> dict[str, Any]:
        return await self._runner.read(self._database.figures)


def refused(error: StoreError) -> Refused:
    """What a transaction is told that *error* has kept from being stored."""
    return Refused(Reason.FULL if error.full else Reason.FAILED, str(error))
