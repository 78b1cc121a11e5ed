from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import h11
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from mythos_trio import http1
from mythos_trio.core.errors import ErrorType, Refusal, busy
from mythos_trio.http1 import (
    MAX_HEAD,
    Head,
    HttpRefusal,
    Repeated,
    error_body,
    parse_head,
    read_body,
    read_head,
    refused,
    response,
)
from mythos_trio.link import Link
from tests.support.memory_net import MemoryStream, wire_pair

T = TypeVar("T")


def raw(line: str = "GET / HTTP/1.1", *headers: str, host: str | None = "localhost") -> bytes:
    lines = [line, *([f"Host: {host}"] if host is not None else []), *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def status_of(head: bytes) -> int:
    with pytest.raises(Refusal) as caught:
        parse_head(head)
    return caught.value.status


# Heads.


def test_a_head_with_everything() -> None:
    data = raw("GET /ws/al%69ce?a=1&b=&a=2&c=x%20y+z HTTP/1.1", "X-One: 1", "x-one: 2", "Odd: caf\xe9")
    head = parse_head(data)
    assert (head.method, head.version, head.raw) == ("GET", "1.1", data)
    assert head.target == "/ws/al%69ce?a=1&b=&a=2&c=x%20y+z"
    assert head.path == "/ws/alice"
    assert head.query == {"a": "2", "b": "", "c": "x y z"}
    assert head.headers == (("host", "localhost"), ("x-one", "1"), ("x-one", "2"), ("odd", "caf\xe9"))
    assert head.header("x-one") == "1, 2"
    assert head.header("absent") is None
    assert not head.has_body


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (raw(), True),
        (raw("GET / HTTP/1.1", "Connection: Keep-Alive, Close"), False),
        (raw("GET / HTTP/1.0"), False),
        (raw("GET / HTTP/1.0", "Connection: keep-alive"), False),
    ],
)
def test_keep_alive(data: bytes, expected: bool) -> None:
    assert parse_head(data).keep_alive is expected


@pytest.mark.parametrize(
    ("headers", "has_body", "length", "chunked"),
    [
        ([], False, None, False),
        (["Content-Length: 0"], False, 0, False),
        (["Content-Length: 12"], True, 12, False),
        (["Transfer-Encoding: Chunked"], True, None, True),
    ],
)
def test_what_the_head_says_of_the_body(headers: list[str], has_body: bool, length: int | None, chunked: bool) -> None:
    head = parse_head(raw("POST / HTTP/1.1", *headers))
    assert (head.has_body, head.content_length, head.chunked) == (has_body, length, chunked)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (raw("GET /"), 400),
        (raw("GET  / HTTP/1.1"), 400),
        (raw("GET / http/1.1"), 400),
        (raw("G\x00T / HTTP/1.1"), 400),
        (raw("GET /a b HTTP/1.1"), 400),
        (raw("GET / HTTP/1.1 "), 400),
        (raw("GET / HTTP/1.1", host=None), 400),
        (raw("GET / HTTP/1.1", "Host: other"), 400),
        (raw("GET / HTTP/1.1", "Bad Name: x"), 400),
        (raw("GET / HTTP/1.1", "Name : x"), 400),
        (raw("GET / HTTP/1.1", "Null: a\x00b"), 400),
        (raw("GET / HTTP/1.1", "No colon"), 400),
        (raw("GET / HTTP/1.1", "Long: 1", " folded"), 400),
        (raw("POST / HTTP/1.1", "Content-Length: 5", "Content-Length: 6"), 400),
        (raw("POST / HTTP/1.1", "Content-Length: 5", "content-length: 5"), 400),
        (raw("POST / HTTP/1.1", "Content-Length: 5, 5"), 400),
        (raw("POST / HTTP/1.1", "Content-Length: -5"), 400),
        (raw("POST / HTTP/1.1", "Content-Length: 0x5"), 400),
        (raw("POST / HTTP/1.1", "Content-Length: " + "9" * 30), 400),
        (raw("POST / HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked"), 400),
        (raw("POST / HTTP/1.0", "Transfer-Encoding: chunked"), 400),
        (raw("POST / HTTP/1.1", "Transfer-Encoding: gzip"), 501),
        (raw("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 501),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (raw("GET / HTTP/2.0"), 505),
        (raw("GET / HTTP/0.9"), 505),
        (raw("GET / HTTP/1.1", *(f"X-{n}: 1" for n in range(100))), 431),
    ],
)
def test_bad_heads(data: bytes, status: int) -> None:
    assert status_of(data) == status


