"""The drill: restart the server under load, prove that nothing is lost, and report what clients notice of it.

``python -m tests.e2e.restart_drill`` prints the table of docs/reliability.rst, ``--write`` puts it there.

Players sit on both transports, with clients as anybody could write them: they name their position, come back when
they are told to, or after a pause of their own. Publishers and commanders go on without a pause and ask again, under
the same id, until they are answered. Everything that was promised has to arrive once, in order, on every connection.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import trio
from attrs import define, field, frozen

from mythos_trio.cli import store_holder
from mythos_trio.core.client import Backoff
from tests.e2e.servers import PUPPET, ROOT, Server, wait_until

PLAYERS: Final = 100
WRITERS: Final = 3
LOAD_SECONDS: Final = 1.0
BACK_SECONDS: Final = 30.0
# What is published and commanded: some hundred a second, so that the processors are not full with that alone.
PAUSE: Final = 0.01
BUCKET: Final = 0.1

PAGE: Final = ROOT / "docs/reliability.rst"
MARKS: Final = (".. restart drill: begin\n", ".. restart drill: end\n")

# As systemd starts a service of a socket unit: the socket is descriptor 3, and the variables say so.
ACTIVATE: Final = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); "
    "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='mythos.socket'); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


class Lost(Exception):
    """A connection has ended. *retry_ms* is what the server asked for, if it said a last word."""

    def __init__(self, retry_ms: int | None = None) -> None:
        super().__init__(retry_ms)
        self.retry_ms = retry_ms


# Servers.


class ActivatedServer(Server):
    """A server whose port belongs to its parent, as systemd has it: this process."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self.listening = socket.create_server(("127.0.0.1", self.port), backlog=4096)
        self.url = f"http://127.0.0.1:{self.port}"

    def launch(self) -> None:
        assert self.process is None, "it runs already"
        number = self.listening.fileno()
        words = ["-S", "-c", ACTIVATE, str(number), "-m", "mythos_trio", "serve", *([self.game] if self.game else [])]
        with (self.directory / "stdout.txt").open("ab") as out, (self.directory / "stderr.txt").open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=(number,),
            )

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.listening.close()


def start_plainly(server: Server) -> None:
    """SIGTERM, and the command again when it has ended."""
    server.terminate()
    assert server.wait_exit() == 0
    server.start()


def kill_the_child(server: Server) -> None:
    """kill -9 of the server, not of its supervisor."""
    before = child_of(server)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: store_holder(server.database) not in (None, before), "the supervisor has started it anew")
    wait_until(server._ready, "it is ready")


def ask_the_supervisor(server: Server) -> None:
    """SIGUSR2: drain, and start anew."""
    before = child_of(server)
    server.signal(signal.SIGUSR2)
    wait_until(lambda: store_holder(server.database) not in (None, before), "the supervisor has started it anew")
    wait_until(server._ready, "it is ready")


def child_of(server: Server) -> int:
    """The server's pid, as ``mythos-trio pid`` finds it."""
    pid = store_holder(server.database)
    assert pid is not None
    return pid


@frozen
class Case:
    """A way to restart."""

    title: str
    restart: Callable[[Server], None]
    kind: type[Server] = Server
    options: tuple[str, ...] = ()
    obedient: bool = True
    """Whether clients wait as long as they are told."""

    @property
    def keeps_port(self) -> bool:
        return self.kind is ActivatedServer or "--supervise" in self.options


CASES: Final = {
    "plain": Case("SIGTERM, and the command again", start_plainly),
    "socket": Case("the same, with systemd's socket", start_plainly, kind=ActivatedServer),
    "supervisor": Case("SIGUSR2 to ``--supervise``", ask_the_supervisor, options=("--supervise",)),
    "kill": Case("``kill -9`` below ``--supervise``", kill_the_child, options=("--supervise",)),
    "herd": Case(
        "systemd's socket, and clients that come back at once", start_plainly, kind=ActivatedServer, obedient=False
    ),
}


