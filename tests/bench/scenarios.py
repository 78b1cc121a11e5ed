"""What is measured: each scenario, for a peer, on a fresh server, once.

A unit is what a scenario counts: a delivery, a POST, a command, a connection. ``cpu_us`` is the server's processor
time for one unit, in microseconds, all threads; what the server puts off belongs to it (the load generator waits a
moment). Sizes are those of the requirement; with ``--quick`` they are so small that the figures mean nothing.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import asdict, define, field, frozen

from mythos_trio.core.messages import make_body
from mythos_trio.core.names import to_player
from mythos_trio.core.transaction import Append, Transaction
from mythos_trio.seams import rfc3339
from mythos_trio.sqlite import SqliteDatabase
from tests.bench.measure import OURS, PEERS, RIVAL, BenchFailed, Memory, Peer, Programs, Running, running

ALL: Final = tuple(PEERS)
PAIR: Final = (OURS, RIVAL)
ALONE: Final = (OURS,)
CONTROL: Final = "raw C"
FLOOR: Final = (*PAIR, CONTROL)
SETTLE_SECONDS: Final = 3.0
# What a server needs beside its connections; so many are left of the hard limit for the largest case.
OTHER_FILES: Final = 200
STORE_BOUNDS: Final = {"MESSAGE_RETENTION_COUNT": "10000000", "MAX_STORE_BYTES": str(1 << 40)}


@define
class Result:
    """One measurement. Times in µs or ms as the names say; None where a scenario has no such figure."""

    scenario: str
    case: str
    peer: str
    round: int
    units: int = 0
    cpu_us: float | None = None
    user_us: float | None = None
    rate: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    load_us: float | None = None
    load_busy: float | None = None
    """The load generator's share of one processor: near 1 it is the limit, and *rate* a lower bound."""
    kib: float | None = None
    """Memory of a connection."""
    start_seconds: float | None = None
    lag_ms: float | None = None
    max_lag_ms: float | None = None
    turn_ms: float | None = None
    """The longest turn of the event loop, in processor time."""
    collection_ms: float | None = None
    """The longest collection of garbage, the same way; a part of some turn."""

    def asdict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@define
class Run:
    """One turn of a scenario for one peer: what it may use, and where its results go."""

    scenario: str
    peer: Peer
    programs: Programs
    round: int
    quick: bool
    full: bool
    scratch: Path
    """A directory that lives as long as the bench: filled stores."""
    say: Callable[[str], None]
    results: list[Result] = field(factory=list)

    def size(self, usual: int, quick: int) -> int:
        return quick if self.quick else usual

    def seconds(self, usual: float) -> float:
        return 0.25 if self.quick else usual

    def measured(self, answer: dict[str, Any], case: str = "", *, posts: bool = False) -> Result:
        """Keep what the load generator said, and, of ours, how late the loop was.

        :param posts: the unit is a POST, not a delivery.
        """
        units = answer["posts"] if posts else answer["units"]
        scale = answer["units"] / units
        result = Result(
            self.scenario,
            case,
            self.peer.name,
            self.round,
            units,
            cpu_us=answer["cpu_us"] * scale,
            user_us=answer["user_us"] * scale,
            rate=answer["rate"] / scale,
            p50_ms=answer["p50_ms"],
            p99_ms=answer["p99_ms"],
            load_us=answer["load_us"] * scale,
            load_busy=answer["load_busy"],
        )
        return self.keep(result, answer["lag"])

    def keep(self, result: Result, lag: dict[str, float]) -> Result:
        for name, value in lag.items():
            setattr(result, name, value)
        self.results.append(result)
        return result

    def server(self, **more: Any) -> Any:
        return running(self.peer, self.programs, **more)


@frozen
class Scenario:
    """*floor* and *goal*: how many times less than `RIVAL` (processor time or memory for a unit)."""

    name: str
    title: str
    unit: str
    peers: Sequence[str]
    run: Callable[[Run], None]
    floor: float | None = None
    goal: float | None = None
    transports: str = "ws"
    cases: str = ""
    """What the cases of a scenario vary, for the axis of its plot."""

    def takes(self, peer: Peer) -> bool:
        return peer.name in self.peers and self.transports in peer.transports


# Publishing.


def fan_out(run: Run) -> None:
    players, count = run.size(1000, 50), run.size(200, 10)
    with run.server() as server:
        words = ("--players", players, "--count", count, "--window", 1, "--warm", run.size(20, 2))
        run.measured(server.load("publish", *words))


def burst(run: Run) -> None:
    players, count = run.size(1000, 50), run.size(400, 40)
    with run.server() as server:
        words = ("--players", players, "--count", count, "--publishers", 8, "--window", 64, "--warm", run.size(20, 8))
        run.measured(server.load("publish", *words))


