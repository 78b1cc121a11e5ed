"""Failed starts: cause and fix on the console, one CRITICAL line in the log, an exit code that tells."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest

from tests.e2e.conftest import Make
from tests.e2e.servers import Server


def failed(server: Server, code: int) -> dict[str, Any]:
    """Start it; the one CRITICAL line of its log."""
    assert server.run_to_end() == code, server.stderr()
    critical = [line for line in server.log_lines() if line["level"] == "CRITICAL"]
    assert len(critical) == 1, critical
    assert "Traceback" not in server.stderr()
    assert critical[0]["event"] in server.stderr().replace("\n", " ")
    return critical[0]


def test_the_port_is_taken(make: Make) -> None:
    server = make()
    with socket.socket(socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", server.port))
        sock.listen()
        line = failed(server, 3)
    assert f"pid {os.getpid()}" in line["event"]
    assert str(server.port) in line["event"]
    assert line["exit_code"] == 3
    assert line["fix"]


def test_the_port_is_free_at_once_after_a_crash_with_clients(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        server.kill9()
        server.start()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("LINKDEAD_GRACE", "-1"),
        ("SECRET_KEY", "short"),
        ("DURABILITY", "perhaps"),
        ("HOST", "no.such.host.invalid"),
    ],
)
def test_a_bad_setting(make: Make, name: str, value: str) -> None:
    server = make()
    server.settings[name] = value
    line = failed(server, 2)
    assert name in line["event"]
    if name != "SECRET_KEY":
        assert value in line["event"]
    else:
        assert value not in server.stderr()
        assert value not in server.log_file.read_text()


def test_the_store_is_held_by_another_process(make: Make, server: Server) -> None:
    other = make(directory=server.directory, LOG_FILE="logs/other.log")
    assert other.run_to_end() == 4
    text = (server.directory / "logs/other.log").read_text()
    assert text.count('"CRITICAL"') == 1
    assert f"{server.pid}" in text
    assert f"{server.pid}" in server.stderr()
    server.published("alice", "the first one is well")


def test_a_file_that_is_not_ours_is_not_touched(make: Make) -> None:
    server = make(DATABASE_URL="sqlite:///./other.db")
    file = server.directory / "other.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
        database.execute("INSERT INTO recipes VALUES ('soup')")
        database.commit()
    before = file.read_bytes()
    line = failed(server, 4)
    assert str(file) in line["event"]
    assert file.read_bytes() == before


def test_a_file_that_is_no_database_is_not_touched(make: Make) -> None:
    server = make(DATABASE_URL="sqlite:///./notes.txt")
    file = server.directory / "notes.txt"
    file.write_text("buy milk\n" * 1000)
    failed(server, 4)
    assert file.read_text() == "buy milk\n" * 1000


@pytest.mark.parametrize("url", ["postgresql://mythos:hunter2@localhost/mythos", "redis://:hunter2@localhost:6379/0"])
def test_a_store_without_a_driver(make: Make, url: str) -> None:
    server = make(DATABASE_URL=url)
    line = failed(server, 5)
    assert url.partition(":")[0] in line["event"]
    assert "hunter2" not in server.stderr()
    assert "hunter2" not in server.log_file.read_text()


@pytest.mark.parametrize("game", ["nowhere:game", "tests.e2e.games:Nobody", "json:dumps"])
def test_no_such_game(make: Make, game: str) -> None:
    line = failed(make(game=game), 2)
    assert game in line["event"]


def run(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the command line, where the server runs."""
    return subprocess.run(
        [sys.executable, "-m", "mythos_trio", *arguments],
        cwd=server.directory,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_who_runs_here(server: Server) -> None:
    assert run(server, "pid").stdout.strip() == str(server.pid)
    server.published("alice", "something", id="some-id")
    explained = run(server, "explain", "some-id")
    assert explained.returncode == 0, explained.stderr
    assert "some-id" in explained.stdout
    server.kill9()
    assert run(server, "pid").returncode == 1


def test_a_new_epoch_is_begun_only_without_a_server(server: Server) -> None:
    refused = run(server, "store", "new-epoch")
    assert refused.returncode == 4
    assert str(server.pid) in refused.stderr
    server.terminate()
    assert server.wait_exit() == 0
    began = run(server, "store", "new-epoch")
    assert began.returncode == 0
    server.start()
    assert f"epoch {server.published('alice', 'in the new epoch')['epoch']} begins" in began.stdout
