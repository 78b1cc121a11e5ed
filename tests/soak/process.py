"""The server's process, life after life, and what can be read of it from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import httpx
import trio
from attrs import frozen

from tests.e2e.servers import environment, free_port

GAME: Final = "tests.soak.game:game"
READY_SECONDS: Final = 20.0
DRAIN_SECONDS: Final = 8.0
FILES: Final = 220
"""``ulimit -n``: enough for the players, and soon used up."""
PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Failed(Exception):
    """The run cannot go on."""


@frozen
class Gauges:
    """What a life uses when nothing is under way."""

    tasks: int
    leaks: int
    rss_mib: float
    files: int
    threads: int


class Server:
    """:param directory: for the log and the console. :param database: a file."""

    def __init__(self, directory: Path, database: Path) -> None:
        self.directory = directory
        self.database = database
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lives = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.exits: dict[int, int] = {}
        """How often each exit code was seen."""
        self.lines: list[dict[str, Any]] = []
        """What has been logged since `read_log` was told to forget."""
        self._read_upto = 0
        self._expected = True

    # Its life.

    def launch(self, *, may_fail: bool = False) -> None:
        """Start the process and do not wait for it. *may_fail*: it may end by itself."""
        settings = {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "DATABASE_URL": f"sqlite:///{self.database}",
            "DRAIN_TIMEOUT": str(DRAIN_SECONDS),
            "HEALTH_CHECK_INTERVAL": "4",
            "PONG_TIMEOUT": "6",
            "CLEANUP_INTERVAL": "7",
            "LINKDEAD_GRACE": "30",
            "RATE_LIMIT_REQUESTS": "1000000",
            # All of it is read, in one file.
            "LOG_MAX_BYTES": "0",
            # Enough for whoever is away for a while, and so few that old ones go while the run lasts.
            "MESSAGE_RETENTION_COUNT": "4000",
        }
        # With faulthandler an abort shows where every thread is.
        serve = [sys.executable, "-X", "faulthandler", "-m", "mythos_trio", "serve", GAME]
        with (self.directory / "console.txt").open("ab") as console:
            self.process = subprocess.Popen(
                ["sh", "-c", f'ulimit -n {FILES} && exec "$@"', "sh", *serve],
                cwd=self.directory,
                env=environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        self.lives += 1
        self._expected = may_fail

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        """Launch it and wait until it is ready.

        :raises Failed:
        """
        self.launch()
        await self.wait_ready()

    async def wait_ready(self) -> None:
        with trio.move_on_after(READY_SECONDS):
            while not await self._ready():
                if self.process is None or self.process.poll() is not None:
                    raise Failed(f"the server did not start: {self.console()}")
                await trio.sleep(0.02)
            self._expected = False
            return
        raise Failed(f"the server was not ready within {READY_SECONDS:g} s: {self.console()}")

    async def _ready(self) -> bool:
        try:
            return (await self.get("/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self, number: signal.Signals) -> None:
        """A signal; one that ends it is expected to."""
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._expected = True
        os.kill(self.pid, number)

    async def wait_exit(self, seconds: float = READY_SECONDS) -> int:
        """Its exit code.

        :raises Failed: it does not end.
        """
        process = self.process
        assert process is not None
        self._expected = True
        with trio.move_on_after(seconds):
            while (code := process.poll()) is None:
                await trio.sleep(0.005)
            self.process = None
            self.exits[code] = self.exits.get(code, 0) + 1
            return code
        process.send_signal(signal.SIGABRT)
        await trio.sleep(1.0)
        raise Failed(f"the server did not end within {seconds:g} s: {self.console()}")

    async def watch(self) -> None:
        """Until it ends by itself, which it must not.

        :raises Failed:
        """
        while True:
            if not self._expected and self.process is not None and (code := self.process.poll()) is not None:
                raise Failed(f"the server ended by itself, exit code {code}: {self.console()}")
            await trio.sleep(0.05)

    def close(self) -> None:
        if self.process is not None:
            self._expected = True
            self.process.kill()
            self.process.wait(10)
            self.process = None

    # What it says.

    def console(self) -> str:
        return (self.directory / "console.txt").read_text(errors="replace")[-3000:]

    def read_log(self, *, forget: bool = False) -> list[dict[str, Any]]:
        """The log's lines since the last time that it was told to *forget*."""
        if forget:
            self.lines = []
        with (self.directory / "logs/mythos.log").open("rb") as file:
            file.seek(self._read_upto)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_upto += len(whole)
        self.lines += [json.loads(line) for line in whole.splitlines()]
        return self.lines

    async def get(self, path: str) -> httpx.Response:
        """On a connection of its own."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=5.0) as client:
            return await client.get(path)

    async def gauges(self) -> Gauges:
        """
        :raises httpx.TransportError: it cannot answer.
        """
        tasks = (await self.get("/monitoring/tasks")).json()
        proc = Path(f"/proc/{self.pid}")
        return Gauges(
            tasks=tasks["total_tasks"],
            leaks=tasks["leaks"],
            rss_mib=int((proc / "statm").read_text().split()[1]) * PAGE / 2**20,
            files=len(os.listdir(proc / "fd")),
            threads=len(os.listdir(proc / "task")),
        )

    async def total_connections(self) -> int:
        count: int = (await self.get("/api/connections/stats")).json()["total_connections"]
        return count

    async def trouble(self) -> str | None:
        """Why it is not well; None if it is. What only the machine is to blame for does not count."""
        answer = (await self.get("/health/detailed")).json()
        ours = [answer["components"][name] for name in ("database", "dispatcher", "health_checker")]
        if answer["status"] == "unhealthy" or any(component["status"] != "healthy" for component in ours):
            return str(answer)
        return None


async def wait_for(what: str, seconds: float, condition: Any) -> None:
    """Ask again and again.

    :raises Failed: it was not so within *seconds*.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if await condition():
                return
        except httpx.TransportError:
            pass  # it is not there, or has no descriptor for us
        if time.monotonic() > deadline:
            raise Failed(f"not within {seconds:g} s: {what}")
        await trio.sleep(0.05)
