"""The front door: accept, read a request's head, find out who asks, hand the connection on.

WebSockets, event streams and the POSTs that want to be fast are answered by our own handlers on the
link; everything else goes to the Quart app over Hypercorn (`mythos_trio.bridge`), one request per
connection. What is wrong with a request is answered here, in the error format of all planes.

A connection that begins with the whole and plain head of a stream, as nearly all that come to play do, is let in by
plain calls of the poller's and the dispatcher's (`_Newcomer`), without a task of its own and its deadlines. Everything
else gets a task (`Front._connection`), which reads, judges and answers.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio
from attrs import define, field

from mythos_trio import logs
from mythos_trio.bell import Bell
from mythos_trio.core import names
from mythos_trio.core.errors import BUSY, FAULT, ErrorType, Refusal
from mythos_trio.delays import Delays
from mythos_trio.http1 import MAX_HEAD, Head, HttpRefusal, plain_head, read_head, refuse, refused, response
from mythos_trio.kept import Asker, Kept
from mythos_trio.ledger import IDLE, LAST_WORDS, REQUEST, Ledger, Tended
from mythos_trio.link import Link
from mythos_trio.net import Listener, Wire

if TYPE_CHECKING:
    from mythos_trio.access import Access, Visitor
    from mythos_trio.config import Settings
    from mythos_trio.poller import Poller
    from mythos_trio.seams import Clock

log = logs.get("server")

HEAD_SECONDS: Final = 10.0
ACCEPT_PAUSE: Final = 0.1
# With CONNECTION_POOL_SIZE handshakes under way, the oldest makes room if it has had this long: else
# as many clients that send nothing would shut everybody else out for HEAD_SECONDS.
YIELD_AFTER: Final = 1.0
# Who has not said a whole head by then gets a task, which waits for the rest of HEAD_SECONDS.
SILENT_SECONDS: Final = 0.5
# Connections that are accepted before other tasks run.
ACCEPT_AT_ONCE: Final = 16
# An episode of trouble is over when it has not shown itself for so long.
EPISODE_SECONDS: Final = 5.0
# How much of a path is logged.
SHOWN: Final = 200
# The largest body for the Quart app.
APP_BODY: Final = 1024 * 1024
APP_METHODS: Final = "GET, HEAD, POST, DELETE, OPTIONS"

_POSTS: Final = re.compile(r"/api/messages|/api/connections/[^/]+/(commands|ack)")


class Door(Protocol):
    """What the front door does for a connection that is let in without a task."""

    def handed_over(self) -> None:
        """The link is somebody else's."""
        ...

    def start(self, call: Callable[[], Awaitable[None]], /) -> None:
        """Go on in a task: something has to wait. When it returns the link is closed or somebody else's."""
        ...

    def crashed(self, error: Exception, /) -> None:
        """*error* has escaped, where no task could be told."""
        ...


class Handlers(Protocol):
    """Who answers what the front door does not give to the Quart app."""

    async def websocket(self, link: Link, head: Head, visitor: Visitor, player: str, /) -> None:
        """A valid upgrade request. When it returns the link is closed or somebody else's."""
        ...

    async def sse(self, link: Link, head: Head, visitor: Visitor, player: str, /) -> None:
        """A GET. When it returns the link is closed or somebody else's."""
        ...

    def arrive(self, to: Route, link: Link, head: Head, visitor: Visitor, door: Door, /) -> None:
        """A valid request for a stream, as above: let the client in by plain calls, and tell *door* when that is done.
        Where something has to wait that is done in a task of *door*."""
        ...

    async def post(self, link: Link, head: Head, visitor: Visitor, /) -> bool:
        """Read the body and answer. True: the connection can carry the next request. May raise Refusal."""
        ...

    def take_post(self, head: Head, visitor: Visitor, body: bytes, asker: Asker, /) -> bool:
        """As `kept.Server.take`, of a POST whose like has been answered before."""
        ...

    def too_late(self, head: Head, /) -> bytes:
        """As `kept.Server.too_late`."""
        ...


class App(Protocol):
    """The Quart app, over Hypercorn."""

    async def serve(self, link: Link, head_raw: bytes, visitor: Visitor, /) -> None:
        """Answer one request and close the link. *head_raw* comes before what the link receives."""
        ...


