"""Requests that no decent client sends. Each gets a clear answer, and nobody else notices.

All share one server, on which a bystander is connected over both transports: after every test a message still
reaches it, and both connections are the ones that it has had from the start.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from tests.e2e.clients import (
    UPGRADE,
    Answer,
    CurlSSE,
    Message,
    Raw,
    WebSocket,
    client_frame,
    open_websocket,
)
from tests.e2e.conftest import Make
from tests.e2e.servers import Server, wait_until

HOST = b"Host: localhost\r\n"
MAX_MESSAGE = 65536


@pytest.fixture(scope="module")
def shared(make_shared: Make) -> Server:
    # Every test has a few connects and commands of its own, from one address.
    return make_shared(RATE_LIMIT_REQUESTS="100000").start()


class Bystander:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._clients = [CurlSSE(f"{server.url}/sse/bystander"), WebSocket(f"{server.ws_url}/ws/bystander")]
        self._numbers = count()
        for client in self._clients:
            assert client.welcome
        self.check()

    def check(self) -> None:
        number = next(self._numbers)
        assert self._server.published("bystander", f"line {number}")["connections"] == 2
        for client in self._clients:
            client.wait_line(f"line {number}")
            assert client.lines == [f"line {n}" for n in range(number + 1)]
            assert not client.ended
            assert len([m for m in client.messages if m["type"] == "welcome"]) == 1

    def close(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture(scope="module")
def bystander(shared: Server) -> Iterator[Bystander]:
    bystander = Bystander(shared)
    yield bystander
    bystander.close()
    assert not [line for line in shared.log_lines() if line["level"] in ("ERROR", "CRITICAL")]


@pytest.fixture
def server(shared: Server, bystander: Bystander) -> Iterator[Server]:
    yield shared
    bystander.check()


def check_error(answer: Answer, status: int, error_type: str = "validation_error") -> Message:
    """The status, and the error format of all planes; its body."""
    assert answer.status == status, answer
    assert answer.headers["server-id"]
    assert answer.headers["content-type"] == "application/json"
    body: Message = answer.json
    assert set(body) == {"error", "error_type", "message", "details", "timestamp"}
    assert body["error"] is True
    assert body["error_type"] == error_type
    assert body["message"]
    return body


def ask(server: Server, data: bytes) -> Answer:
    with Raw(server.port) as raw:
        raw.send(data)
        return raw.answer()


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (path.encode(), HOST, lines, len(body), body)


def message(content: object = "x", **fields: object) -> dict[str, Any]:
    return {"player_id": "victim", "message": {"type": "line", "content": content, **fields}}


# Paths, methods, ids.


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/ws/", 404),
        ("GET", "/sse", 404),
        ("GET", "/api/connections/alice/nothing/more", 404),
        ("GET", "/api/messages/unknown-id", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/api/messages", 405),
        ("PUT", "/api/messages", 405),
        ("DELETE", "/health", 405),
        ("BREW", "/health", 405),
        ("POST", "/sse/alice", 405),
        ("POST", "/ws/alice", 405),
        ("CONNECT", "localhost:22", 400),
    ],
)
def test_paths_and_methods(server: Server, method: str, path: str, status: int) -> None:
    length = b"Content-Length: 0\r\n" if method in ("POST", "PUT") else b""
    answer = ask(server, f"{method} {path} HTTP/1.1\r\n".encode() + HOST + length + b"\r\n")
    check_error(answer, status)
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize(
    "player", ["a%20b", "a%2Fb", "%C3%A4", "a" * 65, "stats", "%00", "..%2f..", "al;ice", "alice%0d%0aX:y", "."]
)
def test_player_ids(server: Server, player: str) -> None:
    for path in (f"/sse/{player}", f"/ws/{player}"):
        answer = ask(server, UPGRADE.format(path=path).encode())
        assert answer.status in (400, 404, 422), answer
        check_error(answer, answer.status)
    named = json.dumps({**message(), "player_id": "a b"}).encode()
    assert check_error(ask(server, post("/api/messages", named)), 422)["details"]["field"] == "player_id"


@pytest.mark.parametrize("query", ["session_id=a%20b", "session_id=" + "s" * 65, "session_id=%C3%A4", "session_id=a/b"])
@pytest.mark.parametrize("path", ["/sse/victim", "/ws/victim"])
def test_session_ids(server: Server, path: str, query: str) -> None:
    head = UPGRADE if path.startswith("/ws") else "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    body = check_error(ask(server, head.format(path=f"{path}?{query}").encode()), 400)
    assert body["details"]["field"] == "session_id"


@pytest.mark.parametrize("position", ["1", "-1", "1-", "a-b", "1-2-3", "1 2", "1-" + "9" * 17, "%F0%9F%98%80", "1-0x1"])
def test_malformed_positions(server: Server, position: str) -> None:
    for template in (UPGRADE, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        path = f"/{'ws' if template is UPGRADE else 'sse'}/victim?position={position}".replace(" ", "%20")
        assert check_error(ask(server, template.format(path=path).encode()), 400)["details"]["field"] == "position"
    head = b"GET /sse/victim HTTP/1.1\r\n" + HOST + b"Last-Event-ID: nonsense\r\n\r\n"
    check_error(ask(server, head), 400)


@pytest.mark.parametrize(
    ("position", "reason"), [("1-9007199254740991", "future"), ("99-1", "future"), ("0-1", "epoch")]
)
def test_positions_that_cannot_be(server: Server, position: str, reason: str) -> None:
    """Well written, but of another epoch or from the future: a gap, said aloud, on both transports."""
    clients = [
        WebSocket(f"{server.ws_url}/ws/victim?position={position}"),
        CurlSSE(f"{server.url}/sse/victim", last_event_id=position),
    ]
    try:
        for client in clients:
            assert client.welcome["resumed"] is False
            assert client.welcome["position"] == position
            gap = client.wait_type("gap")
            assert (gap["reason"], gap["after"]) == (reason, position)
        text = f"after the gap {reason} {position}"
        server.published("victim", text)
        for client in clients:
            client.wait_line(text)
    finally:
        for client in clients:
            client.close()


# Bodies.


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"player_id": "victim"', 400),
        (b"\xff\xfe{}", 400),
        (b'{"player_id": "victim", "message": {"type": "x", "content": "\xff"}}', 400),
        (b'{"player_id": "victim", "message": {"type": "x", "content": "\\ud800"}}', 400),
        (b"[" * 100_000, 400),
        (b'{"player_id": "victim", "message": {"type": "x", "content": ' + b"[" * 70 + b"]" * 70 + b"}}", 400),
        (b'{"player_id": "victim", "message": {"type": "x", "content": 1e999}}', 400),
        (b"null", 422),
        (b"7", 422),
        (b"[]", 422),
        (b"[1]", 422),
        (b'"text"', 422),
        (b"{}", 422),
        (b'{"player_id": 7, "message": {"type": "x", "content": 1}}', 422),
        (b'{"player_id": "victim", "message": []}', 422),
        (b'{"player_id": "victim", "message": {"content": 1}}', 422),
        (b'{"player_id": "victim", "message": {"type": "", "content": 1}}', 422),
        (b'{"player_id": "victim", "message": {"type": 7, "content": 1}}', 422),
        (b'{"player_id": "victim", "message": {"type": "' + b"x" * 65 + b'", "content": 1}}', 422),
        (b'{"player_id": "victim", "message": {"type": "x"}}', 422),
        (b'{"player_id": "victim", "message": {"type": "x", "content": 1, "id": 7}}', 422),
        (b'{"player_id": "victim", "message": {"type": "x", "content": 1, "id": ""}}', 422),
        (b'{"player_id": "victim", "message": {"type": "x", "content": 1, "id": "a\\u0000b"}}', 422),
        (b'{"player_id": "victim", "channel": "c", "message": {"type": "x", "content": 1}}', 422),
        (b'{"channel": "bad channel", "message": {"type": "x", "content": 1}}', 422),
        (b'{"broadcast": false, "message": {"type": "x", "content": 1}}', 422),
        (b'{"player_id": "victim", "message": {"type": "x", "content": 1}, "surprise": 1}', 422),
        (b'{"player_id": "victim", "message": {"type": "x", "content": 1, "seq": 5}}', 422),
        (b'{"player_id": "victim", "message": {"type": "x", "content": 1, "epoch": 5}}', 422),
        (json.dumps(message("x" * (MAX_MESSAGE + 1))).encode(), 413),
        (json.dumps([message()] * 1001).encode(), 422),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else str(value),
)
def test_bodies(server: Server, body: bytes, status: int) -> None:
    check_error(ask(server, post("/api/messages", body)), status)


@pytest.mark.parametrize("type_", ["welcome", "heartbeat", "gap", "reply", "pong", "session_changed", "disconnect"])
def test_reserved_types(server: Server, type_: str) -> None:
    body = {"player_id": "victim", "message": {"type": type_, "content": "I am the server"}}
    assert check_error(ask(server, post("/api/messages", json.dumps(body).encode())), 422)["details"]["field"] == "type"


@pytest.mark.parametrize("path", ["commands", "ack", "subscriptions", "session"])
@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"\xff", b'{"unknown": 1}', b'{"session_id": 7}', b'{"session_id": "a b"}']
)
def test_bodies_of_the_other_posts(server: Server, path: str, body: bytes) -> None:
    answer = ask(server, post(f"/api/connections/bystander/{path}", body, b"Content-Type: application/json"))
    assert answer.status in (400, 422), answer
    check_error(answer, answer.status)


def test_an_id_used_twice(server: Server) -> None:
    first = server.published("victim", "original", id="twice")
    again = server.published("victim", "original", id="twice")
    assert again == {**first, "duplicate": True}
    answer = server.publish("victim", "something else", id="twice")
    assert (answer.status_code, answer.json()["error_type"]) == (409, "validation_error")
    answer = server.publish("somebody-else", "original", id="twice")
    assert answer.status_code == 409
    batch = [message("new", id="new-in-batch"), message("changed", id="twice")]
    assert server.http.post("/api/messages", json=batch).status_code == 409
    # All or nothing: the batch's other message is not there.
    assert server.http.get("/api/messages/new-in-batch").status_code == 404
    batch = [message("a", id="same"), message("b", id="same")]
    assert server.http.post("/api/messages", json=batch).status_code == 409


def test_an_idempotency_key_used_twice(server: Server) -> None:
    headers = {"Idempotency-Key": "key-1"}
    first = server.http.post("/api/messages", json=[message(1), message(2)], headers=headers)
    again = server.http.post("/api/messages", json=[message(1), message(2)], headers=headers)
    assert [a["seq"] for a in first.json()] == [a["seq"] for a in again.json()]
    assert all(a["duplicate"] for a in again.json())
    assert server.http.post("/api/messages", json=[message(1)], headers=headers).status_code == 409
    assert server.http.post("/api/messages", json=message(), headers={"Idempotency-Key": "k" * 129}).status_code == 422


# Heads and framing of requests.


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"Bad Name: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: a\r\n folded\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: \x00\r\n\r\n", 400),
        (b"GET /%zz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /%ff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET http://evil.example/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /health HTTP/3.0\r\n" + HOST + b"\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET /" + b"a" * 20_000, 414),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 20_000, 431),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"".join(b"X%d: y\r\n" % n for n in range(150)) + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n", 400),
        (b"GET /sse/victim HTTP/1.1\r\n" + HOST + b"Upgrade: h2c\r\nConnection: Upgrade\r\n\r\n", 400),
        (b"POST /api/messages HTTP/1.1\r\n" + HOST + b"\r\n", 411),
        (b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Content-Length: 2, 2\r\n\r\n{}", 400),
        (b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Content-Length: -2\r\n\r\n{}", 400),
        (b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999\r\n\r\n{}", 413),
        (
            b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
            400,
        ),
        (b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n{}", 501),
        (b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nExpect: miracles\r\n\r\n{}", 417),
        (b"GET /sse/victim HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}", 400),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, bytes) else str(value),
)
def test_heads(server: Server, head: bytes, status: int) -> None:
    with Raw(server.port) as raw:
        raw.try_send(head)
        check_error(raw.answer(), status)
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.read_to_end() == b""


def test_a_head_byte_by_byte(server: Server) -> None:
    with Raw(server.port) as raw:
        for byte in b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n":
            raw.send(bytes([byte]))
        assert raw.answer().status == 200


def test_heads_that_never_end(server: Server) -> None:
    """Ten seconds for a head, however many bytes come meanwhile."""
    silent, slow = Raw(server.port), Raw(server.port)
    began = time.monotonic()
    with silent, slow:
        slow.send(b"GET /health HTTP/1.1\r\n" + HOST)
        slow.sock.settimeout(0.5)
        data = b""
        while not data and time.monotonic() - began < 15:
            slow.try_send(b"X: y\r\n")
            try:
                data = slow.sock.recv(65536)
            except TimeoutError:
                continue
        assert data.startswith(b"HTTP/1.1 408 ")
        assert 9 < time.monotonic() - began < 14
        assert silent.read_to_end() == b""


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", "", 400),
        ("dGhlIHNhbXBsZSBub25jZQ==", "c2hvcnQ=", 400),
        ("dGhlIHNhbXBsZSBub25jZQ==", "!", 400),
        ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 8", 426),
        ("Sec-WebSocket-Version: 13\r\n", "", 426),
        ("Upgrade: websocket\r\n", "", 426),
        ("Connection: Upgrade", "Connection: keep-alive", 426),
        ("HTTP/1.1", "HTTP/1.0", 400),
    ],
)
def test_upgrades(server: Server, old: str, new: str, status: int) -> None:
    head = UPGRADE.format(path="/ws/victim").replace(old, new)
    answer = ask(server, head.encode())
    check_error(answer, status)
    if "Version" in old:
        assert answer.headers["sec-websocket-version"] == "13"


# Requests that are odd, but right.


def test_http_1_0(server: Server) -> None:
    for path in (b"/health", b"/api/connections/stats"):
        with Raw(server.port) as raw:
            raw.send(b"GET %b HTTP/1.0\r\n\r\n" % path)
            assert raw.answer().status == 200
            assert raw.read_to_end() == b""
    body = json.dumps(message()).encode()
    with Raw(server.port) as raw:
        raw.send(b"POST /api/messages HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert raw.answer().status == 202
        assert raw.read_to_end() == b""
    with Raw(server.port) as raw:
        raw.send(b"GET /sse/victim HTTP/1.0\r\n\r\n")
        assert raw.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert b"welcome" in raw.read_until(b"\n\n")


def test_chunked(server: Server) -> None:
    body = json.dumps(message("chunked", id="chunked-1")).encode()
    half = len(body) // 2
    chunks = b"%x\r\n%b\r\n%x;ext=1\r\n%b\r\n0\r\n\r\n" % (half, body[:half], len(body) - half, body[half:])
    with Raw(server.port) as raw:
        raw.send(b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert raw.answer().status == 202
        # And the connection goes on.
        raw.send(post("/api/messages", body))
        assert raw.answer().json["duplicate"]


def test_chunks_without_end(server: Server) -> None:
    with Raw(server.port) as raw:
        raw.send(b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        for _ in range(60):
            raw.try_send(chunk)
        check_error(raw.answer(), 413)


def test_pipelined(server: Server) -> None:
    """Three requests at once, answered in their order; a GET for the app ends the connection."""
    posts = [post("/api/messages", json.dumps(message(n, id=f"pipe-{n}")).encode()) for n in range(3)]
    with Raw(server.port) as raw:
        raw.send(b"".join(posts) + b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        answers = [raw.answer() for _ in range(4)]
    assert [answer.status for answer in answers] == [202, 202, 202, 200]
    assert [answer.json["id"] for answer in answers[:3]] == ["pipe-0", "pipe-1", "pipe-2"]
    assert answers[3].headers["connection"] == "close"


def test_a_wrong_post_does_not_become_the_next_request(server: Server) -> None:
    """What follows a body that was refused unread must not be taken for a request."""
    inner = post("/api/messages", json.dumps(message("smuggled", id="smuggled")).encode())
    with Raw(server.port) as raw:
        head = b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999\r\n\r\n"
        raw.try_send(head + inner)
        assert raw.answer().status == 413
        assert raw.read_to_end() == b""
    assert server.http.get("/api/messages/smuggled").status_code == 404


def test_expect_100_continue(server: Server) -> None:
    body = json.dumps(message()).encode()
    with Raw(server.port) as raw:
        head = b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        raw.send(head % len(body))
        assert raw.answer().status == 100
        raw.send(body)
        assert raw.answer().status == 202


def test_a_post_that_breaks_off(server: Server) -> None:
    with Raw(server.port) as raw:
        raw.send(b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n{")
        raw.sock.shutdown(socket.SHUT_WR)
        check_error(raw.answer(), 400)


# Frames.


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (client_frame(2, b"binary"), 1003),
        (client_frame(1, b"\xff\xfe"), 1007),
        (client_frame(1, b"look \xc3"), 1007),
        (client_frame(1, b"x" * (MAX_MESSAGE + 1)), 1009),
        (client_frame(1, b"", length=2**62), 1009),
        (client_frame(1, b"x" * 40_000, final=False) + client_frame(0, b"x" * 40_000), 1009),
        (client_frame(0, b"continues nothing"), 1002),
        (client_frame(3, b"reserved opcode"), 1002),
        (b"\xc1\x80\0\0\0\0", 1002),
        (b"\x81\x05hello", 1002),
        (client_frame(9, b"x" * 126), 1002),
        (client_frame(8, b"\x00\x00"), 1002),
        (client_frame(1, b"half", final=False) + client_frame(1, b"another"), 1002),
    ],
    ids=[
        "binary", "not utf-8", "cut utf-8", "too big", "claims to be huge", "too big in parts", "continuation",
        "opcode", "reserved bit", "unmasked", "long ping", "close code", "interleaved",
    ],
)  # fmt: skip
@pytest.mark.parametrize("early", [False, True], ids=["", "behind the handshake"])
def test_frames(server: Server, frame: bytes, code: int, early: bool) -> None:
    with Raw(server.port) as raw:
        if early:
            raw.try_send(UPGRADE.format(path="/ws/victim").encode() + frame)
            assert raw.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        else:
            open_websocket(raw, "/ws/victim")
            raw.frame()
            raw.try_send(frame)
        assert raw.close_code() == code
        raw.try_send(client_frame(8, code.to_bytes(2, "big")))
        raw.read_to_end()


def test_frames_in_pieces(server: Server) -> None:
    """Fragments with a ping between them, byte by byte: right, if slow."""
    command = json.dumps({"type": "ping", "id": "p1"}).encode()
    frames = (
        client_frame(1, command[:5], final=False)
        + client_frame(9, b"are you there")
        + client_frame(0, command[5:10], final=False)
        + client_frame(0, command[10:])
    )
    with Raw(server.port) as raw:
        open_websocket(raw, "/ws/victim")
        for byte in frames:
            raw.send(bytes([byte]))
        seen: list[str] = []
        while not seen or seen[-1] != "pong":
            opcode, payload = raw.frame()
            seen.append("control pong" if opcode == 10 else json.loads(payload)["type"])
        assert "control pong" in seen
        raw.send(client_frame(8, (1000).to_bytes(2, "big")))
        assert raw.close_code() == 1000


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '"text"',
        "{}",
        '{"type": "nonsense"}',
        '{"type": 7}',
        '{"type": "command"}',
        '{"type": "command", "id": 7, "content": "look"}',
        '{"type": "command", "id": "", "content": "look"}',
        '{"type": "command", "id": "' + "x" * 129 + '", "content": "look"}',
        '{"type": "command", "content": "look", "surprise": 1}',
        '{"type": "ack"}',
        '{"type": "ack", "position": 7}',
        '{"type": "ack", "position": "1-x"}',
        '{"type": "ack", "position": "1-9007199254740991"}',
        '{"type": "ack", "position": "99-1"}',
        '{"type": "subscribe", "channel": "bad channel"}',
        '{"type": "subscribe", "channel": "room:tower"}',
        '{"type": "welcome", "session_id": "mine"}',
        "[" * 5000,
        "\u0007",
        "",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_texts(server: Server, text: str) -> None:
    """An error reply says what is wrong; the connection goes on."""
    with WebSocket(f"{server.ws_url}/ws/victim") as ws:
        assert ws.welcome
        ws.send(text)
        reply = ws.wait_type("reply")
        assert reply["ok"] is False
        assert reply["error"]["error_type"] == "validation_error"
        assert reply["error"]["message"]
        ws.send({"type": "ping", "id": "still there"})
        assert ws.wait_type("pong")["id"] == "still there"
        assert ws.close_code is None


# Clients that go away.


def test_connections_that_are_cut(server: Server) -> None:
    """Reset at every stage of a request, some hundred times."""
    stages = [
        b"",
        b"GET /he",
        b"GET /sse/victim HTTP/1.1\r\n" + HOST + b"\r\n",
        UPGRADE.format(path="/ws/victim").encode(),
        UPGRADE.format(path="/ws/victim").encode() + client_frame(1, b"look") + b"\x81",
        b"POST /api/messages HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n{",
        post("/api/messages", json.dumps(message()).encode()),
    ]
    dice = random.Random(7)
    for _ in range(150):
        with Raw(server.port) as raw:
            if dice.random() < 0.5:
                raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raw.try_send(dice.choice(stages))
    wait_until(lambda: victims(server) == 0, "all of them are gone")


def victims(server: Server) -> int:
    connections = server.http.get("/api/connections/victim").json()["connections"]
    return int(connections["websocket"]["count"]) + int(connections["sse"]["count"])
