"""What is started, and what it costs: the peers as processes, the load generator, and what the system says of them.

Processor time is the whole process's (`clock_getcpuclockid`, all threads), read by the load generator right before
and after the measured part. Memory is the process's share of what is resident (PSS).
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from attrs import field, frozen

from mythos_trio.config import SPECS
from tests.bench.game import TELL_SECONDS, TURNS
from tests.e2e.servers import free_port, wait_until

ROOT: Final = Path(__file__).resolve().parents[2]
HERE: Final = Path(__file__).resolve().parent
START_SECONDS: Final = 120.0
RUN_SECONDS: Final = 240.0
OURS: Final = "mythos-trio"
RIVAL: Final = "FastAPI + uvicorn"
WARNINGS: Final = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
# The rate limits and the caps on connections are set high enough; their checks still run. All else is the default.
RAISED: Final[Mapping[str, str]] = {
    "RATE_LIMIT_REQUESTS": "1000000",
    "RATE_LIMIT_WINDOW": "0.1",
    "MAX_TOTAL_CONNECTIONS": "100000",
}


class BenchFailed(Exception):
    """A peer or the load generator did not do what it should; the text says which and what."""


@frozen
class Programs:
    """What has been compiled, and which processors are for whom."""

    load: Path
    raw: Path
    node_modules: Path
    server_cpus: frozenset[int]
    load_cpus: frozenset[int]
    load_options: tuple[str, ...] = ()


def build(directory: Path, *, quick: bool = False) -> Programs:
    """Compile the load generator and the floor into *directory*."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BenchFailed("a C compiler is needed: apt-get install gcc libc6-dev")
    for source in (HERE / "load.c", HERE / "peers" / "raw.c"):
        subprocess.run(
            [compiler, "-O2", *WARNINGS, "-o", directory / source.stem, source, "-lm"], check=True, timeout=120
        )
    modules = os.environ.get("MYTHOS_NODE_MODULES")
    if modules is None or shutil.which("node") is None:
        raise BenchFailed("node, and ws in the directory MYTHOS_NODE_MODULES, are needed: nox -s bench sees to that")
    cpus = sorted(os.sched_getaffinity(0))
    # The load generator has the last processor for itself, so that neither runs on the other's time.
    last, others = frozenset(cpus[-1:]), frozenset(cpus[:-1] or cpus)
    options = ("--settle-ms", "50") if quick else ()
    return Programs(directory / "load", directory / "raw", Path(modules).resolve(), others, last, options)


@frozen
class Peer:
    """A server that is measured.

    *command* gets the compiled programs, the port and the game (mythos-trio only).
    """

    name: str
    command: Callable[[Programs, int, str], list[str]]
    ready: str = "/health"
    transports: frozenset[str] = frozenset({"ws", "sse", "both"})
    load: tuple[str, ...] = ()
    """What the load generator has to be told about it."""
    environment: Mapping[str, str] = field(factory=dict)


def _uvicorn(app: str) -> Callable[[Programs, int, str], list[str]]:
    options = "--loop uvloop --http httptools --ws auto --log-level warning --no-access-log"

    def command(programs: Programs, port: int, game: str) -> list[str]:
        return [sys.executable, "-m", "uvicorn", f"tests.bench.peers.{app}", "--port", str(port), *options.split()]

    return command


PEERS: Final[Mapping[str, Peer]] = {
    peer.name: peer
    for peer in (
        Peer(
            OURS,
            lambda programs, port, game: [sys.executable, "-m", "mythos_trio", "serve", game],
            ready="/health/ready",
            environment=RAISED,
        ),
        Peer(RIVAL, _uvicorn("fastapi_app:app")),
        Peer(
            "python-socketio",
            _uvicorn("socketio_app:app"),
            transports=frozenset({"ws"}),
            load=("--dialect", "socketio"),
        ),
        Peer(
            "websockets",
            lambda programs, port, game: [sys.executable, "-m", "tests.bench.peers.websockets_app"],
            transports=frozenset({"ws"}),
            load=("--publish-over", "ws"),
        ),
        Peer("ws (Node)", lambda programs, port, game: ["node", str(HERE / "peers" / "ws_server.js")]),
        Peer("raw C", lambda programs, port, game: [str(programs.raw), str(port)]),
    )
}


@frozen
class Memory:
    pss_kib: float
    rss_kib: float