class Counter(Protocol):
    """Where errors are counted (`mythos_trio.statistics`)."""

    def error(self, error_type: str, event: str, player_id: str | None, when: float, /) -> None: ...


class Kind(Enum):
    WEBSOCKET = auto()
    SSE = auto()
    POST = auto()
    APP = auto()


@define  # not frozen: made for each connection, and to set a field would take three times as long
class Route:
    kind: Kind
    player: str | None = None


def route(head: Head) -> Route:
    """Who answers *head*. Refusal: 400, 405, 422, 426."""
    stream = _stream_route(head)
    if stream is not None:
        return stream
    if head.header("upgrade") is not None:
        raise HttpRefusal(400, "only WebSockets, at /ws/{player}, are upgraded here")
    if head.method == "POST" and _POSTS.fullmatch(head.path):
        return Route(Kind.POST)
    if head.method == "CONNECT":
        raise HttpRefusal(405, "this is not a proxy", headers=(("Allow", APP_METHODS),))
    if (head.content_length or 0) > APP_BODY:
        raise HttpRefusal(413, f"the request body is larger than {APP_BODY} bytes", limit=APP_BODY)
    return Route(Kind.APP)


def _stream_route(head: Head) -> Route | None:
    for prefix, kind in (("/ws/", Kind.WEBSOCKET), ("/sse/", Kind.SSE)):
        if head.path.startswith(prefix) and head.path != prefix:
            if head.method != "GET":
                raise HttpRefusal(405, f"{prefix}{{player}} takes GET", headers=(("Allow", "GET"),))
            player = names.player_id(head.path.removeprefix(prefix))
            if head.has_body:
                raise HttpRefusal(400, "a GET for a stream has no body")
            if kind is Kind.WEBSOCKET:
                check_upgrade(head)
            elif head.header("upgrade") is not None:
                raise HttpRefusal(400, "an event stream is not upgraded")
            return Route(kind, player)
    return None


