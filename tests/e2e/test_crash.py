"""kill -9: what was answered 202 is not lost, nothing comes twice, and a command happens once or not at all."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest

from tests.e2e.clients import CurlSSE, EventSource, HttpxSSE, Message, Stream, WebSocket
from tests.e2e.conftest import Make
from tests.e2e.servers import PUPPET, Server, wait_until


class Publisher(threading.Thread):
    """Publishes without a pause; what is not answered is asked again under the same id until it is."""

    def __init__(self, server: Server, name: str, player: str = "alice") -> None:
        super().__init__(daemon=True)
        self.answers: dict[str, dict[str, Any]] = {}
        """The answer to each id, in order."""
        self.refused = 0
        """How often there was no server, or it went away before its answer."""
        self._server = server
        self._name = name
        self._player = player
        self._enough = threading.Event()
        self.start()

    def run(self) -> None:
        with httpx.Client(base_url=self._server.url, trust_env=False, timeout=5.0) as client:
            number = 0
            while not self._enough.is_set():
                id = f"{self._name}-{number}"
                answer = self._post(client, id)
                if answer is not None:
                    self.answers[id] = answer
                    number += 1

    def _post(self, client: httpx.Client, id: str) -> dict[str, Any] | None:
        message = {"id": id, "type": "line", "content": id}
        try:
            answer = client.post("/api/messages", json={"player_id": self._player, "message": message})
        except httpx.TransportError:
            self.refused += 1
            time.sleep(0.02)
            return None
        if answer.status_code == 503 and answer.json()["error_type"] == "system_error":  # it is draining
            self.refused += 1
            time.sleep(0.02)
            return None
        assert answer.status_code == 202, answer.text
        body: dict[str, Any] = answer.json()
        time.sleep(0.002)  # some hundred messages a second are enough
        return body

    def stop(self) -> None:
        """Stop after the message that is under way has been answered."""
        self._enough.set()
        self.join(20)
        assert not self.is_alive()


@contextmanager
def publishers(server: Server, count: int) -> Iterator[list[Publisher]]:
    started = [Publisher(server, f"p{index}") for index in range(count)]
    try:
        yield started
    finally:
        for publisher in started:
            publisher.stop()


def all_answers(started: list[Publisher]) -> dict[int, str]:
    """The id of each seq that was promised."""
    answers = [(answer["seq"], id) for publisher in started for id, answer in publisher.answers.items()]
    assert len({seq for seq, _ in answers}) == len(answers), "a number was given twice"
    return dict(sorted(answers))


def whole(server: Server, upto: int) -> list[Message]:
    """All of alice's stream, up to a number, as one client gets it that has missed everything."""
    with WebSocket(f"{server.ws_url}/ws/alice?position=1-0") as client:
        client.wait_seq(upto)
        return [message for message in client.numbered if message["seq"] <= upto]


def lines(*parts: Stream) -> dict[int, str]:
    """What clients that followed each other have seen, as one stream."""
    seen = [(m["seq"], m["id"]) for part in parts for m in part.numbered if m["type"] == "line"]
    seqs = [seq for seq, _ in seen]
    assert seqs == sorted(set(seqs)), "twice, or out of order"
    return dict(seen)


def test_nothing_is_missed_across_transports_and_a_crash(server: Server) -> None:
    """SSE by curl, kill -9, WebSocket from that position, SSE by httpx from there; publishers all the time."""
    with publishers(server, 2) as started:
        with CurlSSE(f"{server.url}/sse/alice") as first:
            first.wait_until(lambda: len(first.lines) >= 100, "100 lines")
            server.kill9()
            first.wait_ended()
        with pytest.raises(httpx.ConnectError):
            server.publish("alice", "nobody hears this")
        before = [publisher.refused for publisher in started]
        wait_until(lambda: all(p.refused > b for p, b in zip(started, before, strict=True)), "publishers are refused")
        server.start()
        with WebSocket(f"{server.ws_url}/ws/alice?position={first.position}") as second:
            assert second.welcome["resumed"]
            second.wait_until(lambda: len(second.lines) >= 100, "100 lines")
        with HttpxSSE(f"{server.url}/sse/alice", last_event_id=second.position) as third:
            third.wait_until(lambda: len(third.lines) >= 100, "100 lines")
            for publisher in started:
                publisher.stop()
            promised = all_answers(started)
            third.wait_seq(max(promised))
    assert lines(first, second, third) == promised
    # And what the game has said: that alice was gone, and is back.
    seen = [message for part in (first, second, third) for message in part.numbered if message["seq"] <= max(promised)]
    assert seen == whole(server, max(promised))
    assert len(promised) >= 300


