"""One attachment of a client to a session: a cursor on the session's log, over a link.

How messages go out
-------------------
A connection that has been written all of its stream, with nothing unsent, is in a cohort and has no cursor of
its own: rounds write to it past all this (`mythos_trio.rounds`). One that is apart is pumped by the dispatcher: a
non-blocking send from its cursor, and no task is woken.
Only when the link refuses (its socket is full), or the log in memory has moved on past the cursor,
does a task of the connection's own start (`_catch_up`): it writes many frames in one send, from the
log or from the store, and ends when it has reached the head. Until then the connection is *behind*, and is
not sent what a newer message of the same write replaces (`mythos_trio.core.backlog`).

Everything else that a connection sends waits in a bounded place for its turn between the messages:
the welcome and a gap (`_first`), replies (at most `MAX_REPLIES`, each behind the messages that it
rests on), one pong and one heartbeat (the newest wins). What has been composed counts as sent only
when the link has taken all of it, so a refused send loses nothing and repeats nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import takewhile
from typing import TYPE_CHECKING, Final

import trio
from attrs import define, field, frozen

from mythos_trio.bell import Bell
from mythos_trio.core import wire
from mythos_trio.core.backlog import CHUNK_BYTES, Batch, Replaced, next_batch
from mythos_trio.core.errors import Close
from mythos_trio.core.health import Liveness
from mythos_trio.core.position import Gap, Position
from mythos_trio.core.rates import Bucket
from mythos_trio.core.timeline import Timeline
from mythos_trio.core.wire import Framing, Message
from mythos_trio.storage import Chunk, StoreError

if TYPE_CHECKING:
    from mythos_trio.hub import Hub
    from mythos_trio.link import Link
    from mythos_trio.rounds import Cohort
    from mythos_trio.session import LiveSession
    from mythos_trio.turns import Turns

MAX_REPLIES: Final = 33
READ_MESSAGES: Final = 256
# While the store cannot be read a connection that needs it tries again this often.
RETRY_SECONDS: Final = 1.0
# Far more than is under way to a client that keeps up, far less than a socket holds for one that does not.
SLOW_BYTES: Final = 16384
NOTHING: Final = Batch((), 0)


class Written(Enum):
    """How far `Connection._write_all_now` came."""

    ALL = "to the head of the log"
    REFUSED = "the link took no more"
    STORE = "what comes next has to be read from the store"


@frozen
class PendingReply:
    """A reply that waits for its place: behind all messages up to *position* (None: at once)."""

    command_id: str | None
    answer: bytes
    position: int | None


@define
class _Between:
    """What waits for its turn between the messages. Made when there is something, dropped when it is out."""

    first: list[bytes] = field(factory=list)
    replies: list[PendingReply] = field(factory=list)
    pong: bytes | None = None
    ping_answer: bytes | None = None
    heartbeat: bool = False
    ping: bool = False


class Connection:
    """See the module's docstring. All methods but `_catch_up` are plain: they never wait."""

    # Without a dictionary: an idle connection costs 2 KiB less, and a round touches less memory.
    __slots__ = (
        "_acknowledged_bytes",
        "_behind",
        "_between",
        "_busy",
        "_chunk",
        "_chunk_to",
        "_from",
        "_has_place",
        "_index",
        "_leaving",
        "_ping_mark",
        "_reply_room",
        "_scope",
        "_start",
        "_told_lost",
        "_written",
        "acknowledged",
        "acknowledgements",
        "address",
        "attached",
        "bell",
        "cohort",
        "command_bucket",
        "due",
        "expires_at",
        "frame_bucket",
        "framing",
        "heartbeat_at",
        "hub",
        "id",
        "late_writes",
        "link",
        "liveness",
        "observable",
        "opened",
        "opened_at",
        "over",
        "place",
        "post_at",
        "replaced",
        "session",
        "starts_after",
        "turns",
    )

    def __init__(
        self,
        *,
        id: str,
        framing: Framing,
        link: Link,
        session: LiveSession,
        hub: Hub,
        turns: Turns,
        address: str,
        observable: bool,
        opened_at: float,
    ) -> None:
        """:param observable: no proxy stands between, so what the kernel says of acknowledged bytes
            is the client's own doing.
        :param opened_at: POSIX seconds.
        """
        self.id = id
        self.framing = framing
        self.link = link
        self.session = session
        self.hub = hub
        self.turns = turns
        self.address = address
        self.observable = observable
        self.opened_at = opened_at
        self.cohort: Cohort | None = None  # with those that have been written as much, and everything
        self.place = 0  # in its cohort
        self._written = 0  # see `written`: while it is apart
        self.acknowledged = 0  # the client said so itself: an ack, a named position, an answered ping
        self.attached = False
        self.over: Close | None = None
        self.bell = Bell()  # rung when its task has something to do, or is to end
        # Its task is to take leave, and has been woken for that in a turn in which it has a place.
        self._leaving = self._has_place = False
        self._scope: trio.CancelScope | None = None
        self.expires_at: float | None = None  # POSIX seconds: of the token, if there is one
        now = trio.current_time()
        self.opened = now
        self.liveness = Liveness(heard_at=now, probed_at=now)
        self.heartbeat_at = now
        self.due = now  # when the health checker has to look at it
        self.post_at = now  # when a POST last named this connection
        # The player's, for what the client says; found when it says something.
        self.command_bucket: Bucket | None = None
        self.frame_bucket: Bucket | None = None
        self._start: Callable[[Callable[[], Awaitable[None]]], None] | None = None
        self.replaced = Replaced()
        self.starts_after = 0  # what is not newer was never for this connection
        self.late_writes = Timeline()  # of writes while it was behind; the others are those of the rounds
        self.acknowledgements = Timeline()
        self._behind = True  # from when the link refuses, or from the beginning, to the head of the log
        self._index: int | None = None  # the cursor in the log; None: behind the log, or not known
        self._told_lost = 0  # losses up to this number have been told as a gap
        self._between: _Between | None = None
        # Where the stream stands when `_Between.first`, the welcome and gaps, is out. `written` does not move
        # there before: a connection that breaks in between must not have seen past a gap that it was never told.
        self._from = 0
        self._chunk: Sequence[Message] = ()  # read from the store, not yet taken by the link
        self._chunk_to = 0
        self._reply_room: trio.Event | None = None
        self._busy = False
        self._ping_mark: int | None = None
        self._acknowledged_bytes = 0

    # What others may know.

    @property
    def transport(self) -> str:
        return self.framing.name

    @property
    def player_id(self) -> str:
        return self.session.player_id

    @property
    def session_id(self) -> str:
        return self.session.session_id

    @property
    def written(self) -> int:
        """Everything of the session up to this number has been taken by the link."""
        return self._written if self.cohort is None else self.cohort.written

    @property
    def behind(self) -> int:
        """Messages in memory that it has not been sent; at least 1 if it reads from the store."""
        if self.cohort is not None:
            return 0
        log = self.session.log
        if log is None or self._index is None:
            return max(1, len(self._chunk)) if self._busy else 0
        return log.head - self._index

    @property
    def waiting_for(self) -> str | None:
        if not self._busy:
            return None
        return "the client to read" if self.link.unsent else "the store"

    @property
    def healthy(self) -> bool:
        return self.why is None

    @property
    def why(self) -> str | None:
        """Why it is not healthy; None if it is: the last ping answered, and not behind."""
        if self.over is not None:
            return self.over.reason
        if self.liveness.waiting and trio.current_time() - self.liveness.probed_at > 5:
            return "no answer to the last ping"
        return f"{self.behind} messages behind" if self.behind > 1 else None

    @property
    def last_activity(self) -> float:
        """POSIX seconds."""
        return self.opened_at + (max(self.liveness.heard_at, self.link.last_received) - self.opened)

    def _wall(self) -> float:
        """POSIX seconds."""
        return self.opened_at + (trio.current_time() - self.opened)

    # Beginning and end.

    def begin(
        self,
        start: Callable[[Callable[[], Awaitable[None]]], None],
        *,
        after: int,
        first: list[bytes],
        chunk: Chunk | None,
        then: list[bytes],
    ) -> None:
        """From now on, with the first `pump`, send the first words, and then all of the session after *after*.

        :param start: starts a task in the nursery that owns this connection.
        :param first: the welcome, and a gap of the position that was named.
        :param chunk: what was read from the store after *after*, if the log does not reach back so far.
        :param then: what stands between a gap of retention and the messages.
        """
        self._from = self.starts_after = after
        self._wait_between().first = first
        if chunk is not None:
            self.take_chunk(chunk)
        self._wait_between().first += then
        self._start = start
        self.link.on_express = self._express
        self.hub.apart[self] = None  # a round that comes first writes all of it

    def end(self, close: Close, *, by: str = "server", retry_ms: int | None = None) -> None:
        """Say the last words and stop: its task ends."""
        if self.over is not None:
            return
        if self._between is not None and self._between.first:
            self.pump()  # nothing has been said yet
        self.over = close
        self.look_at_kernel()
        if self.link.ended is None:
            words = self.framing.last_words(wire.disconnect(close, retry_ms), close, retry_ms)
            self.link.last_words(words, close, by=by)
        self.stop()

    def stop(self) -> None:
        """It is over, or its link is: its task goes on, and what that does in `stoppable` is cut off."""
        self.leave()
        if self._scope is not None:
            self._scope.cancel()

    def leave(self) -> None:
        """Nothing is to be done any more but to take leave: its task goes on when it has a place. Idempotent."""
        if not self._leaving:
            self._leaving = True
            self.turns.wake(self._give_place)

    def _give_place(self) -> None:
        self._has_place = True
        self.bell.ring()

    async def wait_place(self) -> None:
        """For its task, before it takes leave: until it has a place in a turn."""
        self.leave()
        while not self._has_place:
            await self.bell.wait()

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """For its task, where that waits for anything but the bell: `stop` cuts it off. (Not for the whole of its
        life: a scope costs 12 µs and half a KiB, and most connections never wait.)"""
        with trio.CancelScope() as self._scope:
            if self.over is not None or self.link.ended is not None:
                self._scope.cancel()
            yield
        self._scope = None

    # What a client has surely got.

    def confirm(self, seq: int) -> None:
        """The client said itself that it has everything up to *seq*."""
        upto = min(seq, self.written)
        if upto > self.acknowledged:
            self.acknowledgements.add(self.acknowledged, upto, self._wall())
            self.acknowledged = upto
        self.session.saw(seq)

    def look_at_kernel(self) -> None:
        """Move the mark if the peer has acknowledged all bytes.

        The kernel is not asked if that is known: it takes 12 µs and more, and nobody may have spoken to the player.
        """
        link, session = self.link, self.session
        if session.has_seen_all:
            return
        if not self.observable or link.closed or link.unacknowledged() != 0 or link.in_error():
            return
        if self.cohort is not None and self.cohort.written == self.hub.newest:
            session.saw_all(self.hub.newest)
        else:
            session.saw(self.written)

    # Signs of life.

    def heard_bytes(self) -> None:
        """Take what the link and the kernel know about life."""
        heard = self.post_at
        if self.transport == "websocket":
            heard = max(heard, self.link.last_received)
        if heard > self.liveness.heard_at:
            self.liveness.heard(heard)
        if self.liveness.waiting and self._alive_by_kernel():
            self.liveness.heard(trio.current_time())

    def _alive_by_kernel(self) -> bool:
        # Who reads slowly, but reads, is not gone: a ping may be minutes behind in its socket, also
        # when we have nothing left to write. Its window is closed then, so much is unacknowledged, and each
        # bit that it reads lets some more be acknowledged. (That something is acknowledged is not enough: a
        # kernel does so for a program that has stopped, until the window is closed.) Who does not read at
        # all is ended by the link's write timeout.
        before = self._acknowledged_bytes
        self._acknowledged_bytes = self.link.acknowledged()
        slow = self._busy or (self.link.unacknowledged() or 0) >= SLOW_BYTES
        if slow and self._acknowledged_bytes > before:
            return True
        if self.transport == "websocket":
            # While it is not read (its replies wait), bytes in the kernel are its life.
            return self.link.unread() > 0
        return self.link.unacknowledged() == 0

    def _probed(self) -> None:
        self.liveness.probed(trio.current_time())
        self._acknowledged_bytes = self.link.acknowledged()

    def probe(self) -> None:
        """Ask for a sign of life: a ping, or on SSE a heartbeat whose bytes must be acknowledged."""
        if self.transport == "sse":
            self.offer_heartbeat()
        elif self._ping_mark is None:
            # One ping at a time: the frames are all alike, so a late pong must not be taken for
            # the answer to a later ping with a larger mark.
            self._wait_between().ping = True
            self.pump()
        elif not self.liveness.waiting:
            # The kernel has told of life since the ping, which is still to be answered.
            self._probed()

    def ponged(self, payload: bytes) -> None:
        """A pong has come (the link has parsed it)."""
        if payload == wire.PING_PAYLOAD and self._ping_mark is not None:
            mark, self._ping_mark = self._ping_mark, None
            self.confirm(mark)

    # Sending.

    def offer_heartbeat(self) -> None:
        self.heartbeat_at = trio.current_time()
        self._wait_between().heartbeat = True
        self.pump()

    def offer_pong(self, payload: bytes) -> None:
        self._wait_between().pong = payload
        self.pump()

    def answer_ping(self, payload: bytes) -> None:
        """The client has sent a ping frame. Of several that wait the newest is answered (RFC 6455, section 5.5.3)."""
        self._wait_between().ping_answer = wire.pong_frame(payload)
        self.pump()

    def offer_reply(self, command_id: str | None, answer: bytes, position: int | None) -> None:
        """Queue a reply for its place. It is never dropped while the connection lives."""
        if self._answer_now(command_id, answer, position):
            return
        self._wait_between().replies.append(PendingReply(command_id, answer, position))
        self.pump()

    def _answer_now(self, command_id: str | None, answer: bytes, position: int | None) -> bool:
        """Send a reply if its place has come and nothing else waits, as nearly always; whether it has been taken."""
        newest = self.hub.newest
        if self._busy or self.over is not None or self._start is None or not self._at_head():
            return False
        if position is not None and position > newest:
            return False
        reply = wire.reply(command_id, answer, self.hub.epoch, newest if position is None else position)
        if not self.link.try_send(self.framing.control(reply)):
            return False
        self._behind = False
        self._move_to(newest)
        return True

    async def wait_reply_room(self) -> None:
        """Until fewer than `MAX_REPLIES` wait: before that no further frame is taken."""
        while self.waiting_replies >= MAX_REPLIES:
            self._reply_room = trio.Event()
            await self._reply_room.wait()

    @property
    def waiting_replies(self) -> int:
        return 0 if self._between is None else len(self._between.replies)

    def _wait_between(self) -> _Between:
        if self._between is None:
            self._between = _Between()
        return self._between

    def pump(self) -> None:
        """Write what can be written without waiting; a task goes on with the rest."""
        if self._busy or self.over is not None or self._start is None:
            return
        if self.cohort is not None and self.cohort.written != self.hub.newest:
            self.leave_cohort()  # in the middle of a round that has not come to its cohort
        if self._write_all_now() is Written.ALL:
            self._enter_cohort()
            return
        self.leave_cohort()
        self.hub.apart.pop(self, None)
        self._busy = self._behind = True
        try:
            self._start(self._catch_up)
        except RuntimeError:
            # The nursery is closed: the session ends, and this connection with it.
            self._busy = False

    # In a cohort, or apart.

    def _enter_cohort(self) -> None:
        """If it has reached the head, and nothing is unsent, rounds need to know nothing more of it."""
        hub = self.hub
        if self.cohort is not None or self.over is not None:
            return
        send = self.link.express()
        if send is None or hub.newest != hub.cohorts.written or not self._at_head():
            hub.apart[self] = None
            return
        hub.apart.pop(self, None)
        self._behind = False
        self.cohort = hub.cohorts.enter(self, send)
        self.session.keeps_up(self)

    def leave_cohort(self) -> None:
        """From now on it has a cursor of its own, and rounds write from there."""
        cohort = self.cohort
        if cohort is None:
            return
        self.session.falls_behind(self)
        self.hub.cohorts.leave(self, cohort)
        self.cohort = None
        self._written = self._from = cohort.written
        self._index = None
        if self.over is None:
            self.hub.apart[self] = None

    def _express(self, possible: bool) -> None:
        """The link tells whether sends may go past it."""
        if not possible:
            self.leave_cohort()
        elif not self._busy:
            self._enter_cohort()

    def _write_all_now(self) -> Written:
        """Write as far as can be done without waiting."""
        while True:
            batch, upto = self._next_batch()
            data = self._compose(batch, upto)
            if data:
                if not self.link.try_send(data):
                    return Written.REFUSED
                self._taken(batch, upto)
                if self._at_head():
                    self._behind = False
                    return Written.ALL
            elif batch is None:
                return Written.STORE
            elif not batch.count:
                self._move_to(upto)
                self._behind = False
                return Written.ALL

    def _at_head(self) -> bool:
        """Whether there is nothing more to write, for sure."""
        if self.cohort is not None:
            return self._between is None and self.cohort.written == self.hub.newest
        log = self.session.log
        return self._between is None and not self._chunk and log is not None and self._index == log.head

    def _next_batch(self) -> tuple[Batch | None, int]:
        """What comes next and up to which number the stream is then complete; None: not in memory."""
        if self.cohort is not None:
            return NOTHING, self.cohort.written
        if self._chunk:
            batch = next_batch(self._chunk, CHUNK_BYTES)
            return batch, self._chunk_to if batch.count == len(self._chunk) else batch.messages[-1].seq
        log = self.session.log
        if log is None:
            return NOTHING, self._from
        if self._index is None or not log.holds(self._index):
            self._index = log.locate(self._from)
            if self._index is None:
                return None, self._from
        if self._index == log.head:
            return NOTHING, max(self.hub.newest, self._from)
        if self._behind:
            batch = next_batch(log.after(self._index), CHUNK_BYTES)
        else:
            messages = log.read(self._index, CHUNK_BYTES)
            batch = Batch(messages, len(messages))
        at_head = self._index + batch.count == log.head
        return batch, self.hub.newest if at_head else batch.messages[-1].seq

    def _compose(self, batch: Batch | None, upto: int) -> bytes:
        """The bytes of the next send: first words, messages, then what has its place behind them."""
        epoch = self.hub.epoch
        between = self._between
        parts = [] if between is None else list(between.first)
        if batch is not None:
            parts += self._frames(batch, epoch)
        written = max(upto, self._from)
        if between is not None:
            parts += self._frames_between(between, written, f"{epoch}-{written}")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _frames_between(self, between: _Between, written: int, position: str) -> Iterator[bytes]:
        """*position*: what precedes them is complete up to it."""
        control = self.framing.control
        for pending in _due(between.replies, written):
            place = written if pending.position is None else pending.position
            yield control(wire.reply(pending.command_id, pending.answer, self.hub.epoch, place))
        if between.pong is not None:
            yield control(between.pong)
        if between.heartbeat:
            yield control(wire.control("heartbeat", position=position), position)
        if between.ping_answer is not None:
            yield between.ping_answer
        if between.ping:
            yield wire.PING

    def _frames(self, batch: Batch, epoch: int) -> list[bytes]:
        framing = self.framing
        if not batch.skipped:
            return [framing.messages(batch.messages, epoch)] if batch.messages else []
        replaces = batch.replaces()
        return [
            framing.replacing(message, epoch, replaces[message.seq])
            if message.seq in replaces
            else framing.message(message, epoch)
            for message in batch.messages
        ]

    def _taken(self, batch: Batch | None, upto: int) -> None:
        """The link has taken what `_compose` made of the same arguments: move all marks."""
        between = self._between
        if between is not None:
            self._taken_between(between, max(upto, self._from))
        if batch is not None and batch.count:
            if self._chunk:
                self._chunk = self._chunk[batch.count :]
            elif self._index is not None:
                self._index += batch.count
            if batch.skipped:
                self.replaced.note(batch.skipped)
                self.session.skipped_for(self, batch.skipped)
            if self._behind:
                self.late_writes.add(self.written, upto, self._wall())
            self._has_written(batch.messages, upto)
        else:
            self._move_to(self._from if batch is None else upto)
        if between is not None and between.ping:
            self._ping_mark = self.written
            self._probed()

    def _taken_between(self, between: _Between, written: int) -> None:
        del between.replies[: len(_due(between.replies, written))]
        if self._reply_room is not None:
            self._reply_room.set()
            self._reply_room = None
        if between.heartbeat and self.transport == "sse" and not self.liveness.waiting:
            self._probed()
        self._between = _Between(replies=between.replies) if between.replies else None

    def _has_written(self, messages: Sequence[Message], upto: int) -> None:
        self._move_to(upto)
        self.session.delivered_to(self, messages)

    def _move_to(self, seq: int) -> None:
        if self.cohort is None:
            self._written = self._from = max(seq, self._from)

    # Catching up.

    async def _catch_up(self) -> None:
        """Write to the head, waiting for the client and the store as needed.

        Every wait ends: for the client by the link's write deadline, for the store by the store's
        own, and all of it with the nursery that owns the connection.
        """
        try:
            while (done := self._write_all_now()) is not Written.ALL:
                if done is Written.STORE:
                    await self._read_store()
                elif self.link.unsent:
                    await self.link.wait_sent()
                else:
                    # It takes nothing more for good: its owner hears of that from the link.
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # lost, or closed by its owner when the last words had had their time
        finally:
            self._busy = False
            self._enter_cohort()

    async def _read_store(self) -> None:
        """Read the next part of the stream; the gap first, if something is lost."""
        log = self.session.log
        upto = self.hub.newest if log is None else log.floor
        try:
            chunk = await self.hub.storage.read(self.player_id, self.session_id, self._from, upto, READ_MESSAGES)
        except StoreError:
            await trio.sleep(RETRY_SECONDS)
            return
        self.take_chunk(chunk)

    def take_chunk(self, chunk: Chunk) -> None:
        """A part of the stream that was read from the store after `_from` comes next."""
        if chunk.lost > self._told_lost:
            gap = retention_gap(self.hub.epoch, self._from, chunk)
            self._wait_between().first.append(self.gap_bytes(gap))
            self.session.gap_told(self, gap)
            self._told_lost = chunk.lost
            self._from = max(self._from, gap.position.seq)
        if chunk.messages:
            self._chunk = [Message(m.seq, m.id, m.target, m.body, m.stored_at) for m in chunk.messages]
            self._chunk_to = chunk.complete_to
        elif self._between is not None and self._between.first:
            self._from = max(self._from, chunk.complete_to)
        else:
            self._move_to(chunk.complete_to)
        self._index = None

    def gap_bytes(self, gap: Gap) -> bytes:
        payload = wire.control(
            "gap", after=str(gap.after), position=str(gap.position), reason=gap.reason, shared=gap.shared
        )
        return self.framing.control(payload, str(gap.position))


def _due(replies: Iterable[PendingReply], written: int) -> list[PendingReply]:
    """Those whose place has come: they are in order."""
    return list(takewhile(lambda pending: pending.position is None or pending.position <= written, replies))


def retention_gap(epoch: int, after: int, chunk: Chunk) -> Gap:
    """The gap that stands before *chunk*, read after *after*: the stream goes on with the oldest held."""
    goes_on = chunk.messages[0].seq - 1 if chunk.messages else max(chunk.lost, after)
    return Gap(Position(epoch, after), Position(epoch, max(goes_on, after)), "retention")
