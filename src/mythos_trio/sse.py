"""The SSE transport: one endless answer, written by the link (HTML standard, "server-sent events").

What the client says comes by POST (`mythos_trio.posts`). Reading only finds out that it has left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mythos_trio import http1
from mythos_trio.core import wire
from mythos_trio.core.errors import BUSY, RATE, TOO_BIG, Close, ErrorType, Refusal

if TYPE_CHECKING:
    from mythos_trio.access import Access, Headers
    from mythos_trio.connection import Connection
    from mythos_trio.http1 import Head
    from mythos_trio.link import Link
    from mythos_trio.poller import Poller
    from mythos_trio.seams import Clock

# How long a browser waits before it comes back by itself, unless it was told otherwise.
RETRY_MS: Final = 1000

# What a client may say on its event stream, where nothing has a meaning.
MAX_CHATTER: Final = 64 * 1024
CHATTER_PIECE: Final = 4 * 1024

_LEFT: Final = Close(1000, "the client left", ErrorType.CONNECTION)

# Limits: a stranger's WebSocket gets the status; an EventSource must be told to come back.
_COME_BACK: Final = {429: RATE, 503: BUSY}

_GONE: Final = Close(1000, "there is nothing to come back to", ErrorType.SESSION)


class SSETransport:
    name = "sse"
    title = "SSE"
    framing = wire.SSE

    def __init__(self, poller: Poller, access: Access, clock: Clock, *, server_id: str) -> None:
        self._poller = poller
        self._access = access
        self._clock = clock
        self._server_id = server_id
        self._usual_opening = self._open_with(())

    def channel(self, link: Link) -> SSEChannel:
        return SSEChannel(link, self._poller)

    def opening(self, head: Head) -> bytes:
        """The answer's head. No length and no chunks: the stream ends with the connection (RFC 9112,
        section 6.3). Proxies are asked not to gather and not to compress."""
        cors = self._access.cors_headers(head)
        return self._open_with(cors) if cors else self._usual_opening

    def _open_with(self, more: Headers) -> bytes:
        headers = [
            ("Content-Type", "text/event-stream; charset=utf-8"),
            ("Cache-Control", "no-cache, no-transform"),
            ("X-Accel-Buffering", "no"),
            ("Connection", "close"),
            ("Server-Id", self._server_id),
            *more,
        ]
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return b"HTTP/1.1 200 OK\r\n" + lines.encode("latin-1") + b"\r\n"

    async def refuse(self, link: Link, head: Head, refusal: Refusal) -> None:
        """An EventSource comes back by itself after 200, and stops for good on every other status."""
        close = refusal.close or _COME_BACK.get(refusal.status)
        if close is None or close.code == 4500:
            headers = self._access.cors_headers(head)
            await http1.refuse(link, refusal, now=self._clock.now(), server_id=self._server_id, headers=headers)
            return
        if close.reconnect:
            retry_ms = RETRY_MS if refusal.retry_ms is None else refusal.retry_ms
            words = wire.sse_event(wire.disconnect(close, retry_ms), None, retry_ms=retry_ms)
            link.last_words(self.opening(head) + words, close)
            await link.linger()
        else:
            await self.gone(link, head)

    async def gone(self, link: Link, head: Head) -> None:
        """204: an EventSource stops for good."""
        link.last_words(self._no_content(head), _GONE)
        await link.linger()

    def _no_content(self, head: Head) -> bytes:
        headers = self._access.cors_headers(head)
        return http1.response(204, b"", headers=headers, keep_alive=False, server_id=self._server_id)

    def welcome(self, payload: bytes, position: str, retry_ms: int) -> bytes:
        return wire.sse_event(payload, position, retry_ms=retry_ms)


class SSEChannel:
    """An accepted event stream."""

    __slots__ = ("_connection", "_link", "_most", "_poller", "left_with")

    def __init__(self, link: Link, poller: Poller) -> None:
        self._link = link
        self._poller = poller
        self._most = link.received_bytes + MAX_CHATTER
        self._connection: Connection | None = None
        self.left_with: Close | None = None

    def begin(self, connection: Connection) -> None:
        self._connection = connection
        self._link.take_all()
        self._link.watch(self._poller, self._ready)

    async def read(self, connection: Connection) -> None:
        """Until the client leaves. What it sends has no meaning here and is dropped, up to a bound."""
        link = self._link
        try:
            while connection.over is None and link.ended is None and self.left_with is None:
                await connection.bell.wait()
        finally:
            self._connection = None
            link.unwatch()

    def _ready(self) -> None:
        """There is something to receive, or the end. In the poller's turn: nothing waits, and nothing escapes."""
        link, connection = self._link, self._connection
        if connection is None or connection.over is not None:
            link.unwatch()  # the task has been cancelled
            return
        data = link.receive_now(CHATTER_PIECE, self._poller.now)
        if data and link.received_bytes > self._most:
            connection.end(TOO_BIG)
        elif data == b"":
            link.unwatch()
            if link.ended is None:
                self.left_with = _LEFT
            connection.leave()
