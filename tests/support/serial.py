"""Many players' handlers over shared data, with a disk that fails and a server that is killed.

Players give small programs as commands (`Programs`): read, wait, write something made from what was read, send,
set and cancel timers, give up. Each transaction publishes a *record* of what it read and did, as one of its
effects. So the store itself holds the witness: `explain` runs the records one after another, in the order of
their numbers, and every read, timer and answer has to come out as it was.
"""

from __future__ import annotations

import json
import random
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar

import trio
import trio.testing
from attrs import define, field
from trio.testing import MockClock

from mythos_trio.game import Command, CommandError, Game, Player, World
from mythos_trio.storage import InlineRunner, StoreError
from tests.support.play import World as Stage
from tests.support.play import play

P = ParamSpec("P")
T = TypeVar("T")

PLAYERS = ("ann", "bob", "cid", "dee")
KEYS = ("k0", "k1", "k2")
NAMES = ("tick", "tock")
GRACE = 1.0
RECORDS = "record"

Op = tuple[Any, ...]
Item = tuple[Any, ...]


@define
class Crash:
    """``kill -9`` at one of the moments of a life: they are counted, wherever they are."""

    at: int | None
    count: int = 0
    now: trio.Event = field(factory=trio.Event)

    async def moment(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.now.set()
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()


class Disk(InlineRunner):
    """A disk with a moment before and after every write, slow and failing as the dice have it."""

    def __init__(self, crash: Crash, dice: random.Random, failing: float) -> None:
        super().__init__()
        self._crash = crash
        self._dice = dice
        self.failing = failing
        self.ready = False

    async def write(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._writer:
            if self.ready:
                await self._crash.moment()
                await trio.sleep(self._dice.choice((0, 0, 0.001, 0.02)))
                if self._dice.random() < self.failing:
                    raise StoreError("the disk would not")
            result = call(*args, **kwargs)
            if self.ready:
                await self._crash.moment()
            return result


@define
class Record:
    """What a transaction read and did."""

    what: str
    id: str
    reads: list[tuple[str, Any]] = field(factory=list)
    writes: dict[str, Any] = field(factory=dict)
    timers: list[tuple[str, str, str | None]] = field(factory=list)
    fired: tuple[str, str] | None = None
    answer: Any = None

    def made(self) -> list[Any]:
        """A value that depends on all that was read, and is like no other's."""
        return [self.id, len(self.writes), zlib.crc32(json.dumps(self.reads).encode())]

    def show(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("what", "id", "reads", "writes", "timers", "fired", "answer")}


class Programs(Game):
    """Runs the programs that are its commands."""

    def __init__(self) -> None:
        self.crash = Crash(None)
        self.runs = 0

    async def on_command(self, player: Player, command: Command) -> Any:
        record = Record("command", command.id)
        self.runs += 1
        for op in command.content["ops"]:
            await self._do(player, record, *op)
        record.answer = {"id": record.id, "reads": record.reads, "sum": record.made()}
        if command.content["keep"]:
            self._keep(player.world, record)
        elif record.writes or record.timers:
            raise CommandError("it was for nothing", reads=record.reads)
        return record.answer

    async def _do(self, player: Player, record: Record, verb: str, *args: Any) -> None:
        world = player.world
        match verb, args:
            case "sleep", [seconds]:
                await self.crash.moment()
                await trio.sleep(seconds)
            case "read", [key]:
                self._read(world, record, key)
            case "write", [key]:
                self._read(world, record, key)
                self._write(world, record, key)
            case "blind", [key]:
                self._write(world, record, key)
            case "delete", [key]:
                if self._read(world, record, key) is not None:
                    del world.data[key]
                    record.writes[key] = None
            case "own", [other]:
                self._own(world, record, other)
            case "send", [other]:
                world.send(other, "line", record.id)
            case "after", [name, seconds]:
                token = f"{record.id}/{len(record.timers)}"
                player.after(seconds, name, token)
                record.timers.append((f"player/{player.id}", name, token))
            case "cancel", [name]:
                player.cancel(name)
                record.timers.append((f"player/{player.id}", name, None))
            case "world after", [name, seconds]:
                token = f"{record.id}/{len(record.timers)}"
                world.after(seconds, name, token)
                record.timers.append(("world", name, token))

    def _read(self, world: World, record: Record, key: str) -> Any:
        value = world.data.get(key)
        if key in record.writes:
            assert value == record.writes[key], "a handler sees its own writes"
        else:
            record.reads.append((key, value))
        return value

    def _write(self, world: World, record: Record, key: str) -> None:
        value = record.made()
        world.data[key] = value
        record.writes[key] = value

    def _own(self, world: World, record: Record, other: str) -> None:
        """Read and write what belongs to a player, maybe another one."""
        key, data = f"player/{other}", world.data_of(other)
        before = dict.fromkeys(data, None) and {name: data[name] for name in data}
        if key not in record.writes:
            record.reads.append((key, before or None))
        data["n"] = value = record.made()
        record.writes[key] = {**before, "n": value}

    def _keep(self, world: World, record: Record) -> None:
        world.publish(RECORDS, "record", record.show())

    async def _note(self, world: World, record: Record) -> None:
        """Look at one value, wait, write another: so these handlers come between others too."""
        self._read(world, record, "k0")
        await self.crash.moment()
        self._write(world, record, "k1")
        self._keep(world, record)

    async def on_timer(self, player: Player, name: str, value: Any) -> None:
        await self._note(player.world, Record("timer", value, fired=(f"player/{player.id}", name)))

    async def on_world_timer(self, world: World, name: str, value: Any) -> None:
        await self._note(world, Record("timer", value, fired=("world", name)))

    async def on_join(self, player: Player) -> None:
        await self._note(player.world, Record("join", player.id))

    async def on_linkdead(self, player: Player) -> None:
        await self._note(player.world, Record("linkdead", player.id))

    async def on_return(self, player: Player) -> None:
        await self._note(player.world, Record("return", player.id))

    async def on_leave(self, player: Player, reason: str) -> None:
        await self._note(player.world, Record("leave", player.id))


@define
class Told:
    """An answer, and between which numbers of the store it was given."""

    id: str
    ok: bool
    content: Any
    floor: int
    ceiling: int


@define(eq=False)
class Actor:
    """A player's client: goes through its script, over all lives of the server; asks until it is answered."""

    player: str
    script: Sequence[Item]
    at: int = 0
    floor: int = 0
    told: list[Told] = field(factory=list)
    over: trio.Event = field(factory=trio.Event)
    _client: Any = None

    async def live(self, stage: Stage) -> None:
        self._client, self.over = None, trio.Event()
        await self._connect(stage)
        while self.at < len(self.script):
            await self._item(stage, *self.script[self.at])
            self.at += 1
        while True:  # stays, until the server goes
            await self._connect(stage)
            self.over.set()
            await self._client.until_over()

    async def _connect(self, stage: Stage, query: str = "") -> None:
        while self._client is None or self._client.over:
            client = await stage.websocket(self.player, query)
            if (await client.next())["type"] == "welcome":
                self._client = client
            else:
                client.close()  # the disk would not; a server that is busy says so
                await trio.sleep(0.5)

    async def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    async def _item(self, stage: Stage, verb: str, *args: Any) -> None:
        match verb, args:
            case "command", [keep, ops]:
                await self._ask(stage, f"{self.player}-{self.at}", {"keep": keep, "ops": ops})
            case "pause", [seconds]:
                await trio.sleep(seconds)
            case "drop", [seconds]:
                await self._drop()
                await trio.sleep(seconds)
                await self._connect(stage)
            case "switch", []:
                await self._drop()
                await self._connect(stage, f"session_id={self.player}.{self.at}")

    async def _ask(self, stage: Stage, id: str, content: object) -> None:
        while True:
            await self._connect(stage)
            floor = self.floor
            try:
                await self._client.give(content, id)
                reply = await self._client.until(lambda m: m["type"] == "reply" and m["id"] == id)
            except (EOFError, OSError, trio.BrokenResourceError):
                await self._drop()
                continue
            error = reply.get("error", {})
            if reply["ok"] or error["error_type"] == "validation_error":
                self.floor = max(floor, int(reply["position"].split("-")[1]))
                content = reply["content"] if reply["ok"] else error["details"]
                self.told.append(Told(id, reply["ok"], content, floor, stage.server.hub.newest))
                return
            assert error["error_type"] in ("persistence_error", "capacity_error", "session_error"), reply
            await trio.sleep(0.2)


async def _lives(path: Path, actors: list[Actor], crashes: Sequence[int], failing: float, seed: int) -> Programs:
    game = Programs()
    dice = random.Random(seed)
    options: dict[str, Any] = {"rate_limit_requests": 10**6, "linkdead_grace": GRACE, "seed": seed}
    for at in (*crashes, None):
        game.crash = crash = Crash(at)
        disk = Disk(crash, dice, failing)
        async with play(path, game=game, crash=at is not None, hook=disk, **options) as stage:
            disk.ready = True
            with trio.fail_after(3600):
                await _until_over(stage, actors, crash, disk)
    return game


async def _until_over(stage: Stage, actors: list[Actor], crash: Crash, disk: Disk) -> None:
    """Until the crash, or until all is told and nothing is owed any more."""
    async with trio.open_nursery() as nursery:

        async def scene() -> None:
            for actor in actors:
                await actor.over.wait()
            disk.failing = 0
            await trio.sleep(15)  # retries of what a broken disk refused come after 5 s
            nursery.cancel_scope.cancel()

        for actor in actors:
            nursery.start_soon(actor.live, stage)
        # Every life begins with an event of its own.
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(scene)
        await crash.now.wait()
        nursery.cancel_scope.cancel()


# What must hold.


def _rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def explain(path: Path, actors: Sequence[Actor]) -> int:
    """Run what is stored one after another; AssertionError if anything comes out in another way.

    :returns: the number of transactions.
    """
    query = f"SELECT seq, body FROM messages WHERE target = '#{RECORDS}' ORDER BY seq"
    records = [(seq, json.loads(body)["content"]) for seq, body in _rows(path, query)]
    state: dict[str, Any] = {}
    states: list[tuple[int, dict[str, Any]]] = [(0, {})]
    timers: dict[tuple[str, str], str] = {}
    for seq, record in records:
        for key, value in record["reads"]:
            assert state.get(key) == value, f"{seq} {record['id']} read {key} = {value}; it was {state.get(key)}"
        state = {**state, **record["writes"]}
        states.append((seq, state))
        if record["fired"]:
            owner, name = record["fired"]
            assert timers.pop((owner, name), None) == record["id"], f"{seq}: the timer {record['id']} was not there"
        for owner, name, token in record["timers"]:
            timers.pop((owner, name), None)
            if token is not None:
                timers[owner, name] = token
    stored = {
        key: json.loads(value) for key, value in _rows(path, "SELECT key, value FROM data WHERE value IS NOT NULL")
    }
    assert stored == {key: value for key, value in state.items() if value is not None}
    left = {(owner, name): json.loads(v) for owner, name, v in _rows(path, "SELECT owner, name, value FROM timers")}
    assert left == timers == {}, "timers that never fired"
    _presence(records, [actor.player for actor in actors])
    _answers(records, states, actors)
    return len(records)


AFTER = {
    "leave": {"join"},
    "join": {"linkdead", "leave"},
    "return": {"linkdead", "leave"},
    "linkdead": {"return", "leave"},
}


def _presence(records: list[tuple[int, Any]], players: list[str]) -> None:
    """Every handler of presence ran once, after one that it can follow; in the end all are here."""
    newest = dict.fromkeys(players, "leave")
    for seq, record in records:
        if record["what"] in AFTER:
            player = record["id"]
            assert record["what"] in AFTER[newest[player]], f"{seq}: {record['what']} after {newest[player]}"
            newest[player] = record["what"]
    assert set(newest.values()) <= {"join", "return"}, f"still owed: {newest}"


def _answers(records: list[tuple[int, Any]], states: list[tuple[int, Any]], actors: Sequence[Actor]) -> None:
    done: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for seq, record in records:
        if record["what"] == "command":
            done[record["id"]].append((seq, record))
    for actor in actors:
        for told in actor.told:
            kept = done.pop(told.id, [])
            if told.ok and actor.script[int(told.id.split("-")[1])][1]:
                assert len(kept) == 1, f"{told.id} happened {len(kept)} times"
                assert kept[0][1]["answer"] == told.content
                assert kept[0][0] <= told.ceiling, f"{told.id} was answered before it was stored"
            else:
                assert kept == [], f"{told.id} was to have no effects"
                _was_so(told, states)
    assert not done, "effects without an answer"


def _was_so(told: Told, states: list[tuple[int, dict[str, Any]]]) -> None:
    """What the answer says it saw was the state at one moment between the question and the answer."""
    after = max(index for index, (seq, _) in enumerate(states) if seq <= told.floor)
    for seq, state in states[after:]:
        if seq <= told.ceiling and all(state.get(key) == value for key, value in told.content["reads"]):
            return
    raise AssertionError(f"{told} rests on what never was stored")


def script(dice: random.Random, length: int) -> list[Item]:
    """What a player does: mostly programs, one after another."""
    kinds: Sequence[Callable[[], Item]] = (
        *[lambda: ("command", dice.random() < 0.8, program(dice))] * 12,
        lambda: ("pause", dice.choice((0.0, 0.05, 3.0))),
        lambda: ("drop", dice.choice((0.0, 0.5, 4.0))),
        lambda: ("switch",),
    )
    return [dice.choice(kinds)() for _ in range(length)]


def program(dice: random.Random) -> list[Op]:
    """One that looks and goes, one that changes, one that does all sorts of things."""
    look: Sequence[Callable[[], Op]] = (
        lambda: ("read", dice.choice(KEYS)),
        lambda: ("sleep", dice.choice((0.0, 0.0, 0.001, 0.02))),
    )
    change: Sequence[Callable[[], Op]] = (
        lambda: ("write", dice.choice(KEYS)),
        lambda: ("blind", dice.choice(KEYS)),
        lambda: ("delete", dice.choice(KEYS)),
        lambda: ("own", dice.choice(PLAYERS)),
    )
    more: Sequence[Callable[[], Op]] = (
        lambda: ("send", dice.choice(PLAYERS)),
        lambda: ("after", dice.choice(NAMES), dice.choice((0.0, 0.05, 2.0))),
        lambda: ("cancel", dice.choice(NAMES)),
        lambda: ("world after", dice.choice(NAMES), dice.choice((0.0, 0.05, 2.0))),
    )
    kinds = dice.choice((look, (*look, *change), (*look, *change, *more)))
    return [dice.choice(kinds)() for _ in range(dice.randint(1, 6))]


def run(players: int, length: int, crashes: Sequence[int], failing: float, seed: int) -> tuple[int, int]:
    """Play a script a player and explain the store. :returns: (transactions, runs of commands)."""
    dice = random.Random(seed)
    actors = [Actor(player, script(dice, length)) for player in PLAYERS[:players]]
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio._core._run._r.seed(seed)
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        path = Path(directory) / "m.db"
        game = trio.run(_lives, path, actors, crashes, failing, seed, clock=MockClock(autojump_threshold=0))
        return explain(path, actors), game.runs
