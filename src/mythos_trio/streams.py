"""A connection's life, the same on both transports: let in, start, read, end.

The registrar is asked for the player's session, the connection is attached to it, and the first words are said: the
handshake's answer and the welcome, in one go. The front door hands the link over in the same step: from then on
everything of the connection runs in the player's nursery (`Streams._live`), and ends with it. So until the first word
nothing has happened, and a client can still be turned down as its transport does that. What must outlive a connection
by a moment, the wait for the peer to take the last words, is done in `Streams.run`'s nursery.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio
from attrs import define, frozen

from mythos_trio import logs
from mythos_trio.access import TokenError
from mythos_trio.connection import READ_MESSAGES, Connection
from mythos_trio.core import names, wire
from mythos_trio.core.errors import (
    BAD_TOKEN,
    BUSY,
    FAULT,
    RATE,
    SUPERSEDED,
    TOO_MANY,
    Close,
    ErrorType,
    Refusal,
    busy,
)
from mythos_trio.core.health import HEARTBEAT_SECONDS
from mythos_trio.core.position import Gap, Position, Resume, parse_position, resume_from
from mythos_trio.core.rates import Buckets, cut_off_ms, return_ms
from mythos_trio.core.requests import Ack, Auth, ClientRequest, Command, Ping
from mythos_trio.core.wire import Framing
from mythos_trio.handlers import draining
from mythos_trio.link import LOST
from mythos_trio.storage import Chunk, ConnectionRow, StoreError
from mythos_trio.turns import Turns

if TYPE_CHECKING:
    from mythos_trio.access import Access, Visitor
    from mythos_trio.handlers import Context
    from mythos_trio.http1 import Head
    from mythos_trio.link import Link
    from mythos_trio.registrar import Registrar
    from mythos_trio.session import LiveSession

log = logs.get("connection")

OPEN_SECONDS: Final = 10.0
# Who was heard of within this time is surely alive: no need to ask before refusing a newcomer.
HEARD_SECONDS: Final = 5.0
PROBE_RETRY_MS: Final = 2000
# For each command that the rate allows, so many WebSocket frames of any kind: pings, fragments,
# acknowledgements, nonsense. Each costs the server more than the client, about as much as a message sent.
FRAMES_A_COMMAND: Final = 100


class Channel(Protocol):
    """An accepted connection of one transport."""

    def begin(self, connection: Connection) -> None:
        """From now on what the client says is heard."""
        ...

    async def read(self, connection: Connection) -> None:
        """Take what the client says, until it leaves, or the connection or its link is over."""
        ...

    @property
    def left_with(self) -> Close | None:
        """What the client said when it left, if it did."""
        ...


class Transport(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def framing(self) -> Framing: ...

    def opening(self, head: Head) -> bytes:
        """The answer that accepts the connection."""
        ...

    def channel(self, link: Link) -> Channel:
        """Of a connection that has been accepted."""
        ...

    async def refuse(self, link: Link, head: Head, refusal: Refusal) -> None:
        """Turn it down in the way that this transport's clients understand; closes the link."""
        ...

    def welcome(self, payload: bytes, position: str, retry_ms: int) -> bytes:
        """*retry_ms*: when to come back if the connection is cut off without a last word."""
        ...


@frozen
class Wish:
    """What a client asks for in its request."""

    session_id: str | None
    position: Position | None
    replaces: str | None


@define(eq=False)
class _Arrival:
    """A connection that is being let in. *began*: `trio.current_time`."""

    link: Link
    head: Head
    visitor: Visitor
    player_id: str
    transport: Transport
    began: float
    wish: Wish = Wish(None, None, None)


class Door(Protocol):
    """As `front.Door`."""

    def handed_over(self) -> None: ...
    def start(self, call: Callable[[], Awaitable[None]], /) -> None: ...
    def crashed(self, error: Exception, /) -> None: ...