def test_a_refusal_does_not_repeat_the_token() -> None:
    with pytest.raises(Refusal) as caught:
        parse_head(raw("GET /ws/alice?token=SECRET"))
    assert "SECRET" not in caught.value.message


# Targets.


@pytest.mark.parametrize(
    ("target", "path", "origin"),
    [
        ("/", "/", "/"),
        ("//double", "//double", "//double"),
        ("/a/../b", "/a/../b", "/a/../b"),
        ("/caf%C3%A9", "/café", "/caf%C3%A9"),
        ("http://localhost/x?y=1", "/x", "/x?y=1"),
        ("http://LOCALHOST", "/", "/"),
        ("http://localhost?y=1", "/", "/?y=1"),
    ],
)
def test_targets(target: str, path: str, origin: str) -> None:
    head = parse_head(raw(f"GET {target} HTTP/1.1"))
    assert head.path == path
    assert head.origin_raw == raw(f"GET {origin} HTTP/1.1")


def test_options_may_ask_about_the_whole_server() -> None:
    head = parse_head(raw("OPTIONS * HTTP/1.1"))
    assert (head.path, head.query, head.origin_raw) == ("*", {}, head.raw)


@pytest.mark.parametrize(
    "target",
    [
        "*",
        "x",
        "localhost:80",
        "ftp://localhost/",
        "http://",
        "http://elsewhere/",
        "http://user@localhost/",
        "http://[::1/",
        "/%",
        "/%4",
        "/%zz",
        "/?a=%zz",
        "/%00",
        "/%0a",
        "/%7f",
        "/?a=%00",
        "/%ff",
        "/?a=%ff",
        "/#fragment",
        "/?" + "&".join(["a=1"] * 101),
    ],
)
def test_bad_targets(target: str) -> None:
    assert status_of(raw(f"GET {target} HTTP/1.1")) == 400


@pytest.mark.parametrize("byte", [0x00, 0x07, 0x7F, 0x80, 0xE9])
def test_bytes_that_no_target_has(byte: int) -> None:
    assert status_of(b"GET /a" + bytes([byte]) + b"b HTTP/1.1\r\nHost: x\r\n\r\n") == 400


def outcome(data: bytes) -> Head | int:
    """The head, or the status of the refusal: nothing else may come of any bytes."""
    return outcome_of(parse_head, data)


def outcome_of(parse: Callable[[bytes], T], data: bytes) -> T | int:
    try:
        return parse(data)
    except HttpRefusal as refusal:
        return refusal.status


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_refused(data: bytes) -> None:
    assert isinstance(outcome(data + b"\r\n\r\n"), Head) or outcome(data + b"\r\n\r\n") in (400, 431, 501, 505)


_names = st.sampled_from(["Host", "host", "Content-Length", "content-length", "Connection", "Transfer-Encoding", "X-A"])
_values = st.one_of(
    st.sampled_from(
        ["localhost", "a, b", "12", "+12", "1 2", "", " 12", "12 ", "close", "chunked", "\t7", "caf\xe9", "1" * 30]
    ),
    st.text(st.characters(min_codepoint=1, max_codepoint=0xFF), max_size=6),
)


@given(
    st.sampled_from(["GET", "POST", "get", "PROPFINDX", ""]),
    st.sampled_from(["/", "/a?b=c", "/%41", "*", "http://localhost/x", "/a b", "/#", "/api/messages"]),
    st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0"]),
    st.lists(st.tuples(_names, st.sampled_from([":", ": ", ":  ", " :", ":\t"]), _values), max_size=5),
    st.sampled_from(["\r\n", "\n"]),
)
def test_a_plain_head_is_what_h11_reads(
    method: str, target: str, version: str, headers: list[tuple[str, str, str]], end: str
) -> None:
    lines = [f"{method} {target} {version}", "Host: localhost", *("".join(header) for header in headers), "", ""]
    for data in (end.join(lines).encode("latin-1"), end.join([lines[0], *lines[2:]]).encode("latin-1")):
        plain = outcome_of(http1._parse_plain, data)
        assert plain is None or plain == outcome_of(http1._parse_strictly, data)