def _wait_more(client: Stream, count: int) -> None:
    wanted = len(client.lines) + count
    client.wait_until(lambda: len(client.lines) >= wanted, f"{count} more lines")


def test_a_browser_comes_back_by_itself_and_misses_nothing(server: Server) -> None:
    """EventSource names its last id by itself; three crashes."""
    with publishers(server, 1) as started, EventSource(f"{server.url}/sse/alice") as browser:
        for crash in range(1, 4):
            browser.wait_event("open", count=crash)
            _wait_more(browser, 30)
            server.kill9()
            server.start()
        browser.wait_event("open", count=4)
        started[0].stop()
        promised = all_answers(started)
        browser.wait_seq(max(promised))
    assert lines(browser) == promised
    assert [m for m in browser.numbered if m["seq"] <= max(promised)] == whole(server, max(promised))
    assert all(error.fields["state"] != 2 for error in browser.all("error"))


def test_who_names_no_position_misses_nothing(server: Server) -> None:
    """It may see a line again after a crash, but with the same number and id."""
    with WebSocket(f"{server.ws_url}/ws/alice") as first:
        server.published("alice", "one")
        server.published("alice", "two")
        first.wait_line("two")
        server.kill9()
    server.start()
    server.published("alice", "three")
    with WebSocket(f"{server.ws_url}/ws/alice") as second:
        second.wait_line("three")
        assert second.welcome["session_id"] == first.welcome["session_id"]
        known = {message["seq"]: message for message in first.numbered}
        assert {seq: m for m in second.numbered if (seq := m["seq"]) in known}.items() <= known.items()
        assert set(first.lines) | set(second.lines) == {"one", "two", "three"}


