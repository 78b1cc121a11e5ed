"""A whole server and its clients in one process, on virtual time, over sockets in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import wsproto
from wsproto.connection import ConnectionState
from wsproto.events import AcceptConnection, CloseConnection, Ping, RejectConnection, RejectData, Request, TextMessage

from mythos_trio.game import Game
from mythos_trio.ledger import LAST_WORDS, REQUEST
from mythos_trio.server import Server
from mythos_trio.storage import InlineRunner
from mythos_trio.testing.network import MemoryListener, MemoryWire
from mythos_trio.testing.process import Process, VirtualClock
from mythos_trio.world import DefaultGame

__all__ = ["Client", "SSEClient", "VirtualClock", "WebSocketClient", "World", "count_tasks", "play"]


class Client:
    """A connection to the server from outside: bytes in, bytes out."""

    def __init__(self, wire: MemoryWire) -> None:
        self.wire = wire
        self.received: list[dict[str, Any]] = []
        self.buffer = b""
        self.closed: tuple[int, str] | None = None
        self.eof = False

    async def send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            await self.wire.wait_writable()
            view = view[self.wire.send(view) :]

    async def receive(self) -> bytes:
        await self.wire.wait_readable()
        try:
            return self.wire.recv(65536)
        except OSError:
            return b""

    def close(self) -> None:
        self.wire.close()

    def of(self, type_: str) -> list[dict[str, Any]]:
        return [message for message in self.received if message.get("type") == type_]

    @property
    def numbered(self) -> list[dict[str, Any]]:
        return [message for message in self.received if "seq" in message]

    async def until(self, test: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read on until a message passes *test*; it and what came before are in `received`."""
        with trio.fail_after(120):
            while True:
                message = await self.next()
                if test(message):
                    return message
                if self.over:
                    raise EOFError(f"it ended before: {self.received[-3:]}")

    async def next(self) -> dict[str, Any]:
        raise NotImplementedError

    async def until_type(self, type_: str) -> dict[str, Any]:
        return await self.until(lambda message: message.get("type") == type_)

    async def hear(self, seconds: float = 1.0) -> list[dict[str, Any]]:
        """What comes until nothing has come for *seconds*, or the end."""
        heard: list[dict[str, Any]] = []
        with trio.fail_after(7200):  # heartbeats may never let it be silent for so long
            while not self.over:
                with trio.move_on_after(seconds) as silence:
                    heard.append(await self.next())
                if silence.cancelled_caught:
                    break
        return [message for message in heard if message["type"] != "closed"]

    async def until_over(self) -> dict[str, Any] | None:
        """Read to the end; the ``disconnect`` that came before it, if there was one."""
        with trio.fail_after(600):
            while not self.over:
                await self.next()
        said = self.of("disconnect")
        return said[-1] if said else None

    @property
    def over(self) -> bool:
        return self.eof or self.closed is not None

    @property
    def lines(self) -> list[Any]:
        """The contents of the numbered messages, in the order in which they came."""
        return [message["content"] for message in self.numbered]

    @property
    def position(self) -> str:
        """Where this client has come to, as its next connection would name it."""
        for message in reversed(self.received):
            if "position" in message and message["type"] in ("welcome", "heartbeat", "gap"):
                return str(message["position"])
            if "seq" in message:
                return f"{self.received[0]['epoch']}-{message['seq']}"
        raise AssertionError("it has heard nothing yet")


class WebSocketClient(Client):
    def __init__(self, wire: MemoryWire) -> None:
        super().__init__(wire)
        self.protocol = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self.status: int | None = None
        self.subprotocol: str | None = None
        self.body = b""
        self._events: list[Any] = []
        self._text = ""
        self.answer_pings = True

    async def open(
        self, target: str, *, headers: list[tuple[bytes, bytes]] | None = None, subprotocols: list[str] | None = None
    ) -> WebSocketClient:
        request = Request(host="localhost", target=target, extra_headers=headers or [], subprotocols=subprotocols or [])
        await self.send_all(self.protocol.send(request))
        while self.status is None:
            event = await self._event()
            if isinstance(event, AcceptConnection):
                self.status = 101
                self.subprotocol = event.subprotocol
            elif isinstance(event, RejectConnection):
                self.status = event.status_code
                while not isinstance(event, RejectData) or not event.body_finished:
                    event = await self._event()
                    self.body += event.data
            elif isinstance(event, CloseConnection):
                self.status = 0
        return self

    async def _event(self) -> Any:
        while not self._events:
            data = await self.receive()
            self.protocol.receive_data(data or None)
            self._events += list(self.protocol.events())
            if not data and not self._events:
                self.eof = True
                return CloseConnection(code=1006, reason="eof")
        return self._events.pop(0)

    async def say(self, message: object) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        await self.send_all(self.protocol.send(TextMessage(data=text)))

    async def command(self, content: object, id_: str | None = None) -> dict[str, Any]:
        """Give a command and wait for its reply."""
        await self.give(content, id_)
        return await self.until(lambda m: m["type"] == "reply" and id_ in (None, m["id"]))

    async def give(self, content: object, id_: str | None = None) -> None:
        """Give a command."""
        await self.say({"type": "command", "content": content} | ({} if id_ is None else {"id": id_}))

    async def next(self) -> dict[str, Any]:
        """The next JSON message; ``{"type": "closed"}`` at the end."""
        while True:
            event = await self._event()
            if isinstance(event, TextMessage):
                self._text += event.data
                if event.message_finished:
                    message: dict[str, Any] = json.loads(self._text)
                    self._text = ""
                    self.received.append(message)
                    return message
            elif isinstance(event, Ping):
                if self.answer_pings:
                    await self.send_all(self.protocol.send(event.response()))
            elif isinstance(event, CloseConnection):
                if self.closed is None:
                    self.closed = (event.code, event.reason or "")
                    if not self.eof and self.protocol.state is ConnectionState.REMOTE_CLOSING:
                        await self.send_all(self.protocol.send(event.response()))
                return {"type": "closed", "code": self.closed[0]}


