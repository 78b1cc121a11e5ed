"""A client's connections: an open WebSocket or event stream that hands out JSON objects, and plain HTTP.

HTTP is h11 over a Trio stream: httpx reads streams through nested asynchronous generators, which Trio
cannot close in order when a reader is cancelled.
"""

from __future__ import annotations

import os
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import urlsplit

import h11
import msgspec
import trio
from attrs import frozen
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, wrap_client_stream

from mythos_trio.core.client import Outcome, of_code, of_status

JSON: TypeAlias = dict[str, Any]
Dial: TypeAlias = Callable[["Base"], Awaitable[trio.abc.Stream]]

SEND_SECONDS: Final = 10.0
# The largest that a server can be told to take (MAX_MESSAGE_SIZE), with room for its own fields.
MAX_MESSAGE: Final = 17 << 20


class BadUrl(ValueError):
    """Not the address of a server."""


class Lost(Exception):
    """A connection is over."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.why)
        self.outcome = outcome


class EventStream:
    """Bytes of an event stream to the data of its events (HTML standard, section 9.2.6)."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._begun = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that *chunk* completes.

        :raises Lost: an event is beyond `MAX_MESSAGE`.
        """
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        lines = re.split(rb"\r\n|\n|\r", self._rest + chunk)
        self._rest = lines.pop()
        if self._size + len(self._rest) > MAX_MESSAGE:
            raise Lost(Outcome("the server sent a message that is too big"))
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: bytes) -> bytes | None:
        if not self._begun:
            self._begun = True
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            data, self._data, self._size = self._data, [], 0
            return b"\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._size += len(value)
            if self._size > MAX_MESSAGE:
                raise Lost(Outcome("the server sent a message that is too big"))
        return None


@frozen
class Base:
    """Where a server is."""

    host: str
    port: int
    tls: bool
    prefix: str
    """What stands before the paths, without a slash at its end."""

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def parse_url(url: str) -> Base:
    """``http(s)://`` or ``ws(s)://``, a host, maybe a port, maybe a path."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    tls = parts.scheme in ("https", "wss")
    try:
        port = parts.port or (443 if tls else 80)
    except ValueError:
        raise BadUrl(f"{url!r}: the port is a number up to 65535") from None
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname or parts.query or parts.fragment:
        raise BadUrl(f"{url!r} is not a server's address: http://HOST:PORT")
    return Base(parts.hostname, port, tls, parts.path.rstrip("/"))


async def dial(base: Base) -> trio.abc.Stream:
    """A stream to the server, encrypted where it has to be."""
    if not base.tls:
        return await trio.open_tcp_stream(base.host, base.port)
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    stream = await trio.open_ssl_over_tcp_stream(base.host, base.port, ssl_context=context, https_compatible=True)
    await stream.do_handshake()
    return stream


