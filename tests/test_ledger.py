"""What runs is known: a leak planted in each layer is found, told, and fails a test."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

from mythos_trio import ledger as ledger_module
from mythos_trio.core.commands import Entry
from mythos_trio.core.errors import REMOVED
from mythos_trio.core.log import Log
from mythos_trio.core.transaction import Committed, Transaction
from mythos_trio.dispatcher import Submission
from mythos_trio.hub import Hub
from mythos_trio.ledger import CHECKER, PARTS, SETTLE_SECONDS, Bounds, Leak, Ledger, task_name
from mythos_trio.net import open_listeners
from mythos_trio.server import Server
from mythos_trio.session import LiveSession
from mythos_trio.streams import Streams
from mythos_trio.timers import TimerClock
from tests.support.games import Puppet
from tests.support.nothing_left import left_since, look
from tests.support.play import World, nothing_over_is_left, play

Undo = Callable[[], object]

ROOT = Path(__file__).parents[1]


async def forever() -> None:
    await trio.sleep_forever()


def sleeper(nursery: trio.Nursery, name: str) -> Undo:
    """A task that nobody owns, in *nursery*."""
    scope = trio.CancelScope()

    async def sleep() -> None:
        with scope:
            await trio.sleep_forever()

    nursery.start_soon(sleep, name=name)
    return scope.cancel


def live(world: World) -> LiveSession:
    return world.server.hub.sessions["ann"]


def parts(server: Server) -> dict[str, trio.lowlevel.Task]:
    assert server.ledger.nursery is not None
    return {task.name: task for task in server.ledger.nursery.child_tasks}


# Each plants one leak on a server where ann is link-dead, and gives the way to take it back.


def task_of_the_server(world: World) -> Undo:
    assert world.server.ledger.nursery is not None
    return sleeper(world.server.ledger.nursery, "planted")


def task_of_the_registrar(world: World) -> Undo:
    return sleeper(parts(world.server)["registrar"].child_nurseries[0], "planted")


def watch_of_the_registrar(world: World) -> Undo:
    name = "mythos_trio.registrar.Registrar._watch"
    return sleeper(parts(world.server)["registrar"].child_nurseries[0], name)


def last_words_without_a_link(world: World) -> Undo:
    return sleeper(parts(world.server)["streams"].child_nurseries[0], "last words")


def task_of_the_front_door(world: World) -> Undo:
    return sleeper(parts(world.server)["front door"].child_nurseries[0], "connection from nowhere")


def task_of_a_player(world: World) -> Undo:
    nursery = live(world).nursery
    assert nursery is not None
    return sleeper(nursery, "planted")


def stream_of_a_player(world: World) -> Undo:
    nursery = live(world).nursery
    assert nursery is not None
    return sleeper(nursery, "sse of ann")


def second_handler(world: World) -> Undo:
    nursery = live(world).nursery
    assert nursery is not None
    undo = [sleeper(nursery, "handlers of ann") for _ in range(2)]
    return lambda: [take_back() for take_back in undo]


def system_task(world: World) -> Undo:
    scope = trio.CancelScope()

    async def planted() -> None:
        with scope:
            await trio.sleep_forever()

    trio.lowlevel.spawn_system_task(planted)
    return scope.cancel


def log_in_memory(world: World) -> Undo:
    live(world)._log = Log(0)
    return lambda: setattr(live(world), "_log", None)


def subscription(world: World) -> Undo:
    session = live(world)
    over = LiveSession(session.row, session._context, complete=True)
    world.server.hub.channels["den"] = {over: None}
    return lambda: world.server.hub.channels.pop("den")


def commands_that_wait(world: World) -> Undo:
    live(world)._commands.submit(Entry("c", b"", "look", "command", given=True), cast(Any, None))
    return live(world)._commands.abandon


def clock_of_a_ghost(world: World) -> Undo:
    hub = world.server.hub
    hub.clocks["player/ghost"] = TimerClock(hub, "player/ghost", cast(Any, None), cast(Any, None))
    return lambda: hub.clocks.pop("player/ghost")


def value_of_a_transaction_that_is_over(world: World) -> Undo:
    submission = Submission(Transaction(), 0.0, 0)
    writes = world.server.hub.data.join({"sun": b"1"}, submission)
    submission.settle(Committed((), 0))
    return lambda: world.server.hub.data.failed(writes)


PLANTS = [
    (task_of_the_server, "task"),
    (task_of_the_registrar, "task"),
    (watch_of_the_registrar, "task"),
    (last_words_without_a_link, "task"),
    (task_of_the_front_door, "task"),
    (task_of_a_player, "task"),
    (stream_of_a_player, "task"),
    (second_handler, "task"),
    (system_task, "task"),
    (log_in_memory, "log"),
    (subscription, "subscription"),
    (commands_that_wait, "command"),
    (clock_of_a_ghost, "timer"),
    (value_of_a_transaction_that_is_over, "data"),
]


async def link_dead(world: World) -> None:
    client = await world.websocket("ann")
    await client.until_type("welcome")
    client.close()
    await trio.sleep(2)
    assert live(world).state.value == "linkdead"


async def metric(world: World, name: str) -> float:
    """Of ``/metrics``, which is no JSON."""
    monitor = world.server.monitor
    assert monitor is not None
    found = re.search(rf"^mythos_{name} (\S+)$", monitor.metrics().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize(("plant", "kind"), PLANTS, ids=lambda value: getattr(value, "__name__", value))
async def test_a_planted_leak_is_reported_everywhere(
    plant: Callable[[World], Undo], kind: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        await link_dead(world)
        status, answer = await world.request("GET", "/monitoring/tasks")
        assert (status, answer["leaks"], answer["leaked"]) == (200, 0, [])
        undo = plant(world)
        _, answer = await world.request("GET", "/monitoring/tasks")
        assert [leak["kind"] for leak in answer["leaked"]] == [kind]
        assert answer["leaks"] == 1
        assert all(answer["leaked"][0][name] for name in ("name", "why"))
        assert await metric(world, "leaks") == 1
        _, health = await world.request("GET", "/health/detailed")
        assert (health["components"]["ledger"]["status"], health["components"]["ledger"]["leaks"]) == ("degraded", 1)
        with pytest.raises(AssertionError, match="a leak"):
            await nothing_over_is_left(world.server, world.listener)
        undo()
        _, answer = await world.request("GET", "/monitoring/tasks")
        assert answer["leaked"] == []
        assert await metric(world, "leaks") == 0


async def test_connections_of_a_session_that_is_over(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        client = await world.websocket("ann")
        await client.until_type("welcome")
        (connection,) = live(world).connections.values()
        hub = world.server.hub
        del live(world).connections[connection.id]
        assert {leak.kind for leak in await world.server.ledger.look()} >= {"log", "task"}
        live(world).connections[connection.id] = connection
        del hub.connections[connection.id]
        hub.apart[connection] = None
        found = await world.server.ledger.look()
        assert {leak.kind for leak in found} == {"connection", "link"}
        assert {leak.connection_id for leak in found if leak.kind == "connection"} == {connection.id}
        hub.connections[connection.id] = connection
        hub.apart.clear()
        assert await world.server.ledger.look() == []


async def test_a_link_that_is_not_closed_is_a_leak(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[Any] = []
    monkeypatch.setattr(Streams, "_linger", lambda self, link, *, left: forgotten.append(link))
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        client = await world.websocket("ann")
        await client.until_type("welcome")
        for connection in live(world).connections.values():
            connection.end(REMOVED)
            break
        await trio.sleep(3)
        (leak,) = await world.server.ledger.look()
        assert (leak.kind, leak.why) == ("link", "it is open, and no request, connection or last words have it")
        assert str(client.wire.local[1]) in leak.name
        with pytest.raises(AssertionError, match="a leak"):
            await nothing_over_is_left(world.server, world.listener)
        forgotten[0].lingers_until = trio.current_time() - 10
        (leak,) = await world.server.ledger.look()
        assert leak.why == "its last words have no end"
        forgotten[0].close()
        assert await world.server.ledger.look() == []
        assert world.server.ledger.links == {}


async def test_a_link_that_stays_too_long_in_one_stage_is_a_leak(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        world.server.ledger.bounds = Bounds(handshake=1.0)
        wire = world.wire()
        await trio.sleep(0.5)
        assert await world.server.ledger.look() == []
        await trio.sleep(4)
        (leak,) = await world.server.ledger.look()
        assert leak.why == "in the stage 'handshake' for too long"
        wire.close()


async def test_every_link_has_its_stage(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ledger = world.server.ledger
        silent = world.wire()
        client = await world.websocket("ann")
        await client.until_type("welcome")
        kept = world.wire()
        kept.send(b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        await trio.sleep(0.5)
        assert ledger.stages() == {"handshake": 1, "request": 0, "idle": 1, "connection": 1, "last words": 0}
        _, answer = await world.request("GET", "/monitoring/tasks?player=ann")
        assert answer["server"]["links"]["request"] == 1  # this one
        (shown,) = answer["players"]["ann"]["connections"]
        assert shown["transport"] == "websocket"
        assert answer["players"]["ann"]["log"] == {"messages": 0, "bytes": 0}
        for wire in (silent, kept, client):
            wire.close()
        await trio.sleep(2)
        assert ledger.links == {}


async def test_a_moment_between_two_owners_is_no_leak(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A task that ends before the second look."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        assert world.server.ledger.nursery is not None
        world.server.ledger.nursery.start_soon(trio.sleep, SETTLE_SECONDS / 2, name="a moment")
        await trio.lowlevel.checkpoint()
        assert [leak for leak in world.server.ledger.examine() if leak is not None]
        assert await world.server.ledger.look() == []


async def test_a_leak_is_logged_once(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[tuple[str, dict[str, Any]]] = []

    class Lines:
        def warning(self, event: str, **fields: Any) -> None:
            lines.append((event, fields))

    monkeypatch.setattr(ledger_module, "log", Lines())
    async with play(tmp_path / "m.db", game=Puppet(), cleanup_interval=10) as world:
        await link_dead(world)
        undo = log_in_memory(world)
        await trio.sleep(35)  # the checker looks at each clean-up
        assert [(event, fields["player_id"], fields["kind"]) for event, fields in lines] == [
            ("Leak of a log", "ann", "log")
        ]
        assert await metric(world, "leaks") == 1
        (leak,) = await world.server.ledger.look()
        assert leak.age > 15
        undo()
        await world.server.ledger.look()
        log_in_memory(world)
        await world.server.ledger.look()
        assert len(lines) == 2, "it is gone, and comes back: that is news"
        live(world)._log = None


async def test_a_look_is_taken_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(Hub(cast(Any, None), "node-1"))
    looked = 0
    between: list[int] = []

    def many() -> Iterator[Leak | None]:
        nonlocal looked
        for _ in range(10 * ledger_module.SLICE):
            looked += 1
            yield None

    async def others() -> None:
        while looked < 10 * ledger_module.SLICE:
            between.append(looked)
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(ledger, "examine", many)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await ledger.look()
    steps = [after - before for before, after in itertools.pairwise(between)]
    assert max(steps) <= 2 * ledger_module.SLICE
    assert len(between) >= 5


async def test_a_client_s_socket_without_a_link() -> None:
    (listener,) = open_listeners("127.0.0.1", 0)
    ledger = Ledger(Hub(cast(Any, None), "node-1"))
    ledger.ports = frozenset({listener.address[1]})
    client = socket.create_connection(listener.address)
    wire = await listener.accept()
    found = [leak for leak in ledger.examine() if leak is not None]
    assert [(leak.kind, leak.why) for leak in found] == [("socket", "a client's socket without a link")]
    wire.close()
    assert [leak for leak in ledger.examine() if leak is not None] == []
    client.close()
    listener.close()


async def test_the_names_of_the_server_s_tasks_are_known(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A part that has been given another name would be a leak; one that is gone should leave the list."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        names = {name for name in parts(world.server) if not name.startswith(CHECKER)}
        assert names <= PARTS
        assert PARTS - names <= {"background of the game"}  # it has ended: this game has none


def test_a_task_s_name_is_trio_s() -> None:
    names: list[str] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forever)
            await wait_all_tasks_blocked()
            names.extend(task.name for task in nursery.child_tasks)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert names == [task_name(forever)]


# The check at the end of every test.


def test_every_test_has_the_check(request: pytest.FixtureRequest) -> None:
    everywhere = [item for item in request.session.items if isinstance(item, pytest.Function)]
    without = [item.nodeid for item in everywhere if "nothing_is_left" not in item.fixturenames]
    assert everywhere
    assert without == []


LEAKY = """
import os, socket, subprocess, threading
from mythos_trio.testing.network import MemoryListener
from tests.support import nothing_left