@contextmanager
def running(case: Case, directory: Path) -> Iterator[Server]:
    settings = {"RATE_LIMIT_REQUESTS": "1000000", "RATE_LIMIT_WINDOW": "1", "LOG_LEVEL": "WARNING"}
    server = case.kind(directory, game=PUPPET, HOST="127.0.0.1", **settings)
    server.options = case.options
    try:
        yield server.start()
        server.terminate()
        assert server.wait_exit() == 0
    finally:
        server.close()


# Clients.


@define(eq=False)
class Drill:
    """What all clients share, and what they have seen."""

    port: int
    obedient: bool
    lets: list[float] = field(factory=list)
    """When connections were let in."""
    messages: list[float] = field(factory=list)
    answers: list[float] = field(factory=list)
    """When something was answered 202."""
    refused: int = 0
    reset: int = 0
    promised: dict[str, dict[int, str]] = field(factory=dict)
    """Per player: the content that has to arrive at each number."""
    commanded: dict[str, list[str]] = field(factory=dict)
    enough: bool = False


async def connected(drill: Drill) -> trio.SocketStream:
    sock = trio.socket.socket()
    try:
        await sock.connect(("127.0.0.1", drill.port))
    except BaseException as error:
        sock.close()
        if isinstance(error, ConnectionRefusedError):
            drill.refused += 1
        raise
    return trio.SocketStream(sock)


class Reader:
    """Bytes of a connection, in the pieces that are asked for."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._data = bytearray()

    async def _more(self) -> None:
        data = await self._stream.receive_some(65536)
        if not data:
            raise Lost
        self._data += data

    async def until(self, end: bytes) -> bytes:
        while (at := self._data.find(end)) < 0:
            await self._more()
        return await self.exactly(at + len(end))

    async def exactly(self, count: int) -> bytes:
        while len(self._data) < count:
            await self._more()
        taken = bytes(self._data[:count])
        del self._data[:count]
        return taken


@define(eq=False)
class Client:
    """One connection of a player, again and again."""

    drill: Drill
    player: str
    transport: str
    got: list[tuple[int, str]] = field(factory=list)
    lets: int = 0
    position: str = ""
    first: trio.Event = field(factory=trio.Event)
    wanted: int | None = None
    """The number that was promised last, once that is known."""
    through: trio.Event = field(factory=trio.Event)
    _epoch: int = 0
    _retry_ms: int | None = None

    async def run(self) -> None:
        backoff = Backoff()
        while True:
            lets, self._retry_ms = self.lets, None
            try:
                await self._live()
            except* (OSError, Lost, trio.BrokenResourceError):
                pass
            if self.lets > lets:
                backoff.good()
            pause = backoff.next(random.uniform(0.5, 1.0), self._retry_ms)
            await trio.sleep(pause if self.drill.obedient else 0.02)

    async def _live(self) -> None:
        async with await connected(self.drill) as stream:
            upgrade = (
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n"
            )
            at = f"?position={self.position}" if self.position else ""
            await stream.send_all(
                f"GET /{self.transport}/{self.player}{at} HTTP/1.1\r\nHost: localhost\r\n"
                f"{upgrade if self.transport == 'ws' else ''}\r\n".encode()
            )
            reader = Reader(stream)
            head = await reader.until(b"\r\n\r\n")
            assert head.startswith((b"HTTP/1.1 101 ", b"HTTP/1.1 200 ")), head
            while True:
                if self.transport == "ws":
                    await self._frame(reader, stream)
                else:
                    await self._event(reader)

    async def _frame(self, reader: Reader, stream: trio.SocketStream) -> None:
        kind, length = await reader.exactly(2)
        if length >= 126:
            length = int.from_bytes(await reader.exactly(2 if length == 126 else 8), "big")
        payload = await reader.exactly(length)
        if kind == 0x81:
            self._hear(json.loads(payload))
        elif kind == 0x89:
            await stream.send_all(bytes((0x8A, 0x80 | length, 0, 0, 0, 0)) + payload)
        elif kind == 0x88:
            raise Lost

    async def _event(self, reader: Reader) -> None:
        for line in (await reader.until(b"\n\n")).decode().splitlines():
            name, _, value = line.partition(": ")
            if name == "retry":
                self._retry_ms = int(value)
            elif name == "data":
                self._hear(json.loads(value))

    def _hear(self, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if "seq" in message:
            self.position = f"{self._epoch}-{message['seq']}"
            self.got.append((message["seq"], message["content"]))
            self.drill.messages.append(now)
            self.look()
        elif message["type"] == "welcome":
            self._epoch, self.position = message["epoch"], message["position"]
            self.drill.lets.append(now)
            self.lets += 1
            self.first.set()
        elif message["type"] == "disconnect":
            self._retry_ms = message["retry_ms"]
        else:
            assert message["type"] == "heartbeat", message

    def look(self) -> None:
        if self.wanted is not None and self.got and self.got[-1][0] >= self.wanted:
            self.through.set()


@define(eq=False)
class Writer:
    """Publishes, or commands, one after another over one connection that it keeps."""

    drill: Drill
    name: str
    commands: bool
    _count: int = 0
    _stream: trio.SocketStream | None = None

    async def run(self) -> None:
        while not self.drill.enough:
            self._count += 1
            await self.ask_until_answered(f"{self.name}-{self._count}")
            await trio.sleep(PAUSE)
        await self.close()

    async def close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.aclose()

    async def ask_until_answered(self, id: str) -> None:
        drill, player = self.drill, f"p{self._count * 7 % len(self.drill.promised)}"
        to_all = not self.commands and self._count % 20 == 0
        if self.commands:
            path = f"/api/connections/{player}/commands"
            body: dict[str, Any] = {"id": id, "content": f"line {id}"}
        else:
            path, target = "/api/messages", {"broadcast": True} if to_all else {"player_id": player}
            body = {**target, "message": {"id": id, "type": "line", "content": id}}
        answer = None
        while answer is None:
            answer = await self._post(path, body)
            if answer is None:
                await trio.sleep(0.02)
        if self.commands:
            assert answer["ok"] is True, answer
            drill.commanded[player].append(id)
            return
        drill.answers.append(time.monotonic())
        for receiver in drill.promised if to_all else (player,):
            drill.promised[receiver][answer["seq"]] = id

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer's body; None if there was none, or the server had no time."""
        try:
            if self._stream is None:
                self._stream = await connected(self.drill)
            data = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
            await self._stream.send_all(head.encode() + data)
            reader = Reader(self._stream)
            told = (await reader.until(b"\r\n\r\n")).decode().lower()
            found = re.search(r"\r\ncontent-length: (\d+)\r\n", told)
            assert found is not None, told
            answer: dict[str, Any] = json.loads(await reader.exactly(int(found[1])))
            if "\r\nconnection: close\r\n" in told:
                await self.close()
            status = int(told.split()[1])
            assert status in (200, 202, 503), (told, answer)
            return answer if status < 300 else None
        except (OSError, Lost, trio.BrokenResourceError) as error:
            self.drill.reset += not isinstance(error, ConnectionRefusedError)
            await self.close()
            return None


