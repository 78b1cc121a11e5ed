"""A run: a machine with its disk and clock, the lives of the server on it, cables, and all who are about."""

from __future__ import annotations

import json
import logging
import random
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import trio
from attrs import define, field, frozen
from trio.testing import wait_all_tasks_blocked

from mythos_trio import logs
from mythos_trio.sqlite import SqliteDatabase
from mythos_trio.testing.process import Process, VirtualClock
from tests.simulation import oracle
from tests.simulation.clients import ANSWER_SECONDS, CHANGE_SECONDS, GONE, Heard, Operators, Publishers, Terminal
from tests.simulation.game import Arena, Brisk
from tests.simulation.plan import Plan, Shape, Step, draw_plan
from tests.simulation.store import Branch, Copy, Disk, Event, Platter, Recorded, Truth
from tests.support.determinism import run_seeded, small_bounds
from tests.support.model import Violation
from tests.support.play import Client

# Until all is as it should be after the last fault: the longest back-off, and handlers that hang in between.
REST_SECONDS = 180.0


# Of real time. A run takes less than one on a machine of its own.
SPIN_SECONDS = 60.0


class Answer(NamedTuple):
    """To a request; *life* is that of the server that was asked."""

    status: int
    body: Any
    life: Life


@define(eq=False)
class Life:
    """One server process."""

    number: int
    process: Process
    branch: Branch
    disk: Disk
    game: Arena
    began: float
    stopped_at: float = float("inf")
    """When it was told to drain."""
    struck_at: float = float("inf")
    left: Copy | None = None
    """What was on the disk when it was struck."""
    lines: int = 0
    doomed: bool = False
    """Somebody sees to its end, and to the life after it."""
    ready: bool = False
    over: trio.Event = field(factory=trio.Event)

    @property
    def struck(self) -> bool:
        return self.struck_at < float("inf")

    @property
    def ending(self) -> bool:
        return self.struck or self.stopped_at < float("inf")


@frozen
class Broken:
    """A rule that was broken, and how."""

    rule: str
    text: str


