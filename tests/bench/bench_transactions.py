"""How many commands with data a second: ``nox -s bench_transactions``, or ``python -m tests.bench.bench_transactions``.

A server as a process, and one client process that is as cheap as Python allows: raw sockets, frames made
beforehand, replies found by their text. Every player has one command under way and gives the next one when the
reply is there. The processes share the machine, so the client's own time counts too.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import trio
from attrs import define, field

from mythos_trio.game import Command, Game, Player
from tests.e2e.servers import Server

REPLY: Final = b'"type":"reply"'
OK: Final = b'"ok":true'
TICKS: Final = os.sysconf("SC_CLK_TCK")


class Counters(Game):
    """Each command adds one to a number in the data."""

    async def on_command(self, player: Player, command: Command) -> Any:
        data = player.world.data
        match command.text:
            case "own":
                player.data["count"] = count = player.data.get("count", 0) + 1
            case "same":
                data["count"] = count = data.get("count", 0) + 1
            case "wait":
                count = data.get("count", 0) + 1
                await trio.lowlevel.checkpoint()
                data["count"] = count
            case "look":
                count = data.get("count", 0)
        return count


@define
class Case:
    name: str
    players: int
    text: str


CASES: Final = (
    Case("one player alone", 1, "own"),
    Case("100 players, their own data", 100, "own"),
    Case("100 players, the same key", 100, "same"),
    Case("10 players, that key, with an await", 10, "wait"),
    Case("100 players, that key, with an await", 100, "wait"),
    Case("100 players who look at that key", 100, "look"),
)


@define(eq=False)
class Client:
    """One player's connection: a closed loop of commands."""

    sock: socket.socket
    text: str
    name: str
    count: int = 0
    asked: float = 0.0
    failed: int = 0
    times: list[float] = field(factory=list)
    rest: bytes = b""

    def ask(self) -> None:
        self.count += 1
        body = b'{"type":"command","id":"%s-%d","content":"%s"}' % (self.name.encode(), self.count, self.text.encode())
        assert len(body) < 126
        self.asked = time.perf_counter()
        self.sock.sendall(bytes((0x81, 0x80 | len(body), 0, 0, 0, 0)) + body)  # masked with zeros

    def receive(self) -> bool:
        """Whether the reply has come."""
        data = self.rest + self.sock.recv(65536)
        replied = False
        while len(data) >= 2:
            start, length = 2, data[1]
            if length == 126:
                start, length = 4, int.from_bytes(data[2:4], "big")
            if len(data) < start + length:
                break
            frame, data = data[start : start + length], data[start + length :]
            if REPLY in frame:
                self.times.append(time.perf_counter() - self.asked)
                self.failed += OK not in frame
                replied = True
        self.rest = data
        return replied


def connect(server: Server, name: str, text: str) -> Client:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = (
        f"GET /ws/{name} HTTP/1.1\r\nHost: localhost:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    sock.sendall(head.encode())
    answer = b""
    while b'"welcome"' not in answer:
        answer += sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return Client(sock, text, f"{name}-{time.time_ns()}")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@define
class Result:
    a_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    client_us: float
    repeated: float
    failed: int


def measure(server: Server, case: Case, seconds: float) -> Result:
    clients = {(c := connect(server, f"p{i}", case.text)).sock.fileno(): c for i in range(case.players)}
    poll = select.epoll()
    for number in clients:
        poll.register(number, select.EPOLLIN)
    loop(poll, clients, 0.5)
    for client in clients.values():
        client.times.clear()
        client.failed = 0
    runs, cpu, own, began = transactions(server), cpu_seconds(server.pid), time.process_time(), time.perf_counter()
    loop(poll, clients, seconds)
    took = time.perf_counter() - began
    own, cpu = time.process_time() - own, cpu_seconds(server.pid) - cpu
    runs_after = transactions(server)
    for client in clients.values():
        client.sock.close()
    times = sorted(t * 1000 for client in clients.values() for t in client.times)
    count = len(times)
    return Result(
        a_second=count / took,
        p50_ms=times[count // 2],
        p99_ms=times[int(count * 0.99)],
        cpu_us=cpu / count * 1e6,
        client_us=own / count * 1e6,
        repeated=(runs_after["repeated"] - runs["repeated"]) / max(1, runs_after["runs"] - runs["runs"]),
        failed=sum(client.failed for client in clients.values()),
    )


def loop(poll: select.epoll, clients: dict[int, Client], seconds: float) -> None:
    """Everybody asks, again and again; in the end all are answered."""
    end = time.perf_counter() + seconds
    waiting = len(clients)
    for client in clients.values():
        client.ask()
    while waiting:
        for number, _ in poll.poll(10):
            client = clients[number]
            if client.receive():
                if time.perf_counter() < end:
                    client.ask()
                else:
                    waiting -= 1


def transactions(server: Server) -> dict[str, int]:
    answer: dict[str, int] = server.http.get("/monitoring/performance").json()["transactions"]
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--times", type=int, default=3, help="measurements of each case; the median is shown")
    options = parser.parse_args()
    results: dict[str, list[Result]] = {case.name: [] for case in CASES}
    with tempfile.TemporaryDirectory() as directory:
        server = Server(
            Path(directory),
            game="tests.bench.bench_transactions:Counters",
            RATE_LIMIT_REQUESTS="1000000",
            RATE_LIMIT_WINDOW="1",
        ).start()
        try:
            for turn in range(options.times):
                for case in CASES:
                    print(f"{turn + 1}/{options.times} {case.name} …", flush=True)
                    results[case.name].append(measure(server, case, options.seconds))
        finally:
            server.close()
    show(results)


def show(results: dict[str, list[Result]]) -> None:
    heads = ("a second", "p50 ms", "p99 ms", "server µs", "client µs", "repeated", "failed")
    print("\n" + " " * 38 + "".join(f"{head:>11}" for head in heads))
    for name, several in results.items():

        def median(field: str, several: list[Result] = several) -> float:
            return float(statistics.median(getattr(result, field) for result in several))

        cells = (
            f"{median('a_second'):,.0f}",
            f"{median('p50_ms'):.2f}",
            f"{median('p99_ms'):.2f}",
            f"{median('cpu_us'):.0f}",
            f"{median('client_us'):.0f}",
            f"{median('repeated'):.2%}",
            f"{median('failed'):.0f}",
        )
        print(f"{name:38}" + "".join(f"{cell:>11}" for cell in cells))
    print(f"\nload of the machine: {os.getloadavg()[0]:.1f}, processors: {os.cpu_count()}")


if __name__ == "__main__":
    main()
