"""What happens to the server, each as a wave. A fault that leaves no trace where it should is a failure too."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final, TypeAlias

import httpx
import trio
from attrs import define, field

from tests.soak.ledger import Ledger
from tests.soak.players import Player, cut
from tests.soak.process import DRAIN_SECONDS, Failed, Server, wait_for
from tests.soak.traffic import Counts

EXIT_STORE: Final = 4
# What an orderly end may take beyond DRAIN_TIMEOUT: Python's own, on a machine that has other things to do.
END_SECONDS: Final = 2.0
LOCK: Final = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)
db.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
db.execute("ROLLBACK")
"""


@define(eq=False)
class Scene:
    """What a fault may lay its hands on."""

    server: Server
    players: Sequence[Player]
    ledger: Ledger
    counts: Counts
    dice: random.Random
    disk: Path
    kills: dict[str, int] = field(factory=dict)
    notes: list[str] = field(factory=list)
    """What the wave has to tell."""

    def count(self, kind: str) -> None:
        self.kills[kind] = self.kills.get(kind, 0) + 1

    async def kill9(self) -> None:
        self.count("kill -9")
        self.server.kill(signal.SIGKILL)
        await self.exits(-signal.SIGKILL)

    async def exits(self, *codes: int, seconds: float = 20.0) -> int:
        """It ends, with one of these codes."""
        code = await self.server.wait_exit(seconds)
        if code not in codes:
            self.ledger.violation(f"exit code {code} instead of {codes}: {self.server.console()}")
        return code

    async def terminate(self) -> None:
        """SIGTERM: everybody is told when to come back, and it ends in order and in time."""
        self.count("SIGTERM")
        before = [(player, player.connected, player.told.get("4000", 0)) for player in self.players]
        self.server.kill(signal.SIGTERM)
        began = trio.current_time()
        await self.exits(0, seconds=DRAIN_SECONDS + END_SECONDS)
        self.notes.append(f"gone in {trio.current_time() - began:.1f} s")
        await self.server.start()
        for player, connected, told in before:
            now = player.told.get("4000", 0)
            if now - told < connected or player.untimed:
                self.ledger.violation(
                    f"{player.id} had {connected} connections at SIGTERM, and {now - told} were told 4000, "
                    f"{player.untimed} of them not when to come back: {player.told}"
                )

    async def terminate_for_good(self) -> None:
        """The last end of all."""
        self.count("SIGTERM")
        self.server.kill(signal.SIGTERM)
        await self.exits(0, seconds=DRAIN_SECONDS + END_SECONDS)

    async def wait_refused(self, seconds: float) -> None:
        """Until a publisher has been refused."""
        before = self.counts.refused

        async def refused() -> bool:
            return self.counts.refused > before

        await wait_for("publishing is refused", seconds, refused)

    async def wait_published(self, seconds: float) -> None:
        before = self.ledger.published

        async def published() -> bool:
            return self.ledger.published > before

        await wait_for("publishing works again", seconds, published)

    async def wait_unhealthy(self) -> None:
        async def unhealthy() -> bool:
            return (await self.server.get("/health")).status_code == 503

        await wait_for("health says that it cannot store", 15, unhealthy)

    def ended(self) -> int:
        return sum(player.ended for player in self.players)


async def kill(scene: Scene) -> None:
    """At any moment, also of its start; started again at once."""
    for _ in range(scene.dice.randint(2, 4)):
        if scene.dice.random() < 0.7:
            await scene.server.wait_ready()
            await trio.sleep(scene.dice.uniform(0.0, 2.0))
        else:
            await trio.sleep(scene.dice.uniform(0.0, 1.0))
        await scene.kill9()
        scene.server.launch()
    await scene.server.wait_ready()
    scene.notes.append(f"{scene.kills['kill -9']} so far")


async def term(scene: Scene) -> None:
    await trio.sleep(scene.dice.uniform(0.5, 1.5))
    await scene.terminate()


