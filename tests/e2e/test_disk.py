"""A database that is locked, or a disk that is full: said so, nothing unsaved delivered, and it heals by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.clients import CurlSSE, WebSocket, tool
from tests.e2e.conftest import Make
from tests.e2e.servers import PUPPET, Server, wait_until


@contextmanager
def locked(server: Server) -> Iterator[None]:
    """Somebody works on the database with the shell, and has gone for lunch."""
    shell = subprocess.Popen(
        [tool("sqlite3"), str(server.database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert shell.stdin is not None
    assert shell.stdout is not None
    try:
        shell.stdin.write(".timeout 5000\nBEGIN IMMEDIATE;\nSELECT 'held';\n")
        shell.stdin.flush()
        assert shell.stdout.readline() == "held\n"
        yield
    finally:
        shell.stdin.write("ROLLBACK;\n")
        shell.stdin.close()
        assert shell.wait(10) == 0
        shell.stdout.close()


def refused(server: Server, content: str) -> None:
    """Publish until it is refused, as it is once the store has given up waiting."""
    answer = server.publish("alice", content, id=content)
    assert answer.status_code == 503, answer.text
    assert answer.json()["error_type"] in ("persistence_error", "capacity_error")
    assert int(answer.headers["retry-after"]) >= 1


def health(server: Server) -> httpx.Response:
    return server.http.get("/health")


def heals(server: Server) -> None:
    began = time.monotonic()
    wait_until(lambda: server.publish("alice", "healed", id="healed").status_code == 202, "it heals", 20)
    wait_until(lambda: health(server).json()["status"] != "unhealthy", "it says so", 20)
    assert time.monotonic() - began < 20


def test_a_locked_database(puppet: Server) -> None:
    with WebSocket(f"{puppet.ws_url}/ws/alice") as ws, CurlSSE(f"{puppet.url}/sse/alice") as sse:
        puppet.published("alice", "before")
        for client in (ws, sse):
            client.wait_line("before")
        with locked(puppet):
            refused(puppet, "refused")
            reply = ws.ask("line by command", "c1", seconds=30)
            assert reply["error"]["error_type"] == "persistence_error"
            wait_until(lambda: health(puppet).status_code == 503, "unhealthy", 20)
            assert health(puppet).json()["status"] == "unhealthy"
            # What needs no write goes on.
            assert ws.ask("echo still here", "c2")["content"] == "still here"
            assert ws.lines == sse.lines == ["before"]
        heals(puppet)
        assert health(puppet).status_code == 200
        assert ws.ask("line by command", "c1")["ok"]
        puppet.published("alice", "refused", id="refused")
        for client in (ws, sse):
            client.wait_line("refused")
            assert client.lines == ["before", "healed", "by command", "refused"]
            assert not client.ended


def test_a_newcomer_while_the_database_is_locked(puppet: Server) -> None:
    """A session that cannot be stored does not begin: the client is told to come back."""
    with locked(puppet), WebSocket(f"{puppet.ws_url}/ws/bob") as bob:
        bob.wait_ended(seconds=20)
        assert bob.close_code == 4009
        assert bob.messages[-1]["retry_ms"] > 0
        assert "welcome" not in [m["type"] for m in bob.messages]
    heals(puppet)
    with WebSocket(f"{puppet.ws_url}/ws/bob") as bob:
        assert bob.welcome


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("only root can mount a small file system")
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)], check=True, timeout=10)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True, timeout=10)


def test_a_full_disk(make: Make, small_disk: Path) -> None:
    server = make(game=PUPPET, DATABASE_URL=f"sqlite:///{small_disk}/mythos.db").start()
    with WebSocket(f"{server.ws_url}/ws/alice") as ws:
        server.published("alice", "before")
        ws.wait_line("before")
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        taken = []
        for number in range(2000):
            answer = server.publish("alice", f"{number} {'x' * 8000}", id=f"m{number}")
            if answer.status_code != 202:
                break
            taken.append(number)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error_type"] in ("persistence_error", "capacity_error")
        wait_until(lambda: health(server).status_code == 503, "unhealthy", 20)
        ballast.unlink()
        heals(server)
        ws.wait_line("healed")
        assert [int(line.split()[0]) for line in ws.lines[1:-1]] == taken
    server.kill9()
    server.start()
    with WebSocket(f"{server.ws_url}/ws/alice?position=1-0") as again:
        again.wait_line("healed")
        assert again.lines == ws.lines
    server.terminate()
    assert server.wait_exit() == 0