def dual(run: Run) -> None:
    players, count = run.size(500, 25), run.size(200, 10)
    with run.server() as server:
        words = ("--players", players, "--transports", "both", "--count", count, "--window", 1)
        run.measured(server.load("publish", *words, "--warm", run.size(20, 2)))


def _transports(peer: Peer) -> str:
    return "both" if "both" in peer.transports else "ws"


def _unicast(run: Run, server: Running, rate: float, publishers: int, seconds: float) -> dict[str, Any]:
    words = ("--players", run.size(500, 25), "--transports", _transports(run.peer), "--target", "player")
    how = ("--publishers", publishers, "--window", 0, "--rate", rate, "--seconds", run.seconds(seconds))
    return server.load("publish", *words, *how, "--warm", run.size(200, 20))


def unicast_rate(run: Run) -> None:
    with run.server() as server:
        run.measured(_unicast(run, server, 500, 8, 3.0), posts=True)


def unicast_maximum(run: Run) -> None:
    with run.server() as server:
        run.measured(_unicast(run, server, 0, 32, 3.0), posts=True)


def rooms(run: Run) -> None:
    players, seconds = run.size(1000, 40), run.seconds(3.0)
    with run.server() as server:
        words = ("--players", players, "--target", "room", "--room-size", 20, "--publishers", 32, "--window", 0)
        run.measured(server.load("publish", *words, "--seconds", seconds, "--warm", run.size(100, 10)))


# Commands.


def _commands(run: Run, server: Running, rate: float, *more: object) -> dict[str, Any]:
    words = ("--players", run.size(100, 10), "--rate", rate, "--seconds", run.seconds(3.0))
    return server.load("command", *words, "--warm", run.size(1000, 20), *more)


def command(run: Run) -> None:
    with run.server() as server:
        run.measured(_commands(run, server, 0))


def transactions(run: Run) -> None:
    """The game and the command of `tests.bench.bench_transactions`: 100 players, each with data of their own."""
    with run.server(game="tests.bench.game:Counting") as server:
        run.measured(_commands(run, server, 0, "--content", "own"))


# Coming and staying.


def connect(transport: str, *, known: int = 0) -> Callable[[Run], None]:
    def measure(run: Run) -> None:
        warm = ("--warm", run.size(known, 50), "--new", 0) if known else ()
        with run.server() as server:
            words = ("--transports", transport, "--concurrency", 32, "--seconds", run.seconds(3.0))
            run.measured(server.load("connect", *words, *warm))

    return measure


def leave(run: Run) -> None:
    """All connections of 2,000 players are gone in one moment, as when a cable is pulled and its end noticed."""
    players = run.size(2000, 50)
    with run.server() as server:
        with server.idle("--players", players, "--transports", "both") as count:
            server.wait_idle()
            before = server.cpu_seconds()
        server.wait_idle()
        cpu_us = (server.cpu_seconds() - before) / count * 1e6
        lag = server.lag() if run.peer.name == OURS else {}
        run.keep(Result(run.scenario, "", run.peer.name, run.round, units=count, cpu_us=cpu_us), lag)


def memory(transports: str) -> Callable[[Run], None]:
    def measure(run: Run) -> None:
        connections = run.size(5000, 200)
        players = connections // 2 if transports == "both" else connections
        with run.server() as server:
            time.sleep(0.2 if run.quick else 1.0)
            before = server.memory()
            with server.idle("--players", players, "--transports", transports) as count:
                time.sleep(0.2 if run.quick else SETTLE_SECONDS)
                after = server.memory()
                lag = server.lag() if run.peer.name == OURS else {}
            run.keep(_memory(run, before, after, count), lag)

    return measure


def _memory(run: Run, before: Memory, after: Memory, count: int) -> Result:
    return Result(run.scenario, "", run.peer.name, run.round, units=count, kib=(after.pss_kib - before.pss_kib) / count)