def test_a_batch_is_there_as_a_whole_or_not_at_all(server: Server) -> None:
    """Killed at any moment of it: its answer came or not, its messages are there all or none."""
    entries = [{"player_id": "alice", "message": {"type": "line", "content": n}} for n in range(50)]
    stop = threading.Event()
    answered: list[str] = []

    def publish() -> None:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=5.0) as client:
            for number in range(10_000):
                if stop.is_set():
                    return
                key = f"batch-{number}"
                try:
                    answer = client.post("/api/messages", json=entries, headers={"Idempotency-Key": key})
                except httpx.TransportError:
                    return
                assert answer.status_code == 202
                answered.append(key)

    thread = threading.Thread(target=publish, daemon=True)
    thread.start()
    wait_until(lambda: len(answered) >= 3, "batches")
    server.kill9()
    stop.set()
    thread.join(10)
    server.start()
    with WebSocket(f"{server.ws_url}/ws/alice?position=1-0") as client:
        server.published("alice", "last")
        client.wait_line("last")
    assert client.lines[:-1] == list(range(50)) * (len(client.lines) // 50)
    assert len(client.lines) // 50 in (len(answered), len(answered) + 1)


# Commands.


def ran(server: Server) -> list[str]:
    """The ids of the commands whose handler was begun, in order."""
    return (server.directory / "ran.txt").read_text().split()


def test_killed_inside_of_a_handler_nothing_has_happened(puppet: Server) -> None:
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        client.command("wait gate", "c1")
        wait_until((puppet.directory / "gate.inside").exists, "the handler is inside")
        puppet.kill9()
        client.wait_ended()
        assert not client.lines
    (puppet.directory / "gate.go").touch()
    puppet.start()
    with WebSocket(f"{puppet.ws_url}/ws/alice?position={client.position}") as client:
        reply = client.ask("wait gate", "c1")
        assert reply["ok"]
        assert client.lines == ["gate"]
        assert client.ask("wait gate", "c1") == reply
        assert client.lines == ["gate"]
    assert ran(puppet) == ["c1", "c1"]


def stored_answers(server: Server) -> int:
    with closing(sqlite3.connect(f"file:{server.database}?mode=ro", uri=True)) as database:
        (count,) = database.execute("SELECT count(*) FROM answers").fetchone()
        return int(count)


def test_killed_after_the_commit_the_answer_is_there(puppet: Server) -> None:
    """The client is gone before it has the reply, and the server once it has stored it."""
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        position = client.welcome["position"]
        client.command("slow once", "c1")
        client.client.socket.shutdown(2)
        wait_until(lambda: stored_answers(puppet) == 1, "the answer is stored")
        puppet.kill9()
    puppet.start()
    with WebSocket(f"{puppet.ws_url}/ws/alice?position={position}") as client:
        reply = client.ask("slow once", "c1")
        assert reply["ok"]
        assert reply["content"] == "once"
        assert client.lines == ["once", "once again"]
        refused = client.ask("slow twice", "c1-other")
        assert refused["ok"]
        assert client.lines == ["once", "once again", "twice", "twice again"]
    assert ran(puppet) == ["c1", "c1-other"]


class Commander(threading.Thread):
    """Gives one command after the other by POST; each is asked again under its id until it is answered."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.answers: list[dict[str, Any]] = []
        self.lost = 0
        """How often there was no answer."""
        self._server = server
        self._enough = threading.Event()
        self.start()

    def run(self) -> None:
        with httpx.Client(base_url=self._server.url, trust_env=False, timeout=10.0) as client:
            while not self._enough.is_set():
                number = len(self.answers)
                body = {"id": f"c{number}", "content": f"slow {number}"}
                try:
                    answer = client.post("/api/connections/alice/commands", json=body)
                except httpx.TransportError:
                    self.lost += 1
                    time.sleep(0.02)
                    continue
                if answer.status_code == 429:
                    time.sleep(float(answer.headers["retry-after"]))
                    continue
                assert answer.status_code == 200, answer.text
                self.answers.append(answer.json())

    def wait_more(self, count: int) -> None:
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted, f"{count} more answers")

    def stop(self) -> None:
        self._enough.set()
        self.join(20)
        assert not self.is_alive()


def test_killed_at_any_moment_each_command_happens_once(make: Make) -> None:
    """Many kills, most of them in the middle of a command. Its seed is printed, though the clock is real."""
    server = make(game=PUPPET, RATE_LIMIT_REQUESTS="100000").start()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    with WebSocket(f"{server.ws_url}/ws/alice") as client:
        assert client.welcome
    commander = Commander(server)
    for _ in range(12):
        commander.wait_more(5)
        time.sleep(dice.uniform(0, 0.03))  # the moment of the kill is the point here
        server.kill9()
        server.start()
    wait_until(lambda: len(commander.answers) >= 80, "80 answers")
    commander.stop()
    count = len(commander.answers)
    assert [answer["content"] for answer in commander.answers] == [str(n) for n in range(count)]
    with WebSocket(f"{server.ws_url}/ws/alice?position=1-0") as client:
        server.published("alice", "last")
        client.wait_line("last")
        expected = [text for n in range(count) for text in (str(n), f"{n} again")]
        assert client.lines == [*expected, "last"]
        # The stored answers are the ones that were given.
        for number in (0, count // 2, count - 1):
            again = client.ask(f"slow {number}", f"c{number}")
            assert again["content"] == commander.answers[number]["content"]
        assert client.lines == [*expected, "last"]
    began_twice = len(ran(server)) - count
    assert began_twice > 0, "no kill came in the middle of a command"


def test_an_id_that_means_something_else_is_refused(puppet: Server) -> None:
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        assert client.ask("line one", "c1")["ok"]
        answer = puppet.command("alice", "line two", "c1")
        assert answer.status_code == 409 or not answer.json()["ok"], answer.text
        puppet.kill9()
    puppet.start()
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        reply = client.ask("line two", "c1")
        assert not reply["ok"]
        assert reply["error"]["error_type"] == "validation_error"
        assert client.lines in ([], ["one"])


def test_handlers_that_fail_leave_nothing_and_end_nothing(puppet: Server) -> None:
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        raised = client.ask("raise", "c1")
        assert raised["error"]["error_type"] == "system_error"
        refused = client.ask("refuse because", "c2")
        assert refused["error"] == {
            "error_type": "validation_error",
            "message": "You cannot.",
            "details": {"why": "because"},
        }
        assert client.ask("line fine", "c3")["ok"]
        assert client.lines == ["fine"]
    error = puppet.wait_logged("Unexpected error in", level="ERROR")
    assert error["error_type"] == "system_error"
    assert error["player_id"] == "alice"
    assert error["exception"].startswith("Traceback (most recent call last)") or "Traceback" in error["exception"]
