"""The front door as clients see it: raw bytes in, answers out, on a network in memory."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mythos_trio import front as front_module
from mythos_trio.access import Access, Visitor
from mythos_trio.config import Settings
from mythos_trio.core.errors import ErrorType, busy
from mythos_trio.front import HEAD_SECONDS, SILENT_SECONDS, YIELD_AFTER, Front, Kind, Route, route
from mythos_trio.front import Door as LetIn
from mythos_trio.http1 import Head, parse_head, read_body, response
from mythos_trio.hub import Hub
from mythos_trio.kept import ANSWER_SECONDS, IDLE_SECONDS, Asker
from mythos_trio.ledger import Ledger
from mythos_trio.link import Link
from mythos_trio.poller import Poller
from mythos_trio.seams import SystemClock
from tests.support.memory_net import MemoryListener, MemoryStream

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455, section 1.3
UPGRADE = (
    "Upgrade: websocket",
    "Connection: keep-alive, Upgrade",
    f"Sec-WebSocket-Key: {KEY}",
    "Sec-WebSocket-Version: 13",
)


class Fakes:
    """Handlers, the app and the statistics: they write down what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.links: list[Link] = []
        self.bodies: list[bytes] = []
        self.heads: list[bytes] = []
        self.errors: list[str] = []
        self.keep = True
        self.takes = True
        """Whether requests are taken that need no task; *waits*: and not answered yet."""
        self.waits = False
        self.taken: list[bytes] = []
        self.askers: list[Asker] = []
        self.crash: Callable[[Link], Awaitable[None]] | None = None
        self.let_in: Callable[[Link, LetIn], None] | None = None
        """What is done with a stream that needs no task; None: they all do."""

    async def websocket(self, link: Link, head: Head, visitor: Visitor, player: str) -> None:
        await self._stream("websocket", link, player)

    async def sse(self, link: Link, head: Head, visitor: Visitor, player: str) -> None:
        await self._stream("sse", link, player)

    def arrive(self, to: Route, link: Link, head: Head, visitor: Visitor, door: LetIn) -> None:
        kind, player = to.kind.name.lower(), to.player or ""
        if self.let_in is None:
            door.start(partial(self._stream, kind, link, player))
            return
        self.asked.append((kind, player))
        self.let_in(link, door)

    async def _stream(self, kind: str, link: Link, player: str) -> None:
        self.asked.append((kind, player))
        if self.crash is not None:
            await self.crash(link)
        self.links.append(link)
        await link.send_all(b"yours now")

    async def post(self, link: Link, head: Head, visitor: Visitor) -> bool:
        self.asked.append(("post", head.path))
        if self.crash is not None:
            await self.crash(link)
        body = await read_body(link, head, limit=100_000, timeout=10)
        self.bodies.append(body)
        answer = str(len(body)).encode()
        await link.send_all(response(202, answer, keep_alive=head.keep_alive and self.keep, server_id="fake"))
        return self.keep

    def take_post(self, head: Head, visitor: Visitor, body: bytes, asker: Asker) -> bool:
        if not self.takes:
            return False
        self.taken.append(body)
        self.askers.append(asker)
        if not self.waits:
            asker.answer(self.answer_of(body), self.keep)
        return True

    def answer_of(self, body: bytes) -> bytes:
        return response(202, str(len(body)).encode(), keep_alive=self.keep, server_id="fake")

    def too_late(self, head: Head) -> bytes:
        return response(503, b"too late", keep_alive=False, server_id="fake")

    async def serve(self, link: Link, head_raw: bytes, visitor: Visitor) -> None:
        self.asked.append(("app", head_raw.split(b" ")[1].decode()))
        self.heads.append(head_raw)
        if self.crash is not None:
            await self.crash(link)
        await link.send_all(response(200, b"app", keep_alive=False, server_id="fake"))
        await link.linger()

    def error(self, error_type: str, event: str, player_id: str | None, when: float) -> None:
        self.errors.append(error_type)


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(("info", event))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(("warning", event))

    def error(self, event: str, **fields: Any) -> None:
        assert fields["error_type"]
        self.lines.append(("error", event))

    def count(self, event: str) -> int:
        return [line[1] for line in self.lines].count(event)


