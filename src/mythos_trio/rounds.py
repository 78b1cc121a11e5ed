"""The hot path: how what has been committed comes to the connections.

Theory
------
A message to a thousand connections is a thousand ``send`` calls, 4 µs each, in the kernel. What the server does
around each of them is what can be saved. In a bare loop over sockets Python adds 0.4 µs to each, as little as C. But a
connection is a dozen objects (its cursor, session, log, link, socket), and once those of a thousand no longer fit
into the processor's caches, looking at them costs more than the calls: with a cursor moved on each connection a
delivery cost 9 µs, also because the kernel's own data were pushed out of the caches.

So a connection that keeps up has nothing of its own that moves. It belongs to a `Cohort`: connections of one
transport that have all been written *everything* up to one number, the cohort's. A message to everybody is one loop
over the cohort's ``send`` functions, with bytes that all share, and one number that moves. Everything else that is
said of such a connection or its session follows from that number when somebody asks: what it has been written
(`Connection.written`), what is in its log (`mythos_trio.core.log`), how much was delivered (`LiveSession.deliveries`).

A connection leaves its cohort, and has a cursor of its own, as soon as it differs: the kernel did not take all of a
send, or it closes (the link tells: `Link.express`), or a round concerns it otherwise than the rest. Then it is
*apart*: each round writes it from its cursor (`Connection.pump`), and when it has reached the head of the stream and
nothing is unsent, it enters a cohort again. At any time an open connection is in a cohort, or apart, or its own task
writes (`Connection._catch_up`).

A round
-------
1. What went to few (players, channels) is written to each of their connections at once, in one go without a pause:
   nobody sees a connection that has been written and a cohort that has not moved.
2. What went to everybody is written cohort by cohort. Between two of them other tasks run. Each cohort has its own
   number, so nothing has to be kept until then.
3. Those apart are written from their cursors, in slices.

Between slices nothing is held but the list of who is still to be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from typing import TYPE_CHECKING, Final

import trio

from mythos_trio.core.backlog import CHUNK_BYTES
from mythos_trio.core.wire import NAMED, SSE, WEBSOCKET, Framing, Message

if TYPE_CHECKING:
    from mythos_trio.connection import Connection
    from mythos_trio.hub import Hub
    from mythos_trio.session import LiveSession

# A cohort is a slice: 512 sends are 2 to 5 ms.
SIZE: Final = 512
# So many connections are written without a pause where each is written something else.
AT_ONCE: Final = 1024
# Between slices of those apart other tasks run: 64 writes of 10 µs are well below a millisecond.
SLICE: Final = 64

Send = Callable[[bytes], int]


class Cohort:
    """Connections of one transport that have been written all of their streams up to *written*."""

    __slots__ = ("framing", "leads", "members", "sends", "written")

    def __init__(self, framing: Framing, written: int) -> None:
        self.framing = framing
        self.written = written
        self.members: list[Connection] = []
        self.sends: list[Send] = []
        """Of each member, at the same index."""
        self.leads = 0
        """How many sessions have their lead here (`LiveSession.lead`)."""

    def add(self, connection: Connection, send: Send) -> None:
        connection.place = len(self.members)
        self.members.append(connection)
        self.sends.append(send)

    def remove(self, connection: Connection) -> None:
        """The last one takes its place."""
        last, send = self.members.pop(), self.sends.pop()
        if last is not connection:
            place = last.place = connection.place
            self.members[place], self.sends[place] = last, send

    def write(self, data: bytes, written: int, short: _Short) -> None:
        """Send *data* to every member: then all have been written up to *written*."""
        size = len(data)
        for place, send in enumerate(self.sends):
            try:
                sent = send(data)
                if sent != size:
                    short.add(self.members[place], data, sent)
            except OSError as error:
                short.failed(self.members[place], data, error)
        short.break_links()
        self.written = written
        short.finish()


class _Short:
    """Sends of a round of which the kernel has not taken everything. Members cannot leave while their cohort is gone
    through, so what follows from it comes afterwards."""

    def __init__(self) -> None:
        self._rest: list[tuple[Connection, bytes, int]] = []
        self._broken: list[tuple[Connection, OSError]] = []
        self.gone: list[Connection] = []
        """Connections whose links turned out to be broken."""

    def add(self, connection: Connection, data: bytes, sent: int) -> None:
        self._rest.append((connection, data, sent))

    def failed(self, connection: Connection, data: bytes, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            self._rest.append((connection, data, 0))
        else:
            self._broken.append((connection, error))

    def break_links(self) -> None:
        """Before the cohort moves: these have not been written."""
        for connection, error in self._broken:
            connection.leave_cohort()
            connection.link.failed(error)
            self.gone.append(connection)
        self._broken.clear()

    def finish(self) -> None:
        """After the cohort has moved: the rest is the link's to finish, so it counts as written (`Link.try_send`)."""
        for connection, data, sent in self._rest:
            connection.link.finish(data, sent)
        self._rest.clear()


