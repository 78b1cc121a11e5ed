"""A server process, good clients beside it, and what is measured of both while a bad client has its turn."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import httpx
from attrs import Factory, define, frozen

from mythos_trio.config import Settings, load
from tests.e2e.bad_clients.game import CHANNEL
from tests.e2e.clients import UPGRADE, Raw
from tests.e2e.servers import ROOT, Server, environment, wait_until
from tests.support import cables

# Sessions are over soon after their last connection, so that nothing may be left of them at the end.
LINKDEAD_GRACE: Final = "0.5"
SHORT: Final = {"WRITE_TIMEOUT": "2", "HEALTH_CHECK_INTERVAL": "1", "PONG_TIMEOUT": "3", "RATE_LIMIT_WINDOW": "5"}
GAME: Final = "tests.e2e.bad_clients.game:Game"
# For the machine: nothing here is measured to show that it is fast.
SLACK_SECONDS: Final = 6.0
LATE_SECONDS: Final = 3.0
# What a server has more after some minutes with the good clients alone: their logs, the caches of SQLite.
BASE_MIB: Final = 10.0
CLIENT_KIB: Final = 48
MANY: Final = 500
GIVE_UP_SECONDS: Final = 150.0
END_SECONDS: Final = 15.0
PUBLISHED_BYTES: Final = 60_000

# States (linux/include/net/tcp_states.h) in which nothing is kept but the ports: FIN_WAIT2, TIME_WAIT.
_NEXT_TO_NOTHING: Final = ("05", "06")
_LISTEN: Final = "0A"
_NOBODY: Final = "0"
"""The inode of a connection that the process has closed and the kernel still keeps."""
MIB: Final = 1 << 20

_STARTING: Final = threading.Lock()

Json: TypeAlias = dict[str, Any]


@frozen
class Bound:
    """Until when a bad client is gone."""

    text: str
    """Which settings and constants it consists of; RST."""
    seconds: Callable[[Settings], float] | None
    """None: it stays, and that is right."""


@frozen
class Case:
    """What a bad client does. *play* does it and returns the seconds from its last good deed until it is gone."""

    name: str
    does: str
    bound: Bound
    play: Callable[[Stage], float]
    clients: int = 1
    """How many of them there are at once."""
    crowd: int = 0
    """Others who have to be there."""
    work: float = 0.0
    """Seconds for which a slow machine may be busy with it; no part of the bound."""
    loud: bool = False
    """It keeps a processor busy: others cannot be measured beside it."""
    settings: Mapping[str, str] = Factory(dict)

    @property
    def memory_mib(self) -> float:
        """What may be resident afterwards that was not before: the allocator keeps what it had to get once."""
        return BASE_MIB + (self.clients + self.crowd) * CLIENT_KIB / 1024

    @property
    def twice(self) -> bool:
        """Whether it is played again, to see that the second time needs nothing new."""
        return self.clients >= MANY


@define
class Result:
    """What was measured."""

    case: Case
    bound: float | None
    measured: float
    quiet: Json
    """The good clients' figures before: ``count``, ``p50``, ``p99``, ``max``, milliseconds."""
    meanwhile: Json
    before: float
    """MiB that were resident before the bad clients came, …"""
    peak: float
    after: float
    again: float | None
    """… and after a second time, of a case that is played twice."""
    left: Json
    """What there is more than before anybody came: ``sockets``, ``tasks``, ``connections``; and ``leaks``."""
    problems: list[str]

    @property
    def ratios(self) -> tuple[float, float]:
        """The good clients' latency against the quiet run: median, 99th percentile."""
        return self.meanwhile["p50"] / self.quiet["p50"], self.meanwhile["p99"] / self.quiet["p99"]

    def wrong(self) -> list[str]:
        """What is not as it has to be."""
        found = list(self.problems)
        if self.bound is not None and self.measured > self.bound + SLACK_SECONDS + self.case.work:
            found.append(f"gone after {self.measured:.1f} s, the bound is {self.bound:g} s")
        # A case may be over within the time that one message may take on a busy machine.
        if not self.meanwhile["count"] and self.measured > LATE_SECONDS:
            found.append("the good clients have got nothing")
        elif self.meanwhile["count"] and self.meanwhile["max"] > 1000 * LATE_SECONDS:
            found.append(f"a message to a good client took {self.meanwhile['max']:.0f} ms")
        if (grown := self.after - self.before) > self.case.memory_mib:
            found.append(f"{grown:.1f} MiB more than before")
        if self.again is not None and (grown := self.again - self.after) > BASE_MIB:
            found.append(f"{grown:.1f} MiB more the second time")
        found += [f"{count} {name} are left" for name, count in self.left.items() if count > 0]
        return found


NOTHING: Final = {"count": 0, "p50": math.nan, "p99": math.nan, "max": math.nan}


