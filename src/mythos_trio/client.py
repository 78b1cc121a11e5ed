"""A client of both transports, without a user interface: for the terminal, for tests and for programs.

It keeps a WebSocket and an event stream open at once, comes back on each by itself, and hands on every
message once and in order, whichever brought it (contract, section 4): `Merge` holds one number and one epoch.
Commands keep their id across reconnections, and go by POST while the WebSocket is down.

    async with DualClient("http://localhost:8000", "alice") as client:
        reply = await client.send_command("look")
        async for event in client.events():
            print(event["content"])

What a reader has taken waits in one queue until it is consumed; at `MAX_QUEUE` reading stops, so a slow
application is a slow client, which the server can handle.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec
import trio
from attrs import define, frozen

from mythos_trio import __version__
from mythos_trio.carriers import (
    JSON,
    TROUBLE,
    BadUrl,
    Carrier,
    Dial,
    Lost,
    WebSocketCarrier,
    dial,
    headers_of,
    open_event_stream,
    open_exchange,
    open_websocket,
    outcome_of,
    parse_url,
)
from mythos_trio.core.client import FIRST_DELAY, Backoff, Merge, Outcome, json_object, of_disconnect, parse_gap
from mythos_trio.core.errors import Refusal
from mythos_trio.core.position import MAX_SEQ, Position, parse_position
from mythos_trio.seams import Randomness, SystemRandomness

__all__ = ["BadUrl", "ClientEnded", "DualClient", "Ended", "Events", "TransportState"]

# From the first byte out to the welcome.
CONNECT_SECONDS: Final = 10.0
# How long the second transport waits for the first to find out the position.
FIRST_SECONDS: Final = 3.0
# A connection that lived this long was a good one: the next wait is short again. (With 5 s, players were away for
# half a minute after a server had been killed a few times within ten seconds, though it was there again after one.)
GOOD_SECONDS: Final = 2.0
# A transport that was turned down for good is tried again this often, while the other one works.
REFUSED_SECONDS: Final = 60.0
POST_SECONDS: Final = 60.0
ACK_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 1.0
MAX_QUEUE: Final = 1000

TRANSPORTS: Final = ("websocket", "sse")


@frozen
class Ended:
    """Why the client does not come back: *code* is the server's close code, None if there was none."""

    reason: str
    code: int | None = None


class ClientEnded(Exception):
    """The client has ended, or was closed, before there was an answer."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended.reason)
        self.ended = ended


@define(eq=False)
class TransportState:
    """One transport, as a person may want to see it."""

    name: str
    status: str = "connecting"
    """``connecting``, ``connected``, ``waiting`` (to try again) or ``refused``."""
    why: str | None = None
    """How the last connection, or the last attempt, ended."""
    retry_at: float | None = None
    """When it is tried again, on Trio's clock."""
    connection_id: str | None = None
    epoch: int = 0
    carrier: Carrier | None = None
    since: float = 0.0
    """When it was connected last, on Trio's clock."""

    @property
    def connected(self) -> bool:
        return self.status == "connected"


@define(eq=False)
class _Pending:
    """A command that has no answer yet."""

    id: str
    content: Any
    reply: JSON | None = None


@frozen
class _Item:
    """An event that waits to be consumed, and the position before it."""

    event: JSON
    before: Position | None


