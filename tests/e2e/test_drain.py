"""SIGTERM: clients are told when to come back, all is stored, and the process ends in time."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.clients import CurlSSE, EventSource, NodeWebSocket, WebSocket
from tests.e2e.conftest import Make
from tests.e2e.servers import PUPPET, Server, wait_until
from tests.e2e.test_crash import all_answers, lines, publishers
from tests.e2e.test_disk import locked


def test_clients_are_told_and_come_back(server: Server) -> None:
    """With a publisher all the time; what it was promised arrives once, before or after the restart."""
    with (
        EventSource(f"{server.url}/sse/alice") as browser,
        NodeWebSocket(f"{server.ws_url}/ws/alice") as socket,
        publishers(server, 1) as started,
    ):
        browser.wait_until(lambda: len(browser.lines) >= 20, "20 lines")
        socket.wait_until(lambda: len(socket.lines) >= 20, "20 lines")
        server.terminate()
        for client in (browser, socket):
            told = client.wait_type("disconnect")
            assert (told["code"], told["reconnect"]) == (4000, True)
            assert told["retry_ms"] >= 0
        closed = socket.wait_event("close").fields
        assert closed["code"] == 4000
        assert server.wait_exit() == 0
        server.start()
        browser.wait_event("open", count=2)
        wanted = len(browser.lines) + 20
        browser.wait_until(lambda: len(browser.lines) >= wanted, "20 more lines")
        with CurlSSE(f"{server.url}/sse/alice", last_event_id=socket.position) as after:
            started[0].stop()
            promised = all_answers(started)
            for stream in (browser, after):
                stream.wait_seq(max(promised))
    assert lines(browser) == promised
    got = lines(socket, after)
    assert got == {seq: id for seq, id in promised.items() if seq >= min(got)}


def test_a_drained_server_knows_where_everybody_was(server: Server) -> None:
    """Who names no position gets nothing again: the marks were stored."""
    with WebSocket(f"{server.ws_url}/ws/alice") as client:
        server.published("alice", "one")
        position = client.wait_line("one")["seq"]
        client.send({"type": "ack", "position": f"{client.welcome['epoch']}-{position}"})
        assert client.ask("test", "c1")["ok"]
        server.terminate()
        client.wait_ended()
        assert client.close_code == 4000
    assert server.wait_exit() == 0
    server.start()
    with WebSocket(f"{server.ws_url}/ws/alice") as client:
        server.published("alice", "two")
        client.wait_line("two")
        assert client.lines == ["two"]
    assert server.logged("Draining")
    assert server.logged("Server stopped", exit_code=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_at_once(server: Server, number: signal.Signals) -> None:
    began = time.monotonic()
    server.signal(number)
    assert server.wait_exit() == 0
    assert time.monotonic() - began < 5


def inside(server: Server, name: str) -> Path:
    path = server.directory / f"{name}.inside"
    wait_until(path.exists, "the handler is inside")
    return path


def test_a_handler_that_runs_may_end(puppet: Server) -> None:
    """Its effects are stored and delivered, and it is answered, before the client is sent away."""
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        client.command("wait gate", "c1")
        inside(puppet, "gate")
        client.command("line waits in the queue", "c2")
        puppet.terminate()
        # Until the signal has been heard, this message is taken like any other.
        wait_until(lambda: puppet.publish("alice", "too late?", id="p1").status_code == 503, "nothing more is taken")
        answer = puppet.publish("alice", "too late", id="p2")
        assert answer.status_code == 503
        assert answer.json()["error_type"] == "system_error"
        assert int(answer.headers["retry-after"]) >= 1
        ready = puppet.http.get("/health/ready")
        assert ready.status_code == 503
        (puppet.directory / "gate.go").touch()
        assert client.wait_reply("c1")["ok"]
        assert client.wait_reply("c2")["error"]["error_type"] == "system_error"
        client.wait_ended()
        assert client.close_code == 4000
        kinds = [m["type"] for m in client.messages if m.get("content") == "gate" or m["type"] == "disconnect"]
        assert kinds == ["line", "reply", "disconnect"]  # the reply's content is "gate" too
    assert puppet.wait_exit() == 0
    puppet.start()
    with WebSocket(f"{puppet.ws_url}/ws/alice?position={client.position}") as client:
        assert client.ask("wait gate", "c1")["content"] == "gate"
        assert client.ask("line waits in the queue", "c2")["ok"]
        assert client.lines == ["waits in the queue"]  # "gate" came before this position


def test_a_newcomer_during_a_drain_is_told_to_come_back(puppet: Server) -> None:
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        client.command("wait gate", "c1")
        inside(puppet, "gate")
        puppet.terminate()
        wait_until(lambda: puppet.http.get("/health/ready").status_code == 503, "it is draining")
        with WebSocket(f"{puppet.ws_url}/ws/bob") as bob:
            bob.wait_ended()
            assert bob.close_code == 4000
        with CurlSSE(f"{puppet.url}/sse/bob") as bob_sse:
            assert bob_sse.status == 200
            told = bob_sse.wait_type("disconnect")
            assert told["code"] == 4000
            assert bob_sse.retry_ms == told["retry_ms"]
            bob_sse.wait_ended()
        (puppet.directory / "gate.go").touch()
    assert puppet.wait_exit() == 0


def test_a_handler_that_never_ends_is_cut_off(make: Make) -> None:
    puppet = make(game=PUPPET, DRAIN_TIMEOUT="4", HANDLER_TIMEOUT="60").start()
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        client.command("wait gate", "c1")
        inside(puppet, "gate")
        began = time.monotonic()
        puppet.terminate()
        client.wait_ended()
        assert client.close_code == 4000
        assert not client.lines
        assert puppet.wait_exit() == 0
        assert time.monotonic() - began < 4.5
    (puppet.directory / "gate.go").touch()
    puppet.start()
    with WebSocket(f"{puppet.ws_url}/ws/alice?position={client.position}") as client:
        assert client.ask("wait gate", "c1")["ok"]
        assert client.lines == ["gate"]


def test_a_second_signal_hurries(make: Make) -> None:
    puppet = make(game=PUPPET, DRAIN_TIMEOUT="60", HANDLER_TIMEOUT="60").start()
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        client.command("wait gate", "c1")
        inside(puppet, "gate")
        puppet.terminate()
        wait_until(lambda: puppet.http.get("/health/ready").status_code == 503, "it is draining")
        began = time.monotonic()
        puppet.terminate()
        assert puppet.wait_exit() == 0
        assert time.monotonic() - began < 5
        client.wait_ended()
        assert client.close_code == 4000
        assert not client.lines


def test_a_client_that_never_reads_does_not_hold_up_the_end(server: Server) -> None:
    with CurlSSE(f"{server.url}/sse/alice") as sse:
        assert sse.welcome
        sse.process.send_signal(signal.SIGSTOP)
        for number in range(40):
            server.published("alice", [number, "x" * 50_000])
        began = time.monotonic()
        server.terminate()
        assert server.wait_exit() == 0
        assert time.monotonic() - began < 15


def test_what_is_queued_is_stored_and_delivered_before_anybody_is_sent_away(server: Server) -> None:
    """The last commit cannot be made yet: somebody else holds the database's lock."""
    answers: list[httpx.Response] = []
    with WebSocket(f"{server.ws_url}/ws/alice") as client:
        assert client.welcome
        with locked(server):
            publisher = threading.Thread(target=lambda: answers.append(server.publish("alice", "the last")))
            publisher.start()
            health = "/health/detailed"
            wait_until(lambda: server.http.get(health).json()["components"]["dispatcher"]["queued"], "it is queued")
            server.terminate()
            server.wait_logged("Draining")
            # Longer than the drain waits for answers, shorter than SQLite waits for the lock.
            time.sleep(1.3)
            assert not client.ended
        client.wait_ended()
        publisher.join()
    stored = answers[0].status_code == 202
    told = [m.get("content", m["type"]) for m in client.messages if "seq" in m or m["type"] == "disconnect"]
    assert [text for text in told if text in ("the last", "disconnect")] == ["the last"] * stored + ["disconnect"]
    assert server.wait_exit() == 0