def test_what_clients_send_is_plain() -> None:
    lines = ["POST /api/messages HTTP/1.1", "Content-Length: 2", "Accept: */*", "Content-Type: application/json"]
    assert http1._parse_plain(raw(*lines)) is not None
    assert http1._parse_plain(raw("GET /ws/a?position=1-2 HTTP/1.1", "User-Agent: a b (c; d)")) is not None


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=60))
def test_any_target_is_understood_or_refused(target: str) -> None:
    head = outcome(raw(f"GET /{target} HTTP/1.1"))
    assert head == 400 or (isinstance(head, Head) and head.path.startswith("/") and "\0" not in head.path)


# Reading heads.


@pytest.fixture
async def ends(nursery: trio.Nursery) -> AsyncIterator[tuple[MemoryStream, Link]]:
    client, wire = wire_pair()
    link = Link(wire, write_timeout=10, start=nursery.start_soon)
    yield MemoryStream(client), link
    link.close()


Ends = tuple[MemoryStream, Link]


async def test_reading_a_head_leaves_what_follows(ends: Ends) -> None:
    client, link = ends
    await client.send_all(raw("POST /a HTTP/1.1", "Content-Length: 4") + b"body" + raw("GET /b HTTP/1.1"))
    first = await read_head(link, timeout=10)
    assert first is not None
    assert await read_body(link, first, limit=100, timeout=10) == b"body"
    second = await read_head(link, timeout=10)
    assert second is not None
    assert (first.path, second.path) == ("/a", "/b")
    assert link.unread() == 0


async def test_a_head_byte_by_byte(ends: Ends, autojump_clock: MockClock) -> None:
    client, link = ends
    data = raw("GET /slow HTTP/1.1")

    async def send() -> None:
        for at in range(len(data)):
            await client.send_all(data[at : at + 1])
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        head = await read_head(link, timeout=10)
    assert head is not None
    assert head.raw == data


async def test_a_head_that_is_too_slow_is_408_after_one_deadline(ends: Ends, autojump_clock: MockClock) -> None:
    client, link = ends

    async def trickle() -> None:
        while True:
            await client.send_all(b"G")
            await trio.sleep(1)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        with pytest.raises(HttpRefusal) as caught:
            await read_head(link, timeout=10)
        nursery.cancel_scope.cancel()
    assert caught.value.status == 408
    assert trio.current_time() - began == pytest.approx(10)


async def test_nothing_at_all_is_no_request(ends: Ends, autojump_clock: MockClock) -> None:
    client, link = ends
    assert await read_head(link, timeout=10) is None
    assert trio.current_time() == pytest.approx(10, abs=1e-6)
    await client.send_eof()
    assert await read_head(link, timeout=10) is None


async def test_what_has_begun_has_its_own_deadline(ends: Ends, autojump_clock: MockClock) -> None:
    _, link = ends
    await trio.sleep(70)
    with pytest.raises(HttpRefusal) as caught:
        await read_head(link, timeout=10, begun=b"GET / HT")
    assert caught.value.status == 408
    assert trio.current_time() == pytest.approx(80, abs=1e-6)


async def test_what_follows_a_head_is_received_next(ends: Ends, autojump_clock: MockClock) -> None:
    client, link = ends
    head = await read_head(link, timeout=10, begun=raw("POST / HTTP/1.1", "Content-Length: 6") + b"abcd")
    assert head is not None
    await client.send_all(b"efgh")
    assert await read_body(link, head, limit=100, timeout=10) == b"abcdef"
    assert await link.receive_some() == b"gh"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost:", 400),
        (b"\x16\x03\x01\x02\x00", 400),
        (b"\r\nGET / HTTP/1.1\r\n", 400),
        (b"GET /" + b"x" * MAX_HEAD, 414),
        (raw("GET / HTTP/1.1", "Long: " + "x" * MAX_HEAD), 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000, 431),
    ],
    ids=["incomplete", "tls", "blank", "long line", "long header", "endless"],
)
async def test_heads_that_never_will_be(ends: Ends, data: bytes, status: int) -> None:
    client, link = ends
    client.wire.send(data)
    client.wire.send_eof()
    with pytest.raises(HttpRefusal) as caught:
        await read_head(link, timeout=10)
    assert caught.value.status == status
    assert link.received_bytes <= 2 * MAX_HEAD


async def test_a_head_of_just_the_limit(ends: Ends) -> None:
    client, link = ends
    bare = len(raw("GET / HTTP/1.1", "Long: "))
    data = raw("GET / HTTP/1.1", "Long: " + "x" * (MAX_HEAD - bare))
    assert len(data) == MAX_HEAD
    await client.send_all(data + b"after")
    head = await read_head(link, timeout=10)
    assert head is not None
    assert await link.receive_some() == b"after"
    await client.send_all(data.replace(b"Long:", b"Long: x"))
    with pytest.raises(HttpRefusal):
        await read_head(link, timeout=10)