class Streams:
    """Both transports' connections. `run` is the nursery of what outlives a session by a moment."""

    def __init__(self, context: Context, registrar: Registrar, access: Access, turns: Turns) -> None:
        """:param turns: `run` gives their places."""
        self._context = context
        self._registrar = registrar
        self._access = access
        settings = context.settings
        self._connects = Buckets(settings.rate_limit_requests, settings.rate_limit_window)
        self._commands = Buckets(settings.rate_limit_requests, settings.rate_limit_window)
        self._abuse = Buckets(settings.rate_limit_requests, settings.rate_limit_window)
        self._frames = Buckets(settings.rate_limit_requests * FRAMES_A_COMMAND, settings.rate_limit_window)
        self._turns = turns
        self._lines = logs.Gathered(log, turns.at_end)
        self._nursery: trio.Nursery | None = None
        self._arriving = 0
        self._lingering = 0
        self._quiet = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._turns.run()

    async def wait_quiet(self) -> None:
        """When all have been told to go: until every connection is over, and its last words taken or given up."""
        while not self._is_quiet():
            await self._quiet.wait()

    def _is_quiet(self) -> bool:
        # Who has been told to go is in the hub until its task has taken its next step.
        return not self._lingering and not self._context.hub.connections

    def _tell_quiet(self) -> None:
        if self._context.draining and self._is_quiet():
            self._quiet.set()
            self._quiet = trio.Event()

    # Letting in, by plain calls: nearly always, nothing has to wait but for the commit of an admission.

    def arrive(self, link: Link, head: Head, visitor: Visitor, player: str, transport: Transport, door: Door) -> None:
        """Let a client in, and tell *door* when that is done."""
        arrival = _Arrival(link, head, visitor, player, transport, link.last_received)
        self._arriving += 1

        def ask() -> bool:
            arrival.wish = self._wish(head, visitor, player)
            if self._enter_now(arrival, door):
                return True
            return self._registrar.admit(player, arrival.wish.session_id, partial(self._admitted, arrival, door))

        self._attempt(arrival, door, ask)

    def _admitted(self, arrival: _Arrival, door: Door, check: Callable[[], None] = lambda: None) -> None:
        """An admission has been stored, or not, as *check* tells; or it is its turn."""

        def enter() -> bool:
            check()
            return self._enter_now(arrival, door)

        self._attempt(arrival, door, enter)

    def _attempt(self, arrival: _Arrival, door: Door, enter: Callable[[], bool]) -> None:
        """Let a client in by *enter*; where that cannot be done by calls, in a task. Nothing escapes."""
        try:
            if not enter():
                door.start(partial(self._enter, arrival))
        except Refusal as refusal:
            door.start(partial(self._turn_down, arrival, refusal))
        except Exception as error:  # the door logs and counts it, and ends the connection
            self._arriving -= 1
            door.crashed(error)

    def _enter_now(self, arrival: _Arrival, door: Door) -> bool:
        """Let the client in if its session lives: now, or when it is its turn, or in a task if something has to be
        read."""
        wish = arrival.wish
        session = self._registrar.joinable(arrival.player_id, wish.session_id)
        if session is None:
            return False
        if not self._turns.take_now():
            session.arriving += 1  # no grace ends meanwhile
            self._turns.call(partial(self._in_turn, arrival, door, session))
            return True
        resume = self._make_room(session, wish)
        if resume.after < session.floor:
            session.arriving += 1
            door.start(partial(self._enter_held, arrival, session))
            return True
        if not arrival.link.closed:  # else the server has stopped meanwhile, hard
            self._open(arrival, session, resume, None)
        self._arriving -= 1
        door.handed_over()
        return True

    def _in_turn(self, arrival: _Arrival, door: Door, session: LiveSession) -> None:
        try:
            self._admitted(arrival, door)
        finally:
            session.arrived()

    # Letting in, in a task of the front door.

    async def serve(self, link: Link, head: Head, visitor: Visitor, player: str, transport: Transport) -> None:
        """Let a client in. When this returns, the link is handed over or closed."""
        arrival = _Arrival(link, head, visitor, player, transport, trio.current_time())
        self._arriving += 1
        try:
            arrival.wish = self._wish(head, visitor, player)
        except Refusal as refusal:
            await self._turn_down(arrival, refusal)
        else:
            await self._enter(arrival)

    async def _enter(self, arrival: _Arrival) -> None:
        try:
            await self._turns.take()
            while not await self._let_in(
                arrival, await self._registrar.join(arrival.player_id, arrival.wish.session_id)
            ):
                pass
        except Refusal as refusal:
            await self._refuse(arrival, refusal)
        finally:
            self._arriving -= 1

    async def _enter_held(self, arrival: _Arrival, session: LiveSession) -> None:
        try:
            await self._enter(arrival)
        finally:
            session.arrived()

    async def _turn_down(self, arrival: _Arrival, refusal: Refusal) -> None:
        try:
            await self._refuse(arrival, refusal)
        finally:
            self._arriving -= 1

    async def _refuse(self, arrival: _Arrival, refusal: Refusal) -> None:
        self._log_refused(arrival.transport, arrival.player_id, arrival.visitor.address, refusal)
        await arrival.transport.refuse(arrival.link, arrival.head, refusal)

    def _wish(self, head: Head, visitor: Visitor, player: str) -> Wish:
        """What the client asks for, if it may ask at all."""
        session_id = names.session_id(head.query.get("session_id"))
        text = head.header("last-event-id") or head.query.get("position") or None
        position = None if text is None else parse_position(text)
        visitor.require_player(player)
        if self._context.draining:
            raise self._draining()
        self._check_server(visitor)
        return Wish(session_id, position, head.query.get("replaces") or None)

    def _draining(self) -> Refusal:
        # Perhaps as many come now as have been here.
        return draining(return_ms(self._context.randomness.uniform(0, 1 + len(self._context.hub.connections))))

    def _check_server(self, visitor: Visitor) -> None:
        settings = self._context.settings
        if len(self._context.hub.connections) + self._arriving > settings.max_total_connections:
            raise Refusal(
                ErrorType.CAPACITY,
                f"the server is full: {settings.max_total_connections} connections (MAX_TOTAL_CONNECTIONS)",
                status=503,
                retry_ms=5000,
            )
        if not visitor.limited:
            return
        wait = self._connects.take(visitor.address, trio.current_time())
        if wait:
            raise Refusal(
                ErrorType.RATE_LIMIT,
                "too many connects from this address",
                status=429,
                retry_ms=int(wait * 1000) + 1,
            )

    async def _let_in(self, arrival: _Arrival, session: LiveSession) -> bool:
        """Attach the connection to *session* and say the first words; False if the session has ended meanwhile.

        Waits only if the stream has to be read from the store.
        """
        resume = self._make_room(session, arrival.wish)
        chunk = None
        if resume.after < session.floor:
            with session.awaiting():
                chunk = await self._first_chunk(session, resume.after)
            if not session.accepts:
                return False
            if self._context.draining:  # those that are here have perhaps been told to go already
                raise self._draining()
            self._check_room(session, None)
        self._open(arrival, session, resume, chunk)
        return True

    def _log_refused(self, transport: Transport, player: str, address: str, refusal: Refusal) -> None:
        log.warning(
            f"{transport.title} refused",
            error_type=refusal.error_type.value,
            reason=refusal.message,
            player_id=player,
            address=address,
            code=refusal.close.code if refusal.close else refusal.status,
        )

    # Living: a task of the player's nursery.

    async def _live(self, connection: Connection, channel: Channel, transport: Transport) -> None:
        """All of one connection's life, from its first words on."""
        try:
            await self._read(channel, connection)
            # It has left, or been ended, as perhaps a thousand others have in this moment.
            await connection.wait_place()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* Exception as group:
            log.error(
                f"Connection error in {transport.name}",
                error_type=ErrorType.CONNECTION.value,
                player_id=connection.player_id,
                connection_id=connection.id,
                exc_info=group,
            )
            connection.end(FAULT)
        finally:
            self._finish(connection, channel, transport)

    async def _read(self, channel: Channel, connection: Connection) -> None:
        """Take what the client says until it leaves. A crash of the session cuts it off."""
        try:
            await channel.read(connection)
        except trio.Cancelled:
            if connection.link.ended is None:
                connection.end(FAULT)
            raise

    def _connection(self, session: LiveSession, arrival: _Arrival) -> Connection:
        visitor = arrival.visitor
        connection = Connection(
            id=self._context.randomness.token(),
            framing=arrival.transport.framing,
            link=arrival.link,
            session=session,
            hub=self._context.hub,
            turns=self._turns,
            address=visitor.address,
            observable=not visitor.proxied,
            opened_at=self._context.clock.now(),
        )
        connection.expires_at = visitor.expires_at
        return connection

    def _open(self, arrival: _Arrival, session: LiveSession, resume: Resume, chunk: Chunk | None) -> None:
        """Attach a connection, start its task, and send the first words. In one step: the session cannot end in it."""
        hub = self._context.hub
        named = arrival.wish.position
        if named is not None and (resume.gap is None or resume.gap.reason == "epoch"):
            session.saw(resume.after)
        lost = chunk is not None and chunk.lost > 0
        resumed = not session.fresh and resume.gap is None and not lost
        starts_at = str(named if named is not None and (resume.gap or lost) else Position(hub.epoch, resume.after))
        connection = self._connection(session, arrival)
        first = self._first_words(connection, session, arrival, starts_at, resumed, resume.gap)
        self._hand_over(connection, session, arrival)
        connection.begin(
            arrival.link.start,
            after=resume.after,
            first=first,
            chunk=chunk,
            then=self._session_changed(connection, session),
        )
        self._turns.at_end(connection.pump)
        self._log_connected(connection, session, arrival, starts_at, resumed)

    def _hand_over(self, connection: Connection, session: LiveSession, arrival: _Arrival) -> None:
        """From here on the link is the player's nursery's."""
        assert session.nursery is not None  # for the type checker: the session accepts
        link, transport = arrival.link, arrival.transport
        channel = transport.channel(link)
        session.attach(connection)
        link.start = session.nursery.start_soon
        link.on_end = connection.stop
        session.nursery.start_soon(
            self._live,
            connection,
            channel,
            transport,
            name=f"{transport.name} of {session.player_id}",
        )
        channel.begin(connection)
        self._context.hub.note_opened(self._row(connection, session))

    def _make_room(self, session: LiveSession, wish: Wish) -> Resume:
        """Where its stream goes on for the client. May be done again, if it is to wait."""
        self._check_room(session, wish.replaces)
        self._replace(session, wish.replaces)
        return self._resume(session, wish.position)

    def _replace(self, session: LiveSession, replaces: str | None) -> None:
        """End the connection that the client has given up."""
        if replaces is not None and (old := session.connections.get(replaces)) is not None:
            old.end(SUPERSEDED)
            session.detach(old)

    def _check_room(self, session: LiveSession, replaces: str | None) -> None:
        """Keep to MAX_CONNECTIONS_PER_PLAYER. Who may be dead is asked before anybody is refused."""
        # Those that are over are still attached until it is their turn to leave.
        others = [
            c for c in session.connections.values() if c.id != replaces and c.over is None and c.link.ended is None
        ]
        if len(others) < self._context.settings.max_connections_per_player:
            return
        now = trio.current_time()
        silent = []
        for connection in others:
            connection.heard_bytes()
            if now - connection.liveness.heard_at > HEARD_SECONDS:
                silent.append(connection)
        for connection in silent:
            connection.probe()
        if silent:
            raise busy("too many connections; asking whether they are alive", retry_ms=PROBE_RETRY_MS)
        raise Refusal(ErrorType.CAPACITY, TOO_MANY.reason, status=503, close=TOO_MANY)

    def _resume(self, session: LiveSession, named: Position | None) -> Resume:
        hub = self._context.hub
        if named is None or hub.epochs is None:
            return Resume(session.seen)
        return resume_from(named, newest=hub.newest, seen=session.seen, epochs=hub.epochs)

    async def _first_chunk(self, session: LiveSession, after: int) -> Chunk:
        """What has to be read from the store, before what is in memory."""
        hub = self._context.hub
        try:
            with trio.fail_after(OPEN_SECONDS):
                chunk = await hub.storage.read(session.player_id, session.session_id, after, hub.newest, READ_MESSAGES)
                await self._turns.take(begun=True)
                return chunk
        except trio.TooSlowError:
            raise busy("the store is slow: try again") from None
        except StoreError as error:
            log.error(
                f"Failed to recover connection for {session.player_id}",
                error_type=ErrorType.PERSISTENCE.value,
                player_id=session.player_id,
                session_id=session.session_id,
                reason=str(error),
            )
            raise Refusal(ErrorType.PERSISTENCE, str(error), status=503, close=BUSY, retry_ms=PROBE_RETRY_MS) from None

    def _first_words(
        self,
        connection: Connection,
        session: LiveSession,
        arrival: _Arrival,
        position: str,
        resumed: bool,
        gap: Gap | None,
    ) -> list[bytes]:
        hub = self._context.hub
        payload = wire.control(
            "welcome",
            player_id=session.player_id,
            session_id=session.session_id,
            connection_id=connection.id,
            server_id=hub.server_id,
            epoch=hub.epoch,
            position=position,
            resumed=resumed,
            heartbeat_seconds=self.heartbeat_seconds,
        )
        retry_ms = cut_off_ms(len(hub.connections) - 1, self._context.randomness.uniform(0, 1))
        transport = arrival.transport
        first = [transport.opening(arrival.head) + transport.welcome(payload, position, retry_ms)]
        if gap is not None:
            first.append(connection.gap_bytes(gap))
            session.gap_told(connection, gap)
        return first

    def _session_changed(self, connection: Connection, session: LiveSession) -> list[bytes]:
        if session.previous_session_id is None:
            return []
        payload = wire.control(
            "session_changed", session_id=session.session_id, previous_session_id=session.previous_session_id
        )
        return [connection.framing.control(payload)]

    @property
    def heartbeat_seconds(self) -> float:
        return min(HEARTBEAT_SECONDS, self._context.settings.health_check_interval)

    def _row(self, connection: Connection, session: LiveSession) -> ConnectionRow:
        return ConnectionRow(
            connection_id=connection.id,
            player_id=session.player_id,
            session_id=session.session_id,
            transport=connection.transport,
            server_id=self._context.hub.server_id,
            address=connection.address,
            opened_at=connection.opened_at,
        )

    def _log_connected(
        self, connection: Connection, session: LiveSession, arrival: _Arrival, position: str, resumed: bool
    ) -> None:
        now = trio.current_time()
        ms = (now - arrival.began) * 1000
        self._context.statistics.established(now, connection.transport, ms)
        event = f"{arrival.transport.title} connected"
        row = {
            "establishment_time_ms": round(ms, 3),
            "resumed": resumed,
            "position": position,
            "address": connection.address,
            "player_id": session.player_id,
            "session_id": session.session_id,
            "connection_id": connection.id,
        }
        if ms > logs.SLOW_MS:
            log.warning(event, **row)
        else:
            self._lines.info(event, row)
        if log.is_enabled_for(logging.DEBUG):
            log.debug(
                "Session ID", player_id=session.player_id, session_id=session.session_id, wanted=arrival.wish.session_id
            )
            _debug_state(connection, "connected")

    # Ending.

    def _finish(self, connection: Connection, channel: Channel, transport: Transport) -> None:
        """Take leave of a connection: nothing here waits, so it is done also when cancelled."""
        link, left_with = connection.link, channel.left_with
        link.on_end = None
        connection.look_at_kernel()
        close = connection.over or left_with or link.ended or LOST
        left = connection.over is None and left_with is not None
        self._log_disconnected(connection, transport, close, _ended_by(connection, left_with))
        connection.over = close
        self._context.hub.note_closed(connection, self._context.clock.now())
        connection.session.detach(connection)
        self._linger(link, left=left)
        self._tell_quiet()

    def _linger(self, link: Link, *, left: bool) -> None:
        """Wait for the peer to take the last words, a second at most, outside of the player's nursery.

        :param left: the peer has said that it leaves: it sends nothing any more, and nobody waits for that.
        """
        if self._nursery is None or link.closed:
            link.close()
            return
        if left and link.has_said_all():
            self._turns.at_end(link.close)
            return
        link.start = self._nursery.start_soon
        try:
            self._nursery.start_soon(self._last_words, link, name="last words")
        except RuntimeError:  # the server is stopping, hard
            link.close()
        else:
            self._lingering += 1

    async def _last_words(self, link: Link) -> None:
        try:
            await link.linger()
        finally:
            self._lingering -= 1
            self._tell_quiet()

    def _log_disconnected(self, connection: Connection, transport: Transport, close: Close, by: str) -> None:
        if log.is_enabled_for(logging.DEBUG):
            _debug_state(connection, "disconnected")
        link, session = connection.link, connection.session
        lost = max(0, connection.behind) if link.unsent or connection.behind else 0
        fields = {
            "player_id": session.player_id,
            "session_id": session.session_id,
            "connection_id": connection.id,
        }
        self._lines.info(
            f"{transport.title} disconnected",
            {"duration_seconds": round(trio.current_time() - connection.opened, 3), **fields},
            code=close.code,
            reason=close.reason,
            ended_by=by,
            **_advice(close),
        )
        if lost or link.unsent:
            self._context.statistics.failed(max(1, lost), "cut")
            log.warning(
                "Message delivery failed",
                error_type=ErrorType.DELIVERY.value,
                delivery_error="connection cut with unsent messages",
                reason=close.reason,
                unsent_bytes=link.unsent,
                behind=lost,
                **fields,
            )

    # What clients say, on either transport.

    def count_frames(self, connection: Connection, frames: int) -> None:
        """So many frames have come. Beyond the rate the connection ends."""
        bucket = connection.frame_bucket
        if bucket is None:
            bucket = connection.frame_bucket = self._frames.of(connection.session.player_id)
        wait = bucket.take(connection.link.last_received, frames)
        if wait:
            connection.end(RATE, retry_ms=int(wait * 1000) + 1)

    def hear(self, connection: Connection, request: ClientRequest) -> bool:
        """Carry out one request of a live connection; errors are replies.

        False: the store has to be asked first (`hear_and_wait`). Nothing has been done then.
        """
        match request:
            case Command():
                if connection.session.has_to_ask(request):
                    return False
                if self._admit(connection, request):
                    try:
                        connection.session.submit_now(request, connection)
                    except Refusal as refusal:
                        reply_error(connection, request.id, refusal)
            case Ack(position):
                self.acknowledge(connection.session, connection, position)
            case Ping(id):
                connection.offer_pong(wire.control("pong", id=id))
            case Auth(token):
                self._renew(connection, token)
            case _:
                reply_error(connection, request.id, request.refusal)
        return True

    async def hear_and_wait(self, connection: Connection, request: ClientRequest) -> None:
        """As `hear`, and waits for the store where it has to be asked."""
        if self.hear(connection, request):
            return
        assert isinstance(request, Command)  # nothing else is in the store
        if self._admit(connection, request):
            try:
                await connection.session.submit(request, connection)
            except Refusal as refusal:
                reply_error(connection, request.id, refusal)

    def _admit(self, connection: Connection, command: Command) -> bool:
        """Count a command against the rate; whether it may be carried out. Who does not heed the refusals is ended."""
        when = connection.link.last_received
        bucket = connection.command_bucket
        if bucket is None:
            bucket = connection.command_bucket = self._commands.of(connection.session.player_id)
        wait = bucket.take(when)
        if not wait:
            return True
        refusal = self._too_many_commands(wait)
        reply_error(connection, command.id, refusal)
        if self._abuse.take(connection.session.player_id, when):
            connection.end(RATE, retry_ms=refusal.retry_ms)
        return False

    def take_command(self, player_id: str) -> None:
        """Count a command of the player; refuse it beyond the rate."""
        wait = self._commands.take(player_id, trio.current_time())
        if wait:
            raise self._too_many_commands(wait)

    def _too_many_commands(self, wait: float) -> Refusal:
        settings = self._context.settings
        return Refusal(
            ErrorType.RATE_LIMIT,
            f"more than {settings.rate_limit_requests} commands in {settings.rate_limit_window:g} seconds",
            status=429,
            retry_ms=int(wait * 1000) + 1,
        )

    def acknowledge(self, session: LiveSession, connection: Connection | None, position: Position) -> None:
        """An ``ack``: moves the mark of the connection and of the session; deletes nothing."""
        hub = self._context.hub
        if position.epoch != hub.epoch or position.seq > hub.newest:
            refusal = Refusal(
                ErrorType.VALIDATION,
                f"{position} cannot be acknowledged: it is of another epoch or lies in the future",
                status=422,
                details={"field": "position", "newest": str(Position(hub.epoch, hub.newest))},
            )
            if connection is None:
                raise refusal
            reply_error(connection, None, refusal)
        elif connection is None:
            session.saw(position.seq)
        else:
            connection.confirm(position.seq)

    def _renew(self, connection: Connection, token: str) -> None:
        """A fresh token for a live connection; a bad one ends it (4500). In protected mode tokens are
        ignored."""
        if self._context.settings.protected:
            return
        try:
            claims = self._access.verify(token)
        except TokenError:
            connection.end(BAD_TOKEN)
            return
        if claims.player_id != connection.player_id:
            connection.end(BAD_TOKEN)
        else:
            connection.expires_at = claims.expires_at
            connection.due = trio.current_time()


