"""A network in memory: deterministic under virtual time, with a hand on the cable.

    listener = MemoryListener()
    nursery.start_soon(server.serve, listener)
    client = listener.connect()             # a MemoryWire, the client's end
    stream = MemoryStream(client)           # the same as a Trio stream

Each direction holds at most 64 KiB in the sender's kernel and 64 KiB in the receiver's. What is in
the sender's kernel is unacknowledged. Controls stand on either end of a pair: `cut` and `mend` the
cable, `stall` what this end sends, `delay` it, `crumble` it to small pieces, `reset` the connection, or
`forget` it, as a machine that has started again does.
"""

from __future__ import annotations

import errno
import itertools
from collections import deque
from collections.abc import Callable
from weakref import WeakSet

import trio
from attrs import define, field

KERNEL = 64 * 1024
_FIN = b""


@define(eq=False)
class _Way:
    """One direction of a connection."""

    capacity: int
    queue: deque[tuple[float, bytes]] = field(factory=deque)
    """On its way: when it may arrive, and what; empty bytes are the end."""
    queued: int = 0
    arrived: bytearray = field(factory=bytearray)
    passed: int = 0
    """How many bytes have arrived so far."""
    ended: bool = False
    delay: float = 0.0
    stalled: bool = False
    most: Callable[[], int] | None = None
    """How many bytes a kernel takes, or hands out, at once; None: as many as there is room for."""
    record: bytearray | None = None
    """All that has arrived, if somebody wants to know."""

    def piece(self, size: int) -> int:
        """How much of *size* bytes passes at once."""
        return size if self.most is None else max(1, min(size, self.most()))

    def put(self, data: bytes) -> None:
        self.queue.append((trio.current_time() + self.delay, data))
        self.queued += len(data)

    def due(self) -> float | None:
        """When something may arrive next; None if only an event can change that."""
        if self.stalled or not self.queue or len(self.arrived) >= self.capacity:
            return None
        return self.queue[0][0]

    def move(self) -> bool:
        """Let arrive what is due and has room; whether anything did."""
        moved = False
        while (due := self.due()) is not None and due <= trio.current_time():
            moved = True
            when, data = self.queue.popleft()
            if data == _FIN:
                self.ended = True
                continue
            room = self.capacity - len(self.arrived)
            self.arrived += data[:room]
            self.passed += min(room, len(data))
            if self.record is not None:
                self.record += data[:room]
            self.queued -= min(room, len(data))
            if data[room:]:
                self.queue.appendleft((when, data[room:]))
        return moved

    def drop(self) -> None:
        self.queue.clear()
        self.queued = 0
        self.arrived.clear()