async def stop(scene: Scene) -> None:
    """The process stands still for seconds. Nobody is sent away for that."""
    before = scene.ended()
    for _ in range(2):
        seconds = scene.dice.uniform(1.0, 3.0)
        scene.count("SIGSTOP")
        scene.server.kill(signal.SIGSTOP)
        try:
            await trio.sleep(seconds)
        finally:
            scene.server.kill(signal.SIGCONT)
        scene.notes.append(f"{seconds:.1f} s")
        await trio.sleep(scene.dice.uniform(0.5, 1.0))
    if scene.ended() != before:
        told = [(player.id, player.told) for player in scene.players]
        scene.ledger.violation(f"{scene.ended() - before} connections ended because the server had stood still: {told}")


async def cables(scene: Scene) -> None:
    """Clients' connections are cut, one after the other."""
    for count in range(60):
        scene.dice.choice(scene.players).cut_one()
        await trio.sleep(scene.dice.uniform(0.0, 0.1))
        scene.kills["connections cut"] = scene.kills.get("connections cut", 0) + 1
        del count


@asynccontextmanager
async def locked(database: Path) -> AsyncIterator[None]:
    """Another process holds the database."""
    holder = await trio.lowlevel.open_process(
        [sys.executable, "-c", LOCK, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        async with holder.stdout, holder.stdin:
            said = await holder.stdout.receive_some(100)
            if not said.startswith(b"held"):
                raise Failed(f"the database could not be locked: {said!r}")
            yield
    finally:
        with trio.CancelScope(shield=True), trio.fail_after(10):
            await holder.wait()


async def lock(scene: Scene) -> None:
    """The database is locked for seconds."""
    scene.count("database locked")
    async with locked(scene.server.database):
        await scene.wait_refused(15)
        await scene.wait_unhealthy()
        await trio.sleep(scene.dice.uniform(0.0, 2.0))
    await scene.wait_published(15)


async def kill_locked(scene: Scene) -> None:
    """Killed while the database is locked: it starts when it can."""
    scene.count("database locked")
    async with locked(scene.server.database):
        await trio.sleep(scene.dice.uniform(0.2, 1.0))
        await scene.kill9()
        scene.server.launch(may_fail=True)
        await trio.sleep(scene.dice.uniform(0.5, 2.0))
    await started_at_last(scene, "the database was locked")


async def started_at_last(scene: Scene, what: str) -> None:
    """A start that failed for want of the store says so by its exit code, and the next one works."""
    with suppress(Failed):
        await scene.server.wait_ready()
        scene.notes.append(f"started while {what}")
        return
    code = await scene.exits(EXIT_STORE)
    scene.notes.append(f"exit code {code} while {what}")
    await scene.server.start()


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No block is left."""
    ballast = disk / "ballast"
    try:
        fill(ballast)
        yield
    finally:
        ballast.unlink(missing_ok=True)


def fill(ballast: Path) -> None:
    """Take what there is, down to the last block."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 16, 1 << 12):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


async def disk(scene: Scene) -> None:
    """The disk is full: after an orderly start, since the journal of one that ran has room of its own."""
    await scene.terminate()
    scene.count("disk full")
    with full(scene.disk):
        await scene.wait_refused(20)
        await scene.wait_unhealthy()
        await trio.sleep(scene.dice.uniform(0.5, 2.0))
    await scene.wait_published(15)


async def kill_full(scene: Scene) -> None:
    """Killed while the disk is full, and started on it."""
    await scene.terminate()
    scene.count("disk full")
    with full(scene.disk):
        await scene.wait_refused(20)
        await scene.kill9()
        fill(scene.disk / "ballast")
        scene.server.launch(may_fail=True)
        await trio.sleep(2.0)
    await started_at_last(scene, "the disk was full")


async def descriptors(scene: Scene) -> None:
    """Strangers take all descriptors. Those who are connected do not notice."""
    before, published = scene.ended(), scene.ledger.published
    scene.count("descriptors exhausted")
    crowd: list[socket.socket] = []
    try:
        await trio.to_thread.run_sync(flood, scene.server.port, crowd)
        # Longer than the pauses of all that looks after the process, which opens files too.
        await trio.sleep(scene.dice.uniform(10.5, 12.0))
        scene.notes.append(f"{len(crowd)} strangers")
        if scene.ledger.published - published < 10:
            scene.ledger.violation("publishers on open connections could not go on without descriptors")
    finally:
        for sock in crowd:
            sock.close()
    if scene.ended() != before:
        told = [(player.id, player.told) for player in scene.players]
        scene.ledger.violation(f"{scene.ended() - before} connections ended for want of descriptors: {told}")

    async def recovered() -> bool:
        # It says so at a connection that comes some seconds after the last that could not be accepted.
        await answers(scene.server)
        return any(line["event"] == "Accepting connections again" for line in scene.server.read_log())

    await wait_for("it accepts again, and says so", 20, recovered)
    if all(line["event"] != "Cannot accept connections" for line in scene.server.lines):
        scene.ledger.violation("the log does not say that there were no descriptors left")


async def answers(server: Server) -> bool:
    return (await server.get("/health/ready")).status_code == 200


STRANGER: Final = (
    b"POST /api/connections/nobody/ack HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2\r\n\r\n{}"
)


def flood(port: int, crowd: list[socket.socket]) -> None:
    """Open connections that stay, until nobody answers any more. In a thread."""
    unanswered = 0
    while unanswered < 3 and len(crowd) < 1000:
        sock = socket.create_connection(("127.0.0.1", port), timeout=1.0)
        crowd.append(sock)
        try:
            sock.sendall(STRANGER)
            unanswered = 0 if sock.recv(4096) else unanswered + 1
        except (TimeoutError, ConnectionError):
            unanswered += 1
    if unanswered < 3:
        raise Failed(f"{len(crowd)} connections have not used up the descriptors")


async def term_full_sockets(scene: Scene) -> None:
    """SIGTERM while clients that have stopped reading hold full sockets."""
    stuck = [await trio.to_thread.run_sync(deaf, scene.server.port, index) for index in range(4)]
    names = [f"deaf-{index}" for index in range(len(stuck))]
    try:
        async with httpx.AsyncClient(base_url=scene.server.url, trust_env=False, timeout=10.0) as client:
            for number in range(40):
                message = {"type": "flood", "content": [number, "x" * 50_000]}
                await client.post("/api/messages", json=[{"player_id": name, "message": message} for name in names])
        scene.count("full sockets")
        await scene.terminate()
    finally:
        for sock in stuck:
            cut(sock)
            sock.close()
    async with httpx.AsyncClient(base_url=scene.server.url, trust_env=False, timeout=10.0) as client:
        for name in names:  # else they would be link-dead for a while, and their tasks be counted
            await client.delete(f"/api/connections/{name}")


def deaf(port: int, index: int) -> socket.socket:
    """A client that asks for its event stream and never reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(5.0)
    sock.connect(("127.0.0.1", port))
    sock.sendall(f"GET /sse/deaf-{index} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    sock.recv(100)
    return sock


@contextmanager
def small_disk(directory: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own, in memory; gone afterwards.

    :raises Failed: it cannot be mounted.
    """
    place = directory / "disk"
    place.mkdir()
    options = f"size={mebibytes}m"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        raise Failed(
            f"a small file system cannot be mounted ({done.stderr.strip()}): run this as root, or where user "
            "namespaces are allowed, or without the faults that need it: --without disk,kill-disk"
        )
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=10)


Fault: TypeAlias = Callable[[Scene], Awaitable[None]]

GENTLE: Final[dict[str, Fault]] = {"stop": stop, "cables": cables, "lock": lock, "descriptors": descriptors}
"""The process lives on, and has to be as it was."""
HARD: Final[dict[str, Fault]] = {
    "kill": kill,
    "term": term,
    "disk": disk,
    "kill-disk": kill_full,
    "kill-lock": kill_locked,
    "term-full": term_full_sockets,
}
"""It comes to an end."""
ON_DISK: Final = frozenset({"disk", "kill-disk"})

__all__ = ["GENTLE", "HARD", "ON_DISK", "Fault", "Scene", "small_disk"]
