"""The server as a process: started by its command line, on a port and a store of its own, killed by pid."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from mythos_trio.access import Access
from mythos_trio.config import SPECS, Settings
from mythos_trio.seams import SystemClock
from tests.support.nothing_left import shared_ports

ROOT = Path(__file__).resolve().parents[2]
PUPPET = "tests.e2e.games:Puppet"
DUEL = "tests.e2e.games:Duel"
START_SECONDS = 15.0
WAIT_SECONDS = 10.0
# Opened when they are first needed: the log's and the store's files, and Trio's threads for the store.
LATER_DESCRIPTORS = 0
STORE_THREADS = 3

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, seconds: float = WAIT_SECONDS) -> T:
    """The first true value of *condition*, asked again and again; AssertionError after *seconds*."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)
    return value


def free_port() -> int:
    """A port that nobody uses, below those that the kernel gives to outgoing connections: so it is still
    free when a server that was killed is started again."""
    while True:
        port = random.randint(15_000, 30_000)
        try:
            for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                with socket.socket(family) as sock:
                    sock.bind((address, port))
        except OSError:
            continue
        return port


def environment(settings: dict[str, str]) -> dict[str, str]:
    """The environment of a server: *settings* and nothing that the developer's own shell has set; the code is
    the one beside these tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in SPECS and "proxy" not in name.lower()}
    return {**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "NO_PROXY": "*", **settings}


class Server:
    """A server process on a directory. The store and the log lie where the defaults put them.

    :param settings: environment variables beside HOST and PORT, which are set.
    """

    def __init__(self, directory: Path, *, game: str | None = None, **settings: str) -> None:
        self.directory = directory
        self.game = game
        self.options: tuple[str, ...] = ()
        """Further words of the command line."""
        self.port = free_port()
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self._base: tuple[int, int] | None = None
        """Descriptors and threads when it was ready; None if nobody has waited for that."""
        self.url = f"http://localhost:{self.port}"
        self.ws_url = f"ws://localhost:{self.port}"
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=20.0)

    @property
    def environment(self) -> dict[str, str]:
        return environment({"PORT": str(self.port), **self.settings})

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def database(self) -> Path:
        return self.directory / "data/players/mythos.db"

    @property
    def log_file(self) -> Path:
        return self.directory / "logs/mythos.log"

    def launch(self) -> None:
        """Start the process and do not wait for it."""
        assert self.process is None, "it runs already"
        self._base = None
        command = [sys.executable, "-m", "mythos_trio", "serve", *([self.game] if self.game else []), *self.options]
        with (self.directory / "stdout.txt").open("ab") as out, (self.directory / "stderr.txt").open("ab") as err:
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def start(self) -> Server:
        """Start the process and wait until it is ready."""
        self.launch()
        wait_until(self._ready, "the server is ready", START_SECONDS)
        self._base = self._own_descriptors(self._tasks()), psutil.Process(self.pid).num_threads()
        return self

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"exit code {self.process.returncode}: {self.stderr()}"
        try:
            return self.http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM; `wait_exit` waits for the end."""
        self.signal(signal.SIGTERM)

    def kill9(self) -> None:
        """SIGKILL, and wait for the kernel to be through with it."""
        self.signal(signal.SIGKILL)
        assert self.wait_exit() == -signal.SIGKILL

    def wait_exit(self, seconds: float = START_SECONDS) -> int:
        """The exit code."""
        assert self.process is not None
        code = self.process.wait(seconds)
        self.process = None
        return code

    def run_to_end(self) -> int:
        """Start a process that is expected to fail; its exit code."""
        self.launch()
        return self.wait_exit()

    def close(self) -> None:
        """End it, whatever state it is in, and show what it said: pytest shows that of failed tests.

        One that runs is asked for its leaks first: an AssertionError if there are any.
        """
        try:
            if self.process is not None and self.process.poll() is None:
                self.check_leaks()
        finally:
            if self.process is not None:
                self.process.kill()
                self.process.wait(START_SECONDS)
                self.process = None
            self.http.close()
            shared_ports.discard(self.port)
            print(f"--- console of the server on port {self.port}\n{self.stderr()[-4000:]}")

    def check_leaks(self) -> None:
        """Nothing is left in the server of what is over, once it is quiet: leaks, descriptors, threads."""
        left: list[str] = []
        for _ in range(3):
            left = self._left()
            if not left:
                return
            time.sleep(1)
        raise AssertionError(f"left behind in the server on port {self.port}: {left}")

    def _left(self) -> list[str]:
        answer = self._tasks()
        left = [f"a leak: {leak}" for leak in answer["leaked"]]
        if self._base is None:
            return left
        own, threads = self._own_descriptors(answer), psutil.Process(self.pid).num_threads()
        if own > self._base[0] + LATER_DESCRIPTORS:
            names = ", ".join(_descriptors(self.pid))
            left.append(f"{own} descriptors beside those of clients; at its start it had {self._base[0]}: {names}")
        if threads > self._base[1] + STORE_THREADS:
            left.append(f"{threads} threads; at its start it had {self._base[1]}")
        return left

    def _tasks(self) -> dict[str, Any]:
        """``/monitoring/tasks``, as an admin where tokens are asked for."""
        secret = self.settings.get("SECRET_KEY")
        headers = {}
        if secret is not None:
            token = Access(Settings(secret_key=secret), SystemClock()).issue(None, ["admin"], 60)
            headers["Authorization"] = f"Bearer {token}"
        answer = self.http.get("/monitoring/tasks", headers=headers)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def _own_descriptors(self, tasks: dict[str, Any]) -> int:
        links: int = sum(tasks["server"]["links"].values())
        return int(tasks["server"]["descriptors"]) - links

    # What it says.

    def stdout(self) -> str:
        return _text(self.directory / "stdout.txt")

    def stderr(self) -> str:
        return _text(self.directory / "stderr.txt")

    def log_lines(self) -> list[dict[str, Any]]:
        """The log's lines, each of which is JSON; one that is being written is left out."""
        text = _text(self.log_file)
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def logged(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """The lines of an *event* (its beginning) that have these *fields*."""
        return [
            line
            for line in self.log_lines()
            if line["event"].startswith(event) and all(line.get(name) == value for name, value in fields.items())
        ]

    def wait_logged(self, event: str, **fields: object) -> dict[str, Any]:
        """The log is written off the event loop, so a line may come a moment after what it tells of."""
        return wait_until(lambda: self.logged(event, **fields), f"{event!r} {fields} in the log")[-1]

    # What it answers.

    def publish(self, player: str, content: object, *, id: str | None = None, **fields: object) -> httpx.Response:
        message = {"type": "line", "content": content, **({} if id is None else {"id": id}), **fields}
        return self.http.post("/api/messages", json={"player_id": player, "message": message})

    def published(self, player: str, content: object, *, id: str | None = None) -> dict[str, Any]:
        """Publish; the answer's body, which says that it is stored."""
        answer = self.publish(player, content, id=id)
        assert answer.status_code == 202, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def command(self, player: str, content: object, id: str, **fields: object) -> httpx.Response:
        return self.http.post(f"/api/connections/{player}/commands", json={"id": id, "content": content, **fields})

    def session_id(self, player: str) -> str | None:
        session: str | None = self.http.get(f"/api/connections/{player}/session").json()["session_id"]
        return session


def _descriptors(pid: int) -> Iterator[str]:
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            yield f"{descriptor.name} -> {os.readlink(descriptor)}"


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