class Door:
    """A front door, its clients and what stands behind it."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.listener = MemoryListener()
        self.ended = trio.Event()
        """Set when the front door has returned."""
        self.fakes = Fakes()
        self.log = log
        clock = SystemClock()
        self.ledger = Ledger(Hub(cast(Any, None), "door-1"))
        poller, fakes = Poller(), self.fakes
        self.front = Front(settings, Access(settings, clock), fakes, fakes, fakes, clock, self.ledger, poller)
        self._poller = poller

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._poller.run)
            nursery.start_soon(self.front.keep_times)
            await self.front.serve(self.listener)
            nursery.cancel_scope.cancel()
        self.ended.set()

    def connect(self, data: bytes = b"", *, peer: str = "127.0.0.1", eof: bool = False) -> MemoryStream:
        wire = self.listener.connect(peer)
        if data:
            assert wire.send(data) == len(data)
        if eof:
            wire.send_eof()
        return MemoryStream(wire)

    async def ask(self, data: bytes, *, peer: str = "127.0.0.1") -> list[Answer]:
        """Send *data*; the answers, to the end of the connection."""
        stream = self.connect(data, peer=peer)
        answers = parse(await stream.receive_all(), data)
        await stream.aclose()
        return answers

    async def refused(self, data: bytes, *, peer: str = "127.0.0.1") -> Answer:
        """Send *data*; the one answer, which is a proper refusal."""
        (answer,) = await self.ask(data, peer=peer)
        assert answer.headers["connection"] in ("close", "Upgrade, close")
        assert answer.headers["server-id"] == "door-1"
        if not data.startswith(b"HEAD"):
            body = json.loads(answer.body)
            assert set(body) == {"error", "error_type", "message", "details", "timestamp"}
            assert body["error"] is True
            assert body["error_type"] in list(ErrorType)
        assert not self.fakes.asked
        return answer


class Answer:
    def __init__(self, head: h11.Response, body: bytes) -> None:
        self.status = head.status_code
        self.headers: dict[str, str] = {}
        for name, value in head.headers:
            known = self.headers.get(name.decode())
            self.headers[name.decode()] = f"{known}, {value.decode()}" if known else value.decode()
        self.body = body


def parse(data: bytes, request: bytes) -> list[Answer]:
    answers = []
    while data:
        client = h11.Connection(h11.CLIENT)
        method = "HEAD" if request.startswith(b"HEAD") else "GET"
        client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        head = client.next_event()
        assert isinstance(head, h11.Response)
        body = b""
        while isinstance(event := client.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        data = client.trailing_data[0]
        answers.append(Answer(head, body))
    return answers


def raw(line: str, *headers: str, host: str | None = "localhost", body: bytes = b"") -> bytes:
    lines = [line, *([f"Host: {host}"] if host is not None else []), *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def post(body: bytes, *headers: str, line: str = "POST /api/messages HTTP/1.1", host: str = "localhost") -> bytes:
    return raw(line, f"Content-Length: {len(body)}", *headers, host=host, body=body)


@pytest.fixture
def settings() -> Settings:
    return Settings(server_id="door-1", connection_pool_size=50)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(front_module, "log", log)
    return log


@pytest.fixture
async def door(settings: Settings, log: Log) -> AsyncIterator[Door]:
    door = Door(settings, log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.serve)
        yield door
        # Nothing leaks: what was handed on is closed by its owner, the rest by the front door.
        for link in door.fakes.links:
            link.close()
        door.front.draining = True
        door.front.stop_accepting()
        with trio.fail_after(HEAD_SECONDS + 5):
            await door.ended.wait()
        assert door.listener.open_wires == []
        assert door.front.handshakes == 0


# Where requests go.


def test_routes() -> None:
    def of(line: str, *headers: str) -> tuple[Kind, str | None]:
        to = route(parse_head(raw(line, *headers)))
        return to.kind, to.player

    assert of("GET /ws/alice?position=1-2 HTTP/1.1", *UPGRADE) == (Kind.WEBSOCKET, "alice")
    assert of("GET /sse/a%2Db HTTP/1.1") == (Kind.SSE, "a-b")
    assert of("POST /api/messages HTTP/1.1") == (Kind.POST, None)
    assert of("POST /api/connections/alice/commands HTTP/1.1") == (Kind.POST, None)
    assert of("POST /api/connections/alice/ack HTTP/1.1") == (Kind.POST, None)
    for line in (
        "GET / HTTP/1.1",
        "GET /api/messages HTTP/1.1",
        "POST /api/messages/ HTTP/1.1",
        "POST /api/connections/a/b/ack HTTP/1.1",
        "POST /api/connections/alice/session HTTP/1.1",
        "GET /ws HTTP/1.1",
        "GET /ws/ HTTP/1.1",
        "POST /sse HTTP/1.1",
        "DELETE /api/connections/alice HTTP/1.1",
        "BREW /coffee HTTP/1.1",
    ):
        assert of(line) == (Kind.APP, None), line


async def test_streams_are_handed_on(door: Door) -> None:
    for data, asked in (
        (raw("GET /sse/alice HTTP/1.1"), ("sse", "alice")),
        (raw("GET /sse/alice HTTP/1.0"), ("sse", "alice")),
        (raw("GET /ws/bob HTTP/1.1", *UPGRADE), ("websocket", "bob")),
    ):
        stream = door.connect(data + b"early bytes")
        assert await stream.receive_some() == b"yours now"
        assert door.fakes.asked[-1] == asked
        link = door.fakes.links[-1]
        assert link.ended is None
        assert await link.receive_some() == b"early bytes"


async def test_the_app_gets_the_rest(door: Door) -> None:
    data = raw("GET /health?x=1 HTTP/1.1", "X-Odd: caf\xe9")
    (answer,) = await door.ask(data)
    assert answer.body == b"app"
    assert door.fakes.heads == [data]


async def test_the_app_gets_absolute_targets_as_paths(door: Door) -> None:
    await door.ask(raw("GET http://localhost/health?x=1 HTTP/1.1"))
    assert door.fakes.heads == [raw("GET /health?x=1 HTTP/1.1")]


async def test_posts_keep_the_connection(door: Door) -> None:
    stream = door.connect()
    for number in range(3):
        await stream.send_all(post(b"x" * number))
        (answer,) = parse(await stream.receive_until(str(number).encode()), b"POST")
        assert answer.status == 202
        assert "connection" not in answer.headers
    assert door.fakes.bodies + door.fakes.taken == [b"", b"x", b"xx"]
    await stream.aclose()


@pytest.mark.parametrize(
    "data",
    [
        post(b"body", "Connection: close"),
        post(b"body", line="POST /api/messages HTTP/1.0"),
        raw("POST /api/messages HTTP/1.0", "Content-Length: 4", "Connection: keep-alive", body=b"body"),
    ],
    ids=["close", "HTTP/1.0", "HTTP/1.0 keep-alive"],
)
async def test_posts_that_are_the_last(door: Door, data: bytes) -> None:
    (answer,) = await door.ask(data + post(b"dropped"))
    assert (answer.status, answer.headers["connection"]) == (202, "close")
    assert door.fakes.bodies == [b"body"]


async def test_a_handler_may_close_after_its_answer(door: Door) -> None:
    door.fakes.keep = False
    (answer,) = await door.ask(post(b"one") + post(b"two"))
    assert answer.body == b"3"


async def test_pipelined_requests_are_answered_in_order(door: Door) -> None:
    chunked = raw("POST /api/messages HTTP/1.1", "Transfer-Encoding: chunked", body=b"2\r\nab\r\n0\r\n\r\n")
    data = post(b"x") + chunked + post(b"xyz") + raw("GET /health HTTP/1.1") + post(b"never seen")
    answers = await door.ask(data)
    assert [answer.body for answer in answers] == [b"1", b"2", b"3", b"app"]
    assert [kind for kind, _ in door.fakes.asked] == ["post", "post", "post", "app"]


async def test_expect_100(door: Door) -> None:
    stream = door.connect(raw("POST /api/messages HTTP/1.1", "Content-Length: 2", "Expect: 100-continue"))
    assert await stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
    await stream.send_all(b"ok")
    assert b" 202 " in await stream.receive_some()
    await stream.aclose()


async def test_questions_about_requests_to_come(log: Log, nursery: trio.Nursery) -> None:
    door = Door(Settings(server_id="door-1", cors_origins=("https://play.example.org",), secret_key="x" * 32), log)
    nursery.start_soon(door.serve)
    headers = ("Origin: https://play.example.org", "Access-Control-Request-Method: POST")
    for path in ("/api/messages", "/sse/alice", "/health"):
        preflight = raw(f"OPTIONS {path} HTTP/1.1", *headers)
        (answer, last) = await door.ask(preflight + raw("OPTIONS * HTTP/1.1", "Connection: close"))
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == "https://play.example.org"
        assert "connection" not in answer.headers
        assert last.status == 204
        assert "DELETE" in last.headers["allow"]
        assert last.headers["connection"] == "close"
    assert door.fakes.asked == []


async def test_errors_to_admitted_origins_can_be_read_by_their_pages(log: Log, nursery: trio.Nursery) -> None:
    door = Door(Settings(server_id="door-1", cors_origins=("https://play.example.org",), secret_key="x" * 32), log)
    nursery.start_soon(door.serve)
    answer = await door.refused(raw("DELETE /sse/alice HTTP/1.1", "Origin: https://play.example.org"))
    assert answer.headers["access-control-allow-origin"] == "https://play.example.org"


# What is refused.


def without(name: str) -> list[str]:
    return [header for header in UPGRADE if not header.startswith(name)]


WS = "GET /ws/alice HTTP/1.1"
MESSAGES = "POST /api/messages HTTP/1.1"


@pytest.mark.parametrize(
    ("data", "status", "headers"),
    [
        (raw("POST /ws/alice HTTP/1.1", *UPGRADE), 405, {"allow": "GET"}),
        (raw("POST /sse/alice HTTP/1.1", "Content-Length: 0"), 405, {"allow": "GET"}),
        (raw("HEAD /sse/alice HTTP/1.1"), 405, {"allow": "GET"}),
        (raw("CONNECT /health HTTP/1.1"), 405, {}),
        (raw("CONNECT localhost:80 HTTP/1.1"), 400, {}),
        (raw(WS), 426, {"upgrade": "websocket"}),
        (raw(WS, *without("Upgrade"), "Upgrade: h2c"), 426, {"upgrade": "websocket"}),
        (raw(WS, *without("Connection")), 426, {"upgrade": "websocket"}),
        (raw(WS, *without("Sec-WebSocket-Version")), 426, {"sec-websocket-version": "13"}),
        (raw(WS, *without("Sec-WebSocket-Version"), "Sec-WebSocket-Version: 8"), 426, {"sec-websocket-version": "13"}),
        (raw(WS, *without("Sec-WebSocket-Key")), 400, {}),
        (raw(WS, *without("Sec-WebSocket-Key"), "Sec-WebSocket-Key: short"), 400, {}),
        (raw(WS, *without("Sec-WebSocket-Key"), "Sec-WebSocket-Key: caf\xe9" + "A" * 20), 400, {}),
        (raw(WS, *UPGRADE, f"Sec-WebSocket-Key: {KEY}"), 400, {}),
        (raw("GET /ws/alice HTTP/1.0", *UPGRADE), 400, {}),
        (raw(WS, *UPGRADE, "Content-Length: 3", body=b"abc"), 400, {}),
        (raw("GET /sse/alice HTTP/1.1", "Content-Length: 3", body=b"abc"), 400, {}),
        (raw("GET /sse/alice HTTP/1.1", *UPGRADE), 400, {}),
        (raw("GET /health HTTP/1.1", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings"), 400, {}),
        (raw("GET /health HTTP/1.1", *UPGRADE), 400, {}),
        (raw(MESSAGES, "Upgrade: websocket", "Content-Length: 0"), 400, {}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, {}),
        (raw("GET /ws/stats HTTP/1.1", *UPGRADE), 422, {}),
        (raw("GET /ws/.. HTTP/1.1", *UPGRADE), 422, {}),
        (raw("GET /sse/al%20ice HTTP/1.1"), 422, {}),
        (raw("GET /sse/alice/more HTTP/1.1"), 422, {}),
        (raw("GET /sse/caf%C3%A9 HTTP/1.1"), 422, {}),
        (raw("GET /sse/" + "x" * 65 + " HTTP/1.1"), 422, {}),
        (raw("GET /sse/%00 HTTP/1.1"), 400, {}),
        (raw("GET /sse/%zz HTTP/1.1"), 400, {}),
        (raw("GET /sse/\xe9 HTTP/1.1"), 400, {}),
        (raw("GET /health HTTP/1.1", host=None), 400, {}),
        (raw("GET http://elsewhere/ HTTP/1.1"), 400, {}),
        (raw("GET /health HTTP/3.0"), 505, {}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, {}),
        (b"hello there\r\n\r\n", 400, {}),
        (b"GET /" + b"x" * 20000, 414, {}),
        (raw("GET / HTTP/1.1", *(f"X-{n}: {'y' * 200}" for n in range(99))), 431, {}),
        (raw("GET / HTTP/1.1", *(f"X-{n}: y" for n in range(200))), 431, {}),
        (raw("POST /api/connections/a/session HTTP/1.1", "Content-Length: 9999999"), 413, {}),
        (raw(MESSAGES, "Content-Length: 5", "Content-Length: 6", body=b"123456"), 400, {}),
        (raw(MESSAGES, "Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400, {}),
        (raw(MESSAGES, "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 501, {}),
        (raw("GET /health HTTP/1.1", host="evil.example.org"), 403, {}),
        (raw("GET /health HTTP/1.1", "Origin: https://evil.example.org"), 403, {}),
        (raw("GET /health HTTP/1.1", "X-Forwarded-For: 1.2.3.4"), 403, {}),
        (raw(WS, *UPGRADE, "Origin: https://evil.example.org"), 403, {}),
    ],
)
async def test_refusals(door: Door, data: bytes, status: int, headers: dict[str, str]) -> None:
    answer = await door.refused(data)
    assert answer.status == status
    assert headers.items() <= answer.headers.items()
    assert len(door.fakes.errors) == 1
    assert door.log.lines == [("info", "Request refused")]


async def test_strangers_are_told_why(door: Door) -> None:
    answer = await door.refused(raw("GET /health HTTP/1.1"), peer="10.1.2.3")
    assert answer.status == 403
    assert "protected mode" in json.loads(answer.body)["message"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (raw(MESSAGES), 411),
        (raw(MESSAGES, "Content-Length: 100001"), 413),
        (raw(MESSAGES, "Content-Length: 1", "Expect: the impossible"), 417),
        (raw(MESSAGES, "Transfer-Encoding: chunked", body=b"no\r\n"), 400),
    ],
)
async def test_a_refusal_that_a_post_handler_raises_is_answered(door: Door, data: bytes, status: int) -> None:
    (answer,) = await door.ask(data)
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert json.loads(answer.body)["error_type"] == "validation_error"


async def test_a_refusal_says_when_to_come_back(door: Door) -> None:
    async def refuse(link: Link) -> None:
        raise busy("full", retry_ms=2500)

    door.fakes.crash = refuse
    (answer,) = await door.ask(post(b""))
    assert (answer.status, answer.headers["retry-after"]) == (503, "3")


async def test_a_refusal_after_good_requests_is_in_its_place(door: Door) -> None:
    answers = await door.ask(post(b"x") + raw("GET / HTTP/9.9") + post(b"never"))
    assert [answer.status for answer in answers] == [202, 505]


# Slow and bad clients.


async def test_a_head_byte_by_byte(door: Door, autojump_clock: MockClock) -> None:
    stream = door.connect()
    for byte in raw("GET /health HTTP/1.1"):
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.1)
    assert b"app" in await stream.receive_all()
    await stream.aclose()


async def test_a_head_that_is_too_slow_is_408(door: Door, autojump_clock: MockClock) -> None:
    stream = door.connect()
    began = trio.current_time()

    async def trickle() -> None:
        while True:
            await stream.send_all(b"G")
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        data = await stream.receive_until(b"\r\n\r\n")
        nursery.cancel_scope.cancel()
    assert data.startswith(b"HTTP/1.1 408 ")
    assert trio.current_time() - began == pytest.approx(HEAD_SECONDS)
    await stream.aclose()


async def test_a_head_that_never_ends_is_431_and_no_more_is_read(door: Door) -> None:
    stream = door.connect(b"GET / HTTP/1.1\r\n")

    async def flood() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"X: y\r\n" * 1_000_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        assert (await stream.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 431 ")


async def test_a_client_that_says_nothing_is_closed_silently(door: Door, autojump_clock: MockClock) -> None:
    stream = door.connect()
    began = trio.current_time()
    assert await stream.receive_all() == b""
    assert trio.current_time() - began == pytest.approx(HEAD_SECONDS, abs=0.01)
    assert door.fakes.errors == []
    await stream.aclose()


@pytest.mark.parametrize("sent", [b"", b"GET / HT"])
async def test_a_client_that_leaves_at_once_is_no_trouble(door: Door, sent: bytes) -> None:
    await door.connect(sent).aclose()
    stream = door.connect(sent)
    stream.wire.reset()
    await trio.testing.wait_all_tasks_blocked()
    assert door.listener.open_wires == []
    assert door.log.count("Request crashed") == 0


async def test_an_idle_connection_is_closed_after_its_time(door: Door, autojump_clock: MockClock) -> None:
    stream = door.connect(post(b"x"))
    await stream.receive_until(b"1")
    began = trio.current_time()
    assert await stream.receive_all() == b""
    assert trio.current_time() - began == pytest.approx(IDLE_SECONDS, abs=0.01)
    await stream.aclose()


async def test_an_error_can_be_read_by_a_client_that_is_still_sending(door: Door) -> None:
    """What it sends is read and dropped for a while: a reset would take the answer away."""
    stream = door.connect(raw(MESSAGES, "Content-Length: 999999999") + bytes(50_000))
    await stream.wire.wait_readable()
    await stream.send_all(bytes(20_000))
    await trio.testing.wait_all_tasks_blocked()
    assert (await stream.receive_all()).startswith(b"HTTP/1.1 413 ")
    await stream.aclose()


async def test_the_last_answer_can_be_read_by_a_client_that_sends_on(door: Door) -> None:
    stream = door.connect(post(b"x", "Connection: close"))
    await stream.wire.wait_readable()
    await stream.send_all(post(b"too late"))
    await trio.testing.wait_all_tasks_blocked()
    assert (await stream.receive_all()).startswith(b"HTTP/1.1 202 ")
    await stream.aclose()


async def test_a_client_that_never_reads_its_answers_is_reset(door: Door, autojump_clock: MockClock) -> None:
    stream = door.connect()
    requests = post(b"x") * 20_000

    async def send() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(requests)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:  # noqa: ASYNC112
        nursery.start_soon(send)
    assert 10 <= trio.current_time() - began < 12
    assert door.listener.wires[0].was_reset


# Crashes.


async def crash(link: Link) -> None:
    raise RuntimeError("a bug")


async def crash_in_a_group(link: Link) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(crash, link)
        nursery.start_soon(trio.sleep_forever)


async def crash_after_sending(link: Link) -> None:
    await link.send_all(b"HTTP/1.1 200 OK\r\n")
    raise RuntimeError("a bug")


@pytest.mark.parametrize("how", [crash, crash_in_a_group])
@pytest.mark.parametrize("data", [post(b""), raw("GET /sse/alice HTTP/1.1"), raw("GET /health HTTP/1.1")])
async def test_a_crash_is_500_and_hurts_nobody_else(
    door: Door, data: bytes, how: Callable[[Link], Awaitable[None]]
) -> None:
    other = door.connect(b"POST /api/mess")
    door.fakes.crash = how
    (answer,) = await door.ask(data)
    assert (answer.status, json.loads(answer.body)["error_type"]) == (500, "system_error")
    assert door.log.count("Request crashed") == 1
    door.fakes.crash = None
    await other.send_all(b"ages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
    await other.receive_until(b"202")
    await other.aclose()


async def test_a_crash_in_mid_answer_is_a_reset(door: Door) -> None:
    door.fakes.crash = crash_after_sending
    stream = door.connect(post(b""))
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_all()
    assert door.log.count("Request crashed") == 1


async def test_a_client_that_goes_in_mid_answer_is_no_crash(door: Door) -> None:
    async def broken(link: Link) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.wait_sent)
            raise trio.BrokenResourceError

    door.fakes.crash = broken
    stream = door.connect(post(b""))
    assert await stream.receive_all() == b""
    assert door.log.lines == []
    await stream.aclose()


async def test_a_crash_while_the_server_stops_is_logged(settings: Settings, log: Log) -> None:
    async def stubborn(link: Link) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError("a bug in tidying up")

    async def in_a_group(link: Link) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stubborn, link)
            await trio.sleep_forever()

    door = Door(settings, log)
    door.fakes.crash = in_a_group
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.serve)
        door.connect(post(b""))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert log.count("Request crashed") == 1
    assert door.listener.open_wires == []


# Many clients, few descriptors.


async def test_out_of_descriptors_it_waits_says_so_once_and_recovers(door: Door, autojump_clock: MockClock) -> None:
    door.listener.fail(errno.EMFILE, times=20)
    began = trio.current_time()
    await door.ask(raw("GET /health HTTP/1.1"))
    assert trio.current_time() - began == pytest.approx(2.0)
    assert door.log.count("Cannot accept connections") == 1
    await trio.sleep(10)
    await door.ask(raw("GET /health HTTP/1.1"))
    assert door.log.count("Accepting connections again") == 1
    door.listener.fail(errno.ENFILE)
    await door.ask(raw("GET /health HTTP/1.1"))
    assert door.log.count("Cannot accept connections") == 2


async def test_handshakes_are_bounded_and_the_oldest_makes_room(door: Door, autojump_clock: MockClock) -> None:
    silent = [door.connect(b"GET / HT") for _ in range(60)]
    await trio.testing.wait_all_tasks_blocked()
    assert door.front.handshakes == 50
    assert door.listener.waiting == 9  # the front door has one in its hand
    began = trio.current_time()
    await door.ask(raw("GET /health HTTP/1.1"))
    assert trio.current_time() - began == pytest.approx(YIELD_AFTER)
    assert door.log.count("Too many handshakes under way") == 1
    gone = [stream.wire.in_error() for stream in silent]
    assert gone == [True] * 11 + [False] * 49
    for stream in silent:
        stream.wire.close()


async def test_requests_under_way_are_not_handshakes(door: Door, autojump_clock: MockClock) -> None:
    slow = [door.connect(raw(MESSAGES, "Content-Length: 5")) for _ in range(60)]
    await trio.testing.wait_all_tasks_blocked()
    assert (door.front.handshakes, door.listener.waiting) == (0, 0)
    for stream in slow:
        stream.wire.close()


async def test_a_full_door_opens_when_a_handshake_is_done(door: Door, autojump_clock: MockClock) -> None:
    silent = [door.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n") for _ in range(50)]
    await trio.testing.wait_all_tasks_blocked()
    waiting = door.connect(raw("GET /health HTTP/1.1"))
    await trio.testing.wait_all_tasks_blocked()
    assert waiting.wire.unread() == 0
    began = trio.current_time()
    await silent[30].send_all(b"\r\n")
    assert b"app" in await waiting.receive_until(b"app")
    assert trio.current_time() == began
    for stream in [*silent, waiting]:
        stream.wire.close()


async def test_of_kept_connections_the_one_idle_longest_makes_room(door: Door, settings: Settings) -> None:
    kept = []
    for _ in range(settings.connection_pool_size):
        kept.append(door.connect(post(b"x")))
        await kept[-1].receive_until(b"1")
    await kept[0].send_all(post(b"xy"))  # so the next has been idle longest
    await kept[0].receive_until(b"2")
    newcomer = door.connect(post(b"xyz"))
    await newcomer.receive_until(b"3")
    assert await kept[1].receive_all() == b""
    kept[1].wire.close()
    await trio.testing.wait_all_tasks_blocked()
    assert len(door.listener.open_wires) == settings.connection_pool_size
    for stream in [*kept, newcomer]:
        stream.wire.close()


# Requests that need no task of their own.


async def kept(door: Door, *headers: str) -> MemoryStream:
    """A connection that has had one POST answered."""
    stream = door.connect(post(b"first", *headers))
    await stream.receive_until(b"\r\n\r\n5")
    return stream


async def test_a_head_that_has_come_before_is_known(door: Door) -> None:
    stream = await kept(door, "X-Same: yes")
    for body in (b"x", b"", b"y" * 12000):
        await stream.send_all(post(body, "X-Same: yes"))
        await stream.receive_until(b"\r\n\r\n" + str(len(body)).encode())
    assert door.fakes.taken == [b"x", b"", b"y" * 12000]
    assert door.fakes.bodies == [b"first"]
    await stream.aclose()


@pytest.mark.parametrize(
    "data",
    [
        post(b"second", "X-Same: no"),
        post(b"second", "X-Same: yes", "X-More: yes"),
        raw(MESSAGES, "Content-Length: +6", "X-Same: yes", body=b"second"),
        raw(MESSAGES, "Content-Length: 6 ", "X-Same: yes", body=b"second"),
        raw(MESSAGES, "Content-Length: 0000000000000006", "X-Same: yes", body=b"second"),
        raw(MESSAGES, "Content-Length: 99999999999999999999", "X-Same: yes", body=b"second"),
        raw(MESSAGES, "Content-Length:6", "X-Same: yes", body=b"second"),
        raw(MESSAGES, "Content-Length:", "X-Same: yes", body=b"second"),
        raw(MESSAGES, "X-Same: yes", "Transfer-Encoding: chunked", body=b"6\r\nsecond\r\n0\r\n\r\n"),
        post(b"second", "X-Same: yes", host="elsewhere"),
    ],
)
async def test_any_other_head_is_read(door: Door, data: bytes) -> None:
    stream = await kept(door, "X-Same: yes")
    await stream.send_all(data)
    await stream.receive_some()
    assert door.fakes.taken == []
    await stream.aclose()


async def test_of_two_that_come_together_the_first_is_read(door: Door) -> None:
    stream = await kept(door)
    await stream.send_all(post(b"second") + post(b"3rd"))
    await stream.receive_until(b"\r\n\r\n3")
    assert (door.fakes.bodies, door.fakes.taken) == ([b"first", b"second"], [b"3rd"])
    await stream.aclose()


@pytest.mark.parametrize("header", ["Expect: 100-continue", "Idempotency-Key: k", "Connection: close"])
async def test_what_a_head_says_of_one_request_is_not_known_for_the_next(door: Door, header: str) -> None:
    stream = door.connect(post(b"first", header))
    await stream.receive_until(b"\r\n\r\n5")
    with suppress(trio.BrokenResourceError):
        await stream.send_all(post(b"second", header))
        await stream.receive_some()
    assert door.fakes.taken == []
    await stream.aclose()


async def test_a_body_that_comes_late_is_read_by_the_task(door: Door) -> None:
    stream = await kept(door)
    await stream.send_all(post(b"later")[:-3])
    await trio.testing.wait_all_tasks_blocked()
    await stream.send_all(b"ter")
    await stream.receive_until(b"\r\n\r\n5")
    assert door.fakes.bodies == [b"first", b"later"]
    await stream.aclose()


async def test_what_cannot_be_taken_is_answered_all_the_same(door: Door) -> None:
    stream = await kept(door)
    door.fakes.takes = False
    await stream.send_all(post(b"second"))
    await stream.receive_until(b"\r\n\r\n6")
    assert door.fakes.bodies == [b"first", b"second"]
    await stream.aclose()


async def test_one_request_after_the_other(door: Door) -> None:
    stream = await kept(door)
    door.fakes.waits = True
    await stream.send_all(post(b"22"))
    await trio.testing.wait_all_tasks_blocked()
    await stream.send_all(post(b"333"))
    await trio.testing.wait_all_tasks_blocked()
    assert door.fakes.taken == [b"22"]
    door.fakes.waits = False
    door.fakes.askers[0].answer(door.fakes.answer_of(b"22"), True)
    first, second = parse(await stream.receive_until(b"\r\n\r\n3"), b"POST")
    assert (first.body, second.body) == (b"2", b"3")
    await stream.aclose()


async def test_who_says_that_nothing_follows_gets_the_answer(door: Door) -> None:
    stream = await kept(door)
    door.fakes.waits = True
    await stream.send_all(post(b"22"))
    await stream.send_eof()
    await trio.testing.wait_all_tasks_blocked()
    door.fakes.askers[0].answer(door.fakes.answer_of(b"22"), True)
    (answer,) = parse(await stream.receive_all(), b"POST")
    assert answer.body == b"2"


async def test_who_has_gone_is_not_waited_for(door: Door) -> None:
    stream = await kept(door)
    door.fakes.waits = True
    await stream.send_all(post(b"22"))
    await trio.testing.wait_all_tasks_blocked()
    stream.wire.reset()
    door.fakes.askers[0].answer(door.fakes.answer_of(b"22"), True)
    await trio.testing.wait_all_tasks_blocked()
    assert door.listener.open_wires == []


async def test_an_answer_that_does_not_come(door: Door, autojump_clock: MockClock) -> None:
    stream = await kept(door)
    door.fakes.waits = True
    await trio.sleep(ANSWER_SECONDS - 1)
    began = trio.current_time()
    await stream.send_all(post(b"22"))
    (answer,) = parse(await stream.receive_all(), b"POST")
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    assert trio.current_time() - began == pytest.approx(ANSWER_SECONDS, abs=0.01)
    door.fakes.askers[0].answer(door.fakes.answer_of(b"22"), True)  # nobody hears it
    await stream.aclose()


async def test_a_request_begins_the_time_of_idleness_anew(door: Door, autojump_clock: MockClock) -> None:
    stream = await kept(door)
    await trio.sleep(IDLE_SECONDS - 5)
    await stream.send_all(post(b"22"))
    await stream.receive_until(b"\r\n\r\n2")
    began = trio.current_time()
    assert await stream.receive_all() == b""
    assert trio.current_time() - began == pytest.approx(IDLE_SECONDS, abs=0.01)


@pytest.mark.parametrize("later", [False, True])
async def test_a_crash_ends_this_connection_only(door: Door, log: Log, later: bool) -> None:
    stream = await kept(door)
    other = await kept(door)
    door.fakes.waits = True
    if not later:
        door.fakes.take_post = raises  # type: ignore[method-assign]
    await stream.send_all(post(b"22"))
    await trio.testing.wait_all_tasks_blocked()
    if later:
        door.fakes.askers[0].crashed(ValueError("in a callback"))
    (answer,) = parse(await stream.receive_all(), b"POST")
    assert answer.status == 500
    assert log.count("Request crashed") == 1
    await stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert len(door.listener.open_wires) == 1
    await other.aclose()


def raises(head: Head, visitor: Visitor, body: bytes, asker: Asker) -> bool:
    raise ValueError("at once")


async def test_draining_waits_for_what_was_taken(door: Door) -> None:
    stream = await kept(door)
    door.fakes.waits = True
    await stream.send_all(post(b"22"))
    await trio.testing.wait_all_tasks_blocked()
    door.front.draining = True
    with trio.move_on_after(0.01) as scope:
        await door.front.wait_answered(10)
    assert scope.cancelled_caught
    door.fakes.keep = False
    door.fakes.askers[0].answer(door.fakes.answer_of(b"22"), False)
    with trio.fail_after(1):
        await door.front.wait_answered(10)
    (answer,) = parse(await stream.receive_all(), b"POST")
    assert (answer.body, answer.headers["connection"]) == (b"2", "close")
    await stream.aclose()


# Stopping.


async def test_stop_accepting_lets_requests_finish(door: Door) -> None:
    stream = door.connect(raw(MESSAGES, "Content-Length: 4"))
    await trio.testing.wait_all_tasks_blocked()
    door.front.stop_accepting()
    with pytest.raises(ConnectionRefusedError):
        door.listener.connect()
    await stream.send_all(b"body")
    await stream.receive_until(b"202")
    await stream.aclose()


async def test_draining_closes_idle_connections_and_keeps_none(door: Door) -> None:
    idle = door.connect(post(b"x"))
    await idle.receive_until(b"1")
    begun = door.connect(post(b"x"))
    await begun.receive_until(b"1")
    await begun.send_all(b"POST /api/messages HTTP/1.1\r\n")
    await trio.testing.wait_all_tasks_blocked()
    door.front.draining = True
    assert await idle.receive_all() == b""
    await begun.send_all(b"Host: localhost\r\nContent-Length: 2\r\n\r\nxx")
    (answer,) = parse(await begun.receive_all(), b"POST")
    assert answer.body == b"2"
    (answer,) = await door.ask(post(b"xyz") + post(b"not kept"))
    assert answer.body == b"3"
    for stream in (idle, begun):
        await stream.aclose()


async def test_cancelled_it_closes_everything_at_once(settings: Settings, log: Log) -> None:
    door = Door(settings, log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.serve)
        for data in (b"", b"GET", post(b"x"), raw(MESSAGES, "Content-Length: 5"), *[b"G"] * 60):
            door.connect(data)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    # Two have been admitted for good, fifty are handshakes, one was accepted and waits for room.
    assert len(door.listener.wires) == 2 + 50 + 1
    assert door.listener.open_wires == []
    assert door.listener.closed


# Streams that are let in without a task.

STREAM = raw("GET /ws/alice HTTP/1.1", *UPGRADE)


async def test_a_plain_stream_is_handed_over_without_a_task(door: Door) -> None:
    def let_in(link: Link, at: LetIn) -> None:
        assert link.try_send(b"yours now")
        door.fakes.links.append(link)
        at.handed_over()

    door.fakes.let_in = let_in
    client = door.connect(STREAM + b"early frame")
    assert await client.receive_until(b"now") == b"yours now"
    assert door.fakes.asked == [("websocket", "alice")]
    (link,) = door.fakes.links
    assert (door.ledger.links[link].owner, door.front.handshakes) == (None, 0)
    assert link.take_all() == b"early frame"
    link.close()
    assert not door.ledger.links


async def test_what_comes_while_it_is_being_let_in_waits(door: Door, autojump_clock: MockClock) -> None:
    waiting: list[tuple[Link, LetIn]] = []
    door.fakes.let_in = lambda link, at: waiting.append((link, at))
    client = door.connect(STREAM)
    await trio.testing.wait_all_tasks_blocked()
    ((link, at),) = waiting
    await client.send_all(b"more")
    await trio.sleep(2 * SILENT_SECONDS)
    assert (link.unread(), link.closed) == (4, False)

    async def go_on() -> None:
        assert await link.receive_some() == b"more"
        await link.send_all(b"now")

    at.start(go_on)
    assert await client.receive_until(b"now") == b"now"
    at.start(go_on)  # it is through
    await trio.testing.wait_all_tasks_blocked()
    link.close()


async def test_a_crash_without_a_task_is_500(door: Door) -> None:
    def let_in(link: Link, at: LetIn) -> None:
        raise RuntimeError("a bug")

    door.fakes.let_in = let_in
    (answer,) = await door.ask(STREAM)
    assert (answer.status, door.log.count("Request crashed")) == (500, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert not door.ledger.links


async def test_a_head_in_pieces_gets_a_task(door: Door, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    client = door.connect(STREAM[:30])
    await trio.sleep(HEAD_SECONDS / 2)
    await client.send_all(STREAM[30:])
    assert await client.receive_until(b"now") == b"yours now"
    assert trio.current_time() - began < HEAD_SECONDS
    door.fakes.links[0].close()


@pytest.mark.parametrize("first", [b"", b"GET /ws/al"])
async def test_who_does_not_speak_has_ten_seconds_in_all(door: Door, first: bytes, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    client = door.connect(first)
    await trio.sleep(SILENT_SECONDS / 2)
    await client.receive_all()
    assert trio.current_time() - began == pytest.approx(HEAD_SECONDS, abs=1.1)


async def test_who_leaves_without_a_word_leaves_nothing(door: Door) -> None:
    client = door.connect(eof=True)
    assert await client.receive_all() == b""
    await trio.testing.wait_all_tasks_blocked()
    assert not door.ledger.links
    assert door.front.handshakes == 0


async def test_the_door_closes_behind_those_who_are_being_let_in(door: Door) -> None:
    waiting: list[tuple[Link, LetIn]] = []
    door.fakes.let_in = lambda link, at: waiting.append((link, at))
    client, silent = door.connect(STREAM), door.connect()
    await trio.testing.wait_all_tasks_blocked()
    door.front.stop_accepting()
    silent.wire.close()
    await trio.testing.wait_all_tasks_blocked()
    assert not door.ended.is_set()
    ((link, at),) = waiting
    link.close()
    at.handed_over()
    await door.ended.wait()
    assert await client.receive_all() == b""


async def test_a_hard_end_closes_who_is_being_let_in(settings: Settings) -> None:
    door = Door(settings, Log())
    waiting: list[tuple[Link, LetIn]] = []
    door.fakes.let_in = lambda link, at: waiting.append((link, at))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.serve)
        client, silent = door.connect(STREAM), door.connect()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    ((link, at),) = waiting
    assert link.closed
    at.crashed(RuntimeError("nobody is told any more"))
    at.handed_over()
    assert [await stream.receive_all() for stream in (client, silent)] == [b"", b""]
    assert not door.ledger.links


async def test_a_crash_before_the_head_is_known_is_one_connections(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks at a head without a task must not end the server."""

    def crash(*_: object, **__: object) -> None:
        raise RecursionError("a bug")

    monkeypatch.setattr(door.front._access, "check", crash)
    (answer,) = await door.ask(STREAM)
    assert (answer.status, door.log.count("Request crashed")) == (500, 1)
    monkeypatch.undo()
    assert await door.connect(STREAM).receive_until(b"now") == b"yours now"
    door.fakes.links[0].close()