# The drill.


@frozen
class Report:
    """What clients noticed. Times in seconds."""

    connections: int
    came_back: int
    refused: int
    peak: int
    """Connections let in within a tenth of a second, at most."""
    all_back: float
    """From the signal until the last one was back."""
    no_answer: float
    """The longest time between two publications that were answered 202."""
    no_message: float
    """The longest time in which nobody got a message."""
    messages: int


async def drilled(case: Case, server: Server, players: int = PLAYERS) -> Report:
    """Restart the server under load; AssertionError if anything was lost, doubled or out of order."""
    drill = Drill(server.port, case.obedient)
    names = [f"p{number}" for number in range(players)]
    drill.promised = {name: {} for name in names}
    drill.commanded = {name: [] for name in names}
    clients = [Client(drill, name, transport) for name in names for transport in ("ws", "sse")]
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(client.run)
        with trio.fail_after(BACK_SECONDS):
            for client in clients:
                await client.first.wait()
        async with trio.open_nursery() as writers:
            for number in range(WRITERS):
                writers.start_soon(Writer(drill, f"pub{number}", commands=False).run)
                writers.start_soon(Writer(drill, f"cmd{number}", commands=True).run)
            await trio.sleep(LOAD_SECONDS)
            began, before = time.monotonic(), len(drill.lets)
            await trio.to_thread.run_sync(case.restart, server)
            with trio.fail_after(BACK_SECONDS):
                while any(client.lets < 2 for client in clients):
                    await trio.sleep(0.05)
            await trio.sleep(LOAD_SECONDS)
            drill.enough = True
        await all_through(drill, clients)
        nursery.cancel_scope.cancel()
    check(drill, clients)
    back = drill.lets[before:]
    return Report(
        connections=len(clients),
        came_back=sum(client.lets >= 2 for client in clients),
        refused=drill.refused,
        peak=max(Counter(int((at - began) / BUCKET) for at in back).values()),
        all_back=max(back) - began,
        no_answer=longest(drill.answers),
        no_message=longest(drill.messages),
        messages=len(drill.messages),
    )


