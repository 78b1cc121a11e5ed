"""What an operator finds in the log after a day: the words, their fields, and the guide's own searches."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

import pytest

from tests.e2e.clients import CurlSSE, WebSocket, Wscat, tool
from tests.e2e.conftest import Make
from tests.e2e.servers import PUPPET, Server, wait_until

LEVELS = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}
COMPONENTS = {"connection", "session", "authentication", "persistence", "database", "memory", "delivery", "server"}
# Contents that must not be found in a log at INFO.
SECRET_LINE = "for her eyes only"


@pytest.fixture(scope="module")
def day(make_shared: Make) -> Server:
    """A server that has had an eventful day."""
    server = make_shared(
        game=PUPPET,
        HEALTH_CHECK_INTERVAL="1",
        PONG_TIMEOUT="1",
        CLEANUP_INTERVAL="1",
        WRITE_TIMEOUT="1",
        MAX_CONNECTIONS_PER_PLAYER="2",
    )
    server.start()
    live(server)
    return server


def live(server: Server) -> None:
    with Wscat(f"{server.ws_url}/ws/test_player") as ws, CurlSSE(f"{server.url}/sse/test_player") as sse:
        assert ws.welcome
        assert sse.welcome
        server.published("test_player", SECRET_LINE, id="letter")
        server.published("test_player", SECRET_LINE, id="letter")
        for client in (ws, sse):
            client.wait_line(SECRET_LINE)
        ws.type("raise")
        ws.wait_type("reply")
        with WebSocket(f"{server.ws_url}/ws/test_player") as third:
            third.wait_ended()
        session = ws.welcome["session_id"]
        with Wscat(
            f"{server.ws_url}/ws/test_player?session_id={session}&replaces={ws.welcome['connection_id']}"
        ) as same:
            assert same.welcome
    server.published("test_player", "mail")
    with Wscat(f"{server.ws_url}/ws/test_player?session_id=another") as ws:
        assert ws.welcome
        ws.wait_line("mail")
    hanging(server)
    answer = server.http.post("/api/connections/test_player/session", json={"session_id": "another"})
    assert answer.json()["success"]
    with CurlSSE(f"{server.url}/sse/test_player", last_event_id="1-9007199254740991") as sse:
        sse.wait_type("gap")
    server.wait_logged("Cleaned up 0 old connections")
    server.wait_logged("Message delivery failed", delivery_error="gap")  # lines gather for a moment
    server.kill9()
    server.start()
    with WebSocket(f"{server.ws_url}/ws/test_player") as ws_again:
        assert ws_again.welcome["session_id"] == "another"
        assert not ws_again.ask("raise", "c1")["ok"]
    server.wait_logged("WebSocket disconnected", ended_by="client")


def hanging(server: Server) -> None:
    """One client stops answering, and one stops reading."""
    with Wscat(f"{server.ws_url}/ws/hangs") as ws:
        assert ws.welcome
        ws.process.send_signal(signal.SIGSTOP)
        server.wait_logged("WebSocket disconnected", code=4012)
    with CurlSSE(f"{server.url}/sse/slow") as sse:
        assert sse.welcome
        sse.process.send_signal(signal.SIGSTOP)
        entry = {"player_id": "slow", "message": {"type": "line", "content": "x" * 60_000}}
        for _ in range(10):
            assert server.http.post("/api/messages", json=[entry] * 10).status_code == 202
        wait_until(lambda: server.logged("SSE disconnected", player_id="slow"), "the slow one is cut", 20)


def fields(line: dict[str, Any]) -> set[str]:
    return set(line)


def test_every_line(day: Server) -> None:
    lines = day.log_lines()
    assert len(lines) > 30
    for line in lines:
        assert {"event", "level", "timestamp", "component", "server_id"} <= fields(line), line
        assert line["level"] in LEVELS
        assert line["component"] in COMPONENTS
        assert line["timestamp"].endswith("Z")
        assert len(line["timestamp"]) == len("2026-01-01T00:00:00.000Z")
        if line["level"] == "ERROR":
            assert line["error_type"], line
    assert SECRET_LINE not in day.log_file.read_text()
    assert SECRET_LINE not in day.stderr()


@pytest.mark.parametrize(
    ("event", "level", "wanted"),
    [
        ("WebSocket connected", "INFO", {"establishment_time_ms", "resumed", "position", "address", "player_id"}),
        ("SSE connected", "INFO", {"establishment_time_ms", "resumed", "position", "address", "session_id"}),
        ("WebSocket disconnected", "INFO", {"code", "reason", "ended_by", "duration_seconds", "connection_id"}),
        ("SSE disconnected", "INFO", {"code", "reason", "ended_by", "duration_seconds", "connection_id"}),
        ("WebSocket refused", "WARNING", {"error_type", "reason", "address", "player_id"}),
        ("Message delivered", "INFO", {"message_id", "seq", "delivery_time_ms", "receivers", "player_id"}),
        ("Message delivery failed", "WARNING", {"delivery_error", "reason", "error_type"}),
        ("Duplicate message detected", "INFO", {"message_id"}),
        ("Unhealthy connections for player", "WARNING", {"connection_ids", "why", "player_id"}),
        ("Cleaned up 0 old connections", "INFO", set()),
        ("Database connection successful", "INFO", {"driver"}),
        ("Unexpected error in", "ERROR", {"error_type", "player_id", "exception"}),
    ],
)
def test_words(day: Server, event: str, level: str, wanted: set[str]) -> None:
    found = day.logged(event)
    assert found, f"{event!r} is not in the log"
    for line in found:
        assert line["level"] == level
        assert wanted <= fields(line), line


@pytest.mark.parametrize("words", ["session validation", "already in session", "switched from", "Recovered session"])
def test_words_of_sessions(day: Server, words: str) -> None:
    found = [line for line in day.log_lines() if words in line["event"]]
    assert found, f"{words!r} is not in the log"
    for line in found:
        assert line["level"] == "INFO"
        assert line["session_id"]
    if words == "switched from":
        assert all(line["previous_session_id"] for line in found)


def test_who_ended_it_and_what_would_help(day: Server) -> None:
    (cut,) = day.logged("WebSocket disconnected", code=4012)
    assert cut["ended_by"] in ("server", "network")
    assert "PONG_TIMEOUT" in cut["setting"]
    (slow,) = day.logged("SSE disconnected", player_id="slow")
    assert slow["code"] in (4008, 4012)
    assert {line["ended_by"] for line in day.logged("WebSocket disconnected")} >= {"client"}
    assert {line["delivery_error"] for line in day.logged("Message delivery failed")} >= {"gap"}


def test_times_are_numbers(day: Server) -> None:
    for event, name in (("Message delivered", "delivery_time_ms"), ("WebSocket connected", "establishment_time_ms")):
        for line in day.logged(event):
            assert isinstance(line[name], int | float)
    mail = [line for line in day.logged("Message delivered") if line.get("mail")]
    assert mail


# The guide's own lines, word for word.
GUIDE = [
    'cat logs/mythos.log | grep -E "(ERROR|WARNING|CRITICAL)"',
    'cat logs/mythos.log | grep -E "(WebSocket|SSE|connection)"',
    'grep "Message delivered" logs/mythos.log | tail -20',
    'grep "Message delivery failed" logs/mythos.log | tail -20',
    'grep "Message delivered" logs/mythos.log | grep "test_player" | tail -20',
    'grep "message_id" logs/mythos.log | tail -20',
    'grep "session" logs/mythos.log | tail -20',
    'grep "session validation" logs/mythos.log | tail -20',
    'grep "database" logs/mythos.log | tail -20',
    'grep "Traceback" logs/mythos.log | tail -20',
    'grep "WebSocket" logs/mythos.log | tail -20',
    r'grep "sqlite3\|postgresql" logs/mythos.log | tail -20',
    "grep \"ERROR\" logs/mythos.log | jq -r '.error_type' | sort | uniq -c",
    'grep "ERROR" logs/mythos.log | tail -50',
    "grep \"WebSocket connected\" logs/mythos.log | jq -r '.establishment_time_ms' | sort -n",
    "grep \"Message delivered\" logs/mythos.log | jq -r '.delivery_time_ms' | sort -n",
]
GUIDE_URLS = [
    ("/monitoring/connection-health", ".overall_health"),
    ("/monitoring/connection-health", ".connection_type_health"),
    ("/api/connections/stats", ".connection_distribution"),
    ("/api/connections/test_player", ".connections"),
    ("/api/connections/test_player", ".message_delivery_stats"),
    ("/monitoring/dual-connections", ".session_analytics"),
    ("/monitoring/performance", ".message_delivery"),
    ("/monitoring/performance", ".connection_establishment"),
    ("/monitoring/performance", ".system_performance"),
    ("/monitoring/errors", ".error_breakdown"),
]


def shell(server: Server, line: str) -> str:
    tool("jq")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=server.directory,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, f"{line}: {done.returncode} {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("line", GUIDE)
def test_the_guides_searches_find_something(day: Server, line: str) -> None:
    found = shell(day, line).strip()
    assert found
    assert "null" not in found.split()


def test_the_guides_search_for_slow_connects_is_understood(day: Server) -> None:
    """It finds nothing on a good day, and must not fail."""
    shell(day, "grep \"establishment_time_ms\" logs/mythos.log | jq 'select(.establishment_time_ms > 1000)'")
    every = shell(day, "grep \"establishment_time_ms\" logs/mythos.log | jq -c 'select(.establishment_time_ms < 1000)'")
    assert [json.loads(line)["event"] for line in every.splitlines()]


@pytest.mark.parametrize(("path", "query"), GUIDE_URLS)
def test_the_guides_questions_are_answered(day: Server, path: str, query: str) -> None:
    answer = json.loads(shell(day, f"curl -s --noproxy '*' {day.url}{path} | jq '{query}'"))
    assert isinstance(answer, dict)
    assert answer


def test_sighup_opens_the_log_again(server: Server) -> None:
    """As logrotate does it: rename, then SIGHUP."""
    server.wait_logged("Server ready")
    old = server.log_file.with_name("mythos.log.old")
    server.log_file.rename(old)
    server.signal(signal.SIGHUP)
    wait_until(server.log_file.exists, "a new log")
    server.published("alice", "one", id="after-rotation")
    server.published("alice", "one", id="after-rotation")
    server.wait_logged("Duplicate message detected", message_id="after-rotation")
    assert "after-rotation" not in old.read_text()


def test_debug_shows_contents(make: Make) -> None:
    server = make(DEBUG="true").start()
    with Wscat(f"{server.ws_url}/ws/alice") as ws:
        assert ws.welcome
        server.published("alice", SECRET_LINE)
        ws.wait_line(SECRET_LINE)
    wait_until(lambda: "Message content" in server.log_file.read_text(), "Message content")
    for words in ("Connection state", "Session ID"):
        assert words in server.log_file.read_text()
    for line in server.log_lines():
        assert SECRET_LINE not in json.dumps(line) or line["event"].startswith("Message content")