def check_upgrade(head: Head) -> None:
    """Refuse what is not a WebSocket's opening handshake (RFC 6455, section 4.2.1)."""
    if head.version != "1.1":
        raise HttpRefusal(400, "a WebSocket needs HTTP/1.1")
    upgrade = (head.header("upgrade") or "").lower()
    if upgrade != "websocket" or "upgrade" not in head.tokens("connection"):
        headers = (("Upgrade", "websocket"), ("Connection", "Upgrade, close"))
        raise HttpRefusal(426, "this is a WebSocket: connect with ws://, or use /sse/{player}", headers=headers)
    if head.header("sec-websocket-version") != "13":
        raise HttpRefusal(426, "WebSocket version 13 is spoken here", headers=(("Sec-WebSocket-Version", "13"),))
    try:
        key = base64.b64decode(head.header("sec-websocket-key") or "", validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 16:
        raise HttpRefusal(400, "Sec-WebSocket-Key is not 16 bytes in base64")


@define(eq=False)
class _Doorway:
    """Where connections come in: one listener's. It is left when the last one is through."""

    nursery: trio.Nursery
    newcomers: dict[_Newcomer, None] = field(factory=dict)
    """Those without a task."""
    fewer: Bell = field(factory=Bell)


@define(eq=False)
class _Newcomer:
    """A connection whose first head has not come in full, or that is being let in (`Door`). *began*:
    `trio.current_time`."""

    front: Front
    doorway: _Doorway
    tended: Tended
    began: float
    head: Head | None = None
    """Of the stream that it is being let in to."""
    scope: trio.CancelScope | None = None
    """Of its task, while that reads the first head."""

    def hear(self) -> None:
        """Something has come, or the end: in the poller's turn."""
        self.front.hear(self)

    # As `Door`.

    def handed_over(self) -> None:
        self.front.leave(self)

    def start(self, call: Callable[[], Awaitable[None]]) -> None:
        self.front.go_on(self, call)

    def crashed(self, error: Exception) -> None:
        async def crash() -> None:
            raise error

        self.front.go_on(self, crash)


@define
class _Episode:
    """Trouble that is told once, not at every turn."""

    last: float | None = None

    def begin(self) -> bool:
        """It shows itself; whether that is news."""
        news = self.last is None
        self.last = trio.current_time()
        return news

    def end(self) -> bool:
        """It does not show itself; whether that is news."""
        if self.last is None or trio.current_time() - self.last < EPISODE_SECONDS:
            return False
        self.last = None
        return True


class Front:
    """Accepts connections and serves their requests until they are handed on."""

    def __init__(
        self,
        settings: Settings,
        access: Access,
        handlers: Handlers,
        bridge: App,
        statistics: Counter,
        clock: Clock,
        ledger: Ledger,
        poller: Poller,
    ) -> None:
        self._settings = settings
        self._access = access
        self._handlers = handlers
        self._bridge = bridge
        self._clock = clock
        self._statistics = statistics
        self._ledger = ledger
        self._poller = poller
        self._listeners: list[Listener] = []
        self._stopped = False
        self._draining = False
        # In the order they began.
        self._handshakes: dict[_Newcomer, None] = {}
        self._silent: Delays[_Newcomer] = Delays(SILENT_SECONDS, lambda newcomer: self._tend(newcomer, b""))
        self._room: trio.Event | None = None
        self._idle: dict[Kept, None] = {}
        """Kept connections that wait for a request. The first has waited longest."""
        self._answering = 0
        self._answered = trio.Event()
        self._exhausted = _Episode()
        self._crowded = _Episode()

    @property
    def handshakes(self) -> int:
        """Connections whose first head has not come in full."""
        return len(self._handshakes)

    @property
    def draining(self) -> bool:
        """Whether connections are no longer kept for another request. Requests are served as before:
        the handlers know what to say."""
        return self._draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._draining = draining
        if draining:
            for kept in list(self._idle):
                kept.let_go()

    async def wait_answered(self, seconds: float) -> None:
        """Until every request that has come is answered, or handed over; *seconds* at most."""
        with trio.move_on_after(seconds):
            while self._answering:
                await self._answered.wait()

    def stop_accepting(self) -> None:
        """Close the listeners; connections go on. `serve` returns when the last one is through."""
        self._stopped = True
        for listener in self._listeners:
            listener.close()

    async def serve(self, listener: Listener) -> None:
        """Accept from *listener* until `stop_accepting`, or it is cancelled.

        Connections that were not handed on live in this call, and end with it.
        """
        self._listeners.append(listener)
        doorway = None
        try:
            async with trio.open_nursery() as nursery:
                doorway = _Doorway(nursery)
                while not self._stopped and (wire := await self._accept(listener)) is not None:
                    try:
                        await self._wait_room()
                    except trio.Cancelled:
                        wire.close()
                        raise
                    self._admit(wire, doorway)
                    self._admit_waiting(listener, doorway)
                await self._wait_through(doorway)
        finally:
            listener.close()
            for newcomer in [] if doorway is None else list(doorway.newcomers):
                newcomer.tended.link.close()
                self.leave(newcomer)

    async def keep_times(self) -> None:
        """Give a task to each who was accepted and does not speak. Runs until it is cancelled."""
        await self._silent.run()

    # Accepting.

    async def _accept(self, listener: Listener) -> Wire | None:
        """The next connection; None when the listener is closed. Out of descriptors or memory it waits."""
        while True:
            try:
                wire = await listener.accept()
            except trio.ClosedResourceError:
                return None
            except OSError as error:
                # Whatever it is (EMFILE, ENOBUFS, a firewall, a network that went down): the listener
                # is as good as before, and giving up would be worse.
                if self._exhausted.begin():
                    log.warning(
                        "Cannot accept connections",
                        reason=os.strerror(error.errno or 0),
                        error_type=ErrorType.CAPACITY.value,
                        hint="raise the limit of open files (ulimit -n)",
                    )
                await trio.sleep(ACCEPT_PAUSE)
            else:
                if self._exhausted.end():
                    log.info("Accepting connections again")
                return wire

    async def _wait_room(self) -> None:
        """Until fewer than CONNECTION_POOL_SIZE handshakes are under way."""
        while len(self._handshakes) >= self._settings.connection_pool_size:
            if self._crowded.begin():
                log.warning(
                    "Too many handshakes under way",
                    error_type=ErrorType.CAPACITY.value,
                    handshakes=len(self._handshakes),
                    setting="CONNECTION_POOL_SIZE",
                )
            oldest = next(iter(self._handshakes))
            if self._room is None:
                self._room = trio.Event()
            with trio.move_on_at(oldest.began + YIELD_AFTER) as scope:
                await self._room.wait()
            if scope.cancelled_caught and oldest in self._handshakes:
                self._make_way(oldest)
        self._crowded.end()

    def _admit(self, wire: Wire, doorway: _Doorway) -> None:
        link = Link(wire, write_timeout=self._settings.write_timeout, start=doorway.nursery.start_soon)
        tended = self._ledger.admit(link, link.last_received)
        newcomer = tended.owner = _Newcomer(self, doorway, tended, tended.since)
        self._handshakes[newcomer] = doorway.newcomers[newcomer] = None
        self._silent.begin(newcomer, tended.since)
        if link.try_watch(self._poller, newcomer.hear) is not None:
            self._tend(newcomer, b"")

    def _admit_waiting(self, listener: Listener, doorway: _Doorway) -> None:
        """Those who came with the one that was waited for: to wait for each costs as much as to accept it."""
        for _ in range(ACCEPT_AT_ONCE - 1):
            if self._stopped or len(self._handshakes) >= self._settings.connection_pool_size:
                return
            wire = listener.accept_now()
            if wire is None:
                return
            self._admit(wire, doorway)

    async def _wait_through(self, doorway: _Doorway) -> None:
        """Nobody comes any more: until all are through that have come."""
        for newcomer in list(doorway.newcomers):
            if newcomer.head is None:
                self._tend(newcomer, b"")
        while doorway.newcomers:
            await doorway.fewer.wait()

    def _end_handshake(self, newcomer: _Newcomer) -> None:
        if newcomer in self._handshakes:
            del self._handshakes[newcomer]
            if self._room is not None:
                self._room.set()
                self._room = None

    def _make_way(self, newcomer: _Newcomer) -> None:
        """It has had its time, and others wait."""
        if newcomer.scope is not None:
            newcomer.scope.cancel()
            self._end_handshake(newcomer)
        else:
            newcomer.tended.link.reset(BUSY, by="server")
            self.leave(newcomer)

    # One connection without a task.

    def hear(self, newcomer: _Newcomer) -> None:
        """What a newcomer says first has come, or its end. Nothing escapes."""
        link = newcomer.tended.link
        if newcomer.head is not None:
            # It sends on, or leaves, before it has been let in: one thing after the other.
            link.unwatch()
            return
        data = link.receive_now(MAX_HEAD, self._poller.now)
        if data is None:
            return
        if not data:
            link.close()
            self.leave(newcomer)
            return
        self._hear_first(newcomer, data)

    def _hear_first(self, newcomer: _Newcomer, data: bytes) -> None:
        try:
            if not self._lets_in(newcomer, data):
                self._tend(newcomer, data)
        except Exception as error:
            if newcomer.head is None:
                # Nothing has been done: its task comes to the same refusal, or crash, and says it.
                self._tend(newcomer, data)
            else:
                newcomer.crashed(error)

    def _lets_in(self, newcomer: _Newcomer, data: bytes) -> bool:
        """Whether a newcomer's first words are of the kind that needs no task; then it is being let in."""
        if not data.startswith((b"GET /ws/", b"GET /sse/")) or (found := plain_head(data)) is None:
            return False
        head, rest = found
        tended = newcomer.tended
        visitor = self._access.check(head, tended.link.peer)
        to = route(head)
        if to.player is None:
            return False
        self._silent.end(newcomer)
        self._end_handshake(newcomer)
        tended.link.push_back(rest)
        tended.at(REQUEST, self._poller.now)
        newcomer.head = head
        self._answering += 1
        self._handlers.arrive(to, tended.link, head, visitor, newcomer)
        return True

    def leave(self, newcomer: _Newcomer) -> None:
        """It is somebody else's, or closed."""
        if newcomer not in newcomer.doorway.newcomers:
            return  # the server has stopped
        self._let_go(newcomer)
        self._end_handshake(newcomer)
        self._ledger.hand_on(newcomer.tended)
        if newcomer.head is not None:
            self._leave_request()

    def _let_go(self, newcomer: _Newcomer) -> None:
        self._silent.end(newcomer)
        newcomer.doorway.newcomers.pop(newcomer, None)
        newcomer.doorway.fewer.ring()

    def _tend(self, newcomer: _Newcomer, begun: bytes) -> None:
        """Have a task read the first head, of which *begun* has come."""
        newcomer.scope = trio.CancelScope()
        self._start(newcomer, self._connection, newcomer, begun)

    def go_on(self, newcomer: _Newcomer, call: Callable[[], Awaitable[None]]) -> None:
        """Have a task let it in, or turn it down."""
        if newcomer not in newcomer.doorway.newcomers:
            return  # the server has stopped
        self._start(newcomer, self._go_on, newcomer, call)

    def _start(self, newcomer: _Newcomer, function: Callable[..., Awaitable[None]], *arguments: object) -> None:
        link = newcomer.tended.link
        name = f"connection from {link.peer}:{link.peer_port}"
        link.unwatch()
        try:
            newcomer.doorway.nursery.start_soon(function, *arguments, name=name)
        except RuntimeError:  # the server is stopping, hard, and nobody is left to see to it
            link.close()
            self.leave(newcomer)
        else:
            self._let_go(newcomer)

    # One connection with a task.

    async def _go_on(self, newcomer: _Newcomer, call: Callable[[], Awaitable[None]]) -> None:
        async def serve() -> _Then:
            await call()
            return _Then.FORGET

        tended, head = newcomer.tended, newcomer.head
        assert head is not None  # for the type checker: nobody is let in before
        tended.owner = trio.lowlevel.current_task()
        then = _Then.CLOSE
        try:
            then = await self._answer(tended.link, head, serve)
            await self._say_last(tended, then)
        finally:
            self._part(tended, then)

    async def _connection(self, newcomer: _Newcomer, begun: bytes) -> None:
        tended = newcomer.tended
        link = tended.link
        tended.owner = trio.lowlevel.current_task()
        kept = Kept(tended, self, self._poller, self._clock)
        then = _Then.CLOSE
        try:
            head = await self._first_head(newcomer, begun)
            while head is not None:
                tended.at(REQUEST)
                self._answering += 1
                then = await self._answer(link, head, partial(self._serve, kept, head))
                tended.at(IDLE)
                head = await self._next_head(kept) if then is _Then.NEXT else None
            await self._say_last(tended, then)
        finally:
            self._end_handshake(newcomer)
            self._part(tended, then)

    async def _say_last(self, tended: Tended, then: _Then) -> None:
        """Let the client take the last answer."""
        if then is not _Then.FORGET and tended.link.sent_bytes:
            tended.at(LAST_WORDS)
            await tended.link.linger()

    def _part(self, tended: Tended, then: _Then) -> None:
        if then is not _Then.FORGET:
            tended.link.close()
        self._ledger.hand_on(tended)

    async def _first_head(self, newcomer: _Newcomer, begun: bytes) -> Head | None:
        """The first request's head. None: there is none, or it was refused."""
        link, scope = newcomer.tended.link, newcomer.scope
        assert scope is not None  # for the type checker: its task was started with one
        with scope:
            head = await self._read_head(link, begun, newcomer.began)
            self._end_handshake(newcomer)
            return head
        link.reset(BUSY, by="server")  # it has to make room
        return None

    async def _next_head(self, kept: Kept) -> Head | None:
        """The head of another request that this task has to serve. None: there is none, or it was refused."""
        if self._draining:
            return None
        begun = await kept.wait()
        if kept.error is not None and kept.head is not None:
            link = kept.tended.link
            self._crashed(link, kept.head, kept.error, link.sent_bytes)
            return None
        return await self._read_head(kept.tended.link, begun) if begun else None

    # What a kept connection asks that needs no task (`kept.Server`).

    def take(self, head: Head, visitor: Visitor, body: bytes, asker: Asker) -> bool:
        return self._handlers.take_post(head, visitor, body, asker)

    def too_late(self, head: Head) -> bytes:
        return self._handlers.too_late(head)

    def idles(self, kept: Kept) -> None:
        if len(self._idle) >= self._settings.connection_pool_size:
            # Else whoever keeps thousands takes everybody's descriptors for IDLE_SECONDS.
            next(iter(self._idle)).let_go()
        self._idle[kept] = None
        kept.tended.at(IDLE, kept.since)

    def is_asked(self, kept: Kept) -> None:
        self._idle.pop(kept, None)
        kept.tended.at(REQUEST, kept.since)
        self._answering += 1

    def is_answered(self, kept: Kept) -> None:
        self._leave_request()

    def wakes(self, kept: Kept) -> None:
        self._idle.pop(kept, None)

    async def _read_head(self, link: Link, begun: bytes, since: float | None = None) -> Head | None:
        try:
            return await read_head(link, timeout=HEAD_SECONDS, begun=begun, since=since)
        except Refusal as refusal:
            await self._refuse(link, refusal, None)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client has gone
        return None

    # One request.

    async def _answer(self, link: Link, head: Head, serve: Callable[[], Awaitable[_Then]]) -> _Then:
        """Have *head* answered. What a handler lets escape ends here, with this one connection."""
        sent = link.sent_bytes
        try:
            return await serve()
        except Refusal as refusal:
            await self._refuse(link, refusal, head)
        except BaseExceptionGroup as group:
            errors, others = group.split(Exception)
            if errors is not None:
                self._crashed(link, head, errors, sent)
            if others is not None:
                raise others from None
        except Exception as error:
            self._crashed(link, head, error, sent)
        finally:
            self._leave_request()
        return _Then.CLOSE

    def _leave_request(self) -> None:
        self._answering -= 1
        if self._draining and not self._answering:
            self._answered.set()
            self._answered = trio.Event()

    async def _serve(self, kept: Kept, head: Head) -> _Then:
        link = kept.tended.link
        visitor = self._access.check(head, link.peer)
        if (ready := self._ready_answer(head)) is not None:
            await link.send_all(ready)
            return _Then.NEXT if head.keep_alive and not head.has_body else _Then.CLOSE
        to = route(head)
        if to.kind is Kind.POST:
            if not await self._handlers.post(link, head, visitor) or not head.keep_alive:
                return _Then.CLOSE
            kept.learn(head, visitor)
            return _Then.NEXT
        if to.player is None:
            await self._bridge.serve(link, head.origin_raw, visitor)
        elif to.kind is Kind.WEBSOCKET:
            await self._handlers.websocket(link, head, visitor, to.player)
        else:
            await self._handlers.sse(link, head, visitor, to.player)
        return _Then.FORGET

    def _ready_answer(self, head: Head) -> bytes | None:
        """The answer to what is asked about a request to come, for all paths; None if that is not asked."""
        headers = self._access.preflight_headers(head)
        if headers is None and head.path == "*":
            headers = (("Allow", APP_METHODS),)
        if headers is None:
            return None
        keep = head.keep_alive and not head.has_body and not self._draining
        return response(204, b"", headers=headers, keep_alive=keep, server_id=self._settings.server_id)

    async def _refuse(self, link: Link, refusal: Refusal, head: Head | None) -> None:
        log.info(
            "Request refused",
            status=refusal.status,
            error_type=refusal.error_type.value,
            reason=refusal.message,
            address=link.peer,
            method=None if head is None else head.method,
            path=None if head is None else head.path[:SHOWN],
        )
        now = self._clock.now()
        # The line above is no warning, so it is not counted by itself.
        self._statistics.error(refusal.error_type.value, "Request refused", None, now)
        await refuse(
            link,
            refusal,
            server_id=self._settings.server_id,
            headers=() if head is None else self._access.cors_headers(head),
            head_only=head is not None and head.method == "HEAD",
            now=now,
        )

    def _crashed(self, link: Link, head: Head, error: Exception, sent: int) -> None:
        """Say that *error* escaped from a handler; 500 if nothing was sent yet, else the end."""
        if _client_gone(error):
            return
        log.error(
            "Request crashed",
            error_type=ErrorType.SYSTEM.value,
            address=link.peer,
            method=head.method,
            path=head.path[:SHOWN],
            exc_info=error,
        )
        if link.sent_bytes != sent:
            link.reset(FAULT, by="server")
            return
        refusal = Refusal(ErrorType.SYSTEM, FAULT.reason, status=500)
        server_id, now = self._settings.server_id, self._clock.now()
        link.last_words(refused(refusal, now=now, server_id=server_id, head_only=head.method == "HEAD"), FAULT)


class _Then(Enum):
    """What becomes of a connection after a request."""

    NEXT = auto()
    CLOSE = auto()
    FORGET = auto()
    """It was handed on, or closed."""


def _client_gone(error: Exception) -> bool:
    """Whether *error* says only that the connection has ended."""
    gone = (trio.BrokenResourceError, trio.ClosedResourceError)
    if isinstance(error, ExceptionGroup):
        return error.split(gone)[1] is None
    return isinstance(error, gone)
