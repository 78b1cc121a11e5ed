"""A client that reads slowly, over real sockets: what it is spared, and when it is cut off."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from typing import Any

from tests.e2e.conftest import Make
from tests.e2e.servers import Server

ROUNDS = 40
BARS = 30
FILLING = "x" * 1500


class SlowReader:
    """An event stream on a small socket, read when the test says so."""

    def __init__(self, server: Server, position: str | None = None) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(10)
        self.socket.connect(("127.0.0.1", server.port))
        query = "" if position is None else f"?position={position}"
        self.socket.sendall(f"GET /sse/ann{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        self.data = b""
        while b"\n\n" not in self.data:
            self.data += self.socket.recv(1000)

    def close(self) -> None:
        self.socket.close()

    @property
    def messages(self) -> list[dict[str, Any]]:
        _, _, events = self.data.partition(b"\r\n\r\n")
        whole = events[: events.rfind(b"\n\n") + 2].decode()
        return [json.loads(row.removeprefix("data: ")) for row in whole.split("\n") if row.startswith("data: ")]

    def read_until(self, mark: bytes, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while mark not in self.data or not self.data.endswith(b"\n\n"):
            assert time.monotonic() < deadline
            data = self.socket.recv(65536)
            assert data, "it ended"
            self.data += data

    def read_to_reset(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                return
            assert data, "it ended in order"
            self.data += data
        raise AssertionError("it goes on")


def publish(server: Server) -> None:
    """3 MB: more than the sockets, a session's log (1 MiB) and one chunk from the store hold together."""
    for number in range(ROUNDS):
        bars = [{"type": "bar", "content": [number, n, FILLING], "replace_key": "hp"} for n in range(BARS)]
        batch = [{"player_id": "ann", "message": said} for said in [*bars, {"type": "line", "content": number}]]
        answer = server.http.post("/api/messages", json=batch)
        assert answer.status_code == 202, answer.text


def check(messages: list[dict[str, Any]]) -> None:
    """All lines once and in order, and of the bars the last."""
    assert [m["content"] for m in messages if m["type"] == "line"] == list(range(ROUNDS))
    bars = [m["content"][:2] for m in messages if m["type"] == "bar"]
    assert bars[-1] == [ROUNDS - 1, BARS - 1]
    assert bars == sorted(bars)
    seqs = [m["seq"] for m in messages if "seq" in m]
    assert seqs == sorted(set(seqs))


def test_who_is_behind_gets_every_line_and_is_spared_old_bars(make: Make) -> None:
    server = make(WRITE_TIMEOUT="60", MESSAGE_RETENTION_COUNT="100000").start()
    with closing(SlowReader(server)) as ann:
        publish(server)
        ann.read_until(b'"content":%d' % (ROUNDS - 1))
        check(ann.messages)
        skipped = sum(m.get("replaces", 0) for m in ann.messages)
        # Those that are missing are said to be.
        assert skipped + len([m for m in ann.messages if m["type"] == "bar"]) == ROUNDS * BARS
        assert skipped > ROUNDS * BARS / 2
        delivery = server.http.get("/monitoring/performance").json()["message_delivery"]
        assert delivery["replaced"] == skipped


def test_who_does_not_read_is_cut_off_and_comes_back_for_all_of_it(make: Make) -> None:
    server = make(WRITE_TIMEOUT="1", MESSAGE_RETENTION_COUNT="100000").start()
    with closing(SlowReader(server)) as ann:
        publish(server)
        server.wait_logged("SSE disconnected", player_id="ann", code=4008)
        ann.read_to_reset()
    before = [m for m in ann.messages if "seq" in m]
    assert 0 < len(before) < ROUNDS * BARS
    epoch = ann.messages[0]["epoch"]
    with closing(SlowReader(server, f"{epoch}-{before[-1]['seq']}")) as back:
        back.read_until(b'"content":%d' % (ROUNDS - 1))
        check([*before, *back.messages])