# Reading bodies.


async def body_of(ends: Ends, head: bytes, body: bytes = b"", *, limit: int = 100, timeout: float = 10) -> bytes:
    client, link = ends
    await client.send_all(body)
    return await read_body(link, parse_head(head), limit=limit, timeout=timeout)


POST = "POST / HTTP/1.1"
CHUNKED = raw(POST, "Transfer-Encoding: chunked")


async def test_a_body_with_a_length(ends: Ends) -> None:
    assert await body_of(ends, raw(POST, "Content-Length: 4"), b"bodyGET") == b"body"
    assert await ends[1].receive_some() == b"GET"


async def test_an_empty_body(ends: Ends) -> None:
    assert await body_of(ends, raw(POST, "Content-Length: 0")) == b""


async def test_a_chunked_body_leaves_what_follows(ends: Ends) -> None:
    data = b"3\r\nabc\r\n4;ext=1\r\ndefg\r\n0\r\nTrailer: x\r\n\r\n"
    assert await body_of(ends, CHUNKED, data + b"GET /") == b"abcdefg"
    assert await ends[1].receive_some() == b"GET /"


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (raw(POST), b"", 411),
        (raw(POST, "Content-Length: 101"), b"", 413),
        (raw(POST, "Content-Length: 99999999999999999999"), b"", 413),
        (CHUNKED, b"65\r\n" + bytes(101), 413),
        (CHUNKED, b"32\r\n" + bytes(50) + b"\r\n33\r\n" + bytes(51), 413),
        (CHUNKED, b"1\r\nx\r\n" * 99 + b"1" + b"0" * 19 + b"\r\n" + bytes(200), 413),
        (CHUNKED, b"xyz\r\n", 400),
        (CHUNKED, b"-1\r\n", 400),
        (CHUNKED, b"3\r\nabcd", 400),
        (CHUNKED, b"5" + b";x" * 20000, 413),
        (CHUNKED, b"0\r\n" + b"T: x\r\n" * 10000, 413),
        (CHUNKED, b"5\r\nab", 400),
        (raw(POST, "Content-Length: 5"), b"four", 400),
        (raw(POST, "Content-Length: 5", "Expect: miracles"), b"", 417),
    ],
)
async def test_bad_bodies(ends: Ends, head: bytes, body: bytes, status: int) -> None:
    ends[0].wire.send(body)
    ends[0].wire.send_eof()
    with pytest.raises(HttpRefusal) as caught:
        await read_body(ends[1], parse_head(head), limit=100, timeout=10)
    assert caught.value.status == status


async def test_tiny_chunks_are_too_much_work(ends: Ends) -> None:
    client, link = ends
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"1\r\nx\r\n" * 60_000)
        with pytest.raises(HttpRefusal) as caught:
            await read_body(link, parse_head(CHUNKED), limit=65536, timeout=10)
        nursery.cancel_scope.cancel()
    assert caught.value.status == 413
    assert link.received_bytes <= 65536 * 5 // 4 + 3 * MAX_HEAD


async def test_a_body_that_is_too_slow(ends: Ends, autojump_clock: MockClock) -> None:
    with pytest.raises(HttpRefusal) as caught:
        await body_of(ends, raw(POST, "Content-Length: 5"), b"four")
    assert caught.value.status == 408
    assert trio.current_time() == pytest.approx(10, abs=1e-6)