class Exchange:
    """One request and its answer."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._state = h11.Connection(h11.CLIENT)
        self._heard = False

    async def ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> h11.Response:
        request = h11.Request(method=method, target=target, headers=list(headers.items()))
        data = self._state.send(request) or b""
        if body:
            data += self._state.send(h11.Data(data=body)) or b""
        await self._stream.send_all(data + (self._state.send(h11.EndOfMessage()) or b""))
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise Lost(Outcome("the server broke off its answer"))

    async def receive(self) -> bytes:
        """The next bytes of the body; empty at its end."""
        event = await self._next()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def body(self) -> bytes:
        found = bytearray()
        while data := await self.receive():
            found += data
            if len(found) > MAX_MESSAGE:
                raise Lost(Outcome("the server's answer is too big"))
        return bytes(found)

    async def _next(self) -> object:
        while True:
            event = self._state.next_event()
            if event is h11.NEED_DATA:
                data = bytes(await self._stream.receive_some())
                if not data and not self._heard:
                    raise Lost(Outcome("the server closed the connection without an answer"))
                self._heard = True
                self._state.receive_data(data)
            else:
                return event


def headers_of(response: h11.Response) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}


class Carrier(Protocol):
    """An open connection of either transport."""

    async def receive(self) -> JSON:
        """The next JSON object; `Lost` when the connection is over."""
        ...


class WebSocketCarrier:
    def __init__(self, websocket: WebSocketConnection) -> None:
        self._websocket = websocket

    async def receive(self) -> JSON:
        try:
            return _decode(await self._websocket.get_message())
        except ConnectionClosed as closed:
            raise Lost(_of_close(closed)) from None

    async def send(self, message: Mapping[str, Any]) -> None:
        """:raises Lost: it is over, or the message cannot be got rid of."""
        try:
            with trio.fail_after(SEND_SECONDS):
                await self._websocket.send_message(msgspec.json.encode(message).decode())
        except ConnectionClosed as closed:
            raise Lost(_of_close(closed)) from None
        except trio.TooSlowError:
            raise Lost(Outcome("the server does not read")) from None

    async def close(self) -> None:
        await self._websocket.aclose()


def _of_close(closed: ConnectionClosed) -> Outcome:
    reason = closed.reason
    if reason is None or reason.code == 1006:
        return Outcome("the connection broke")
    return of_code(reason.code, reason.reason or "closed by the server")


class SSECarrier:
    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._parser = EventStream()
        self._ready: deque[bytes] = deque()

    async def receive(self) -> JSON:
        while not self._ready:
            chunk = await self._exchange.receive()
            if not chunk:
                raise Lost(Outcome("the stream ended"))
            self._ready.extend(self._parser.feed(chunk))
        return _decode(self._ready.popleft())


def _decode(data: str | bytes) -> JSON:
    try:
        message = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise Lost(Outcome(f"the server sent what is no JSON: {error}")) from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise Lost(Outcome("the server sent what is no message"))
    return message


def outcome_of(error: BaseException) -> Outcome:
    """What an exception of a connection or of an attempt means."""
    if isinstance(error, trio.BrokenResourceError) and isinstance(error.__cause__, ssl.SSLError):
        error = error.__cause__
    match error:
        case Lost():
            return error.outcome
        case ConnectionRejected():
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in error.headers or ()}
            return of_status(error.status_code, headers, error.body or b"")
        case HandshakeError():
            return Outcome("the server broke off the handshake")
        case h11.RemoteProtocolError():
            return Outcome(f"the server does not speak HTTP: {error}")
        case trio.TooSlowError():
            return Outcome("no answer in time")
        case trio.BrokenResourceError() | trio.ClosedResourceError():
            return Outcome("the connection broke")
        case ssl.SSLError():
            return Outcome(f"TLS: {error.strerror or error}")
        case OSError():
            return Outcome(_of_os_error(error))
    raise error


def _of_os_error(error: OSError) -> str:
    # Trio says of several addresses: "all attempts to connect to … failed", with the reasons below it.
    cause: BaseException | None = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    found = cause if isinstance(cause, OSError) else error
    # Trio puts the address into the text, which is known, and makes a long line of it.
    number = found.errno or 0
    text = os.strerror(number) if number > 0 else found.strerror or str(found)
    return text.lower() or type(found).__name__


TROUBLE: Final = (Lost, HandshakeError, h11.RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError)


@asynccontextmanager
async def open_exchange(dial: Dial, base: Base) -> AsyncIterator[Exchange]:
    stream = await dial(base)
    try:
        yield Exchange(stream)
    finally:
        await trio.aclose_forcefully(stream)


@asynccontextmanager
async def open_event_stream(dial: Dial, base: Base, target: str, headers: Mapping[str, str]) -> AsyncIterator[Carrier]:
    """:raises Lost: and what `outcome_of` knows."""
    accept = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    async with open_exchange(dial, base) as exchange:
        response = await exchange.ask("GET", target, {**headers, **accept})
        if response.status_code != 200:
            raise Lost(of_status(response.status_code, headers_of(response), await exchange.body()))
        yield SSECarrier(exchange)


class _Watched(trio.abc.Stream):
    """A stream that ends the waiting for a handshake when it breaks. (trio-websocket goes on waiting: a client whose
    server was killed in that moment came back 10 s later.)"""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.handshake = trio.CancelScope()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data: bytes | bytearray = b""
        try:
            data = await self._stream.receive_some(max_bytes)
        finally:
            if not data:
                self.handshake.cancel()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def open_websocket(dial: Dial, base: Base, target: str, headers: Mapping[str, str]) -> AsyncIterator[Carrier]:
    """:raises Lost: and what `outcome_of` knows, also in a group."""
    stream = await dial(base)
    watched = _Watched(stream)
    try:
        async with trio.open_nursery() as nursery:
            with watched.handshake:
                websocket = await wrap_client_stream(
                    nursery,
                    watched,  # type: ignore[arg-type]  # any stream will do
                    headers["Host"],
                    target,
                    subprotocols=["mythos-protocol"],
                    extra_headers=[(n.encode(), v.encode()) for n, v in headers.items() if n != "Host"],
                    max_message_size=MAX_MESSAGE,
                )
            if watched.handshake.cancelled_caught:
                raise Lost(Outcome("the server broke off the handshake"))
            yield WebSocketCarrier(websocket)
            nursery.cancel_scope.cancel()
    finally:
        await trio.aclose_forcefully(stream)