class MemoryWire:
    """One end of a connection in memory: a `mythos_trio.net.Wire`, and a hand on the cable."""

    def __init__(self, local: tuple[str, int], peer: tuple[str, int], outgoing: _Way, incoming: _Way) -> None:
        self.local = local
        self.peer, self.peer_port = peer
        self.closed = False
        self.was_reset = False
        """Whether this end reset the connection."""
        self.error: int | None = None
        self._out = outgoing
        self._in = incoming
        self._eof_sent = False
        self._other: MemoryWire = self
        self._changed = trio.Event()

    def __repr__(self) -> str:
        return f"<MemoryWire {self.local} to {self.peer}{' closed' if self.closed else ''}>"

    # The wire.

    def send(self, data: bytes | memoryview, /) -> int:
        self._check()
        if self._eof_sent:
            raise OSError(errno.EPIPE, "nothing more can be sent")
        self._move()
        sent = 0
        data = data[: self._out.piece(len(data))]
        while sent < len(data) and (room := self._out.capacity - self._out.queued) > 0:
            self._out.put(bytes(data[sent : sent + room]))
            sent = min(len(data), sent + room)
            self._move()
        if data and not sent:
            raise BlockingIOError(errno.EAGAIN, "the send buffer is full")
        return sent

    send_last = send

    def recv(self, limit: int, /) -> bytes:
        self._move()
        if self.closed or self.error is not None:
            self._check()
        if self._in.arrived:
            limit = self._in.piece(limit)
            data = bytes(self._in.arrived[:limit])
            del self._in.arrived[:limit]
            self._move()
            self._tell()
            return data
        if self._in.ended:
            return b""
        raise BlockingIOError(errno.EAGAIN, "nothing has come")

    async def wait_readable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not (self._readable() or self.closed):
            await self._wait_change()
        if self.closed:
            raise trio.ClosedResourceError

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not (self._writable() or self.closed):
            await self._wait_change()
        if self.closed:
            raise trio.ClosedResourceError

    def unacknowledged(self) -> int | None:
        self._move()
        return None if self.closed else self._out.queued

    def acknowledged(self) -> int | None:
        self._move()
        return None if self.closed else self._out.passed

    def unread(self) -> int:
        self._move()
        return 0 if self.closed else len(self._in.arrived)

    def fileno(self) -> int:
        return -1

    def in_error(self) -> bool:
        self._move()
        return self.closed or self.error is not None

    def send_eof(self) -> None:
        if not self.closed and not self._eof_sent:
            self._check()
            self._eof_sent = True
            self._out.put(_FIN)
            self._move()

    def close(self) -> None:
        """As a kernel does it: with bytes unread the peer gets a reset instead of the end."""
        if self.closed:
            return
        self._move()
        if self._in.arrived:
            self.reset()
            return
        if not self._eof_sent and self.error is None:
            self._out.put(_FIN)
        self.closed = True
        self._move()
        self._tell()

    def reset(self) -> None:
        if self.closed:
            return
        self.closed = self.was_reset = True
        self._out.drop()
        if self._out.stalled:
            # The other end does not hear of it: what is in its kernel stays there, unacknowledged.
            self._in.arrived.clear()
        else:
            self._in.drop()
            self._other._get_reset()
        self._tell()

    # The hand on the cable.

    def cut(self) -> None:
        """Nothing passes in either direction, and nobody is told."""
        self._out.stalled = self._in.stalled = True

    def mend(self) -> None:
        self._out.stalled = self._in.stalled = False
        self._move()
        self._tell()

    def stall(self, stalled: bool = True) -> None:
        """What this end sends stays in its kernel, unacknowledged; or goes on."""
        self._out.stalled = stalled
        self._move()
        self._tell()

    def delay(self, seconds: float) -> None:
        """What this end sends from now on arrives *seconds* later."""
        self._out.delay = seconds

    def crumble(self, most: Callable[[], int] | None) -> None:
        """What this end sends is taken by its kernel, and handed out by the other's, in pieces: each of at most
        ``most()`` bytes, one at least. ``lambda: 1`` is byte by byte; None is whole again."""
        self._out.most = most

    def forget(self) -> None:
        """This end's machine has started again and knows nothing of the connection. It says nothing; what comes
        is answered with a reset. So the other end is half-open until it sends."""
        if self.closed:
            return
        self.closed = True
        self._in.arrived.clear()
        self._out.drop()
        self._tell()

    @property
    def other(self) -> MemoryWire:
        """The other end."""
        return self._other

    def record(self) -> bytearray:
        """From now on, all bytes that arrive at this end's kernel, read or not."""
        if self._in.record is None:
            self._in.record = bytearray()
        return self._in.record

    # Within.

    def _check(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, "the wire is closed")
        if self.error is not None:
            raise OSError(self.error, "the connection is broken")

    def _get_reset(self) -> None:
        if not self.closed:
            self.error = errno.ECONNRESET

    def _move(self) -> None:
        moved = [way.move() for way in (self._out, self._in)]
        # Data for an end that is closed is answered by a reset.
        for end in (self, self._other):
            if end.closed and end._in.arrived:
                end._in.arrived.clear()
                end._other._get_reset()
        if any(moved):
            self._tell()

    def _tell(self) -> None:
        for end in (self, self._other):
            end._changed.set()
            end._changed = trio.Event()

    def _readable(self) -> bool:
        self._move()
        return bool(self._in.arrived) or self._in.ended or self.error is not None

    def _writable(self) -> bool:
        self._move()
        return self._out.queued < self._out.capacity or self.error is not None

    async def _wait_change(self) -> None:
        dues = [due for way in (self._out, self._in) if (due := way.due()) is not None]
        with trio.move_on_at(min(dues, default=float("inf"))):
            await self._changed.wait()


