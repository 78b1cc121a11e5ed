"""The bridge to the Quart-Trio app, over Hypercorn's HTTP/1.1.

The one module that touches Hypercorn's internal classes (`TCPServer`, `WorkerContext`, `Lifespan`) and
quart-trio's connection class. What it relies on, held by ``tests/test_bridge.py``:

* `TCPServer` takes any stream that has a ``.socket`` and no ``do_handshake``, and its `state` reaches the
  app as ``scope["state"]``;
* it shields its sends, so the deadline for a client that does not read has to be in the stream;
* ``keep_alive_max_requests = 1`` makes every answer the connection's last, so each request passes the
  front door;
* quart-trio cancels the request's nursery when Hypercorn reports the end of the answer, which it does
  while the last piece of the body is being sent. Unshielded, that cancels Hypercorn's own tidying up,
  and the connection stays open (hypercorn issues 106 and 210).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from hypercorn.utils import wrap_app
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection

from mythos_trio.core.errors import ErrorType
from mythos_trio.http1 import JSON, error_body
from mythos_trio.link import Link, SocketInfo
from mythos_trio.seams import SystemClock

if TYPE_CHECKING:
    from mythos_trio.access import Visitor
    from mythos_trio.config import Settings

MAX_BODY: Final = 1024 * 1024
BODY_SECONDS: Final = 10.0
# From the request to the end of its answer. Nothing in the app takes longer by design: the longest is
# a session switch, with 5 s for the end of the old session and 5 s for the commit.
REQUEST_SECONDS: Final = 30.0
# On top of that, for the answer that says so and for tidying up.
GRACE_SECONDS: Final = 5.0
LIFESPAN_SECONDS: Final = 5.0

_SERVER_ID: Final = b"server-id"
_clock = SystemClock()

Send = Callable[[Any], Awaitable[None]]


class _Config(Config):
    """Hypercorn's settings. Our header is on all of its answers, those that it makes itself too."""

    def __init__(self, server_id: str) -> None:
        self._server_id = server_id.encode("latin-1")
        self.include_server_header = False
        self.keep_alive_max_requests = 1
        self.accesslog = None
        self.errorlog = logging.getLogger("hypercorn.error")
        self.startup_timeout = self.shutdown_timeout = LIFESPAN_SECONDS

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        return [*super().response_headers(protocol), (_SERVER_ID, self._server_id)]


class _Connection(TrioASGIHTTPConnection):
    """quart-trio's handling of one request, with a deadline, and with the end of the answer shielded."""

    async def handle_request(  # type: ignore[override]  # quart-trio's has the nursery too
        self, nursery: trio.Nursery, request: Any, send: Any
    ) -> None:
        sender = _Sender(send)
        with trio.move_on_after(REQUEST_SECONDS) as scope:
            await super().handle_request(nursery, request, cast(Any, sender))
        if scope.cancelled_caught:
            await sender.give_up()
            nursery.cancel_scope.cancel()


class _Sender:
    """ASGI's ``send`` for one request."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False

    async def __call__(self, message: dict[str, Any]) -> None:
        # Hypercorn's own does not always have a checkpoint once the client has gone: a response that
        # only sends would stop the event loop for good.
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            self._started = True
            # It is in the configuration; twice it would be a list.
            headers = [(name, value) for name, value in message["headers"] if name.lower() != _SERVER_ID]
            message = {**message, "headers": headers}
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        with trio.CancelScope(shield=last) as scope:
            if last:
                scope.deadline = trio.current_time() + REQUEST_SECONDS
            await self._send(message)

    async def give_up(self) -> None:
        """Say that it took too long, if anything can be said still."""
        if self._started:
            return
        body = error_body(ErrorType.SYSTEM, "the request took too long", {}, _clock.now())
        headers = [
            (b"content-type", JSON.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await self({"type": "http.response.start", "status": 503, "headers": headers})
        await self({"type": "http.response.body", "body": body, "more_body": False})


class _Stream:
    """The link as Hypercorn's stream. Closing it leaves the link open: the bridge lets the client read
    the answer first, which a client that is still sending could not if the socket were closed."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.closed = False
        self._receiving: trio.CancelScope | None = None

    @property
    def socket(self) -> SocketInfo:
        return self._link.socket

    async def send_all(self, data: bytes) -> None:
        if self.closed:
            raise trio.ClosedResourceError
        await self._link.send_all(data)

    async def receive_some(self, limit: int) -> bytes:
        if self.closed:
            raise trio.ClosedResourceError
        with trio.CancelScope() as self._receiving:
            data = await self._link.receive_some(limit)
            if data:
                return data
            # Hypercorn takes the end for the client's departure and drops the request; but
            # `printf … | nc` still waits for its answer. Who has left is found out by sending.
            await self._link.wait_ended()
        raise trio.ClosedResourceError

    async def send_eof(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError
        await self._link.send_eof()

    async def aclose(self) -> None:
        self.closed = True
        if self._receiving is not None:
            self._receiving.cancel()
        await trio.lowlevel.checkpoint()


class Bridge:
    """Serves requests by *app*. Its ``scope["state"]["visitor"]`` is the `Visitor` of the request.

    The app's limits are lowered to ours where they are higher, and its class for connections is replaced.
    """

    def __init__(self, app: QuartTrio, settings: Settings) -> None:
        app.asgi_http_class = _Connection
        _lower(app.config, "MAX_CONTENT_LENGTH", MAX_BODY)
        _lower(app.config, "BODY_TIMEOUT", BODY_SECONDS)
        _lower(app.config, "RESPONSE_TIMEOUT", REQUEST_SECONDS)
        self._app = wrap_app(cast(Any, app), 0, "asgi")
        self._config = _Config(settings.server_id)
        self._context = WorkerContext(None)
        self._state: LifespanState = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the app, and stop it when cancelled. An app that does not start is an exception."""
        lifespan = Lifespan(self._app, self._config, self._state)
        alive = trio.CancelScope(shield=True)

        async def live() -> None:
            with alive:
                await lifespan.handle_lifespan()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(live, name="app")
            try:
                await lifespan.wait_for_startup()
                if not lifespan.shutdown.is_set():  # else it did not start: its exception is on the way
                    task_status.started()
                    await trio.sleep_forever()
            except BaseException:
                with trio.move_on_after(LIFESPAN_SECONDS, shield=True):
                    if not lifespan.shutdown.is_set():
                        await lifespan.wait_for_shutdown()
                alive.cancel()
                raise

    async def serve(self, link: Link, head_raw: bytes, visitor: Visitor) -> None:
        """Have one request answered, and close the link. Cancelled, it ends at once."""
        link.push_back(head_raw)
        stream = _Stream(link)
        state = ConnectionState({**self._state, "visitor": visitor})
        server = TCPServer(self._app, self._config, self._context, cast(Any, state), cast(Any, stream))
        try:
            with trio.move_on_after(REQUEST_SECONDS + GRACE_SECONDS):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_break_when_cancelled, link, stream)
                    await server.run()
                    nursery.cancel_scope.cancel()
            await link.linger()
        finally:
            link.close()


async def _break_when_cancelled(link: Link, stream: _Stream) -> None:
    """Hypercorn's sends are shielded: only closing the link ends one that waits for the client."""
    try:
        await trio.sleep_forever()
    finally:
        if not stream.closed:
            link.close()


def _lower(config: Any, name: str, most: float) -> None:
    value = config.get(name)
    config[name] = most if value is None else min(value, most)