class SSEClient(Client):
    def __init__(self, wire: MemoryWire) -> None:
        super().__init__(wire)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.last_id: str | None = None
        self.retry_ms: int | None = None

    async def open(self, target: str, *, headers: str = "") -> SSEClient:
        await self.send_all(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
        while b"\r\n\r\n" not in self.buffer:
            data = await self.receive()
            if not data:
                return self
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        return self

    async def next(self) -> dict[str, Any]:
        while b"\n\n" not in self.buffer:
            data = await self.receive()
            if not data:
                self.eof = True
                return {"type": "closed"}
            self.buffer += data
        event, _, self.buffer = self.buffer.partition(b"\n\n")
        message: dict[str, Any] = {}
        for line in event.decode().split("\n"):
            field, _, value = line.partition(": ")
            if field == "data":
                message = json.loads(value)
            elif field == "id":
                self.last_id = value
            elif field == "retry":
                self.retry_ms = int(value)
        self.received.append(message)
        return message


class World:
    """A running server and the way to it."""

    def __init__(self, server: Server, listener: MemoryListener, ended: trio.Event) -> None:
        self.server = server
        self.listener = listener
        self.ended = ended

    def wire(self) -> MemoryWire:
        return self.listener.connect()

    async def websocket(self, player: str, query: str = "", **more: Any) -> WebSocketClient:
        return await WebSocketClient(self.wire()).open(f"/ws/{player}?{query}", **more)

    async def sse(self, player: str, query: str = "", **more: Any) -> SSEClient:
        return await SSEClient(self.wire()).open(f"/sse/{player}?{query}", **more)

    async def request(self, method: str, path: str, body: object = None, headers: str = "") -> tuple[int, Any]:
        """One request on a connection of its own: (status, decoded body)."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        client = Client(self.wire())
        length = f"Content-Length: {len(data)}\r\n" if body is not None else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{length}{headers}\r\n"
        await client.send_all(head.encode() + data)
        answer = b""
        while chunk := await client.receive():
            answer += chunk
        client.close()
        top, _, rest = answer.partition(b"\r\n\r\n")
        status = int(top.split()[1])
        return status, json.loads(rest) if rest else None

    async def publish(self, **publication: Any) -> dict[str, Any]:
        status, answer = await self.request("POST", "/api/messages", publication)
        assert status == 202, answer
        assert isinstance(answer, dict)
        return answer


@asynccontextmanager
async def play(
    path: Path,
    *,
    game: Game | None = None,
    seed: int = 0,
    crash: bool = False,
    hook: Any = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """Run a server in this task's time. *crash*: leave as ``kill -9`` does, without a drain.

    After the scene nothing may be left of connections that are over, and after the server's end
    nothing at all.
    """
    runner = hook if isinstance(hook, InlineRunner) else InlineRunner(hook)
    process = Process(path, game or DefaultGame(), seed=seed, runner=runner, **settings)
    server, listener = process.server, process.listener
    world = World(server, listener, process.ended)
    tasks_before = count_tasks()
    async with trio.open_nursery() as nursery:
        await nursery.start(process.run)
        yield world
        if crash:
            await process.kill()
        elif not server._stop.is_set():
            await nothing_over_is_left(server, listener)
            server.stop()
    assert listener.open_wires == []
    assert server.hub.connections == {}
    assert server.hub.stuck == []
    assert count_tasks() == tasks_before


def count_tasks() -> int:
    """All tasks of this Trio run but the system's own."""
    main = trio.lowlevel.current_root_task()
    assert main is not None  # a run is going on
    tasks, count = [main], 0
    while tasks:
        count += 1
        tasks += [child for nursery in tasks.pop().child_nurseries for child in nursery.child_tasks]
    return count


async def nothing_over_is_left(server: Server, listener: MemoryListener) -> None:
    """Of what is over, a second for last words later, nothing is left: sockets, tasks, subscriptions."""
    left: list[str] = []
    for _ in range(60):
        left = leftovers(server, listener)
        if not left:
            break
        await trio.sleep(0.05)
    left += [f"a leak: {leak}" for leak in await server.ledger.look()]
    assert not left, f"left behind: {left}"


def leftovers(server: Server, listener: MemoryListener) -> list[str]:
    """What is over and not gone yet: a look at the ledger that allows for no time, and what it cannot know."""
    ledger = server.ledger
    left = [str(leak) for leak in ledger.examine() if leak is not None]
    known = {link.peer_port for link in ledger.links}
    left += [f"an unknown socket: {wire}" for wire in listener.open_wires if wire.peer_port not in known]
    left += [f"{count} {stage}" for stage, count in ledger.stages().items() if count and stage in (REQUEST, LAST_WORDS)]
    return left
