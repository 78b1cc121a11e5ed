"""The WebSocket transport: the handshake and reading by trio-websocket, writing by the link.

trio-websocket sees the link as its stream and the request's head as its first bytes. It answers the
handshake, pings and close frames; what the server sends of its own goes to the link as whole frames
(`Connection.pump`), only between trio-websocket's, which the link sees to. Sizes, pongs and binary frames
are looked at by the link's `FrameScanner`, in bytes, before trio-websocket has gathered a message.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from mythos_trio import http1
from mythos_trio.core import wire
from mythos_trio.core.errors import BINARY, Close, ErrorType, Refusal
from mythos_trio.core.frames import FrameScanner
from mythos_trio.core.requests import parse_frame
from mythos_trio.streams import Streams

if TYPE_CHECKING:
    from mythos_trio.access import Access
    from mythos_trio.connection import Connection
    from mythos_trio.http1 import Head
    from mythos_trio.link import Link
    from mythos_trio.seams import Clock

# In order of preference. "bearer" stands before a token (`mythos_trio.access`), which is never sent back; the
# word is, if it is the only other one: a browser that has offered subprotocols fails the connection when none
# is chosen (Fetch standard, "establish a WebSocket connection").
SUBPROTOCOLS: Final = ("mythos-protocol", "bearer")
HANDSHAKE_SECONDS: Final = 10.0
RECEIVE_BYTES: Final = 4096


class WebSocketTransport:
    name = "websocket"
    title = "WebSocket"
    framing = wire.WEBSOCKET

    def __init__(
        self, streams: Streams, access: Access, clock: Clock, *, max_message_size: int, server_id: str
    ) -> None:
        self._streams = streams
        self._access = access
        self._clock = clock
        self._max_message_size = max_message_size
        self._server_id = server_id

    @asynccontextmanager
    async def open(self, link: Link, head: Head) -> AsyncIterator[WebSocketChannel]:
        """Accept the handshake. Inside, trio-websocket's reader runs."""
        # Before the first byte is handed over: what a client sends right behind its handshake is
        # looked at too.
        link.scanner = FrameScanner(self._max_message_size, skip=len(head.raw))
        link.push_back(head.raw)
        stream = _Stream(link, len(head.raw))
        async with trio.open_nursery() as nursery:
            with trio.fail_after(HANDSHAKE_SECONDS):
                # trio-websocket counts characters, and only when they have come: the link's scanner
                # counts bytes, from the frame's header on.
                request = await wrap_server_stream(
                    nursery, stream, max_message_size=self._max_message_size, receive_buffer_size=RECEIVE_BYTES
                )
                chosen = next((name for name in SUBPROTOCOLS if name in request.proposed_subprotocols), None)
                connection = await request.accept(
                    subprotocol=chosen, extra_headers=[(b"Server-Id", self._server_id.encode())]
                )
                stream.accepted.set()
            yield WebSocketChannel(connection, self._streams)
            nursery.cancel_scope.cancel()

    async def refuse(self, link: Link, head: Head, refusal: Refusal) -> None:
        """A stranger gets an HTTP status; a client of ours is accepted, told ``disconnect`` and closed,
        since a browser shows its page nothing but the close code."""
        close = refusal.close
        if close is None:
            headers = self._access.cors_headers(head)
            await http1.refuse(link, refusal, now=self._clock.now(), server_id=self._server_id, headers=headers)
            return
        try:
            with trio.move_on_after(HANDSHAKE_SECONDS):
                async with self.open(link, head):
                    words = self.framing.last_words(wire.disconnect(close, refusal.retry_ms), close)
                    link.last_words(words, close)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass
        await link.linger()

    def welcome(self, payload: bytes, position: str) -> bytes:
        return self.framing.control(payload)


class _Stream(trio.abc.Stream):
    """The link as trio-websocket sees it. When trio-websocket closes it, the link stays open: what the last
    words are, and how long the peer has to take them, is for the connection to say. (Text that is not
    UTF-8 makes trio-websocket 0.12 close without a close frame, and the client would see 1006.)

    What comes behind the handshake, *head_bytes*, is handed over only when that has been answered: wsproto 1.3
    loses what it is given earlier.
    """

    def __init__(self, link: Link, head_bytes: int) -> None:
        self._link = link
        self._head_bytes = head_bytes
        self.accepted = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._link.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._link.wait_sent()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._head_bytes <= 0:
            await self.accepted.wait()
        data = await self._link.receive_some(max_bytes)
        self._head_bytes -= len(data)
        return data

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class WebSocketChannel:
    """An accepted WebSocket."""

    def __init__(self, websocket: WebSocketConnection, streams: Streams) -> None:
        self._websocket = websocket
        self._streams = streams

    @property
    def left_with(self) -> Close | None:
        """The close frame that the client sent; None if there was none (RFC 6455, section 7.1.5: 1006)."""
        reason = self._websocket.closed
        if reason is None or reason.code == 1006:
            return None
        return Close(reason.code, reason.reason or reason.name, ErrorType.CONNECTION)

    async def read(self, connection: Connection) -> None:
        """Text frames are requests. Ends when the client leaves."""
        link = connection.link
        link.on_pong = connection.ponged
        link.on_violation = connection.end
        if link.violation is not None:
            connection.end(link.violation)
        with suppress(ConnectionClosed):
            while connection.over is None:
                await connection.wait_reply_room()
                message = await self._websocket.get_message()
                if isinstance(message, bytes):
                    connection.end(BINARY)
                    return
                await self._streams.hear(connection, parse_frame(message))
        failure = self.left_with
        if failure is not None and not connection.link.sealed:
            # trio-websocket has found a violation of the protocol and has not said so.
            connection.end(failure)