async def all_through(drill: Drill, clients: list[Client]) -> None:
    """Until each client has all that it was promised: a last message to everybody is behind everything."""
    writer = Writer(drill, "last", commands=False)
    writer._count = 20  # a broadcast
    await writer.ask_until_answered("last")
    await writer.close()
    for client in clients:
        client.wanted = max(drill.promised[client.player])
        client.look()
    with trio.fail_after(BACK_SECONDS):
        for client in clients:
            await client.through.wait()


def check(drill: Drill, clients: list[Client]) -> None:
    for client in clients:
        who = f"{client.transport} of {client.player}"
        seqs = [seq for seq, _ in client.got]
        assert seqs == sorted(set(seqs)), f"{who}: twice, or out of order"
        published = [(seq, text) for seq, text in client.got if not text.startswith("cmd")]
        assert published == sorted(drill.promised[client.player].items()), f"{who}: not what was promised"
        commanded = [text for _, text in client.got if text.startswith("cmd")]
        assert sorted(commanded) == sorted(drill.commanded[client.player]), f"{who}: a command's line is missing"


def longest(times: list[float]) -> float:
    """The longest time between two of *times*."""
    ordered = sorted(times)
    return max(later - earlier for earlier, later in itertools.pairwise(ordered))


# The table.


def run(name: str) -> Report:
    with tempfile.TemporaryDirectory() as directory, running(CASES[name], Path(directory)) as server:
        return trio.run(drilled, CASES[name], server)


def table(reports: dict[str, list[Report]]) -> str:
    """As reStructuredText: the median of each figure."""
    heads = (
        "restart",
        "refused",
        "let in within 0.1 s, at most",
        "all back after, s",
        "no 202 for, s",
        "no message, s",
    )
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 40 12 12 12 12 12", ""]
    lines += [f"   {'* -' if head == heads[0] else '  -'} {head}" for head in heads]
    for name, several in reports.items():

        def median(get: Callable[[Report], float], several: list[Report] = several) -> float:
            return sorted(map(get, several))[len(several) // 2]

        cells = (
            f"{median(lambda r: r.refused):.0f}",
            f"{median(lambda r: r.peak):.0f}",
            f"{median(lambda r: r.all_back):.1f}",
            f"{median(lambda r: r.no_answer):.1f}",
            f"{median(lambda r: r.no_message):.1f}",
        )
        lines += [f"   * - {CASES[name].title}", *(f"     - {cell}" for cell in cells)]
    return "\n".join(lines) + "\n"


def written(text: str, page: str) -> str:
    """*page* with *text* between the marks."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    assert begin
    assert end
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="which restarts; default: all")
    parser.add_argument("--times", type=int, default=3, help="how often each; the median is shown")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.rst")
    options = parser.parse_args()
    reports: dict[str, list[Report]] = {name: [] for name in options.cases or CASES}
    for turn in range(options.times):
        for name, several in reports.items():
            several.append(run(name))
            print(f"{turn + 1}/{options.times} {name}: {several[-1]}", flush=True)
    text = table(reports)
    print(f"\n{text}\nload of the machine: {os.getloadavg()[0]:.1f}, processors: {os.cpu_count()}")
    if options.write:
        PAGE.write_text(written(text, PAGE.read_text()))


if __name__ == "__main__":
    main()
