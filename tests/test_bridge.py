"""The bridge on a small Quart-Trio app, and what it relies on in Hypercorn and quart-trio."""

from __future__ import annotations

import inspect
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from typing import Any, cast

import h11
import pytest
import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import LifespanFailureError, wrap_app
from quart import request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from trio.testing import MockClock

from mythos_trio.access import Visitor
from mythos_trio.bridge import GRACE_SECONDS, MAX_BODY, REQUEST_SECONDS, Bridge
from mythos_trio.config import Settings
from mythos_trio.link import Link
from tests.support.memory_net import MemoryStream, MemoryWire, wire_pair

HUGE = 8 * 1024 * 1024
VISITOR = Visitor(address="127.0.0.1", proxied=False, trusted_peer=False, protected=True, loopback=True)


def make_app(seen: dict[str, Any]) -> QuartTrio:
    app = QuartTrio("tests")

    @app.before_serving
    async def start() -> None:
        seen["started"] = True

    @app.after_serving
    async def stop() -> None:
        seen["stopped"] = True

    @app.get("/hello")
    async def hello() -> dict[str, Any]:
        seen["visitor"] = request.scope["state"]["visitor"]
        return {"query": request.args.get("q"), "client": request.scope["client"]}

    @app.post("/echo")
    async def echo() -> bytes:
        return cast(bytes, await request.get_data())

    @app.post("/ignore")
    async def ignore() -> str:
        return "fine"

    @app.get("/huge")
    async def huge() -> bytes:
        return bytes(HUGE)

    @app.get("/endless")
    async def endless() -> Any:
        async def produce() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 10000
            finally:
                seen["endless ended"] = True

        return produce()

    @app.get("/hang")
    async def hang() -> str:
        await trio.sleep(3600)
        return "never"

    @app.get("/crash")
    async def crash() -> str:
        raise RuntimeError("a bug")

    @app.get("/own")
    async def own() -> tuple[str, dict[str, str]]:
        return "x", {"Server-Id": "the app's"}

    return app