class Cohorts:
    """All connections that keep up. *written*: the number of the newest round that is complete."""

    def __init__(self) -> None:
        self.written = 0
        self._all: dict[str, dict[Cohort, None]] = {WEBSOCKET.name: {}, SSE.name: {}}
        self._roomy: dict[str, dict[Cohort, None]] = {WEBSOCKET.name: {}, SSE.name: {}}

    def __iter__(self) -> Iterator[Cohort]:
        for cohorts in self._all.values():
            yield from cohorts

    def enter(self, connection: Connection, send: Send) -> Cohort:
        """*connection* has been written all up to `written`, which is the newest number that is applied."""
        framing = connection.framing
        roomy = self._roomy[framing.name]
        if not roomy:
            cohort = Cohort(framing, self.written)
            self._all[framing.name][cohort] = roomy[cohort] = None
        cohort = next(iter(roomy))
        cohort.add(connection, send)
        if len(cohort.members) == SIZE:
            del roomy[cohort]
        return cohort

    def leave(self, connection: Connection, cohort: Cohort) -> None:
        cohort.remove(connection)
        name = cohort.framing.name
        if cohort.members:
            self._roomy[name][cohort] = None
        else:
            self._roomy[name].pop(cohort, None)
            del self._all[name][cohort]

    def move(self, written: int) -> None:
        """Everything up to *written* has been sent to all that it concerns."""
        self.written = written
        for cohort in self:
            cohort.written = written


class Fresh:
    """The messages of one round, and who is to get them: gathered while committed transactions are applied."""

    def __init__(self) -> None:
        self.everyone: list[Message] = []
        self.sessions: dict[LiveSession, list[Message]] = {}

    def add(self, message: Message, sessions: Iterable[LiveSession]) -> None:
        mine = self.sessions
        for session in sessions:
            if session in mine:
                mine[session].append(message)
            elif session.connections:
                mine[session] = [message]

    @property
    def connections(self) -> int:
        """How many connections get something that not everybody gets."""
        return sum(len(session.connections) for session in self.sessions)


class Rounds:
    """Writes what `Hub.apply` has gathered. *tell_failure* hears of each connection whose link has ended."""

    def __init__(self, hub: Hub, tell_failure: Callable[[Connection], None]) -> None:
        self._hub = hub
        self._tell_failure = tell_failure

    async def write(self) -> None:
        """One round: when it is over, everybody has been written everything once, as far as sockets had room."""
        hub = self._hub
        fresh, hub.fresh = hub.fresh, Fresh()
        if fresh.everyone or fresh.connections > AT_ONCE:
            # In the order of the numbers, and no connection twice: those that get more than all others do so apart.
            for session in fresh.sessions:
                for connection in list(session.connections.values()):
                    connection.leave_cohort()
        else:
            self._write_few(fresh.sessions)
        if fresh.everyone:
            await self._write_everyone(fresh.everyone)
        hub.cohorts.move(hub.newest)
        await self._write_apart()

    def _write_few(self, sessions: Mapping[LiveSession, Sequence[Message]]) -> None:
        short = _Short()
        epoch = self._hub.epoch
        for session, messages in sessions.items():
            alone = messages[0] if len(messages) == 1 else None  # as nearly always
            size = len(alone.body) if alone else sum([len(message.body) for message in messages])
            if size > CHUNK_BYTES:
                # From their cursors, a chunk at a time: else a client that does not read costs all of the round.
                for connection in list(session.connections.values()):
                    connection.leave_cohort()
                continue
            for connection in session.connections.values():
                cohort = connection.cohort
                if cohort is None:
                    continue  # apart: its turn comes
                framing = cohort.framing
                data = framing.message(alone, epoch) if alone else framing.messages(messages, epoch)
                try:
                    sent = cohort.sends[connection.place](data)
                    if sent != len(data):
                        short.add(connection, data, sent)
                except OSError as error:
                    short.failed(connection, data, error)
            if session.lead is not None:
                for message in messages:
                    message.received_by(session.player_id)
        short.break_links()
        self._hub.cohorts.move(self._hub.newest)
        short.finish()
        self._tell(short)

    async def _write_everyone(self, messages: Sequence[Message]) -> None:
        hub = self._hub
        waiting = [cohort for cohort in hub.cohorts if cohort.written < hub.newest]
        chunks = list(_chunks(messages, hub.newest))
        for number, (cohort, (chunk, upto)) in enumerate(product(waiting, chunks)):
            if number:
                await trio.lowlevel.checkpoint()
            self._count(cohort, chunk)
            short = _Short()
            cohort.write(cohort.framing.messages(chunk, hub.epoch), upto, short)
            self._tell(short)

    def _count(self, cohort: Cohort, messages: Sequence[Message]) -> None:
        named = [c.session.player_id for c in islice(cohort.members, 2 * NAMED) if c.session.lead is c]
        for message in messages:
            message.received_by_all(cohort.leads, named)

    async def _write_apart(self) -> None:
        hub = self._hub
        # Taken whole: who takes the first key of a dict again and again passes all those that were taken before
        # it each time, and a round over 10,000 connections costs five times as much.
        apart, hub.apart = hub.apart, {}
        for number, connection in enumerate(apart, 1):
            connection.pump()
            if connection.link.ended is not None:
                self._tell_failure(connection)
            if number % SLICE == 0:
                await trio.lowlevel.checkpoint()

    def _tell(self, short: _Short) -> None:
        for connection in short.gone:
            self._tell_failure(connection)


def _chunks(messages: Sequence[Message], newest: int) -> Iterator[tuple[Sequence[Message], int]]:
    """*messages* in parts of `CHUNK_BYTES` at most, but one at least, and up to which number each completes the
    stream: a client that does not read costs no more than one of them."""
    chunk: list[Message] = []
    size = 0
    for message in messages:
        size += len(message.body)
        if chunk and size > CHUNK_BYTES:
            yield chunk, chunk[-1].seq
            chunk, size = [], len(message.body)
        chunk.append(message)
    yield chunk, newest