def connections(run: Run) -> None:
    """Fan-out, one message at a time; about the same number of deliveries in each case."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - OTHER_FILES
    cases = (100,) if run.quick else (100, 1000, 5000, 10_000, 20_000)
    for players in sorted({min(players, room) for players in cases}):
        run.say(f"{players:,} connections")
        deliveries = run.size(200_000, 1000)
        with run.server() as server:
            words = ("--players", players, "--count", max(10, deliveries // players), "--window", 1)
            answer = server.load("publish", *words, "--warm", 5, "--timeout", 180, seconds=420)
            run.measured(answer, str(players))


def resume(run: Run) -> None:
    players, missed = run.size(2000, 20), run.size(100, 10)
    with run.server(HISTORY=str(missed)) as server:
        words = ("--players", players, "--missed", missed, "--timeout", 120)
        run.measured(server.load("resume", *words))


def half(run: Run) -> None:
    """POSTs to random dual players and commands, each at half of the rate that the same server has just reached.

    The loop in C has the rates that mythos-trio had in the round: it shows what the machine does to a percentile.
    """
    with run.server() as server:
        most = _unicast(run, server, 0, 32, 2.0)
        rate = _same_rate(run, "POST", most["posts"] / most["seconds"] / 2)
        run.measured(_unicast(run, server, rate, 32, 4.0), "POST", posts=True)
        rate = _same_rate(run, "command", _commands(run, server, 0)["rate"] / 2)
        run.measured(_commands(run, server, rate), "command")


def _same_rate(run: Run, case: str, own: float) -> float:
    """*own*, but for the loop in C that of mythos-trio, if it was measured in the round."""
    told = run.scratch / f"half-{run.round}-{case}"
    if run.peer.name == OURS:
        told.write_text(str(own))
    return float(told.read_text()) if run.peer.name == CONTROL and told.exists() else own


# What is stored.


def stored(run: Run) -> None:
    """POSTs to random dual players, and the start, with so many messages in the store."""
    cases = [1000] if run.quick else [1000, 100_000, 1_000_000, *([10_000_000] if run.full else [])]
    for count in cases:
        run.say(f"{count:,} messages stored")
        store = filled(run.scratch, count, run.say)
        with run.server(store=store, **STORE_BOUNDS) as server:
            result = run.measured(_unicast(run, server, 0, 32, 3.0), str(count), posts=True)
            result.start_seconds = server.started_seconds


def filled(scratch: Path, count: int, say: Callable[[str], None]) -> Path:
    """A directory with a store of *count* messages, closed in order; made once."""
    directory = scratch / f"store-{count}"
    if (directory / "whole").exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    database = SqliteDatabase(directory / "mythos.db", max_store_bytes=1 << 40)
    now = time.time()
    database.open(now)
    content = {"text": "x" * 120}
    for first in range(0, count, 1000):
        numbers = range(first, min(first + 1000, count))
        appends = [
            Append(
                to_player(f"stored{n % 10_000}"),
                f"old-{n:032}",
                make_body(f"old-{n:032}", "line", content, rfc3339(now), {}),
            )
            for n in numbers
        ]
        outcomes = database.commit([Transaction([append]) for append in appends], now)
        if any(not hasattr(outcome, "seqs") for outcome in outcomes):
            raise BenchFailed(f"the store could not be filled: {outcomes[0]}")
        if first % 500_000 == 0 and first:
            say(f"filling the store: {first:,} of {count:,}")
    database.close()
    (directory / "whole").touch()
    return directory


SCENARIOS: Final[tuple[Scenario, ...]] = (
    Scenario(
        "fan-out", "Fan-out to 1,000 WebSocket clients, one message at a time", "delivery", ALL, fan_out, 1.8, 2.3
    ),
    Scenario("burst", "The same, 8 publishers at once", "delivery", ALL, burst, 5, 9),
    Scenario(
        "dual", "Fan-out to 500 players with WebSocket and SSE", "delivery", ALL, dual, 2.0, 2.6, transports="both"
    ),
    Scenario("unicast-rate", "POST to a random player of 500, 500 a second", "POST", ALL, unicast_rate),
    Scenario("unicast-max", "POST to a random player of 500, as many as can be", "POST", ALL, unicast_maximum, 2.5, 5),
    Scenario("command", "Command without effects, and its reply", "command", ALL, command, 1.0, 2.2),
    Scenario("rooms", "Messages to rooms of 20", "delivery", ALL, rooms),
    Scenario("connect-ws", "Connect by WebSocket, a new player each time", "connection", ALL, connect("ws"), 1.2, 2),
    Scenario(
        "connect-sse",
        "Connect by SSE, a new player each time",
        "connection",
        ALL,
        connect("sse"),
        1.2,
        2,
        transports="sse",
    ),
    Scenario(
        "return-ws", "Connect by WebSocket, 1,000 players come again", "connection", PAIR, connect("ws", known=1000)
    ),
    Scenario("leave", "2,000 players with both transports leave at once", "connection", PAIR, leave, transports="both"),
    Scenario(
        "memory-ws", "Memory of an idle connection, 5,000 on WebSocket", "connection", ALL, memory("ws"), 1.3, 2.5
    ),
    Scenario(
        "memory-both",
        "Memory of an idle connection, 2,500 players on both",
        "connection",
        ALL,
        memory("both"),
        1.3,
        2.5,
        transports="both",
    ),
    Scenario(
        "connections", "Fan-out against the number of connections", "delivery", FLOOR, connections, cases="connections"
    ),
    Scenario("resume", "2,000 clients come back at once, 100 messages each", "message", PAIR, resume),
    Scenario("transactions", "Commands that commit data, 100 players", "command", ALONE, transactions),
    Scenario("half", "At half of the greatest rate", "unit", FLOOR, half),
    # The last one: the kernel is busy with gigabytes of it for a while.
    Scenario("stored", "POST against the number of stored messages", "POST", ALONE, stored, cases="messages stored"),
)
