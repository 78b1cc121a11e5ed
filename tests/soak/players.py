"""Players on both transports: the project's own client, and one that shares no line of code with it.

Each hands what it has merged to its `Account`, which judges it. The other client has its WebSocket from
``websockets`` and its event stream from ``httpx-sse``, and merges by what the protocol's page says.
"""

from __future__ import annotations

import json
import random
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import httpx
import httpx_sse
import trio
from attrs import define, field
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from mythos_trio.carriers import Base, dial
from mythos_trio.client import TRANSPORTS, DualClient, TransportState
from tests.e2e.clients import HttpxSSE
from tests.soak.ledger import Account, Message, Track

ASK_SECONDS: Final = 15.0
# A server that cannot accept answers nobody.
OPEN_SECONDS: Final = 5.0
# Errors of a command that was not carried out, and may be asked for again.
AGAIN: Final = frozenset({"persistence_error", "capacity_error", "system_error", "rate_limit_error", "session_error"})

LOST: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, httpx.TransportError)
"""How a connection may end."""


class Unanswered(Exception):
    """It is not known what became of a command."""


def cut(sock: socket.socket | trio.socket.SocketType) -> None:
    """Have the connection end now, and reset it when its owner closes it."""
    if sock.fileno() >= 0:
        with suppress(OSError):  # it may be over already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.shutdown(socket.SHUT_RDWR)


class Player(ABC):
    """Somebody who listens on *transports*, and gives commands."""

    def __init__(self, url: str, account: Account, transports: tuple[str, ...], dice: random.Random) -> None:
        self.url = url
        self.account = account
        self.id = account.player
        self.transports = transports
        self.dice = dice
        self.ended = 0
        """Connections that were open and are over."""
        self.told: dict[str, int] = {}
        """How many connections were ended with which words: the code of ``disconnect``, or "cut"."""
        self.untimed = 0
        """Farewells of a drain that did not say when to come back."""

    def over(self, why: str) -> None:
        self.ended += 1
        self.told[why] = self.told.get(why, 0) + 1

    @abstractmethod
    async def run(self) -> None:
        """Listen for ever."""

    @property
    @abstractmethod
    def connected(self) -> int:
        """How many connections are open."""

    @abstractmethod
    def cut_one(self) -> None:
        """Pull a cable."""

    @abstractmethod
    async def ask(self, id: str, content: str) -> Message:
        """Send a command once; its reply.

        :raises Unanswered:
        """


class OwnPlayer(Player):
    """The project's client."""

    def __init__(self, url: str, account: Account, transports: tuple[str, ...], dice: random.Random) -> None:
        super().__init__(url, account, transports, dice)
        self._client: DualClient | None = None
        self._sockets: list[trio.socket.SocketType] = []
        self._open: dict[str, bool] = {}

    async def run(self) -> None:
        self._client = client = DualClient(self.url, self.id, transports=self.transports, dial=self._dial)
        client.on_change = self._look
        async with client:
            async for event in client.events():
                self.account.take(event)

    async def _dial(self, base: Base) -> trio.abc.Stream:
        stream = await dial(base)
        assert isinstance(stream, trio.SocketStream)
        self._sockets = [sock for sock in self._sockets if sock.fileno() >= 0]
        self._sockets.append(stream.socket)
        return stream

    def _look(self) -> None:
        assert self._client is not None
        for name, state in self._client.transports.items():
            was, self._open[name] = self._open.get(name, False), state.connected
            if was and not state.connected:
                self.over(self._words(state))

    def _words(self, state: TransportState) -> str:
        if state.status == "waiting" and state.why is not None and state.why.endswith(")"):
            return state.why.rpartition("(")[2].removesuffix(")")
        return "cut"

    @property
    def connected(self) -> int:
        return 0 if self._client is None else sum(state.connected for state in self._client.transports.values())

    def cut_one(self) -> None:
        if self._sockets:
            cut(self.dice.choice(self._sockets))

    async def ask(self, id: str, content: str) -> Message:
        while self._client is None:
            await trio.sleep(0.01)
        return await self._client.send_command(content, command_id=id)