@frozen(eq=False)
class Running:
    """A peer's process that answers."""

    peer: Peer
    programs: Programs
    process: subprocess.Popen[bytes]
    port: int
    started_seconds: float
    """From the process's beginning to its first good answer."""
    directory: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def load(self, mode: object, *arguments: object, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """Run the load generator; what it says, and, of ours, `lag` before the connections end.

        :raises BenchFailed: it failed, or some message did not come exactly once.
        """
        with self._generator(mode, arguments, seconds) as answer:
            return {**answer, "lag": self.lag() if self.peer.name == OURS else {}}

    @contextmanager
    def idle(self, *arguments: object, seconds: float = RUN_SECONDS) -> Iterator[int]:
        """Connections that stay as long as the context; their number."""
        with self._generator("idle", arguments, seconds) as answer:
            yield answer["connections"]

    @contextmanager
    def _generator(self, mode: object, arguments: tuple[object, ...], seconds: float) -> Iterator[dict[str, Any]]:
        """The load generator, from its result until it has ended."""
        words = self._words(mode, arguments)
        complaints = self.directory / "load.txt"
        with complaints.open("wb") as err:
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, preexec_fn=self._pin
            )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            there, _, _ = select.select([process.stdout], [], [], seconds)
            line = process.stdout.readline() if there else b"(nothing in time)"
            answer = json.loads(line) if line.startswith(b"{") else None
            if answer is not None and answer.get("whole", True):
                yield answer
            process.stdin.close()
            if answer is None or process.wait(seconds):
                said = f"{line.decode()}{complaints.read_text(errors='replace')}"
                raise BenchFailed(f"{self.peer.name}: {' '.join(words[1:])}\n{said}\n{self.words()}")
        finally:
            process.kill()
            process.wait(10)
            process.stdout.close()

    def _words(self, mode: object, arguments: tuple[object, ...]) -> list[str]:
        given = [str(argument) for argument in arguments]
        known = ["--port", str(self.port), "--pid", str(self.process.pid), *self.peer.load, *self.programs.load_options]
        return [str(self.programs.load), str(mode), *known, *given]

    def _pin(self) -> None:
        os.sched_setaffinity(0, self.programs.load_cpus)

    def memory(self) -> Memory:
        sizes = dict.fromkeys(("Pss:", "Rss:"), 0.0)
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, size = line.split()[:2]
            if name in sizes:
                sizes[name] = float(size)
        return Memory(sizes["Pss:"], sizes["Rss:"])

    def cpu_seconds(self) -> float:
        """Of all its threads: the process's clock (`clock_getcpuclockid` makes this number of the pid)."""
        return time.clock_gettime((~self.process.pid) << 3 | 2)

    def wait_idle(self, seconds: float = 0.3, limit: float = 60.0) -> None:
        """Until it has done nothing worth mentioning for *seconds*."""
        deadline, before = time.monotonic() + limit, self.cpu_seconds()
        while time.monotonic() < deadline:
            time.sleep(seconds)
            now = self.cpu_seconds()
            if now - before < seconds / 50:
                return
            before = now
        raise BenchFailed(f"{self.peer.name} is busy for more than {limit:g} s after all have left")

    def lag(self) -> dict[str, float]:
        """How late mythos-trio's event loop was: ``lag_ms`` (99th percentile) and ``max_lag_ms`` by the clock,
        ``turn_ms`` and ``collection_ms`` by the processor time of its longest turn and collection of garbage."""
        time.sleep(2 * TELL_SECONDS)
        answer = httpx.get(f"{self.url}/health/detailed", trust_env=False, timeout=60.0).json()
        measured = answer["components"]["event_loop"]
        gauge: dict[str, float] = json.loads((self.directory / TURNS).read_text())
        return {"lag_ms": measured["lag_ms"], "max_lag_ms": measured["max_lag_ms"], **gauge}

    def words(self) -> str:
        """What it said on its console, the end of it."""
        return f"--- {self.peer.name} said:\n{(self.directory / 'console.txt').read_text(errors='replace')[-3000:]}"


@contextmanager
def running(
    peer: Peer, programs: Programs, *, game: str = "tests.bench.game:Bench", store: Path | None = None, **settings: str
) -> Iterator[Running]:
    """Start *peer* in a directory of its own, and end it.

    :param store: a directory with a filled store; mythos-trio gets a copy.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        place, port = Path(directory), free_port()
        if store is not None:
            (place / "data").mkdir()
            shutil.copytree(store, place / "data/players")
        # Else the kernel writes the copy, or what the server before has left, while this one is measured: its start
        # looks slow.
        os.sync()
        inherited = {name: text for name, text in os.environ.items() if name not in SPECS}
        paths = f"{ROOT}{os.pathsep}{ROOT / 'src'}"
        environment = {**inherited, "PYTHONPATH": paths, "NODE_PATH": str(programs.node_modules), "PORT": str(port)}
        environment |= {**peer.environment, **settings}
        with (place / "console.txt").open("wb") as console:
            began = time.monotonic()
            process = subprocess.Popen(
                peer.command(programs, port, game),
                cwd=place,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                preexec_fn=lambda: os.sched_setaffinity(0, programs.server_cpus),
            )
        try:
            wait_until(lambda: _answers(peer, process, place, port), f"{peer.name} answers", START_SECONDS)
            server = Running(peer, programs, process, port, time.monotonic() - began, place)
            yield server
            if process.poll() is not None:
                raise BenchFailed(f"{peer.name} has ended: {process.returncode}\n{server.words()}")
        finally:
            process.kill()
            process.wait(30)


def _answers(peer: Peer, process: subprocess.Popen[bytes], place: Path, port: int) -> bool:
    if process.poll() is not None:
        said = (place / "console.txt").read_text(errors="replace")
        raise BenchFailed(f"{peer.name} did not start: {process.returncode}\n{said}")
    try:
        return httpx.get(f"http://127.0.0.1:{port}{peer.ready}", trust_env=False, timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False


def check_counting(programs: Programs) -> None:
    """A server that loses a delivery, or makes one twice, must not get through."""
    for fault in ("lose", "twice"):
        for target, count in (("all", 10), ("player", 200)):
            with running(_liar(fault), programs) as server:
                try:
                    server.load(
                        *("publish", "--players", 20, "--target", target, "--count", count, "--window", 1),
                        *("--timeout", 2, "--settle-ms", 50),
                    )
                except BenchFailed as failure:
                    if '"whole":false' not in str(failure):
                        raise
                    continue
                raise BenchFailed(f"the load generator has not noticed: {fault} one of the messages to {target}")


def _liar(fault: str) -> Peer:
    return Peer(f"raw C, {fault}", lambda programs, port, game: [str(programs.raw), str(port), fault])