nothing_left.WAIT_SECONDS = 0.1
held = []

def test_descriptor():
    held.append(open(__file__))

def test_socket():
    held.append(socket.socket())

def test_store(tmp_path):
    from mythos_trio.sqlite import SqliteDatabase
    database = SqliteDatabase(tmp_path / "m.db")
    database.open(0.0)
    held.append(database)

def test_thread():
    event = threading.Event()
    held.append(event)
    threading.Thread(target=event.wait, daemon=True).start()

def test_child():
    held.append(subprocess.Popen(["sleep", "20"]))

def test_wire():
    import trio
    async def main():
        listener = MemoryListener()
        held.append((listener, listener.connect()))
        held.append(await listener.accept())
    trio.run(main)

def test_good(tmp_path):
    with open(tmp_path / "f", "w"):
        pass

def test_zz_end():
    held[4].kill()
    held[4].wait()
    held[3].set()
"""


def test_a_test_that_leaves_something_fails(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin of this suite's conftest, in a run of its own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "src"))))
    pytester.makepyfile(LEAKY)
    options = ("-p", "tests.support.nothing_left", "-p", "no:randomly", "-p", "no:cacheprovider")
    result = pytester.runpytest_subprocess(*options, timeout=50)
    result.assert_outcomes(passed=8, errors=6)
    for left in ("descriptor: ", "socket:", "m.db", "thread: ", "child process: ", "accepted socket in memory: "):
        result.stdout.fnmatch_lines([f"*left behind: *{left}*"])


def test_what_goes_by_itself_is_waited_for(tmp_path: Path) -> None:
    before = look()
    file = (tmp_path / "f").open("w")
    timer = threading.Timer(0.2, file.close)
    timer.start()
    assert str(tmp_path) in str(look().more_than(before))
    assert left_since(before) == []
    assert file.closed