def wire_pair(
    client: tuple[str, int] = ("127.0.0.1", 50000),
    server: tuple[str, int] = ("127.0.0.1", 8000),
    capacity: int = KERNEL,
) -> tuple[MemoryWire, MemoryWire]:
    """The client's and the server's end of a new connection."""
    there, back = _Way(capacity), _Way(capacity)
    ours, theirs = MemoryWire(client, server, there, back), MemoryWire(server, client, back, there)
    ours._other, theirs._other = theirs, ours
    return ours, theirs


_listeners: WeakSet[MemoryListener] = WeakSet()


def open_wires() -> list[MemoryWire]:
    """The accepted ends, of all listeners that somebody still holds, that were not closed."""
    return [wire for listener in list(_listeners) for wire in listener.open_wires]


class MemoryListener:
    """A listening socket in memory: a `mythos_trio.net.Listener`."""

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 8000)) -> None:
        self.address = address
        self.wires: list[MemoryWire] = []
        """The server's end of every connection that there was."""
        self.closed = False
        self._ports = itertools.count(50000)
        self._waiting: deque[MemoryWire] = deque()
        self._failures: deque[OSError] = deque()
        self._changed = trio.Event()
        _listeners.add(self)

    @property
    def open_wires(self) -> list[MemoryWire]:
        """The server's ends that it has not closed."""
        return [wire for wire in self.wires if not wire.closed]

    @property
    def waiting(self) -> int:
        """Connections that were not accepted yet."""
        return len(self._waiting)

    def connect(self, peer: str = "127.0.0.1", *, capacity: int = KERNEL) -> MemoryWire:
        """Connect from the address *peer*; the client's end."""
        if self.closed:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens")
        client, server = wire_pair((peer, next(self._ports)), self.address, capacity)
        self._waiting.append(server)
        self._tell()
        return client

    def fail(self, number: int, times: int = 1) -> None:
        """Let `accept` fail *times* with the errno *number* before it accepts again."""
        self._failures.extend(OSError(number, errno.errorcode[number]) for _ in range(times))

    async def accept(self) -> MemoryWire:
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            if self.closed:
                raise trio.ClosedResourceError
            await self._changed.wait()
        if self._failures:
            raise self._failures.popleft()
        wire = self._waiting.popleft()
        self.wires.append(wire)
        return wire

    def accept_now(self) -> MemoryWire | None:
        if self._failures or not self._waiting:
            return None
        wire = self._waiting.popleft()
        self.wires.append(wire)
        return wire

    def close(self) -> None:
        self.closed = True
        while self._waiting:
            self._waiting.popleft().reset()
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class MemoryStream(trio.abc.HalfCloseableStream):
    """A wire as a Trio stream, for clients that want one."""

    def __init__(self, wire: MemoryWire) -> None:
        self.wire = wire

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(bytes(data))
        await trio.lowlevel.checkpoint()
        while rest:
            await self.wait_send_all_might_not_block()
            try:
                rest = rest[self.wire.send(rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error

    async def wait_send_all_might_not_block(self) -> None:
        await self.wire.wait_writable()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while True:
            await self.wire.wait_readable()
            try:
                return self.wire.recv(max_bytes or KERNEL)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error

    async def receive_all(self) -> bytes:
        """Everything until the end. BrokenResourceError if there was a reset instead."""
        data = b""
        while piece := await self.receive_some():
            data += piece
        return data

    async def receive_until(self, mark: bytes) -> bytes:
        """Everything up to and with *mark*, and what came with it. EOFError if the end comes first."""
        data = b""
        while mark not in data:
            piece = await self.receive_some()
            if not piece:
                raise EOFError(data)
            data += piece
        return data

    async def send_eof(self) -> None:
        self.wire.send_eof()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.wire.close()
        await trio.lowlevel.checkpoint()
