"""The port stays open while the server is away: systemd's units, a socket from any parent, ``serve --supervise``."""

from __future__ import annotations

import configparser
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from mythos_trio.cli import store_holder
from mythos_trio.config import Settings
from tests.e2e.clients import WebSocket
from tests.e2e.conftest import Make
from tests.e2e.restart_drill import ActivatedServer, child_of
from tests.e2e.servers import ROOT, Server, wait_until
from tests.e2e.test_starts import failed, run

DEPLOY = ROOT / "docs/deploy"


def unit(name: str) -> configparser.ConfigParser:
    # A key may come several times: the last one is seen.
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / name).read_text())
    return parser


@pytest.fixture
def activated(tmp_path: Path) -> Iterator[ActivatedServer]:
    server = ActivatedServer(tmp_path)
    try:
        yield server
    finally:
        server.close()


# systemd.


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    program = shlex.split(unit("mythos.service")["Service"]["ExecStart"])[0]
    for name in ("mythos.service", "mythos.socket"):
        # The program is not installed on this machine.
        (tmp_path / name).write_text((DEPLOY / name).read_text().replace(program, sys.executable))
    found = subprocess.run(
        ["systemd-analyze", "verify", *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_the_units_belong_together_and_to_the_server() -> None:
    service, sock = unit("mythos.service"), unit("mythos.socket")
    assert service["Unit"]["Requires"] == "mythos.socket"
    assert sock["Socket"]["ListenStream"].endswith(f":{Settings().port}")
    assert float(service["Service"]["TimeoutStopSec"]) > Settings().drain_timeout
    assert service["Service"]["RestartPreventExitStatus"] == "2 3 4 5"


def test_the_command_of_the_unit_serves_on_the_socket_that_it_is_handed(
    activated: ActivatedServer, tmp_path: Path
) -> None:
    """And says when it is ready, and that it stops; between two lives those who come wait."""
    assert shlex.split(unit("mythos.service")["Service"]["ExecStart"])[1:] == ["serve"]
    activated.settings["PORT"] = "1"  # is not looked at
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(20)
        activated.settings["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        activated.launch()
        with WebSocket(f"ws://127.0.0.1:{activated.port}/ws/alice") as client:
            assert notified.recv(100) == b"READY=1"
            assert client.welcome
            line = activated.wait_logged("Listening on inherited sockets")
            assert line["addresses"] == [f"127.0.0.1:{activated.port}"]
            activated.terminate()
            assert notified.recv(100) == b"STOPPING=1"
            client.wait_ended()
        assert activated.wait_exit() == 0
        with socket.create_connection(("127.0.0.1", activated.port), 20) as waiting:
            waiting.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            activated.launch()
            assert waiting.recv(100).startswith(b"HTTP/1.1 200 ")
    assert f":{activated.port}/" in activated.stdout()


def test_on_a_socket_of_systemd_itself(make: Make) -> None:
    server = make(HOST="127.0.0.1")
    command = ["systemd-socket-activate", "-l", f"127.0.0.1:{server.port}", "--fdname=mythos"]
    command += [f"--setenv={name}" for name in server.environment]
    with (server.directory / "stderr.txt").open("ab") as err:
        server.process = subprocess.Popen(
            [*command, sys.executable, "-m", "mythos_trio", "serve"],
            cwd=server.directory,
            env=server.environment,
            stdin=subprocess.DEVNULL,
            stdout=err,
            stderr=err,
        )
    wait_until(server._ready, "the first who connects has it started")
    server.wait_logged("Listening on inherited sockets")
    server.terminate()
    assert server.wait_exit() == 0


# What cannot be listened on.


def test_a_socket_that_cannot_be_listened_on(activated: ActivatedServer) -> None:
    activated.listening.close()
    activated.listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    line = failed(activated, 3)
    assert "socket 3 (mythos.socket), which was handed over, is not a TCP socket" in line["event"]
    assert "ListenStream=" in line["fix"]


def test_a_descriptor_that_is_not_there(make: Make) -> None:
    server = make()
    server.options = ("--fd", "77")
    assert "socket 77" in failed(server, 3)["event"]


# The supervisor.


@pytest.fixture
def supervised(make: Make) -> Server:
    server = make()
    server.options = ("--supervise",)
    return server


def test_killed_again_and_again_and_nobody_is_refused(supervised: Server) -> None:
    supervised.start()
    assert run(supervised, "pid").stdout.strip() == str(child_of(supervised)) != str(supervised.pid)
    for number in range(3):
        before = child_of(supervised)
        os.kill(before, signal.SIGKILL)
        wait_until(lambda b=before: store_holder(supervised.database) != b, "it is dead")  # type: ignore[misc]
        # Waits, and is answered by the next one.
        with httpx.Client(base_url=supervised.url, trust_env=False, timeout=20) as client:
            body = {"player_id": "alice", "message": {"type": "line", "content": number, "id": f"m{number}"}}
            assert client.post("/api/messages", json=body).status_code == 202
        assert child_of(supervised) != before
    supervised.terminate()
    assert supervised.wait_exit() == 0
    assert run(supervised, "pid").returncode == 1
    assert supervised.stderr().count("the server ended by signal 9") == 3


def test_code_that_is_broken_does_not_replace_a_server_that_runs(supervised: Server) -> None:
    """SIGUSR2: the next server loads the game first, and only then the one that runs is drained."""
    code = supervised.directory / "mygame.py"
    code.write_text("from mythos_trio.game import Game\ngame = Game()\n")
    supervised.game = "mygame:game"
    supervised.start()
    before = child_of(supervised)
    code.write_text("this is no Python\n")
    supervised.signal(signal.SIGUSR2)
    wait_until(lambda: "exit code 2: the old one goes on" in supervised.stderr(), "it says so")
    assert child_of(supervised) == before
    supervised.published("alice", "nobody has noticed")
    code.write_text("from mythos_trio.game import Game\ngame = Game()\nmended = True\n")
    with WebSocket(f"{supervised.ws_url}/ws/alice") as client:
        client.wait_line("nobody has noticed")
        supervised.signal(signal.SIGUSR2)
        client.wait_ended()
        assert client.close_code == 4000
    wait_until(lambda: store_holder(supervised.database) not in (None, before), "the next one has the store")
    supervised.published("alice", "on the next one")
    assert len(supervised.logged("Server stopped", exit_code=0)) == 1
    supervised.terminate()
    assert supervised.wait_exit() == 0
    assert len(supervised.logged("Server stopped", exit_code=0)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_a_supervisor_that_is_killed_takes_the_server_with_it_in_order(supervised: Server) -> None:
    supervised.start()
    child = psutil.Process(child_of(supervised))
    with WebSocket(f"{supervised.ws_url}/ws/alice") as client:
        assert client.welcome
        supervised.kill9()
        client.wait_ended()
        assert client.close_code == 4000
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the server has ended")
    assert supervised.logged("Server stopped", exit_code=0)
    supervised.start()


def test_starts_of_a_supervisor_that_fail(supervised: Server) -> None:
    supervised.settings["LINKDEAD_GRACE"] = "-1"
    assert "LINKDEAD_GRACE" in failed(supervised, 2)["event"]
    del supervised.settings["LINKDEAD_GRACE"]
    supervised.log_file.unlink()
    with socket.create_server(("127.0.0.1", supervised.port)):
        assert f"pid {os.getpid()}" in failed(supervised, 3)["event"]
    supervised.log_file.unlink()
    supervised.game = "nowhere:game"
    assert "nowhere" in failed(supervised, 2)["event"]


def test_one_who_keeps_the_port_is_enough(make: Make) -> None:
    server = make()
    server.options = ("--supervise", "--reload")
    assert server.run_to_end() == 2
    assert "one of them" in server.stderr()