class Witness:
    """The good clients' process."""

    def __init__(self, server: Server) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.bad_clients.witness", str(server.port)],
            cwd=ROOT,
            env=environment({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._hear() == "ready"

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def phase(self, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()

    def stop(self) -> Json:
        self.phase("stop")
        told: Json = json.loads(self._hear() or '{"phases": {}, "problems": ["the good clients have crashed"]}')
        self._process.wait(END_SECONDS)
        return told

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(END_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Bad(Raw):
    """A bad client's connection. *receive_buffer*: how much its kernel takes while it does not read."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(GIVE_UP_SECONDS)
        self.sock.connect(("127.0.0.1", port))
        self.port = self.sock.getsockname()[1]
        self._buffer = b""
        self._pace: tuple[float, float] | None = None

    def read_slowly(self, bytes_a_second: float) -> None:
        """From now on."""
        self._pace = bytes_a_second, time.monotonic()

    def read_exactly(self, count: int) -> bytes:
        while self._pace is not None and len(self._buffer) < count:
            time.sleep(0.05)
            rate, last = self._pace
            now = time.monotonic()
            self._pace = rate, now
            self._buffer += self.sock.recv(int(rate * (now - last)))
        return super().read_exactly(count)

    def cut_the_cable(self) -> None:
        """Say nothing afterwards."""
        cables.cut(self.sock)

    def reset(self) -> None:
        """Leave with a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        with suppress(OSError):  # wakes a thread that reads: it would keep the connection
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def flood(self, data: bytes) -> None:
        """Send *data* again and again until the server ends it, in a thread."""

        def send() -> None:
            with suppress(OSError):
                while True:
                    self.sock.sendall(data)

        threading.Thread(target=send, daemon=True).start()

    def drink(self) -> None:
        """Read all that comes, in a thread."""

        def read() -> None:
            with suppress(OSError):
                while self.sock.recv(1 << 16):
                    pass

        threading.Thread(target=read, daemon=True).start()


class Stage:
    """What a case has to do with: the server, its settings, and ways to be bad and to see what becomes of it."""

    def __init__(self, server: Server, settings: Settings, case: Case, stack: ExitStack) -> None:
        self.server = server
        self.settings = settings
        self.case = case
        self._stack = stack

    @property
    def names(self) -> list[str]:
        """The bad players."""
        return [f"bad{number}" for number in range(self.case.clients)]

    def connect(self, receive_buffer: int | None = None) -> Bad:
        client = Bad(self.server.port, receive_buffer)
        self._stack.callback(client.close)
        return client

    def websocket(self, player: str, receive_buffer: int | None = None) -> Bad:
        """A WebSocket whose welcome has been read."""
        client = self.connect(receive_buffer)
        client.send(UPGRADE.format(path=f"/ws/{player}").encode())
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        assert b"welcome" in client.frame()[1]
        return client

    def sse(self, player: str, receive_buffer: int | None = None) -> Bad:
        """An event stream whose welcome has been read."""
        client = self.connect(receive_buffer)
        client.send(f"GET /sse/{player} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert b"welcome" in client.read_until(b"\n\n")
        return client

    def pour(self, count: int) -> None:
        """Publish to all bad players, *count* times `PUBLISHED_BYTES`."""
        for number in range(count):
            message = {"type": "line", "content": {"number": number, "padding": "x" * PUBLISHED_BYTES}}
            answer = self.post("/api/messages", {"channel": CHANNEL, "message": message})
            assert answer.status_code == 202, answer.text

    def post(self, path: str, body: Json) -> httpx.Response:
        """On a connection of its own, so that none is kept."""
        return httpx.post(f"http://127.0.0.1:{self.server.port}{path}", json=body, trust_env=False, timeout=60.0)

    def enclose(self, close: Callable[[], None]) -> None:
        """Have *close* called when the case is over."""
        self._stack.callback(close)

    # What the kernel knows.

    def held(self, ports: set[int]) -> set[int]:
        """Those of the clients' *ports* whose connection the server's process has open."""
        return {port for port, inode, _ in self._connections() if port in ports and inode != _NOBODY}

    def in_kernel(self, ports: set[int]) -> set[int]:
        """Those whose connection the server's kernel still keeps, though the process may be through with it."""
        return {port for port, _, state in self._connections() if port in ports and state not in _NEXT_TO_NOTHING}

    def _connections(self) -> Iterator[tuple[int, str, str]]:
        """Of the server's side: the client's port, the socket's inode (0: no process has it), the TCP state."""
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, state, _, _, _, _, _, inode, *_ = line.split()
            if int(local.partition(":")[2], 16) == self.server.port and state != _LISTEN:
                yield int(remote.partition(":")[2], 16), inode, state

    def wait_gone(self, clients: Sequence[Bad] | set[int], since: float) -> float:
        """The seconds from *since* (`time.monotonic`) until the server has let go of all *clients* (or ports)."""
        ports = clients if isinstance(clients, set) else {client.port for client in clients}
        pause = 0.02 if len(ports) < 100 else 0.2
        while left := self.held(ports):
            passed = time.monotonic() - since
            assert passed < GIVE_UP_SECONDS, f"{len(left)} of {len(ports)} are still there after {passed:.0f} s"
            time.sleep(pause)
        return time.monotonic() - since

    def wait_kernel(self, clients: Sequence[Bad], since: float) -> float:
        """The same for its kernel, which may have something to deliver when the process is through."""
        ports = {client.port for client in clients}
        while self.in_kernel(ports):
            passed = time.monotonic() - since
            assert passed < GIVE_UP_SECONDS, f"the kernel still has {len(self.in_kernel(ports))} of them"
            time.sleep(0.02)
        return time.monotonic() - since

    def ports_of(self, pid: int) -> set[int]:
        """The ports from which process *pid* is connected to the server."""
        inodes = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
        found = set()
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, _, _, _, _, _, inode, *_ = line.split()
            if f"socket:[{inode}]" in inodes and int(remote.partition(":")[2], 16) == self.server.port:
                found.add(int(local.partition(":")[2], 16))
        assert found, "it is not connected"
        return found

    def check_held(self, clients: Sequence[Bad]) -> None:
        ports = {client.port for client in clients}
        assert self.held(ports) == ports, "somebody was sent away who should have stayed"

    # What the process costs.

    def resident(self) -> float:
        """MiB."""
        pages = int(Path(f"/proc/{self.server.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / MIB

    def counts(self) -> Json:
        tasks = self.server.http.get("/monitoring/tasks").json()
        stats = self.server.http.get("/api/connections/stats").json()
        return {
            "tasks": tasks["total_tasks"],
            "connections": stats["total_connections"],
            "leaks": tasks["leaks"],
        }

    def sockets(self) -> int:
        """Connections that the process has open."""
        return sum(inode != _NOBODY for _, inode, _ in self._connections())

    def trouble_in_the_log(self) -> list[str]:
        lines = [line for line in self.server.log_lines() if line["level"] in ("ERROR", "CRITICAL")]
        found = [f"logged: {line['event']}: {line.get('exception', '')[-1000:]}" for line in lines]
        if "Traceback" in self.server.stderr():
            found.append("a traceback on the console")
        return found


class Peak:
    """Looks at the memory now and then."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.value = 0.0

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.value = max(self.value, self._stage.resident())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()


def settings_of(case: Case, given: Mapping[str, str]) -> dict[str, str]:
    return {"LINKDEAD_GRACE": LINKDEAD_GRACE, "LOG_LEVEL": "WARNING", **given, **case.settings}


def bound_of(case: Case, settings: Settings) -> float | None:
    return None if case.bound.seconds is None else case.bound.seconds(settings)


def measure(case: Case, above: Path, given: Mapping[str, str], *, quiet_seconds: float) -> Result:
    """Play *case* on a server of its own, in a directory in *above*, with the settings that are *given*."""
    environ = settings_of(case, given)
    directory = above / case.name
    directory.mkdir()
    settings = load(environ, dotenv_path=directory / "no.env")
    server = Server(directory, game=GAME, **environ)
    with closing(server), ExitStack() as clients:
        with _STARTING:  # together they would all be slow
            server.start()
        stage = Stage(server, settings, case, clients)
        empty = stage.counts()
        problems: list[str] = []
        with closing(Witness(server)) as witness, Peak(stage) as peak:
            time.sleep(0.3)  # the first messages pay for what the server does only once
            witness.phase("quiet")
            time.sleep(quiet_seconds)
            before = stage.resident()
            witness.phase("meanwhile")
            measured = _play(stage, clients, problems)
            witness.phase("afterwards")
            time.sleep(1.0)
            after, again = stage.resident(), None
            if case.twice:
                _play(stage, clients, problems)
                time.sleep(1.0)
                again = stage.resident()
            told = witness.stop()
        left = _what_is_left(stage, empty)
        problems += told["problems"] + stage.trouble_in_the_log()
        try:
            server.check_leaks()
        except AssertionError as error:
            problems.append(str(error))
        server.kill9()
        return Result(
            case=case,
            bound=bound_of(case, settings),
            measured=measured,
            quiet=told["phases"].get("quiet", NOTHING),
            meanwhile=told["phases"].get("meanwhile", NOTHING),
            before=before,
            peak=peak.value,
            after=after,
            again=again,
            left=left,
            problems=problems,
        )


def _play(stage: Stage, clients: ExitStack, problems: list[str]) -> float:
    try:
        return stage.case.play(stage)
    except (AssertionError, OSError) as error:
        problems.append(f"the case broke off: {error!r}")
        return math.nan
    finally:
        clients.close()


def _what_is_left(stage: Stage, empty: Json) -> Json:
    """What there is more than before anybody came, when all have had time to go."""
    left: Json = {}

    def nothing() -> bool:
        left.update({name: count - empty[name] for name, count in stage.counts().items()})
        left["sockets"] = stage.sockets()
        return all(count <= 0 for count in left.values())

    with suppress(AssertionError):
        wait_until(nothing, "nothing is left", END_SECONDS)
    return left