@define(eq=False)
class Wire:
    """An open connection of an `OtherPlayer`."""

    transport: str
    sock: socket.socket | trio.socket.SocketType | None = None
    track: Track | None = None
    words: str = "cut"
    retry: float | None = None
    """Seconds."""
    connection_id: str = ""
    done: trio.Event = field(factory=trio.Event)


class OtherPlayer(Player):
    """A client after the protocol's page."""

    def __init__(self, url: str, account: Account, transports: tuple[str, ...], dice: random.Random) -> None:
        super().__init__(url, account, transports, dice)
        self._epoch = 0
        self._number = 0
        self._known = trio.Event()
        self._wires: dict[str, Wire] = {}
        self._protocol: ClientProtocol | None = None
        self._send: Callable[[bytes], None] | None = None
        self._replies: dict[str, Message] = {}
        self._changed = trio.Event()
        self._http = httpx.AsyncClient(
            base_url=url, trust_env=False, timeout=ASK_SECONDS, limits=httpx.Limits(max_keepalive_connections=0)
        )

    @property
    def _path(self) -> str:
        named = f"?position={self._epoch}-{self._number}" if self._epoch else ""
        return f"/{self.id}{named}"

    async def run(self) -> None:
        async with self._http, trio.open_nursery() as nursery:
            for transport in self.transports:
                nursery.start_soon(self._keep, transport)

    async def _keep(self, transport: str) -> None:
        if transport == "sse" and len(self.transports) == 2:
            await self._known.wait()
        live = self._websocket if transport == "websocket" else self._event_stream
        while True:
            wire = self._wires[transport] = Wire(transport)
            opened = False
            try:
                await live(wire)
            except LOST:
                pass  # it ended one way or the other
            finally:
                del self._wires[transport]
                if wire.track is not None:
                    opened = True
                    wire.track.over = True
            if opened:
                self.over(wire.words)
                if wire.words == "4000" and wire.retry is None:
                    self.untimed += 1
            self._changed_now()
            await trio.sleep(self.dice.uniform(0.1, 0.6) if wire.retry is None else wire.retry)

    # The two transports.

    async def _websocket(self, wire: Wire) -> None:
        protocol = ClientProtocol(parse_uri(f"{self.url.replace('http', 'ws', 1)}/ws{self._path}"), max_size=None)
        with trio.fail_after(OPEN_SECONDS):
            stream = await dial_again(self.url)
        async with stream:
            wire.sock = stream.socket
            protocol.send_request(protocol.connect())
            await self._pump(protocol, stream, wire)

    async def _pump(self, protocol: ClientProtocol, stream: trio.SocketStream, wire: Wire) -> None:
        lock = trio.Lock()

        async def flush() -> None:
            async with lock:
                for data in protocol.data_to_send():
                    if data:
                        await stream.send_all(data)

        await flush()
        self._protocol, self._flush = protocol, flush
        try:
            while protocol.state is not State.CLOSED:
                with trio.fail_after(20.0):  # heartbeats come more often
                    data = await stream.receive_some(65536)
                if data:
                    protocol.receive_data(data)
                else:
                    protocol.receive_eof()
                for event in protocol.events_received():
                    if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                        self._heard(wire, json.loads(bytes(event.data)))
                await flush()
                if not data or protocol.close_expected():
                    return
        finally:
            self._protocol = None

    async def _event_stream(self, wire: Wire) -> None:
        token = trio.lowlevel.current_trio_token()
        stream = _HandingOn(f"{self.url}/sse{self._path}", token, lambda message: self._heard(wire, message), wire)
        try:
            await wire.done.wait()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(stream.close)
        if stream.refused is not None:
            self.account.refuse(f"{self.id}: {stream.refused}")

    # What is heard.

    def _heard(self, wire: Wire, message: Message) -> None:
        if "seq" in message:
            self._message(wire, message)
        elif message["type"] == "welcome":
            self._welcome(wire, message)
        elif message["type"] == "disconnect":
            wire.words = str(message["code"])
            wire.retry = message["retry_ms"] / 1000 if "retry_ms" in message else None
        elif message["type"] == "reply":
            self._replies[message["id"]] = message
            self._changed_now()
        elif message["type"] == "heartbeat":
            epoch, number = map(int, message["position"].split("-"))
            if epoch == self._epoch and number > self._number:
                self._number = number
        elif message["type"] != "pong":
            self.account.refuse(f"{self.id} was told {message}")

    def _welcome(self, wire: Wire, message: Message) -> None:
        epoch, start = map(int, message["position"].split("-"))
        if not self._epoch:
            self._epoch, self._number = epoch, start
            self._known.set()
        if epoch != self._epoch or start > self._number:
            self.account.refuse(f"{self.id} is at {self._epoch}-{self._number}, and was welcomed at {epoch}-{start}")
        wire.connection_id = message["connection_id"]
        wire.track = self.account.open_track(wire.transport, start)
        self._changed_now()

    def _message(self, wire: Wire, message: Message) -> None:
        assert wire.track is not None
        wire.track.seqs.append(message["seq"])
        if message["seq"] > self._number:
            self._number = message["seq"]
            self.account.take(message)

    def _changed_now(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # What others may ask of it.

    @property
    def connected(self) -> int:
        return sum(wire.track is not None for wire in self._wires.values())

    def cut_one(self) -> None:
        wires = [wire for wire in self._wires.values() if wire.sock is not None]
        if wires:
            sock = self.dice.choice(wires).sock
            assert sock is not None
            cut(sock)

    async def ask(self, id: str, content: str) -> Message:
        by_websocket = self._protocol is not None and self.dice.random() < 0.6
        try:
            with trio.fail_after(ASK_SECONDS):
                return await (self._ask_websocket if by_websocket else self._ask_post)(id, content)
        except LOST as error:
            raise Unanswered(repr(error)) from error

    async def _ask_websocket(self, id: str, content: str) -> Message:
        protocol = self._protocol
        if protocol is None or protocol.state is not State.OPEN:
            raise Unanswered("not connected")
        self._replies.pop(id, None)
        protocol.send_text(json.dumps({"type": "command", "id": id, "content": content}).encode())
        await self._flush()
        while id not in self._replies:
            if self._protocol is not protocol:
                raise Unanswered("the connection ended")
            await self._changed.wait()
        return self._replies.pop(id)

    async def _ask_post(self, id: str, content: str) -> Message:
        answer = await self._http.post(f"/api/connections/{self.id}/commands", json={"id": id, "content": content})
        reply: Message = answer.json()
        if reply.get("type") == "reply":
            return reply
        # Not carried out, or not yet: in the form of all HTTP errors.
        return {"type": "reply", "id": id, "ok": False, "error": {"error_type": reply["error_type"], **reply}}


async def dial_again(url: str) -> trio.SocketStream:
    parts = httpx.URL(url)
    return await trio.open_tcp_stream(parts.host, parts.port or 80)


class _HandingOn(HttpxSSE):
    """An event stream that keeps nothing: *heard* is called in the event loop."""

    def __init__(self, url: str, token: trio.lowlevel.TrioToken, heard: Callable[[Message], None], wire: Wire) -> None:
        self._token = token
        self._heard = heard
        self._wire = wire
        self.refused: str | None = None
        super().__init__(url)

    def _read(self) -> None:
        try:
            super()._read()
        except httpx_sse.SSEError as error:
            self.refused = f"the event stream was refused: {error}"

    def _add(self, message: Message, id: str | None = None) -> None:
        self._wire.sock = self._socket
        self._soon(self._heard, message)

    def _end(self) -> None:
        self._soon(self._wire.done.set)

    def _soon(self, function: Callable[..., object], *args: Any) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)


def transports_of(index: int) -> tuple[str, ...]:
    """Most have both; some, of either kind of client, have only one."""
    one = {4: "websocket", 5: "sse", 6: "websocket", 7: "sse"}.get(index % 12)
    return TRANSPORTS if one is None else (one,)