@define(eq=False)
class World:
    """See the module's docstring."""

    plan: Plan
    path: Path
    lines: list[dict[str, Any]]
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    clock: VirtualClock = field(factory=VirtualClock)
    trace: list[str] = field(factory=list)
    wrong: list[Broken] = field(factory=list)
    peace: trio.Event = field(factory=trio.Event)
    """No more faults."""
    heard: list[Heard] = field(factory=list)
    commands: list[Any] = field(factory=list)
    claims: dict[tuple[str, int], int] = field(factory=dict)
    """(player, branch) → the largest number that a client has named or acknowledged."""
    acceptances: list[tuple[Branch, int]] = field(factory=list)
    """What was answered 202: (branch, uid)."""
    backups: list[tuple[Copy, list[Event]]] = field(factory=list)
    lives: list[Life] = field(factory=list)
    disk_was_ill: bool = False
    boots: int = 1
    nursery: trio.Nursery = field(init=False)
    chance: random.Random = field(init=False)
    truth: Truth = field(init=False)
    platter: Platter = field(init=False)
    devices: dict[str, Terminal] = field(init=False)
    publishers: Publishers = field(init=False)
    operators: Operators = field(init=False)
    _running: int = 0
    _numbers: Iterator[int] = field(factory=lambda: count(1))
    _runs: count[int] = field(factory=lambda: count(1))

    def __attrs_post_init__(self) -> None:
        self.chance = random.Random(self.plan.seed)
        self.truth = Truth(self._commit_is_wrong)
        self.platter = Platter(self.path, self.truth)
        self.devices = {device.name: Terminal(device, self) for device in self.plan.devices}
        self.publishers = Publishers(self)
        self.operators = Operators(self)

    @property
    def terminals(self) -> list[Terminal]:
        return list(self.devices.values())

    @property
    def life(self) -> Life:
        return self.lives[-1]

    def next_number(self) -> int:
        return next(self._numbers)

    def tell(self, text: str) -> None:
        self.trace.append(f"{trio.current_time():9.3f}  {text}")

    def broken(self, rule: str, text: str, **details: object) -> None:
        """The run ends here."""
        told = text + "".join(f"\n    {name} = {value!r}" for name, value in details.items())
        self.wrong.append(Broken(rule, told))
        self.tell(f"BROKEN {rule}: {told}")
        self.scope.cancel()

    def _commit_is_wrong(self, violation: Violation) -> None:
        self.broken(oracle.rule_of_commit(str(violation)), str(violation))

    # Playing.

    async def play(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                await self._begin_life()
                nursery.start_soon(self._inspect, name="inspector")
                for at, step in self.plan.steps:
                    await trio.sleep_until(at)
                    self._running += 1
                    nursery.start_soon(self._one, step, name=f"step {step}")
                await self._come_to_rest()
                oracle.judge(self)
                await self._close_down()
                nursery.cancel_scope.cancel()

    async def _one(self, step: Step) -> None:
        self.tell(f"* {step}")
        try:
            await step.play(self)
        finally:
            self._running -= 1

    async def _come_to_rest(self) -> None:
        """No more faults; everybody is there; wait until nothing is under way."""
        self.peace.set()
        self.tell("peace")
        why: list[str] = []
        for _ in range(int(REST_SECONDS * 4)):
            self.life.disk.mend()
            self.life.disk.on_commit = None
            for terminal in self.terminals:
                terminal.shape = Shape(terminal.spec.name)
                terminal.doze_until = 0.0
                terminal.arrive()
            await trio.sleep(0.25)
            why = self._unrest()
            if not why:
                break
        if why:
            self.broken("comes to rest", "after the last fault all comes to rest", why=why)
        await wait_all_tasks_blocked()

    def _unrest(self) -> list[str]:
        if self._running:
            return [f"{self._running} steps run"]
        if self.life.over.is_set():
            return ["no server"]
        server, hub = self.life.process.server, self.life.process.server.hub
        why = []
        if server.dispatcher.queued or server.context.handlers or self.life.game.restless_until > trio.current_time():
            why.append("transactions or handlers are under way")
        if hub.timers:
            why.append(f"timers: {list(hub.timers)}")
        why += [
            f"{session.player_id} is busy"
            for session in hub.sessions.values()
            if session.running_handler or session.arriving or session.over or session.presence.owed
        ]
        for terminal in self.terminals:
            for transport in terminal.spec.transports:
                heard = terminal.heard.get(transport)
                if heard is None or not (heard.open and heard.welcomed and heard.reachable):
                    why.append(f"{terminal.spec.name} has no {transport}")
                elif heard.connection_id not in hub.connections:
                    why.append(f"the server does not know {heard.label}")
                elif any(
                    wire.unacknowledged() or wire.unread() for wire in (heard.client.wire, heard.client.wire.other)
                ):
                    why.append(f"{heard.label} has something on its way")
                elif hub.connections[heard.connection_id].behind:
                    why.append(f"{heard.label} is behind")
            pending = [a.id for a in terminal.commands if not a.done and a.session == terminal.session]
            if pending:
                why.append(f"{terminal.spec.name} waits for {pending}")
        ours = {h.connection_id for t in self.terminals for h in t.heard.values()}
        if strangers := hub.connections.keys() - ours:
            why.append(f"connections that nobody has: {sorted(strangers)}")
        if len(self.life.process.listener.open_wires) != len(hub.connections):
            why.append("sockets that are no connections")
        return why

    async def _close_down(self) -> None:
        """Everybody leaves, then the server is told to stop: nothing is left."""
        for terminal in self.terminals:
            terminal.depart("close")
        settings = self.plan.settings
        await trio.sleep(settings["linkdead_grace"] + 2 * settings["handler_timeout"] + 3)
        await wait_all_tasks_blocked()
        await oracle.judge_leftovers(self)
        await self._drain(self.life)
        oracle.judge_end(self)

    # The server's lives.

    async def _begin_life(self) -> None:
        settings = dict(self.plan.settings)
        boot = f"boot-{self.boots}"
        database = Recorded(self.path, durability=settings["durability"], boot_id=lambda: boot)
        database.truth, database.platter = self.truth, self.platter
        disk = Disk(self.chance, self.truth)
        game = (Brisk if self.plan.seed % 2 else Arena)(self._runs)
        process = Process(
            self.path,
            game,
            seed=self.plan.seed,
            runner=disk,
            database=database,
            clock=self.clock,
            **settings,
        )
        life = Life(len(self.lives) + 1, process, self.truth.branch, disk, game, trio.current_time())
        self.lives.append(life)
        await self.nursery.start(self._serve, life)
        life.ready = True
        self.tell(f"life {life.number} of the server, epoch {process.server.hub.epoch}")
        oracle.check_epoch(self, life)

    async def _serve(self, life: Life, task_status: trio.TaskStatus[None]) -> None:
        try:
            await life.process.run(task_status)
        except* Exception as group:
            if not life.struck:
                self.broken("stays up", "nothing ends the server", error=repr(group), of=_innermost(group))
        finally:
            life.over.set()

    def _strike(self, life: Life, how: str) -> None:
        """The process is gone, in this very moment."""
        if life.struck or life.over.is_set():
            return
        self.tell(f"struck: {how}")
        life.struck_at = trio.current_time()
        life.lines = len(self.lines)
        life.left = self.platter.after_power_cut(self.chance) if how == "power" else self.platter.copy()
        life.process.strike()

    async def end_life(self, how: str, down: float, when: str) -> None:
        life = self.life
        if life.doomed or not life.ready or self.peace.is_set():
            return
        life.doomed = True
        if how == "drain":
            await self._drain(life)
        else:
            if when == "commit":
                life.disk.on_commit = lambda: self._strike(life, how)
                with trio.move_on_after(4.0):
                    await life.over.wait()
                life.disk.on_commit = None
            self._strike(life, how)
            await life.over.wait()
            self._leave_disk(life, how)
        await trio.sleep(down)
        await self._begin_life()

    def _leave_disk(self, life: Life, how: str) -> None:
        """What the next life finds."""
        del self.lines[life.lines :]  # the last moments of a process that is struck are seen by nobody
        assert life.left is not None  # it has been struck
        self.platter.put_back(life.left)
        if how == "power":
            self.boots += 1
            self._cut(life.left.events)
        elif how == "restore" and self.backups:
            copy, events = self.backups[0]
            self.platter.put_back(copy)
            self.truth.fork(events)
            SqliteDatabase(self.path, boot_id=lambda: f"boot-{self.boots}").new_epoch(self.clock.now())
            self.tell(f"a backup is put back: {len(events)} commits")

    def _cut(self, events: int) -> None:
        """A power cut has left the first *events*."""
        lost = len(self.truth.events) - events
        self.tell(f"the power cut took {lost} commits")
        former = self.truth.branch
        if self.plan.settings["durability"] == "power":
            if lost:
                self.truth.fork(self.truth.events[:events])
                oracle.check_durable(self, former, self.truth.branch)
        else:
            self.truth.fork(self.truth.events[:events])

    async def _drain(self, life: Life) -> None:
        self.tell("told to drain")
        began = life.stopped_at = trio.current_time()
        was_ill = not life.disk.well
        life.process.server.stop()
        await life.over.wait()
        took = trio.current_time() - began
        if life.struck:
            return
        ill = was_ill or life.disk.trouble_at >= began or not life.disk.well
        server = life.process.server
        if took > self.plan.settings["drain_timeout"] + 0.1:
            self.broken("bounds", "a drain ends within DRAIN_TIMEOUT", took=took)
        if server.exit_code and not ill:
            self.broken("bounds", "a drain ends in order", exit_code=server.exit_code)
        if life.process.listener.open_wires:
            self.broken("nothing left", "after a drain no socket is left", of=life.process.listener.open_wires)

    async def bad_disk(self, what: str, seconds: float) -> None:
        disk = self.life.disk
        if self.peace.is_set() or not self.life.ready:
            return  # a server that cannot open its store does not start: tests/e2e/test_starts.py
        self.disk_was_ill = True
        disk.trouble_at = trio.current_time()
        match what:
            case "slow":
                disk.slow = 0.6
            case "failing":
                disk.failing = "disk I/O error, on purpose"
            case "full":
                disk.failing = "full, on purpose"
            case "blind":
                disk.failing, disk.blind = "nothing works, on purpose", True
            case _:
                disk.hangs = what
        with trio.move_on_after(seconds):
            await self.peace.wait()
        disk.mend()

    def flush(self) -> None:
        if self.life.ready and not self.life.ending:
            last = self.platter.marks[-1]
            self.platter.marks[-1] = type(last)(last.wal, last.events, True)

    def backup(self) -> None:
        if self.life.ready and not self.life.ending:
            self.backups.append((self.platter.copy(), list(self.truth.events)))

    # What is watched.

    async def _inspect(self) -> None:
        """Bounds that hold at every moment."""
        since: dict[str, tuple[int, float]] = {}
        while True:
            await trio.sleep(0.5)
            if not self.life.over.is_set():
                since = oracle.check_links(self, since)

    def watch_gone(self, heard: Heard, direction: str) -> None:
        """A connection is half-open from now on: see that the server ends it in time."""
        one_way = {"ws": "up", "sse": "down"}[heard.transport]
        if heard.welcomed and direction in ("both", one_way):
            self.nursery.start_soon(self._watch_gone, heard, trio.current_time())

    async def _watch_gone(self, heard: Heard, began: float) -> None:
        settings = self.plan.settings
        bound = settings["health_check_interval"] + settings["pong_timeout"]
        await trio.sleep(bound + min(1.0, settings["pong_timeout"] / 4) + 0.1)
        if heard.touched_at > began or heard.reachable or heard.life.ending:
            return
        connection = heard.life.process.server.hub.connections.get(heard.connection_id)
        if connection is not None:
            self.broken("bounds", "a half-open connection is gone in time", connection=heard.label, since=began)

    # What clients do.

    async def request(self, method: str, path: str, body: object = None, *, lost: int = -1) -> Answer | None:
        """One request; None if there was no answer. *lost*: reset after so many checkpoints."""
        life, began = self.life, trio.current_time()
        try:
            client = Client(life.process.listener.connect())
        except ConnectionRefusedError:
            return None
        data = b"" if body is None else json.dumps(body).encode()
        length = f"Content-Length: {len(data)}\r\n" if body is not None else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{length}\r\n"
        answer = b""
        try:
            changes = method == "DELETE" or path.endswith(("/session", "/subscriptions"))
            with trio.move_on_after(CHANGE_SECONDS if changes else ANSWER_SECONDS) as patience:
                await client.send_all(head.encode() + data)
                if lost >= 0:
                    for _ in range(lost):
                        await trio.lowlevel.checkpoint()
                    client.wire.reset()
                    return None
                while chunk := await client.receive():
                    answer += chunk
        except GONE:
            pass
        finally:
            client.close()
        if patience.cancelled_caught:
            self.broken("answered", "a request is answered in time", request=f"{method} {path}", body=body)
        top, _, rest = answer.partition(b"\r\n\r\n")
        if not top:
            self.check_answered(life, began, f"{method} {path}")
            return None
        status = int(top.split()[1])
        self.tell(f"{method} {path} {str(body)[:100]} → {status} {rest[:160].decode()}")
        return Answer(status, json.loads(rest) if rest else None, life)

    def check_answered(self, life: Life, began: float, who: str) -> None:
        """Somebody who asked at *began* got no answer. Who has asked before a drain is answered."""
        self.nursery.start_soon(self._check_answered, life, began, who)

    async def _check_answered(self, life: Life, began: float, who: str) -> None:
        await trio.sleep(0.1)  # if the server has failed, that is what is to be told
        if not (life.struck or began >= life.stopped_at):
            self.broken("answered", "who has asked before a drain is answered", who=who, began=began)

    def claim(self, terminal: Terminal, number: int) -> None:
        """A client says that it has everything up to *number*."""
        assert terminal.branch is not None  # it has been welcomed
        key = terminal.spec.player, terminal.branch.number
        self.claims[key] = max(self.claims.get(key, 0), number)

    def refused(self, heard: Heard, code: int) -> None:
        """A connection was turned down."""
        oracle.check_refusal(self, heard, code)

    def accepted(self, items: list[dict[str, Any]], answers: list[dict[str, Any]], life: Life) -> None:
        """A publication was answered 202."""
        oracle.check_accepted(self, items, answers, life.branch)


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return "".join(traceback.format_exception(error)[-4:])


@contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    """Virtual time stands still for who spins: then only the real one can end it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"it spins: {seconds:g} seconds of real time, and no end")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@frozen
class Result:
    """What came of a run."""

    plan: Plan
    broken: Broken | None
    trace: tuple[str, ...]
    seconds: float
    """Of virtual time."""

    @property
    def hash(self) -> str:
        return sha256("\n".join(self.trace).encode()).hexdigest()[:16]


async def _main(world: World) -> float:
    try:
        await world.play()
    except BaseExceptionGroup as group:
        # A mistake of the simulation itself, or of the server in a task that is ours.
        world.broken("stays up", "no task fails", error=_innermost(group))
    return trio.current_time()


def run_plan(wanted: Plan) -> Result:
    """Play a plan from its beginning, and check all rules."""
    shared_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        logs.capture(logging.WARNING) as lines,
        small_bounds(),
        tempfile.TemporaryDirectory(dir=shared_memory) as directory,
    ):
        world, seconds = World(wanted, Path(directory) / "m.db", lines), 0.0
        try:
            with _no_longer_than(SPIN_SECONDS):
                seconds = run_seeded(_main, world, seed=wanted.seed)
        except (TimeoutError, trio.TrioInternalError) as error:
            world.wrong.append(Broken("comes to rest", repr(error)))
    return Result(wanted, world.wrong[0] if world.wrong else None, tuple(world.trace), seconds)


def run_seed(seed: int) -> Result:
    return run_plan(draw_plan(seed))
