"""A client's connections: the event stream's parser, addresses, and what is wrong with an answer."""

from __future__ import annotations

import re
import ssl

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import memory_stream_pair

from mythos_trio import carriers
from mythos_trio.carriers import (
    BadUrl,
    Base,
    EventStream,
    Lost,
    open_event_stream,
    open_exchange,
    open_websocket,
    outcome_of,
    parse_url,
)

BASE = Base("server", 80, False, "")
HEADERS = {"Host": "server"}


# The event stream's parser.


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"id: 1-2\nevent: message\nretry: 5\ndata: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b": comment\n\ndata: a\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [b"a", b"b", b"c"]),
        (b"data\n\n", [b""]),
        (b"data: a\n", []),
        (b"dat: a\n\n", []),
        (b"\n\n\n", []),
    ],
)
def test_events(data: bytes, events: list[bytes]) -> None:
    assert EventStream().feed(data) == events
    parser = EventStream()
    assert [event for byte in data for event in parser.feed(bytes([byte]))] == events


@given(st.lists(st.sampled_from([b"data: x", b"data:", b"id: 1", b":", b"\n", b"\r", b"\r\n", b"y"])), st.data())
def test_how_the_bytes_are_cut_makes_no_difference(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    parser = EventStream()
    assert [event for piece in pieces for event in parser.feed(piece)] == EventStream().feed(stream)


@pytest.mark.parametrize("chunk", [b"data: " + b"x" * 600, b"data: " + b"x" * 60 + b"\n"])
def test_an_event_without_an_end_is_bounded(chunk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "MAX_MESSAGE", 500)
    parser = EventStream()
    with pytest.raises(Lost):
        feed_often(parser, chunk)


def feed_often(parser: EventStream, chunk: bytes) -> None:
    for _ in range(20):
        parser.feed(chunk)


# Addresses.


@pytest.mark.parametrize(
    ("url", "base", "authority"),
    [
        ("http://localhost:8000", Base("localhost", 8000, False, ""), "localhost:8000"),
        ("localhost:8000", Base("localhost", 8000, False, ""), "localhost:8000"),
        ("https://play.example/game/", Base("play.example", 443, True, "/game"), "play.example"),
        ("wss://play.example", Base("play.example", 443, True, ""), "play.example"),
        ("ws://[::1]:8000/", Base("::1", 8000, False, ""), "[::1]:8000"),
        ("http://Host:80", Base("host", 80, False, ""), "host"),
    ],
)
def test_addresses(url: str, base: Base, authority: str) -> None:
    assert parse_url(url) == base
    assert base.authority == authority


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:99999", "http://x/?a=b", "", "http://x:port"])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(BadUrl, match=re.escape(repr(url))):
        parse_url(url)


# Answers.


class OneAnswer:
    """Sends *answer* to whoever dials, and keeps what was asked."""

    def __init__(self, nursery: trio.Nursery, answer: bytes, *, end: bool = True) -> None:
        self._nursery = nursery
        self._answer = answer
        self._end = end
        self.asked = b""
        self.client_closed = trio.Event()

    async def dial(self, _base: Base) -> trio.abc.Stream:
        ours, theirs = memory_stream_pair()
        self._nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.asked += bytes(await stream.receive_some())
        await stream.send_all(self._answer)
        if self._end:
            await stream.send_eof()
        while await stream.receive_some():
            pass
        self.client_closed.set()


async def test_a_post_and_its_answer(nursery: trio.Nursery) -> None:
    server = OneAnswer(nursery, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202 OK\r\nContent-Length: 2\r\n\r\n{}")
    async with open_exchange(server.dial, BASE) as exchange:
        response = await exchange.ask("POST", "/x", {**HEADERS, "Content-Length": "4"}, b"body")
        assert response.status_code == 202
        assert await exchange.body() == b"{}"
    assert server.asked == b"POST /x HTTP/1.1\r\nHost: server\r\nContent-Length: 4\r\n\r\nbody"
    await server.client_closed.wait()


async def test_a_chunked_event_stream(nursery: trio.Nursery) -> None:
    """As some proxies make of it."""
    event = b'data: {"type":"a"}\n\n'
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (event[:7], event[7:]))
    server = OneAnswer(nursery, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    async with open_event_stream(server.dial, BASE, "/sse/a", HEADERS) as carrier:
        assert await carrier.receive() == {"type": "a"}
        with pytest.raises(Lost, match="the stream ended"):
            await carrier.receive()
    await server.client_closed.wait()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 403 No\r\nContent-Length: 17\r\n\r\n" + b'{"message":"why"}', "why (403)"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "(204)"),
        (b"SSH-2.0-OpenSSH_9\r\n", "does not speak HTTP"),
        (b"", "without an answer"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: nonsense\n\n", "no JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [1]\n\n", "no message"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"type": 1}\n\n', "no message"),
    ],
)
async def test_what_is_wrong_with_an_event_stream(nursery: trio.Nursery, answer: bytes, why: str) -> None:
    server = OneAnswer(nursery, answer)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # any: what it means is looked at below
        async with open_event_stream(server.dial, BASE, "/sse/a", HEADERS) as carrier:
            await carrier.receive()
    assert why in outcome_of(caught.value).why


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 403 No\r\nContent-Length: 17\r\n\r\n" + b'{"message":"why"}', "why (403)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "(200)"),
    ],
)
async def test_what_is_wrong_with_a_websocket(nursery: trio.Nursery, answer: bytes, why: str) -> None:
    server = OneAnswer(nursery, answer)
    found: list[BaseException] = []
    try:
        async with open_websocket(server.dial, BASE, "/ws/a", HEADERS):
            pass
    except* Exception as group:
        found.extend(group.exceptions)
    assert len(found) == 1
    assert why in outcome_of(found[0]).why
    await server.client_closed.wait()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "connection refused"),
        (OSError("all attempts to connect to x:1 failed"), "all attempts to connect to x:1 failed"),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), "TLS: certificate verify failed"),
        (trio.BrokenResourceError(), "the connection broke"),
        (trio.TooSlowError(), "no answer in time"),
    ],
)
def test_what_exceptions_mean(error: Exception, why: str) -> None:
    assert outcome_of(error).why == why


def test_a_bug_is_not_taken_for_a_bad_connection() -> None:
    with pytest.raises(ZeroDivisionError):
        outcome_of(ZeroDivisionError())


async def test_a_refused_connection_is_named_in_few_words() -> None:
    listener = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener[0].socket.getsockname()[1]
    await listener[0].aclose()
    with pytest.raises(OSError, match=str(port)) as caught:
        await carriers.dial(Base("localhost", port, False, ""))
    assert outcome_of(caught.value).why == "connection refused"
