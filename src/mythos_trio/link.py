"""The link: the one owner of a connection's socket, its unsent bytes, and the last word on its state.

trio-websocket and Hypercorn see it as a stream. The dispatcher writes to it with `Link.try_send`,
without waiting. Frames and answers are never torn: what has begun to go out is finished by the link,
whatever becomes of the one who sent it, or the connection is broken.

While nothing is unsent the link has no task. The kernel has the write timeout to take each chunk of
at most 64 KiB; a client that does not let it is gone.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, NoReturn

import trio
from attrs import define, field

from mythos_trio.core.errors import BINARY, SLOW, TOO_BIG, Close, ErrorType
from mythos_trio.core.frames import Closing, FrameScanner, Pong, TooBig
from mythos_trio.net import Wire

if TYPE_CHECKING:
    from mythos_trio.poller import Poller

CHUNK: Final = 64 * 1024
RECEIVE: Final = 64 * 1024
LINGER_SECONDS: Final = 1.0
LINGER_BYTES: Final = 64 * 1024
_CLOSE_FRAME: Final = b"\x88"  # RFC 6455, section 5.2: FIN and opcode 8

CLOSED: Final = Close(1000, "the connection was closed", ErrorType.CONNECTION)
LOST: Final = Close(1006, "the connection was lost", ErrorType.CONNECTION)
ABANDONED: Final = Close(1001, "the server stopped in mid-sentence", ErrorType.SYSTEM)

Starter = Callable[[Callable[[], Awaitable[None]]], None]


@define(eq=False)
class _Piece:
    """Bytes that were taken and are not all with the kernel: *rest* is what is not."""

    rest: memoryview
    done: trio.Event = field(factory=trio.Event, init=False)
    """Set when *rest* is empty, or the link is closed."""


@define
class SocketInfo:
    """What Hypercorn asks of a socket: its addresses."""

    family: socket.AddressFamily
    peer: tuple[str, int]
    local: tuple[str, int]

    def getpeername(self) -> tuple[str, int]:
        return self.peer

    def getsockname(self) -> tuple[str, int]:
        return self.local


class Link(trio.abc.HalfCloseableStream):
    """A connection's socket. One task may receive; any number may send.

    The link has *ended* from the moment its cause is known: the last words are said, it was closed
    or reset, or the network broke it. Then nothing more can be sent, `on_end` is called once and
    `wait_ended` returns. After last words what the peer still sends can be received until the link
    is closed; so the owner calls `linger`, which waits for the peer and closes.
    """

    __slots__ = (
        "_broken",
        "_closed",
        "_drained",
        "_ended",
        "_eof_sent",
        "_flush_starter",
        "_hushed",
        "_peer_done",
        "_poller",
        "_pushed",
        "_queue",
        "_receiving",
        "_sealed",
        "_wire",
        "at_end",
        "ended",
        "ended_by",
        "last_received",
        "lingers_until",
        "on_closed",
        "on_end",
        "on_express",
        "on_frames",
        "on_pong",
        "on_violation",
        "received_bytes",
        "scanner",
        "sent_bytes",
        "start",
        "unsent",
        "violation",
        "write_timeout",
    )

    def __init__(self, wire: Wire, *, write_timeout: float, start: Starter) -> None:
        self._wire = wire
        self.write_timeout = write_timeout
        self.start = start
        """Starts a task to finish a partial write; the owner's `nursery.start_soon`. Reassignable."""
        # Lists: nearly always empty, and then a deque takes ten times as much.
        self._queue: list[_Piece] = []
        self.unsent = 0
        """Bytes taken and not yet given to the kernel."""
        self._flush_starter: Starter | None = None
        self._drained: trio.Event | None = None
        self._sealed = False
        self._eof_sent = False
        self._closed = False
        self._broken = False
        self._hushed = False
        self._peer_done = False
        self._receiving = False
        self._pushed: list[bytes] = []
        self._poller: Poller | None = None
        self._ended: trio.Event | None = None
        self.ended: Close | None = None
        """Why it is over, None while it lives. The first cause wins."""
        self.ended_by = ""
        """``client``, ``network``, ``server`` or ``operator``."""
        self.on_end: Callable[[], None] | None = None
        self.on_express: Callable[[bool], None] | None = None
        """Told False when `express` may not be used any more, and True when it may be again."""
        self.on_closed: Callable[[Link], None] | None = None
        """Called once, when the socket has been closed."""
        self.lingers_until: float | None = None
        """Since `linger` was called: when it ends, of `trio.current_time`."""
        self.scanner: FrameScanner | None = None
        """Looks over what is received before the receiver sees it."""
        self.on_pong: Callable[[bytes], None] | None = None
        self.on_frames: Callable[[int], None] | None = None
        """Told how many frames have begun in what was just received."""
        self.on_violation: Callable[[Close], None] | None = None
        self.violation: Close | None = None
        """What `on_violation` was told, or would have been: it may happen before anybody listens."""
        self.last_received = trio.current_time()
        """`trio.current_time` of the last byte from the peer."""
        self.received_bytes = 0
        self.at_end = False
        """Whether the peer sends nothing more, for sure: its end has been received."""
        self.sent_bytes = 0
        """Bytes that the link has given to the kernel: those that went past it (`express`) are not counted."""

    def __repr__(self) -> str:
        state = "open" if self.ended is None else f"ended: {self.ended.reason}"
        return f"<Link {self.peer}:{self.peer_port}, {state}>"

    @property
    def peer(self) -> str:
        return self._wire.peer

    @property
    def peer_port(self) -> int:
        return self._wire.peer_port

    @property
    def socket(self) -> SocketInfo:
        """ClosedResourceError if it is closed."""
        family = socket.AF_INET6 if ":" in self.peer else socket.AF_INET
        return SocketInfo(family, (self.peer, self.peer_port), self._wire.local)

    @property
    def closed(self) -> bool:
        """Whether the socket is closed: nothing more can be received either."""
        return self._closed

    @property
    def sealed(self) -> bool:
        """Whether nothing more can be sent: it has ended, or the last frame is out."""
        return self._sealed

    # Sending.

    def try_send(self, data: bytes) -> bool:
        """Send all or nothing, in order, without waiting. Never raises.

        True: taken; what the kernel did not take at once is the link's to finish. False: earlier
        bytes are unsent (see `wait_sent`), or nothing more can be sent.
        """
        if self._queue or self._sealed:
            return False
        # As `_put`, but without a call: this is the one place through which nearly all bytes go.
        try:
            sent = self._wire.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._break(error)
            return False
        self.sent_bytes += sent
        if sent != len(data):
            self._keep(memoryview(data)[sent:])
        return not self._closed

    def express(self) -> Callable[[bytes], int] | None:
        """The socket's own ``send``, for who cannot afford a call in between; None: not now.

        It may be used as long as nothing is unsent and more may be sent: `on_express` tells when that ends, and
        when it is so again. What it has not taken, or raised, is the link's to see to (`finish`, `failed`).
        """
        return None if self._queue or self._sealed or self._closed else self._wire.send

    def finish(self, data: bytes, sent: int) -> None:
        """`express` has taken only the first *sent* bytes of *data*: send the rest, as `try_send` does."""
        self._keep(memoryview(data)[sent:])

    def failed(self, error: OSError) -> None:
        """`express` has raised *error*."""
        self._break(error)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send after what is unsent. BrokenResourceError if the link ends before all is with the kernel.

        Atomic: once the first byte is out the link finishes it, also if the caller is cancelled.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.ended is not None or self._eof_sent:
            self._raise_ended()
        if self.scanner is not None and data[:1] == _CLOSE_FRAME:
            self._seal()
        piece = self._put(bytes(data) if isinstance(data, bytearray) else data)
        if piece is not None:
            await self._wait_piece(piece)
        elif self._closed:
            self._raise_ended()
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def send_eof(self) -> None:
        """Send what is unsent, then say that nothing follows. Receiving goes on."""
        self._eof_sent = True
        self._seal()
        await self.wait_sent()
        try:
            self._wire.send_eof()
        except OSError as error:
            self._break(error)
            self._raise_ended()

    async def wait_send_all_might_not_block(self) -> None:
        await self.wait_sent()

    async def wait_sent(self) -> None:
        """Until nothing is unsent. BrokenResourceError if the link breaks before, or has."""
        await trio.lowlevel.checkpoint()
        while self.unsent:
            if self._drained is None:
                self._drained = trio.Event()
            await self._drained.wait()
        if self._closed:
            self._raise_ended()

    def last_words(self, data: bytes, close: Close, *, by: str = "server") -> None:
        """The last thing ever sent, after what is unsent; the link ends. Does not wait. Never raises.

        Does nothing if the link has ended. The owner then calls `linger`.
        """
        if self.ended is not None:
            return
        if not self._sealed:
            self._put(data, self._wire.send_last)
        self._end(close, by)

    # Ending.

    def close(self, close: Close | None = None, *, by: str = "server") -> None:
        """Close the socket; unsent bytes are dropped (`wait_sent` first, or `linger`). Idempotent."""
        if not self._closed:
            self._closed = True
            self.unwatch()
            self._wire.close()
            self._let_go()
        self._end(close or CLOSED, by)

    def reset(self, close: Close, *, by: str) -> None:
        """End it now, hard: the peer sees a reset. Idempotent."""
        if not self._closed:
            self._closed = self._broken = True
            self.unwatch()
            self._wire.reset()
            self._let_go()
        self._end(close, by)

    def has_said_all(self) -> bool:
        """Whether the kernel has all that was sent, and nothing has come that was not received: `close` then loses
        nothing, if the peer sends nothing more."""
        return not self.unsent and (self.at_end or not self.unread())

    async def linger(self, seconds: float = LINGER_SECONDS, limit: int = LINGER_BYTES) -> None:
        """Close so that the peer gets what was sent: tell it that nothing follows, and for *seconds*
        and *limit* bytes at most read and drop what it still sends. (Closing with bytes unread makes the
        kernel send a reset, which can take the last answer out of the peer's buffer.)

        Nobody else may be receiving. Never raises but Cancelled; the link is closed afterwards.
        """
        self.lingers_until = trio.current_time() + seconds
        self.scanner = None  # what is dropped need not be understood
        try:
            with trio.move_on_after(seconds):
                await self.send_eof()
                limit += self.received_bytes
                while self.received_bytes < limit and await self.receive_some():
                    pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it is gone already
        finally:
            self.close()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    async def wait_ended(self) -> None:
        if self.ended is None:
            if self._ended is None:
                self._ended = trio.Event()
            await self._ended.wait()
        else:
            await trio.lowlevel.checkpoint()

    # Receiving.

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has come, ``b""`` at the end. Safe to cancel.

        After a violation that `scanner` saw nothing more is handed over; what comes is dropped until
        the peer says that it closes.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving")
        self._receiving = True
        try:
            while True:
                data = await self._receive(max_bytes or RECEIVE)
                kept = data if self.scanner is None else self._inspect(self.scanner, data)
                if kept or not data or self._peer_done:
                    return kept
        finally:
            self._receiving = False

    def watch(self, poller: Poller, readable: Callable[[], None]) -> None:
        """Have *readable* called when something has come (`receive_now`), or the end, until `unwatch`: so that no
        task has to wait for it. It is not called for what was pushed back."""
        if not self._closed and (error := self.try_watch(poller, readable)) is not None:
            self._break(error)

    def try_watch(self, poller: Poller, readable: Callable[[], None]) -> OSError | None:
        """As `watch`, of an open link; why not, if the kernel watches no more (fs.epoll.max_user_watches, memory)."""
        try:
            poller.watch(self._wire, readable)
        except OSError as error:
            return error
        self._poller = poller
        return None

    def unwatch(self) -> None:
        """Idempotent; closing does it too."""
        if self._poller is not None:
            self._poller.forget(self._wire)
            self._poller = None

    def receive_now(self, limit: int, now: float | None = None) -> bytes | None:
        """What has come, ``b""`` at the end or when the link is broken, None if nothing has come. Without `scanner`."""
        if self._closed:
            return b""
        if self._pushed:
            return self._take_pushed(limit)
        try:
            data = self._wire.recv(limit)
        except BlockingIOError:
            return None
        except OSError as error:
            self._break(error)
            return b""
        if data:
            self.last_received = trio.current_time() if now is None else now
            self.received_bytes += len(data)
        else:
            self.at_end = True
        return data

    def take_all(self) -> bytes:
        """All that was pushed back."""
        data = b"".join(self._pushed)
        self._pushed.clear()
        return data

    def push_back(self, data: bytes) -> None:
        """The next `receive_some` returns these bytes first."""
        if data:
            self._pushed.insert(0, data)

    def take(self, size: int) -> bytes | None:
        """The next *size* bytes, if they have been received already and were pushed back; else None."""
        if size == 0:
            return b""
        if not self._pushed or len(self._pushed[0]) < size:
            return None
        data = self._pushed.pop(0)
        self.push_back(data[size:])
        return data[:size]

    # What is known of the peer.

    def unacknowledged(self) -> int | None:
        """Bytes taken that the peer's kernel has not acknowledged; None where that cannot be known."""
        count = self._wire.unacknowledged()
        return None if count is None else count + self.unsent

    def acknowledged(self) -> int:
        """How many bytes the peer's kernel has acknowledged so far, give or take one; where that cannot be known, how
        many the link has given to our own."""
        count = self._wire.acknowledged()
        return self.sent_bytes if count is None else count

    def unread(self) -> int:
        """Bytes that have come and were not received."""
        return self._wire.unread() + sum(map(len, self._pushed))

    def fileno(self) -> int:
        """The socket's descriptor; -1 if it is closed, or is none of the kernel's."""
        return self._wire.fileno()

    def in_error(self) -> bool:
        """Whether the network has broken it, as far as the kernel knows, or it is closed."""
        return self._wire.in_error()

    # Within.

    def _put(self, data: bytes | memoryview, send: Callable[[bytes | memoryview], int] | None = None) -> _Piece | None:
        """Give *data* to the kernel, after what is unsent; the piece that it did not take yet.

        :param send: the wire's, if it is another one than `Wire.send`.
        """
        if not self._queue:
            try:
                sent = self._wire.send(data) if send is None else send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._break(error)
                return None
            self.sent_bytes += sent
            if sent == len(data):
                return None
            data = memoryview(data)[sent:]
        return self._keep(memoryview(data))

    def _keep(self, rest: memoryview) -> _Piece:
        """What the kernel has not taken is the link's to finish."""
        piece = _Piece(rest)
        self._queue.append(piece)
        self.unsent += len(rest)
        if self.on_express is not None and len(self._queue) == 1:
            self.on_express(False)
        if self._flush_starter is None:
            self._start_flush()
        return piece

    def _seal(self) -> None:
        """Nothing more is sent."""
        if not self._sealed:
            self._sealed = True
            if self.on_express is not None:
                self.on_express(False)

    def _start_flush(self) -> None:
        self._flush_starter = self.start
        try:
            self.start(self._flush)
        except RuntimeError:  # the owner's nursery is closed: nobody is left to finish it
            self._flush_starter = None
            self.reset(ABANDONED, by="server")

    async def _flush(self) -> None:
        """Hand over what is unsent, then end. Cancelled, the link's present owner carries on."""
        starter = self._flush_starter
        try:
            while self._queue:
                await self._flush_chunk(self._queue[0])
        finally:
            self._flush_starter = None
            if self._queue and self.start != starter:
                self._start_flush()
            elif self._queue:
                self.reset(ABANDONED, by="server")

    async def _flush_chunk(self, piece: _Piece) -> None:
        """Hand over the next chunk of *piece*, the queue's first, within the write timeout."""
        left = min(len(piece.rest), CHUNK)
        with trio.move_on_after(self.write_timeout) as scope:
            while left and not self._closed:
                left -= await self._write_some(piece, left)
        if scope.cancelled_caught:
            self.reset(SLOW, by="client")
        elif not piece.rest and not self._closed:
            del self._queue[0]
            piece.done.set()
            self._tell_drained()

    async def _write_some(self, piece: _Piece, limit: int) -> int:
        try:
            await self._wire.wait_writable()
            sent = self._wire.send(piece.rest[:limit])
        except BlockingIOError:
            return 0
        except trio.ClosedResourceError:
            return 0  # closed meanwhile
        except OSError as error:
            self._break(error)
            return 0
        piece.rest = piece.rest[sent:]
        self.unsent -= sent
        self.sent_bytes += sent
        return sent

    async def _wait_piece(self, piece: _Piece) -> None:
        try:
            await piece.done.wait()
        except trio.Cancelled:
            # The first one is under way. The others have not begun: they are taken back.
            if piece in self._queue and piece is not self._queue[0]:
                self._queue.remove(piece)
                self.unsent -= len(piece.rest)
            raise
        if piece.rest:
            self._raise_ended()

    async def _receive(self, limit: int) -> bytes:
        while not self._closed:
            if self._pushed:
                await trio.lowlevel.checkpoint()
                return self._take_pushed(limit)
            try:
                # First wait, then receive: the exception of a receive in vain is dear.
                await self._wire.wait_readable()
                data = self._wire.recv(limit)
            except BlockingIOError:
                continue
            except trio.ClosedResourceError:
                break
            except OSError as error:
                self._break(error)
                break
            if data:
                self.last_received = trio.current_time()
                self.received_bytes += len(data)
            else:
                self.at_end = True
            return data
        await trio.lowlevel.checkpoint_if_cancelled()
        self._raise_ended()

    def _take_pushed(self, limit: int) -> bytes:
        data = self._pushed.pop(0)
        self.push_back(data[limit:])
        return data[:limit]

    def _inspect(self, scanner: FrameScanner, data: bytes) -> bytes:
        """Let *scanner* see *data*, tell what it saw; what of *data* may be handed over."""
        kept = b"" if self._hushed else data
        frames = scanner.frames
        for event in scanner.feed(data):
            if isinstance(event, Pong):
                if self.on_pong is not None:
                    self.on_pong(event.payload)
            elif isinstance(event, Closing):
                self._peer_done = self._hushed
            else:
                self._hushed = True
                kept = data[: event.before]
                self._tell_violation(TOO_BIG if isinstance(event, TooBig) else BINARY)
        if self.on_frames is not None and scanner.frames > frames:
            self.on_frames(scanner.frames - frames)
        return kept

    def _tell_violation(self, close: Close) -> None:
        self.violation = close
        if self.on_violation is not None:
            self.on_violation(close)

    def _break(self, error: OSError) -> None:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            # Not the peer's doing: epoll takes no more. A reset would take what was sent out of the peer's buffer.
            self.close(LOST)
            return
        by_client = error.errno in (errno.ECONNRESET, errno.EPIPE)
        self.reset(LOST, by="client" if by_client else "network")

    def _end(self, close: Close, by: str) -> None:
        if self.ended is not None:
            return
        self.ended, self.ended_by = close, by
        self._seal()
        if self._ended is not None:
            self._ended.set()
        if self.on_end is not None:
            self.on_end()

    def _let_go(self) -> None:
        """The wire is closed: drop what is unsent, wake who waits for it."""
        if self.on_closed is not None:
            self.on_closed(self)
        self._pushed.clear()
        pieces, self.unsent = list(self._queue), 0
        self._queue.clear()
        for piece in pieces:
            piece.done.set()
        self._tell_drained()

    def _tell_drained(self) -> None:
        if self._queue:
            return
        if self._drained is not None:
            self._drained.set()
            self._drained = None
        if self.on_express is not None and not (self._sealed or self._closed):
            self.on_express(True)

    def _raise_ended(self) -> NoReturn:
        if self._broken or not (self._closed or self._eof_sent):
            raise trio.BrokenResourceError(LOST.reason if self.ended is None else self.ended.reason)
        raise trio.ClosedResourceError