async def test_expect_is_answered_before_the_body(ends: Ends) -> None:
    client, link = ends
    head = parse_head(raw(POST, "Content-Length: 4", "Expect: 100-Continue"))
    bodies: list[bytes] = []

    async def read() -> None:
        bodies.append(await read_body(link, head, limit=100, timeout=10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        assert await client.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send_all(b"body")
    assert bodies == [b"body"]


@pytest.mark.parametrize(
    "head",
    [
        raw(POST, "Content-Length: 4", "Expect: 100-continue"),
        raw("POST / HTTP/1.0", "Content-Length: 4", "Expect: 100-continue"),
    ],
    ids=["the body is here already", "HTTP/1.0"],
)
async def test_expect_need_not_be_answered(ends: Ends, head: bytes) -> None:
    assert await body_of(ends, head, b"body") == b"body"
    assert ends[1].sent_bytes == 0


async def test_a_body_that_is_too_big_is_refused_instead_of_continued(ends: Ends) -> None:
    with pytest.raises(HttpRefusal) as caught:
        await body_of(ends, raw(POST, "Content-Length: 400", "Expect: 100-continue"))
    assert caught.value.status == 413
    assert ends[1].sent_bytes == 0


# Answers.


def parse_answer(data: bytes, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    answer = client.next_event()
    assert isinstance(answer, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return answer.status_code, {name.decode(): value.decode() for name, value in answer.headers}, body


def test_an_answer() -> None:
    data = response(202, b'{"seq":1}', headers=[("X-More", "y")], keep_alive=True, server_id="s1")
    status, headers, body = parse_answer(data)
    assert (status, body) == (202, b'{"seq":1}')
    assert headers.pop("date").endswith(" GMT")
    assert headers == {
        "server-id": "s1",
        "content-type": "application/json",
        "content-length": "9",
        "x-more": "y",
    }


def test_an_answer_that_is_the_last() -> None:
    assert parse_answer(response(200, b"x", keep_alive=False, server_id="s"))[1]["connection"] == "close"


def test_answers_without_a_body() -> None:
    assert b"Content-Length" not in response(204, b"", keep_alive=True, server_id="s")
    status, headers, body = parse_answer(
        response(403, b"forbidden", keep_alive=False, server_id="s", head_only=True), "HEAD"
    )
    assert (status, headers["content-length"], body) == (403, "9", b"")


def test_no_header_breaks_a_line() -> None:
    with pytest.raises(ValueError, match="line break"):
        response(200, b"", headers=[("X", "a\r\nSet-Cookie: b")], keep_alive=True, server_id="s")


def test_the_error_format() -> None:
    assert json.loads(error_body(ErrorType.SESSION, "gone", {"session_id": "s"}, 0.5)) == {
        "error": True,
        "error_type": "session_error",
        "message": "gone",
        "details": {"session_id": "s"},
        "timestamp": "1970-01-01T00:00:00.500Z",
    }


def test_a_refusal_as_an_answer() -> None:
    status, headers, body = parse_answer(refused(busy("full", retry_ms=1500), now=0, server_id="s"))
    assert (status, headers["retry-after"], headers["connection"]) == (503, "2", "close")
    assert json.loads(body)["error_type"] == "capacity_error"
    refusal = HttpRefusal(405, "no", headers=(("Allow", "GET"),))
    assert parse_answer(refused(refusal, now=0, server_id="s", headers=[("Vary", "Origin")]))[1]["allow"] == "GET"


# A head that comes again.

LENGTHS = st.one_of(st.integers(0, 40).map(str), st.sampled_from(["", "+3", "03", "3 ", "3,3", "٣", "1" * 16]))


@given(
    first=st.sampled_from(["Content-Length: 3", "content-length:3", "CONTENT-LENGTH: 3"]),
    others=st.lists(st.sampled_from(["X-A: 1", "X-B: content-length: 7", "Cookie: a=b"]), max_size=3),
    length=LENGTHS,
    body=st.binary(max_size=40),
    cut=st.integers(-3, 3),
)
def test_what_is_known_by_its_bytes_is_what_would_be_read(
    first: str, others: list[str], length: str, body: bytes, cut: int
) -> None:
    def head_of(line: str) -> bytes:
        lines = ["POST /api/messages HTTP/1.1", "Host: x", *others[:1], line, *others[1:], "", ""]
        return "\r\n".join(lines).encode()

    known = Repeated.of(parse_head(head_of(first)))
    assert known is not None
    raw = head_of(first.replace("3", length))
    data = raw + (body if cut >= 0 else body[:cut])
    found = known.body(data)
    if length == str(len(body)) and cut >= 0:
        assert found == body
    if found is not None:
        again = parse_head(raw)
        assert data[len(raw) :] == found
        assert again.content_length == len(found)
        assert [pair for pair in again.headers if pair[0] != "content-length"] == [
            pair for pair in known.head.headers if pair[0] != "content-length"
        ]


@pytest.mark.parametrize(
    "line",
    ["Idempotency-Key: k", "Expect: 100-continue", "X-Odd: caf\xe9", "X-Folded: a\r\n b", "X-Long: " + "x" * 17000],
)
def test_a_head_that_is_not_to_be_known_again(line: str) -> None:
    raw = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n{line}\r\n\r\n".encode("latin-1")
    head = Head("POST", "/", "/", {}, (), "1.1", raw, {line.partition(":")[0].lower(): "x"})
    assert Repeated.of(head) is None