class DualClient:
    """See the module's docstring.

    :param url: of the server, ``http://`` or ``https://``.
    :param token: needed where the server has a ``SECRET_KEY``.
    :param session_id: take this session; None joins the current one.
    :param position: go on after it (``EPOCH-SEQ``); None leaves it to the server.
    :raises BadUrl:
    """

    def __init__(
        self,
        url: str,
        player: str,
        token: str | None = None,
        session_id: str | None = None,
        *,
        position: str | None = None,
        transports: tuple[str, ...] = TRANSPORTS,
        randomness: Randomness | None = None,
        dial: Dial = dial,
    ) -> None:
        self._base = parse_url(url)
        self._player = player
        self._token = token
        self._dial = dial
        self._randomness = randomness or SystemRandomness()
        self._merge = Merge()
        if position is not None:
            start = parse_position(position)
            self._merge = Merge(start.epoch, start.seq)
        self.session_id = session_id
        self.ended: Ended | None = None
        self.transports = {name: TransportState(name) for name in transports}
        self._queue: deque[_Item] = deque()
        self._held: _Item | None = None  # the event that was handed out last, and may not be done with
        self._acknowledged: Position | None = None
        self._pending: dict[str, _Pending] = {}
        self._ahead: TransportState | None = next(iter(self.transports.values()), None)
        self._changed = trio.Event()
        self._scope = trio.CancelScope()
        self._context: AbstractAsyncContextManager[None] | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when a transport's state has changed, or the client has ended."""

    async def __aenter__(self) -> DualClient:
        self._context = self._open_for_use()
        await self._context.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._context is not None
        return await self._context.__aexit__(kind, error, trace)  # noqa: ASYNC102  # it is the nursery's end

    @asynccontextmanager
    async def _open_for_use(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run)
            try:
                yield
                await self._say_goodbye()
            finally:
                self._end(Ended("closed"))

    async def _say_goodbye(self) -> None:
        """Tell the server what was read, and leave in order, as far as that takes no time."""
        with trio.move_on_after(CLOSE_SECONDS), suppress(*TROUBLE, OSError, trio.TooSlowError):
            await self._acknowledge()
            carrier = self._websocket
            if carrier is not None:
                await carrier.close()

    # What others may know.

    @property
    def position(self) -> str | None:
        """Everything up to it has been taken, and is or will be among the `events`."""
        return None if self._merge.position is None else str(self._merge.position)

    @property
    def health(self) -> str:
        """``healthy``: all transports; ``degraded``: some; ``unhealthy``: none."""
        connected = [state.connected for state in self.transports.values()]
        return "healthy" if all(connected) else "degraded" if any(connected) else "unhealthy"

    async def wait_connected(self) -> None:
        """Until a transport is; `ClientEnded` if that will not be."""
        while not any(state.connected for state in self.transports.values()):
            self._raise_if_ended()
            await self._changed.wait()

    def _raise_if_ended(self) -> None:
        if self.ended is not None:
            raise ClientEnded(self.ended)

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # Events.

    def events(self) -> Events:
        """Numbered messages, each once and in order; ``gap`` where some were lost; ``session_changed``.

        Ends when the client has. Going on to the next event says that the last one is done with: it
        will not come again.
        """
        return Events(self)

    async def _next_event(self) -> JSON | None:
        if self._held is not None:
            self._held = None
            self._notify()
        while not self._queue:
            if self.ended is not None:
                return None
            await self._changed.wait()
        self._held = self._queue.popleft()
        return self._held.event

    @property
    def consumed(self) -> str | None:
        """Everything up to it is done with: what to name as *position* in another run."""
        return None if self._consumed is None else str(self._consumed)

    @property
    def _consumed(self) -> Position | None:
        oldest = self._held or (self._queue[0] if self._queue else None)
        return self._merge.position if oldest is None else oldest.before

    async def wait_consumed(self, position: str, seconds: float = 1.0) -> None:
        """Until all events up to *position* (of a reply) are done with, *seconds* at most.

        A reply by POST may come before the messages that precede it; how long those take is not known.
        """
        until = parse_position(position)
        with trio.move_on_after(seconds):
            while self.ended is None:
                consumed = self._consumed
                if consumed is not None and (consumed.epoch != until.epoch or consumed.seq >= until.seq):
                    return
                await self._changed.wait()

    def _offer(self, event: JSON, before: Position | None) -> None:
        self._queue.append(_Item(event, before))
        self._notify()

    async def _room(self) -> None:
        """Until the application has consumed something, if too much waits for it."""
        while len(self._queue) >= MAX_QUEUE and self.ended is None:
            await self._changed.wait()

    # Commands.

    async def send_command(self, content: Any, *, command_id: str | None = None) -> JSON:
        """Send a command; its ``reply``: ``ok`` and ``content``, or ``error``.

        It waits for a connection if there is none, and keeps its id until there is an answer, so that the
        command is carried out once. Raises `ClientEnded` if there will be none.
        """
        pending = _Pending(command_id or self._randomness.token(), content)
        if pending.id in self._pending:
            raise ValueError(f"the command {pending.id!r} is under way already")
        self._pending[pending.id] = pending
        try:
            while pending.reply is None:
                self._raise_if_ended()
                await self._try_command(pending)
            return pending.reply
        finally:
            del self._pending[pending.id]

    async def _try_command(self, pending: _Pending) -> None:
        """Send it the best way that there is now. Returns when it is answered, or the way has changed."""
        carrier = self._websocket
        if carrier is not None:
            message = {"type": "command", "id": pending.id, "content": pending.content}
            try:
                await carrier.send(message)
            except Lost:
                # Its reader notices too, and says so; until then there is nothing to do.
                await trio.lowlevel.checkpoint()
            while pending.reply is None and self._websocket is carrier and self.ended is None:
                await self._changed.wait()
        elif self._event_stream_is_open:
            await self._post_command(pending)
        else:
            await self._changed.wait()

    async def _post_command(self, pending: _Pending) -> None:
        body = {"type": "command", "id": pending.id, "content": pending.content, "session_id": self.session_id}
        try:
            status, headers, answer = await self._post("commands", body)
        except (*TROUBLE, OSError, trio.TooSlowError):
            await trio.sleep(FIRST_DELAY)
            return
        reply = json_object(answer)
        if reply.get("type") == "reply":
            pending.reply = reply
        elif status in (408, 409, 425, 429) or status >= 500:
            # Not carried out: the server is not ready for it, or the session waits for a connection.
            retry = headers.get("retry-after", "")
            await trio.sleep(float(retry) if re.fullmatch(r"[0-9]{1,3}", retry) else FIRST_DELAY)
        else:
            error = {
                "error_type": reply.get("error_type", "system_error"),
                "message": reply.get("message", f"status {status}"),
                "details": reply.get("details", {}),
            }
            pending.reply = {"type": "reply", "id": pending.id, "ok": False, "error": error}

    async def _post(self, what: str, body: JSON) -> tuple[int, dict[str, str], bytes]:
        target = f"{self._base.prefix}/api/connections/{quote(self._player, safe='')}/{what}"
        data = msgspec.json.encode({name: value for name, value in body.items() if value is not None})
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Connection": "close"}
        with trio.fail_after(POST_SECONDS):
            async with open_exchange(self._dial, self._base) as exchange:
                response = await exchange.ask("POST", target, {**self._headers(), **headers}, data)
                return response.status_code, headers_of(response), await exchange.body()

    # Connections.

    @property
    def _websocket(self) -> WebSocketCarrier | None:
        state = self.transports.get("websocket")
        return state.carrier if state is not None and isinstance(state.carrier, WebSocketCarrier) else None

    @property
    def _event_stream_is_open(self) -> bool:
        state = self.transports.get("sse")
        return state is not None and state.connected

    async def _run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                for state in self.transports.values():
                    nursery.start_soon(self._keep, state)
                nursery.start_soon(self._acknowledge_forever)

    def _end(self, ended: Ended) -> None:
        if self.ended is None:
            self.ended = ended
        self._scope.cancel()
        self._notify()
        self.on_change()

    async def _keep(self, state: TransportState) -> None:
        """Keep one transport connected, for ever."""
        backoff = Backoff()
        while True:
            self._set(state, "connecting")
            outcome = await self._attempt(state)
            if state.connected and trio.current_time() - state.since >= GOOD_SECONDS:
                backoff.good()
            state.why = outcome.why
            if outcome.over:
                self._end(Ended(outcome.why, outcome.code))
            elif outcome.refused:
                await self._wait_refused(state, outcome)
            else:
                delay = backoff.next(self._randomness.uniform(0.5, 1.0), outcome.retry_ms)
                state.retry_at = trio.current_time() + delay
                self._set(state, "waiting")
                await trio.sleep(delay)

    async def _wait_refused(self, state: TransportState, outcome: Outcome) -> None:
        """Turned down for good: by a proxy between, if the other transport works; else by the server."""
        state.retry_at = trio.current_time() + REFUSED_SECONDS
        self._set(state, "refused")
        if all(other.status == "refused" for other in self.transports.values()):
            self._end(Ended(outcome.why, outcome.code))
        await trio.sleep_until(state.retry_at)

    def _set(self, state: TransportState, status: str) -> None:
        state.status = status
        if status in ("connecting", "connected"):
            state.retry_at = None
        self._notify()
        self.on_change()

    async def _attempt(self, state: TransportState) -> Outcome:
        """One connection, from its first byte to its end."""
        await self._wait_for_position(state)
        outcome = Outcome("the connection broke")
        try:
            await self._live(state)
        except* Exception as group:
            outcome = outcome_of(_first_of(group))
        finally:
            state.carrier = None
            self._let_others_connect(state)
        return outcome

    async def _wait_for_position(self, state: TransportState) -> None:
        """As long as no position is known one transport goes ahead, so that the other can name one."""
        with trio.move_on_after(FIRST_SECONDS):
            while not self._merge.epoch and self._ahead not in (None, state):
                await self._changed.wait()
        if not self._merge.epoch:
            self._ahead = state

    def _let_others_connect(self, state: TransportState) -> None:
        if self._ahead is state:
            self._ahead = None
            self._notify()

    async def _live(self, state: TransportState) -> None:
        named = self._merge.position
        scope = trio.CancelScope(deadline=trio.current_time() + CONNECT_SECONDS)
        with scope:
            async with self._open(state, named) as carrier:
                idle = self._welcome(state, carrier, named, await carrier.receive())
                while True:
                    scope.deadline = math.inf
                    await self._room()
                    scope.deadline = trio.current_time() + idle
                    self._take(state, await carrier.receive())
        if scope.cancelled_caught:
            why = "nothing heard from the server" if state.connected else f"no welcome within {CONNECT_SECONDS:g} s"
            raise Lost(Outcome(why))

    def _open(self, state: TransportState, named: Position | None) -> AbstractAsyncContextManager[Carrier]:
        query = {
            "session_id": self.session_id,
            "position": None if named is None else str(named),
            "replaces": state.connection_id,
        }
        text = urlencode({name: value for name, value in query.items() if value is not None})
        path = "ws" if state.name == "websocket" else "sse"
        target = f"{self._base.prefix}/{path}/{quote(self._player, safe='')}" + (f"?{text}" if text else "")
        open_it = open_websocket if path == "ws" else open_event_stream
        return open_it(self._dial, self._base, target, self._headers())

    def _headers(self) -> dict[str, str]:
        bearer = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        return {"Host": self._base.authority, "User-Agent": f"mythos-trio/{__version__}", **bearer}

    # What the server says.

    def _welcome(self, state: TransportState, carrier: Carrier, named: Position | None, message: JSON) -> float:
        """Take the first message; how many seconds of silence are too many."""
        if message["type"] == "disconnect":
            raise Lost(of_disconnect(message))
        if message["type"] != "welcome":
            raise Lost(Outcome("the server did not send a welcome"))
        try:
            epoch, start = int(message["epoch"]), parse_position(message["position"])
            session_id, connection_id = str(message["session_id"]), str(message["connection_id"])
            heartbeat = float(message.get("heartbeat_seconds", 30))
        except (KeyError, TypeError, ValueError, Refusal) as error:
            raise Lost(Outcome(f"the server sent a welcome that cannot be understood: {error!r}")) from error
        state.connection_id = connection_id
        if not self._merge.opened(named, epoch, start):
            raise Lost(Outcome("opened again, to name a position", retry_ms=0))
        self.session_id = session_id
        state.epoch, state.carrier = epoch, carrier
        state.since = trio.current_time()
        self._let_others_connect(state)
        self._set(state, "connected")
        return 2 * min(max(heartbeat, 1.0), 60.0) + 5.0

    def _take(self, state: TransportState, message: JSON) -> None:
        before = self._merge.position
        if "seq" in message:
            seq = message["seq"]
            if not isinstance(seq, int) or not 0 < seq <= MAX_SEQ:
                raise Lost(Outcome("the server sent a number that is none"))
            if self._merge.message(state.epoch, seq):
                self._offer(message, before)
            return
        match message["type"]:
            case "heartbeat":
                self._pass(state, message)
            case "gap":
                self._take_gap(message, before)
            case "reply":
                if isinstance(state.carrier, WebSocketCarrier):
                    # Its place in the stream: all that it rests on came before it.
                    self._pass(state, message)
                self._answer(message)
            case "session_changed":
                self._offer(message, before)
            case "disconnect":
                raise Lost(of_disconnect(message))

    def _take_gap(self, message: JSON, before: Position | None) -> None:
        try:
            gap = parse_gap(message)
        except ValueError as error:
            raise Lost(Outcome(f"the server sent what cannot be understood: {error}")) from error
        if self._merge.gap(gap):
            self._offer(message, before)

    def _pass(self, state: TransportState, message: JSON) -> None:
        try:
            position = parse_position(str(message.get("position")))
        except Refusal as error:
            raise Lost(Outcome(f"the server sent what cannot be understood: {error}")) from error
        self._merge.passed(state.epoch, position.seq)
        self._notify()

    def _answer(self, reply: JSON) -> None:
        pending = self._pending.get(str(reply.get("id")))
        if pending is not None:
            pending.reply = reply
            self._notify()

    # Acknowledgements.

    async def _acknowledge_forever(self) -> None:
        while True:
            await trio.sleep(ACK_SECONDS)
            with suppress(*TROUBLE, OSError, trio.TooSlowError):
                await self._acknowledge()

    async def _acknowledge(self) -> None:
        """Say what was consumed, so that a client that comes back without a position sees none of it again."""
        position = self._consumed
        if position is None or position.epoch != self._merge.epoch or position == self._acknowledged:
            return
        carrier = self._websocket
        if carrier is not None:
            await carrier.send({"type": "ack", "position": str(position)})
        elif self._event_stream_is_open:
            body = {"position": str(position), "connection_id": self.transports["sse"].connection_id}
            await self._post("ack", {**body, "session_id": self.session_id})
        else:
            return
        self._acknowledged = position


class Events:
    """An asynchronous iterator: see `DualClient.events`."""

    def __init__(self, client: DualClient) -> None:
        self._client = client

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> JSON:
        await trio.lowlevel.checkpoint()
        event = await self._client._next_event()
        if event is None:
            raise StopAsyncIteration
        return event


def _first_of(group: BaseExceptionGroup[Exception]) -> BaseException:
    """The exception that says most: what was lost, before what broke because of it."""
    found: list[BaseException] = []
    waiting: list[BaseException] = [group]
    while waiting:
        error = waiting.pop(0)
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(error.exceptions)
        else:
            found.append(error)
    return next((error for error in found if isinstance(error, Lost)), found[0])