class Place:
    """A bridge that runs, and clients of it."""

    def __init__(self, bridge: Bridge, nursery: trio.Nursery, seen: dict[str, Any]) -> None:
        self.bridge = bridge
        self.nursery = nursery
        self.seen = seen
        self.wires: list[MemoryWire] = []
        self.served: list[trio.Event] = []

    def connect(self, line: str, *headers: str, done: Callable[[], object] | None = None) -> MemoryStream:
        """A connection whose head the front door has read; `done` is called when it is served."""
        client, wire = wire_pair()
        self.wires.append(wire)
        link = Link(wire, write_timeout=10, start=self.nursery.start_soon)
        head = "\r\n".join([line, "Host: localhost", *headers, "", ""]).encode()

        served = trio.Event()
        self.served.append(served)

        async def serve() -> None:
            await self.bridge.serve(link, head, VISITOR)
            served.set()
            if done is not None:
                done()

        self.nursery.start_soon(serve)
        return MemoryStream(client)

    async def ask(self, line: str, *headers: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """One request; the answer, to the end of the connection."""
        stream = self.connect(line, *headers)
        await stream.send_all(body)
        data = await stream.receive_all()
        await stream.aclose()
        return parse(data)


def parse(data: bytes) -> tuple[int, dict[str, str], bytes]:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    client.receive_data(b"")
    answer = client.next_event()
    assert isinstance(answer, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    names = [name for name, _ in answer.headers]
    assert len(names) == len(set(names))
    return answer.status_code, {name.decode(): value.decode() for name, value in answer.headers}, body


@pytest.fixture
async def place(nursery: trio.Nursery) -> AsyncIterator[Place]:
    seen: dict[str, Any] = {}
    bridge = Bridge(make_app(seen), Settings(server_id="test-1"))
    await nursery.start(bridge.run)
    place = Place(bridge, nursery, seen)
    yield place
    with trio.fail_after(20):
        for served in place.served:
            await served.wait()
    assert all(wire.closed for wire in place.wires)


# What it does.


async def test_a_request_is_answered_and_the_connection_closed(place: Place) -> None:
    status, headers, body = await place.ask("GET /hello?q=1 HTTP/1.1")
    assert status == 200
    assert json.loads(body) == {"query": "1", "client": ["127.0.0.1", 50000]}
    assert headers["connection"] == "close"
    assert headers["server-id"] == "test-1"
    assert "server" not in headers
    assert place.seen["started"]


async def test_the_visitor_reaches_the_app(place: Place) -> None:
    await place.ask("GET /hello HTTP/1.1")
    assert place.seen["visitor"] is VISITOR


async def test_http_1_0(place: Place) -> None:
    status, _, body = await place.ask("GET /hello HTTP/1.0")
    assert (status, json.loads(body)["query"]) == (200, None)


@pytest.mark.parametrize("line", ["GET /none HTTP/1.1", "BREW /none HTTP/1.1", "GET //x HTTP/1.1"])
async def test_unknown_paths(place: Place, line: str) -> None:
    assert (await place.ask(line))[0] == 404


async def test_unknown_methods(place: Place) -> None:
    status, headers, _ = await place.ask("BREW /hello HTTP/1.1")
    assert status == 405
    assert "GET" in headers["allow"]


async def test_server_id_is_said_once(place: Place) -> None:
    assert (await place.ask("GET /own HTTP/1.1"))[1]["server-id"] == "test-1"


async def test_a_body_that_comes_later(place: Place, autojump_clock: MockClock) -> None:
    stream = place.connect("POST /echo HTTP/1.1", "Content-Length: 10")
    await stream.send_all(b"first")
    await trio.sleep(1)
    await stream.send_all(b"later")
    assert parse(await stream.receive_all())[2] == b"firstlater"
    await stream.aclose()


async def test_a_chunked_body(place: Place) -> None:
    body = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    assert (await place.ask("POST /echo HTTP/1.1", "Transfer-Encoding: chunked", body=body))[2] == b"abcde"


async def test_expect_is_answered_by_hypercorn(place: Place) -> None:
    stream = place.connect("POST /echo HTTP/1.1", "Content-Length: 2", "Expect: 100-continue")
    assert (await stream.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    await stream.send_all(b"ok")
    assert parse(await stream.receive_all())[2] == b"ok"
    await stream.aclose()


async def test_a_body_that_breaks_is_400_with_our_header(place: Place) -> None:
    status, headers, _ = await place.ask("POST /echo HTTP/1.1", "Transfer-Encoding: chunked", body=b"zz\r\n")
    assert (status, headers["server-id"]) == (400, "test-1")


@pytest.mark.parametrize("path", ["/echo", "/ignore"])
async def test_an_endless_body_is_cut_and_its_client_told(place: Place, path: str) -> None:
    stream = place.connect(f"POST {path} HTTP/1.1", "Transfer-Encoding: chunked")
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"

    async def flood() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(chunk * (4 * MAX_BODY // 65536))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        answer = await stream.receive_until(b"\r\n\r\n")
    assert answer[9:12] == (b"413" if path == "/echo" else b"200")


async def test_a_body_that_never_comes_is_408(place: Place, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    assert (await place.ask("POST /echo HTTP/1.1", "Content-Length: 10", body=b"five."))[0] == 408
    assert trio.current_time() - began < 12


async def test_a_crash_is_500(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    assert (await place.ask("GET /crash HTTP/1.1"))[0] == 500
    assert "a bug" in caplog.text


async def test_a_handler_that_hangs_is_503_in_the_error_format(place: Place, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    status, headers, body = await place.ask("GET /hang HTTP/1.1")
    assert trio.current_time() - began == pytest.approx(REQUEST_SECONDS)
    assert (status, headers["server-id"]) == (503, "test-1")
    assert json.loads(body)["error_type"] == "system_error"


async def test_a_huge_answer_arrives_whole(place: Place) -> None:
    _, _, body = await place.ask("GET /huge HTTP/1.1")
    assert len(body) == HUGE


# Bad clients.


@pytest.mark.parametrize("path", ["/huge", "/endless"])
async def test_a_client_that_never_reads_is_gone_after_the_write_timeout(
    place: Place, autojump_clock: MockClock, path: str
) -> None:
    done = trio.Event()
    began = trio.current_time()
    stream = place.connect(f"GET {path} HTTP/1.1", done=done.set)
    await done.wait()
    assert trio.current_time() - began == pytest.approx(10, abs=0.1)
    assert place.wires[0].was_reset
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_all()


async def test_an_answer_without_end_ends(place: Place, autojump_clock: MockClock) -> None:
    stream = place.connect("GET /endless HTTP/1.1")
    began = trio.current_time()
    with trio.fail_after(REQUEST_SECONDS + GRACE_SECONDS + 2):
        while await stream.receive_some():
            await trio.sleep(0.1)
    assert trio.current_time() - began >= REQUEST_SECONDS
    assert place.seen["endless ended"]
    await stream.aclose()


async def test_a_client_that_reads_slowly_has_no_more_time_than_others(place: Place, autojump_clock: MockClock) -> None:
    """The write deadline lets it, and Hypercorn's shield would wait for it."""
    done = trio.Event()
    began = trio.current_time()
    stream = place.connect("GET /huge HTTP/1.1", done=done.set)
    while not done.is_set():
        await trio.sleep(5)
        if stream.wire.unread():
            await stream.receive_some(65536)
    assert trio.current_time() - began <= REQUEST_SECONDS + GRACE_SECONDS + 5


async def test_a_client_that_sends_on_can_read_the_answer(place: Place, autojump_clock: MockClock) -> None:
    """Closing at once would reset the connection, and take the answer out of the client's kernel."""
    stream = place.connect("POST /ignore HTTP/1.1", "Content-Length: 1000000")
    await stream.send_all(bytes(50_000))
    await stream.wire.wait_readable()
    await trio.sleep(0.1)
    await stream.send_all(bytes(30_000))
    await trio.sleep(0.1)
    assert parse(await stream.receive_all())[0] == 200
    await stream.aclose()


@pytest.mark.parametrize("path", ["/hang", "/huge", "/endless"])
async def test_a_client_that_leaves_takes_its_request_with_it(
    place: Place, autojump_clock: MockClock, path: str
) -> None:
    done = trio.Event()
    began = trio.current_time()
    stream = place.connect(f"GET {path} HTTP/1.1", done=done.set)
    await trio.sleep(1)
    stream.wire.reset()
    await done.wait()
    assert trio.current_time() - began < 3


async def test_a_client_that_says_no_more_gets_its_answer(place: Place) -> None:
    stream = place.connect("GET /hello HTTP/1.1")
    await stream.send_eof()
    assert parse(await stream.receive_all())[0] == 200


async def test_a_client_that_closes_in_mid_body_is_given_up(place: Place, autojump_clock: MockClock) -> None:
    done = trio.Event()
    stream = place.connect("POST /echo HTTP/1.1", "Content-Length: 10", done=done.set)
    await stream.send_all(b"five.")
    await stream.aclose()
    with trio.fail_after(12):
        await done.wait()


async def test_a_second_request_behind_the_first_is_dropped(place: Place) -> None:
    """The answer says "close": the client has to connect again."""
    stream = place.connect("GET /hello HTTP/1.1")
    await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await stream.receive_all()).count(b"HTTP/1.1 200") == 1
    await stream.aclose()


# Stopping.


@pytest.mark.parametrize("path", ["/hang", "/huge", "/endless"])
async def test_stopping_is_at_once(path: str, autojump_clock: MockClock) -> None:
    seen: dict[str, Any] = {}
    bridge = Bridge(make_app(seen), Settings(server_id="test-1"))
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        place = Place(bridge, nursery, seen)
        place.connect(f"GET {path} HTTP/1.1")
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began == pytest.approx(1, abs=0.1)
    assert all(wire.closed for wire in place.wires)
    assert seen["stopped"]


async def test_an_app_that_does_not_start_is_an_error() -> None:
    app = QuartTrio("tests")

    @app.before_serving
    async def start() -> None:
        raise RuntimeError("no")

    bridge = Bridge(app, Settings())
    with trio.fail_after(5), pytest.RaisesGroup(LifespanFailureError, flatten_subgroups=True):
        await bridge.run()


def test_limits_are_lowered_and_never_raised() -> None:
    app = QuartTrio("tests")
    app.config["BODY_TIMEOUT"] = 3
    app.config["RESPONSE_TIMEOUT"] = None
    Bridge(app, Settings())
    assert app.config["BODY_TIMEOUT"] == 3
    assert app.config["RESPONSE_TIMEOUT"] == REQUEST_SECONDS
    assert app.config["MAX_CONTENT_LENGTH"] == MAX_BODY


# What it relies on. A new Hypercorn or quart-trio that changes it fails here.


def test_the_versions_that_were_looked_at() -> None:
    assert version("hypercorn").startswith("0.18.")
    assert version("quart-trio").startswith("0.12.")


def test_signatures() -> None:
    def names(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(TCPServer.__init__) == ["self", "app", "config", "context", "state", "stream"]
    assert names(WorkerContext.__init__) == ["self", "max_requests"]
    assert names(TrioASGIHTTPConnection.handle_request) == ["self", "nursery", "request", "send"]
    assert names(Config.response_headers) == ["self", "protocol"]


class RecordingStream:
    """The least that Hypercorn needs; what it sends ends when `gate` opens."""

    def __init__(self, data: bytes) -> None:
        self.calls: list[str] = []
        self.sent = b""
        self.shielded: list[bool] = []
        self._data = data
        self.eof = trio.Event()
        self.socket = self.Socket()
        self.before_send: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    class Socket:
        family = socket.AF_INET
        getpeername = staticmethod(lambda: ("10.0.0.1", 1))
        getsockname = staticmethod(lambda: ("10.0.0.2", 2))

    async def send_all(self, data: bytes) -> None:
        self.calls.append("send_all")
        await self.before_send()
        self.sent += data

    async def receive_some(self, limit: int) -> bytes:
        if self._data:
            data, self._data = self._data, b""
            return data
        await self.eof.wait()
        return b""

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append("send_eof")

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append("aclose")
        self.eof.set()


def tcp_server(app: Any, stream: RecordingStream, **state: Any) -> TCPServer:
    config = Config()
    config.errorlog = logging.getLogger("hypercorn.error")
    config.keep_alive_max_requests = 1
    return TCPServer(wrap_app(app, 0, "asgi"), config, WorkerContext(None), cast(Any, state), cast(Any, stream))


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": repr(scope["state"]).encode()})


REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_hypercorn_takes_a_stream_with_a_socket_and_hands_on_the_state() -> None:
    stream = RecordingStream(REQUEST)
    with trio.fail_after(5):
        await tcp_server(answer, stream, visitor="somebody").run()
    assert b"{'visitor': 'somebody'}" in stream.sent
    assert b"connection: close" in stream.sent
    assert {"send_eof", "aclose"} < set(stream.calls)


async def test_hypercorn_shields_its_sends(autojump_clock: MockClock) -> None:
    stream = RecordingStream(REQUEST)

    async def slowly() -> None:
        await trio.sleep(60)

    stream.before_send = slowly
    began = trio.current_time()
    with trio.move_on_after(1):
        await tcp_server(answer, stream).run()
    assert trio.current_time() - began >= 60


async def test_quart_trio_cancels_the_request_in_the_last_send(autojump_clock: MockClock) -> None:
    """The reason for the shield: without it this connection would not be closed."""
    app = QuartTrio("tests")

    @app.get("/")
    async def index() -> str:
        return "x"

    stream = RecordingStream(REQUEST)
    with trio.move_on_after(1) as scope:
        await tcp_server(app, stream).run()
    assert scope.cancelled_caught, "quart-trio or Hypercorn has mended it: the shield can go"