def _debug_state(connection: Connection, state: str) -> None:
    log.debug(
        "Connection state",
        state=state,
        player_id=connection.player_id,
        connection_id=connection.id,
        written=connection.written,
        acknowledged=connection.acknowledged,
        behind=connection.behind,
        waiting_for=connection.waiting_for,
    )


def reply_error(connection: Connection, id: str | None, refusal: Refusal) -> None:
    body = wire.error_body(refusal.error_type, refusal.message, refusal.details)
    connection.offer_reply(id, body, None)


def _ended_by(connection: Connection, left_with: Close | None) -> str:
    """Who ended it: client, network, server or operator."""
    if connection.over is not None:
        return connection.link.ended_by or "server"
    if left_with is not None:
        return "client"
    return "network" if connection.link.ended is None else connection.link.ended_by


_ADVICE: Final = {
    4008: "WRITE_TIMEOUT",
    4009: "MAX_CONNECTIONS_PER_PLAYER",
    4012: "PONG_TIMEOUT, HEALTH_CHECK_INTERVAL",
    4029: "RATE_LIMIT_REQUESTS, RATE_LIMIT_WINDOW",
    4509: "MAX_CONNECTIONS_PER_PLAYER",
    1009: "MAX_MESSAGE_SIZE",
}


def _advice(close: Close) -> dict[str, str]:
    """The setting to change, where one would help."""
    setting = _ADVICE.get(close.code)
    return {} if setting is None else {"setting": setting}
