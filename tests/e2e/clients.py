"""Clients that we did not write, each wrapped so that a test can wait for what it has received.

All of them share `Stream`: the server's messages as decoded JSON, in order.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeAlias

import httpx
import httpx_sse
from attrs import define, field
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

NODE_SCRIPTS = Path(__file__).resolve().parent / "node"
WAIT_SECONDS = 10.0

Message: TypeAlias = dict[str, Any]


def tool(name: str) -> str:
    """The path of a program that these tests cannot do without."""
    path = shutil.which(name)
    assert path is not None, f"{name} is not installed: these tests need it"
    return path


def node_modules() -> Path:
    """Where npm has installed wscat, ws and eventsource: the directory, or the one above it."""
    given = os.environ.get("MYTHOS_NODE_MODULES")
    assert given, "MYTHOS_NODE_MODULES is not set: npm install --prefix DIR wscat ws eventsource, then DIR/node_modules"
    directory = Path(given).resolve()
    nested = directory / "node_modules"
    found = nested if nested.is_dir() else directory
    assert (found / "eventsource").is_dir(), f"there is no eventsource in {found}"
    return found


class Stream:
    """What a client has received."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.ids: list[str | None] = []
        """The SSE event id that came with each message; None on other transports."""
        self._changed = threading.Condition()
        self._ended = False

    @property
    def ended(self) -> bool:
        """The server's side is over, and nothing more will come."""
        return self._ended

    @property
    def numbered(self) -> list[Message]:
        return [message for message in list(self.messages) if "seq" in message]

    @property
    def seqs(self) -> list[int]:
        return [message["seq"] for message in self.numbered]

    @property
    def lines(self) -> list[Any]:
        """The contents of the messages of type ``line``, which is what tests publish."""
        return [message["content"] for message in self.numbered if message["type"] == "line"]

    @property
    def welcome(self) -> Message:
        """The newest welcome, waited for."""
        self.wait_type("welcome")
        return [message for message in self.messages if message["type"] == "welcome"][-1]

    @property
    def position(self) -> str:
        """The position after the newest message that has one."""
        epoch, at = 0, ""
        for message in list(self.messages):
            epoch = message.get("epoch", epoch)
            at = f"{epoch}-{message['seq']}" if "seq" in message else message.get("position", at)
        return at

    def wait(self, found: Callable[[Message], object], what: str, seconds: float = WAIT_SECONDS) -> Message:
        """The first message that is *found*, however long ago it came."""
        self.wait_until(lambda: any(map(found, self.messages)), what, seconds)
        return next(filter(found, self.messages))

    def wait_type(self, type_: str, seconds: float = WAIT_SECONDS) -> Message:
        return self.wait(lambda message: message["type"] == type_, f"a message of type {type_}", seconds)

    def wait_line(self, content: object, seconds: float = WAIT_SECONDS) -> Message:
        return self.wait(
            lambda message: "seq" in message and message["content"] == content, f"a line {content!r}", seconds
        )

    def wait_seq(self, seq: int, seconds: float = WAIT_SECONDS) -> None:
        self.wait_until(lambda: seq in self.seqs, f"message number {seq}", seconds)

    def wait_reply(self, id: str, seconds: float = WAIT_SECONDS) -> Message:
        return self.wait(
            lambda message: message["type"] == "reply" and message["id"] == id, f"the reply to {id}", seconds
        )

    def wait_ended(self, seconds: float = WAIT_SECONDS) -> None:
        self.wait_until(lambda: self._ended, "the end of the stream", seconds)

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                assert left > 0, f"{self!r}: not within {seconds:g} s: {what}; received: {self.messages}"
                # What a condition looks at may change without a message, so it is also asked in between.
                self._changed.wait(min(left, 0.1))

    def _add(self, message: Message, id: str | None = None) -> None:
        with self._changed:
            self.messages.append(message)
            self.ids.append(id)
            self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Program(Stream):
    """A client that is a program: its output is read line by line by threads."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **(env or {})},
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.take, self._end), daemon=True),
            threading.Thread(
                target=self._read, args=(self.process.stderr, self.errors.append, lambda: None), daemon=True
            ),
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(pipe: IO[str], take: Callable[[str], None], end: Callable[[], None]) -> None:
        try:
            for line in pipe:
                take(line.rstrip("\r\n"))
        finally:
            end()

    def take(self, line: str) -> None:
        """A line of the program's output."""
        raise NotImplementedError

    def type(self, line: str) -> None:
        """Type *line* into the program."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait_exit(self, seconds: float = WAIT_SECONDS) -> int:
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_SECONDS)
        for reader in self._readers:
            reader.join(WAIT_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what was typed and never read
                pipe.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__} ({self.errors[-5:]})"


class CurlSSE(Program):
    """``curl -N`` on an event stream."""

    def __init__(self, url: str, *, last_event_id: str | None = None, headers: Iterable[str] = ()) -> None:
        self.head: list[str] = []
        self.retry_ms: int | None = None
        self._in_head = True
        self._id: str | None = None
        self._data: list[str] = []
        more = [] if last_event_id is None else [f"Last-Event-ID: {last_event_id}"]
        options = [part for header in (*headers, *more) for part in ("-H", header)]
        super().__init__([tool("curl"), "-sS", "-N", "-i", "--noproxy", "*", *options, url])

    @property
    def status(self) -> int:
        """The answer's status, waited for."""
        self.wait_until(lambda: self.head, "an answer")
        return int(self.head[0].split()[1])

    def header(self, name: str) -> str | None:
        for line in self.head[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name.lower():
                return value.strip()
        return None

    def take(self, line: str) -> None:
        if self._in_head:
            self._in_head = bool(line)
            if line:
                self.head.append(line)
        elif not line:
            self._dispatch()
        else:
            self._field(line)

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            self._id = value
        elif name == "data":
            self._data.append(value)
        elif name == "retry":
            self.retry_ms = int(value)

    def _dispatch(self) -> None:
        if self._data:
            self._add(json.loads("\n".join(self._data)), self._id)
        self._data, self._id = [], None


class Wscat(Program):
    """npm's ``wscat -c``."""

    def __init__(self, url: str, *options: str) -> None:
        script = node_modules() / "wscat/bin/wscat"
        super().__init__([tool("node"), str(script), "--no-color", *options, "-c", url])

    def take(self, line: str) -> None:
        self._add(json.loads(re.sub("^(> )+", "", line)))  # its prompt, once something has been typed


@define
class Event:
    """Something that a client written in JavaScript was told, beside messages."""

    name: str
    fields: dict[str, Any] = field(factory=dict)


class NodeClient(Program):
    """A script of ``tests/e2e/node``, which prints one JSON object for each event of its client."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.events: list[Event] = []
        command = [tool("node"), str(NODE_SCRIPTS / script), *arguments]
        super().__init__(command, {"MYTHOS_NODE_MODULES": str(node_modules())})

    def take(self, line: str) -> None:
        value = json.loads(line)
        name = value.pop("event")
        self.events.append(Event(name, value))
        if name == "message":
            self._add(json.loads(value["data"]), value.get("id"))

    def all(self, name: str) -> list[Event]:
        return [event for event in list(self.events) if event.name == name]

    def wait_event(self, name: str, *, count: int = 1, seconds: float = WAIT_SECONDS) -> Event:
        """The event *name* number *count*, counted from 1."""
        self.wait_until(
            lambda: len(self.all(name)) >= count, f"{name} number {count}; there were {self.events}", seconds
        )
        return self.all(name)[count - 1]


class EventSource(NodeClient):
    """npm's ``eventsource``: an EventSource as browsers have it, which comes back by itself.

    Its events: ``open``, ``message``, and ``error`` with ``code``, ``message`` and ``state`` (0: it will try
    again, 2: it has given up).
    """

    def __init__(self, url: str) -> None:
        super().__init__("eventsource.mjs", url)

    def wait_gave_up(self) -> Event:
        """The error after which it does not come back."""
        self.wait_until(lambda: any(e.fields["state"] == 2 for e in self.all("error")), "it gives up")
        return next(error for error in self.all("error") if error.fields["state"] == 2)


class NodeWebSocket(NodeClient):
    """npm's ``ws``. Its events: ``open`` (``protocol``), ``message``, ``close`` (``code``, ``reason``),
    ``error`` (``message``), ``refused`` (``status``, ``body``). Typed lines are sent as text frames."""

    def __init__(self, url: str, *protocols: str) -> None:
        super().__init__("websocket.mjs", url, *protocols)


class WebSocket(Stream):
    """Python's ``websockets``, read by a thread of its own."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__()
        self.close_code: int | None = None
        self.close_reason: str | None = None
        options = {"max_size": None, "open_timeout": WAIT_SECONDS, "close_timeout": 2} | options
        self._stack = contextlib.ExitStack()
        self.client: ClientConnection = self._stack.enter_context(connect(url, proxy=None, **options))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while True:
                self._add(json.loads(self.client.recv()))
        except ConnectionClosed as closed:
            frame = closed.rcvd
            self.close_code = None if frame is None else frame.code
            self.close_reason = None if frame is None else frame.reason
        finally:
            self._end()

    def send(self, frame: object) -> None:
        """*frame* as JSON; text as it is."""
        self.client.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    def command(self, content: object, id: str) -> None:
        self.send({"type": "command", "id": id, "content": content})

    def ask(self, content: object, id: str, seconds: float = WAIT_SECONDS) -> Message:
        """Send a command and wait for its reply, which may be the second one to this id."""
        before = len(self._replies(id))
        self.command(content, id)
        self.wait_until(lambda: len(self._replies(id)) > before, f"the reply to {id}", seconds)
        return self._replies(id)[before]

    def _replies(self, id: str) -> list[Message]:
        return [message for message in list(self.messages) if message["type"] == "reply" and message["id"] == id]

    def close(self) -> None:
        self._stack.close()
        self._reader.join(WAIT_SECONDS)

    def __repr__(self) -> str:
        return f"WebSocket (closed: {self.close_code} {self.close_reason})"


def refused_status(url: str, **options: Any) -> int:
    """The HTTP status with which a WebSocket at *url* is refused."""
    try:
        with connect(url, proxy=None, open_timeout=WAIT_SECONDS, **options):
            raise AssertionError(f"{url} was not refused")
    except InvalidStatus as refusal:
        return refusal.response.status_code


class HttpxSSE(Stream):
    """Python's ``httpx-sse``, read by a thread of its own."""

    def __init__(self, url: str, *, last_event_id: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__()
        self._client = httpx.Client(trust_env=False, timeout=httpx.Timeout(WAIT_SECONDS, read=60.0))
        named = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
        self._url, self._headers = url, {**(headers or {}), **named}
        self._socket: socket.socket | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            with httpx_sse.connect_sse(self._client, "GET", self._url, headers=self._headers) as source:
                self._socket = source.response.extensions["network_stream"].get_extra_info("socket")
                for event in source.iter_sse():
                    self._add(json.loads(event.data), event.id)
        except httpx.TransportError:
            pass  # the server was killed, or the test has closed it
        finally:
            self._end()

    def close(self) -> None:
        # Closing from another thread does not wake a read; shutting the socket down does.
        if self._socket is not None and self._socket.fileno() >= 0:
            with contextlib.suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(WAIT_SECONDS)
        assert not self._reader.is_alive()
        self._client.close()


# Raw sockets: for what no client library lets one send.


@define
class Answer:
    """An HTTP answer as it came. *rest*: what followed the body."""

    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Raw:
    """A plain TCP connection."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.sock = socket.create_connection((host, port), timeout=WAIT_SECONDS)
        self._buffer = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def try_send(self, data: bytes) -> None:
        """Send to a server that may already have answered and closed."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            data = self.sock.recv(65536)
            assert data, f"it ended before {mark!r}: {self._buffer!r}"
            self._buffer += data
        found, _, self._buffer = self._buffer.partition(mark)
        return found + mark

    def read_exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = self.sock.recv(65536)
            assert data, f"it ended before {count} bytes: {self._buffer!r}"
            self._buffer += data
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

    def read_to_end(self) -> bytes:
        while data := self._receive():
            self._buffer += data
        found, self._buffer = self._buffer, b""
        return found

    def _receive(self) -> bytes:
        try:
            return self.sock.recv(65536)
        except ConnectionResetError:
            return b""

    def answer(self) -> Answer:
        """Read one HTTP answer. An informational one (1xx) counts as one."""
        lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        bodiless = status in (204, 304) or status < 200
        body = b"" if bodiless else self.read_exactly(int(headers.get("content-length", "0")))
        return Answer(status, headers, body)

    def frame(self) -> tuple[int, bytes]:
        """Read one WebSocket frame of a server: its opcode and payload (RFC 6455, section 5.2)."""
        first, length = self.read_exactly(2)
        if length == 126:
            length = int.from_bytes(self.read_exactly(2), "big")
        elif length == 127:
            length = int.from_bytes(self.read_exactly(8), "big")
        return first & 0x0F, self.read_exactly(length)

    def close_code(self) -> int:
        """Read frames up to the close frame; its code."""
        while True:
            opcode, payload = self.frame()
            if opcode == 8:
                return int.from_bytes(payload[:2], "big")

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def open_websocket(raw: Raw, path: str) -> None:
    """The opening handshake, by hand."""
    raw.send(UPGRADE.format(path=path).encode())
    head = raw.read_until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head


def client_frame(opcode: int, payload: bytes, *, final: bool = True, length: int | None = None) -> bytes:
    """A masked frame (the mask is zero, so the payload can be read). *length*: what its header claims."""
    size = len(payload) if length is None else length
    head = bytes([(0x80 if final else 0) | opcode])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += b"\xfe" + size.to_bytes(2, "big")
    else:
        head += b"\xff" + size.to_bytes(8, "big")
    return head + bytes(4) + payload


def without_escapes(text: str) -> str:
    """*text* of a terminal without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", text)
