"""The driver of the session-conflict tests: players who connect, switch, drop and come back, all at once.

`run(steps, seed)` plays a list of steps against a whole server on virtual time and holds everything that
clients see, the store and the task tree against the reference model (`tests.support.model`). Each step
is a task of its own; the pause after it says how far it may get before the next one begins. All chance
comes from *seed*, also the order in which Trio runs tasks, so the same call does the same again.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import trio
import wsproto
from attrs import define, field, frozen
from trio.testing import wait_all_tasks_blocked

from mythos_trio import logs
from mythos_trio.config import Settings
from mythos_trio.core.transaction import Committed, Outcome, Transaction
from mythos_trio.game import Command, CommandError, Game, Player
from mythos_trio.seams import SeededRandomness
from mythos_trio.server import Server
from mythos_trio.session import LiveSession
from mythos_trio.sqlite import SqliteDatabase
from mythos_trio.storage import Bounds, Cleaned
from tests.support.determinism import run_seeded, small_bounds
from tests.support.memory_net import KERNEL, MemoryListener
from tests.support.merge import Received, View, parse
from tests.support.model import History, require
from tests.support.play import Client, SSEClient, VirtualClock, WebSocketClient

P = ParamSpec("P")
T = TypeVar("T")

PLAYERS = ("ann", "bob")
PAGES = 2
CHANNELS = ("c1", "c2")
TransportName: TypeAlias = Literal["ws", "sse"]
TRANSPORTS: tuple[TransportName, ...] = ("ws", "sse")

GRACE = 5.0
RETENTION = 60.0
SETTINGS: dict[str, Any] = {
    "linkdead_grace": GRACE,
    "handler_timeout": 2.0,
    "health_check_interval": 4.0,
    "pong_timeout": 3.0,
    "cleanup_interval": 7.0,
    "message_retention": RETENTION,
    "message_retention_count": 4,
    "drain_timeout": 8.0,
    "write_timeout": 2.0,
    "max_connections_per_player": 4,
    "rate_limit_requests": 100_000,
}
# Close codes that say "not now": always allowed where something else is under way.
NOT_NOW = {4000, 4008, 4009, 4012, 1011}
# What a client meets when the other end is gone.
GONE = (
    OSError,
    trio.ClosedResourceError,
    trio.BrokenResourceError,
    wsproto.utilities.LocalProtocolError,
    wsproto.utilities.RemoteProtocolError,
)
# What goes wrong on purpose may be in the log at ERROR.
EXPECTED_ERRORS = ("Unexpected error in on_command",)


class ModelGame(Game):
    """Tells by messages what it was told, so that the store knows it, and does what commands say."""

    def __init__(self, runs: count[int]) -> None:
        self._runs = runs
        self.restless_until = 0.0
        """What a handler has asked for is done a moment after its reply."""

    async def on_command(self, player: Player, command: Command) -> Any:
        run, what = next(self._runs), command.content["do"]
        answer = {"run": run, "session": player.session_id, "command": command.id}
        if what == "look":
            return answer
        if what == "slow":
            await trio.sleep(0.3)
        player.send("did", answer)
        if what == "hang":
            await trio.sleep(10)
        elif what == "raise":
            raise ValueError("on purpose")
        elif what == "refuse":
            raise CommandError("no")
        elif what == "shout":
            player.world.publish("c1", "shout", answer)
        elif what == "join":
            player.subscribe("c1")
        elif what == "renew":
            self.restless_until = trio.current_time() + 1
            player.new_session()
        elif what == "kick":
            self.restless_until = trio.current_time() + 1
            player.disconnect()
        return answer

    async def on_subscribe(self, player: Player, channel: str) -> bool:
        return True

    async def on_join(self, player: Player) -> None:
        self._told(player, "join")

    async def on_linkdead(self, player: Player) -> None:
        await trio.sleep(0.2)
        self._told(player, "linkdead")

    async def on_return(self, player: Player) -> None:
        self._told(player, "return")

    async def on_leave(self, player: Player, reason: str) -> None:
        await trio.sleep(0.1)
        self._told(player, "leave")

    def _told(self, player: Player, what: str) -> None:
        player.send("told", {"what": what, "session": player.session_id})


COMMANDS = ("act", "look", "slow", "hang", "raise", "refuse", "shout", "join", "renew", "kick")
WITHOUT_EFFECTS = {"look", "hang", "raise", "refuse"}


class Recorded(SqliteDatabase):
    """A store that tells the model of each commit."""

    history: History

    def commit(self, batch: Sequence[Transaction], now: float) -> list[Outcome]:
        outcomes = super().commit(batch, now)
        for transaction, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Committed):
                self.history.commit(transaction, outcome)
        return outcomes

    def clean(self, now: float, bounds: Bounds, *, slice_rows: int = 500) -> Cleaned:
        cleaned = super().clean(now, bounds, slice_rows=slice_rows)
        with closing(sqlite3.connect(self.path)) as db:
            self.history.remove_all_but({seq for (seq,) in db.execute("SELECT seq FROM messages")})
        return cleaned


class Disk:
    """A `Runner` in the event loop that takes its time before and after each call."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._writer = trio.Lock()
        self.stuck_until = 0.0

    async def write(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._writer:
            await self._wait()
            await trio.sleep_until(self.stuck_until)
            result = call(*args, **kwargs)
            await self._wait()
            return result

    async def read(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        await self._wait()
        result = call(*args, **kwargs)
        await self._wait()
        return result

    async def aside(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        await trio.lowlevel.checkpoint()
        return call(*args, **kwargs)

    async def _wait(self) -> None:
        if self._chance.random() < 0.5:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(self._chance.choice((0.001, 0.005, 0.02)))


# What clients do.


@define(eq=False)
class Connection:
    """A client's end of one connection."""

    player: str
    page: Page
    transport: TransportName
    client: Client
    received: Received
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    open: bool = True
    """The client believes in it."""
    reachable: bool = True
    """Nothing has been done to the wire."""
    live: LiveSession | None = None
    finished: trio.Event = field(factory=trio.Event)

    def __str__(self) -> str:
        return self.received.label


@define(eq=False)
class Page:
    """A browser's page: one view, any number of connections (the newest of each transport counts)."""

    player: str
    number: int
    view: View = field(factory=View)
    session_id: str | None = None
    connections: dict[TransportName, Connection] = field(factory=dict)

    def open_connection(self, *transports: TransportName) -> Connection | None:
        found = (self.connections.get(transport) for transport in transports)
        return next((connection for connection in found if connection is not None and connection.open), None)


@define(eq=False)
class Life:
    """One server process."""

    server: Server
    listener: MemoryListener
    database: Recorded
    disk: Disk
    game: ModelGame
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    done: trio.Event = field(factory=trio.Event)
    ending: bool = False
    crashed: bool = False
    stopped_at: float = float("inf")
    """When it was told to drain."""

    async def check_answered(self, began: float, **who: object) -> None:
        """Somebody who asked at *began* got no answer."""
        await trio.sleep(0.1)  # if the server has failed, that is what is to be told
        rightly = self.crashed or began >= self.stopped_at
        require(rightly, "who has asked before a drain is answered", began=began, **who)


Answer: TypeAlias = "tuple[int, Any] | None"


@define(eq=False)
class Simulation:
    """Clients, server and model of one run."""

    seed: int
    path: Path
    nursery: trio.Nursery
    lines: list[dict[str, Any]]
    chance: random.Random = field(init=False)
    history: History = field(factory=History)
    snapshot: History | None = None
    trace: list[str] = field(factory=list)
    pages: dict[tuple[str, int], Page] = field(factory=dict)
    connections: list[Connection] = field(factory=list)
    life: Life = field(init=False)
    lives: int = 0
    reboots: int = 0
    running: int = 0
    """Steps under way."""
    begun: int = 0
    """Steps that have begun."""
    numbers: count[int] = field(factory=lambda: count(1))
    runs: count[int] = field(factory=lambda: count(1))
    # What was said and answered.
    sent: dict[tuple[str, str, str], set[str]] = field(factory=dict)
    replies: dict[tuple[str, str, str], list[dict[str, Any]]] = field(factory=dict)
    in_one_life: dict[tuple[str, str, int], Any] = field(factory=dict)
    publications: list[tuple[str, dict[str, Any]]] = field(factory=list)
    keys: dict[str, tuple[str, list[int], float]] = field(factory=dict)
    batches: dict[int, list[dict[str, Any]]] = field(factory=dict)
    last_said: dict[tuple[str, int], tuple[str, str]] = field(factory=dict)
    first_answers: set[int] = field(factory=set)
    got: dict[str, set[str]] = field(factory=lambda: {player: set() for player in PLAYERS})
    """Ids of messages that have reached a client of the player."""
    claimed: dict[str, int] = field(factory=lambda: dict.fromkeys(PLAYERS, 0))
    """The largest number that a client of the player has named or acknowledged."""
    acknowledged: dict[tuple[str, str], int] = field(factory=dict)
    """The same for one session, as the server has heard it, in this life."""
    unsure: set[str] = field(factory=set)
    """Players of whom bytes have arrived that no client read: what was seen is not known."""

    def __attrs_post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.pages = {(player, number): Page(player, number) for player in PLAYERS for number in range(PAGES)}

    def tell(self, text: str) -> None:
        self.trace.append(f"{trio.current_time():9.3f}  {text}")

    # The server.

    async def start(self) -> None:
        self.lives += 1
        database = Recorded(self.path, boot_id=lambda: f"boot-{self.reboots}")
        database.history = self.history
        disk = Disk(self.chance)
        game = ModelGame(self.runs)
        server = Server(
            Settings(port=0, server_id="test", **SETTINGS),
            game=game,
            database=database,
            runner=disk,
            clock=VirtualClock(),
            randomness=SeededRandomness(self.seed * 1000 + self.lives),
        )
        self.life = Life(server, MemoryListener(), database, disk, game)
        await self.nursery.start(self._serve, self.life)

    async def _serve(self, life: Life, task_status: trio.TaskStatus[None]) -> None:
        try:
            with life.scope:
                await life.server.serve([life.listener], task_status=task_status)
        finally:
            life.done.set()

    async def drain(self) -> None:
        life = self.life
        life.ending = True
        began = life.stopped_at = trio.current_time()
        hung = life.disk.stuck_until > began
        life.server.stop()
        await life.done.wait()
        took = trio.current_time() - began
        require(took <= SETTINGS["drain_timeout"] + 0.1, "a drain keeps to its time", took=took)
        require(life.server.exit_code == 0 or hung, "a drain ends well", exit_code=life.server.exit_code)
        life.listener.close()
        life.database.abandon()
        await self._settle_clients()
        self._check_connections(all_of_it=False)

    async def crash(self) -> None:
        """As ``kill -9``: the kernel closes the sockets; what they held is still delivered."""
        life = self.life
        life.ending = life.crashed = True
        self._check_log()
        for wire in life.listener.open_wires:
            wire.close()
        life.listener.close()
        life.scope.cancel()
        await life.done.wait()
        life.database.abandon()
        self.lines.clear()  # the last moments of a process that is killed are not seen by anybody
        await self._settle_clients()
        self._check_connections(all_of_it=False)
        self.acknowledged.clear()

    async def _settle_clients(self) -> None:
        """After the end of a server: clients read what is left, and find out."""
        await wait_all_tasks_blocked()
        for connection in self.connections:
            if not connection.reachable:
                self.give_up(connection)
        await wait_all_tasks_blocked()

    def take_snapshot(self) -> None:
        """What the disk would have after a power cut from now on."""
        with closing(sqlite3.connect(self.path)) as db, closing(sqlite3.connect(f"{self.path}.disk")) as disk:
            db.backup(disk)
        self.snapshot = copy.deepcopy(self.history)

    def lose_power(self) -> None:
        """The server is gone: put the disk's state in the place of the store."""
        if self.snapshot is None:
            return
        for end in ("", "-wal", "-shm"):
            Path(f"{self.path}{end}").unlink(missing_ok=True)
        Path(f"{self.path}.disk").rename(self.path)
        self.reboots += 1
        self.history, self.snapshot = self.snapshot, None
        self.connections = []
        self.replies.clear()
        self.sent.clear()
        self.keys.clear()
        self.publications.clear()
        self.first_answers.clear()
        self.unsure |= set(PLAYERS)

    # Requests.

    async def request(
        self, method: str, path: str, body: object = None, headers: str = "", *, patience: int | None = None
    ) -> Answer:
        """One request; None if there was no answer. *patience*: reset after so many checkpoints."""
        data = b"" if body is None else json.dumps(body).encode()
        life, began = self.life, trio.current_time()
        try:
            client = Client(life.listener.connect())
        except ConnectionRefusedError:
            return None
        length = f"Content-Length: {len(data)}\r\n" if body is not None else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{length}{headers}\r\n"
        answer = b""
        try:
            await client.send_all(head.encode() + data)
            if patience is not None:
                for _ in range(patience):
                    await trio.lowlevel.checkpoint()
                client.wire.reset()
                return None
            while chunk := await client.receive():
                answer += chunk
        except GONE:
            pass
        finally:
            client.close()
        top, _, rest = answer.partition(b"\r\n\r\n")
        if not top:
            await life.check_answered(began, request=f"{method} {path}", body=body)
            return None
        return int(top.split()[1]), json.loads(rest) if rest else None

    def give_up(self, connection: Connection) -> None:
        connection.open = False
        connection.scope.cancel()

    async def read(self, connection: Connection) -> None:
        """A connection's reader."""
        with connection.scope:
            try:
                while (message := await connection.client.next())["type"] != "closed":
                    self._take(connection, message)
            except GONE:
                pass
        connection.open = False
        if connection.client.wire.unread():
            self.unsure.add(connection.player)
        connection.client.close()
        connection.finished.set()

    def _take(self, connection: Connection, message: dict[str, Any]) -> None:
        received, player = connection.received, connection.player
        received.add(message)
        if "seq" in message:
            self.got[player].add(message["id"])
        elif message["type"] == "reply":
            self.heard(player, received.session_id, message, connection.live)
        elif message["type"] == "welcome":
            connection.page.session_id = received.session_id
            live = self.life.server.hub.sessions.get(player)
            connection.live = live if live is not None and live.session_id == received.session_id else None

    def is_said_twice(self, id: str | None) -> bool:
        """Whether more than one publication has had this id."""
        return sum(said == id for said, _ in self.publications) > 1

    def heard(self, player: str, session_id: str, reply: dict[str, Any], live: LiveSession | None = None) -> None:
        """A reply has come: the same id has one answer."""
        if reply["id"] is None:
            return
        key = player, session_id, reply["id"]
        self.replies.setdefault(key, []).append(reply)
        content = reply.get("content") or {}
        if reply["ok"] and live is not None and "run" in content:
            first = self.in_one_life.setdefault((player, reply["id"], id(live)), (live, content))[1]
            require(first == content, "the same id has one answer", command=key, first=first, now=content)

    # Checks.

    @property
    def alone(self) -> bool:
        """Whether only one step is under way, and nothing is wrong with the server."""
        life = self.life
        trouble_until = max(life.disk.stuck_until, life.game.restless_until)
        return self.running == 1 and not life.ending and trouble_until < trio.current_time()

    async def quiet(self) -> None:
        """Wait until nothing is under way, then hold everything against the model."""
        why: list[str] = []
        for _ in range(240):
            await trio.sleep(0.25)
            why = self._unrest()
            if not why:
                break
        require(not why, "it comes to rest", why=why)
        await wait_all_tasks_blocked()
        self._check_all()

    def _unrest(self) -> list[str]:
        """What is still under way, or should be gone by now."""
        life, hub = self.life, self.life.server.hub
        why = []
        if self.running:
            why.append(f"{self.running} steps run")
        if life.disk.stuck_until > trio.current_time():
            why.append("the disk is stuck")
        if life.server.dispatcher.queued:
            why.append(f"{life.server.dispatcher.queued} transactions wait")
        for session_ in hub.sessions.values():
            busy = session_.running_handler or session_.arriving or session_.over
            if busy or session_.presence.owed:
                why.append(f"{session_.player_id} is busy, or owes {session_.presence.owed_text}")
        ours = {c.received.connection_id for c in self.connections if c.open and c.reachable and c.received.welcomed}
        if ours - hub.connections.keys():
            why.append(f"the server does not know {ours - hub.connections.keys()}")
        reachable = {c.received.connection_id for c in self.connections if not c.reachable}
        if hub.connections.keys() - ours - reachable:
            why.append(f"the clients have left {hub.connections.keys() - ours - reachable}")
        if len(life.listener.open_wires) != len(hub.connections):
            why.append(f"{len(life.listener.open_wires)} sockets for {len(hub.connections)} connections")
        for connection in self.connections:
            written = hub.connections.get(connection.received.connection_id)
            if connection.open and connection.reachable and written is not None and written.behind:
                why.append(f"{connection} is behind")
        return why

    def _check_all(self) -> None:
        hub = self.life.server.hub
        self._check_connections(all_of_it=True)
        self._check_sessions()
        self._check_tasks()
        self._check_store()
        self._check_replies()
        require(not hub.stuck, "no session is stuck", stuck=hub.stuck)
        self._check_log()

    def _check_log(self) -> None:
        errors = [
            line
            for line in self.lines
            if line["level"] in ("ERROR", "CRITICAL") and not line["event"].startswith(EXPECTED_ERRORS)
        ]
        require(not errors, "no error is logged", first=errors[:1])

    def _check_connections(self, *, all_of_it: bool) -> None:
        for connection in self.connections:
            live = connection.open and connection.reachable
            connection.received.check(connection.player, all_of_it=all_of_it and live)
        self.connections = [c for c in self.connections if c.open]

    def _check_sessions(self) -> None:
        hub = self.life.server.hub
        for player in PLAYERS:
            current, live = self.history.current(player), hub.sessions.get(player)
            if live is None:
                require(
                    current is None or not current.told or current.told[-1] == "leave",
                    "who is offline has left",
                    session=current,
                )
                continue
            require(
                current is not None and current.id == live.session_id,
                "the live session is the current one",
                live=live.session_id,
                current=current,
            )
            assert current is not None  # for the type checker: required above
            told = current.told[-1] if current.told else ""
            there = told in ("join", "return")
            require(there or not live.online, "the game knows who is there", state=live.state, told=current.told)
            require(bool(live.connections) == live.online, "online is having a connection", session=live.session_id)
            channels = {interval.channel for interval in current.intervals if interval.end is None}
            require(set(live.channels) == channels, "subscriptions are as stored", live=live.channels, model=channels)
            self._check_seen(player, live.session_id, live.seen)
            lowest = self.acknowledged.get((player, live.session_id), 0)
            require(live.seen >= lowest, "what was acknowledged is seen", seen=live.seen, acknowledged=lowest)
        for channel, listeners in hub.channels.items():
            for listener in listeners:
                live = hub.sessions.get(listener.player_id)
                require(live is listener, "only live sessions listen", channel=channel, who=listener.player_id)
        for facts in self.history.sessions.values():
            self._check_seen(facts.player, facts.id, 0)
            later = [s for s in self.history.sessions.values() if s.player == facts.player and s.start > facts.start]
            if facts.end is not None and later:
                following = min(later, key=lambda s: s.start)
                lowest = self.acknowledged.get((facts.player, facts.id), 0)
                require(
                    following.mail_from >= lowest or following.mail_from >= min(lowest, facts.end),
                    "mail that was seen does not come to the next session",
                    session=following,
                    acknowledged=lowest,
                )
                self._check_seen(facts.player, facts.id, following.mail_from)

    def _check_seen(self, player: str, session_id: str, seen: int) -> None:
        """Nothing is taken for seen that no client has got."""
        if player in self.unsure:
            return
        history = self.history
        replaced: set[tuple[str, str]] = set()  # keys of which something newer has come
        for fact in reversed(history.stream(history.sessions[player, session_id])):
            honest = fact.id in self.got[player] or fact.seq in history.removed or fact.seq <= self.claimed[player]
            honest = honest or fact.key in replaced
            if fact.key is not None and fact.id in self.got[player]:
                replaced.add(fact.key)
            require(fact.seq > seen or honest, "what is seen has arrived", session=session_id, seen=seen, fact=fact)

    def _check_tasks(self) -> None:
        """Tasks of players who have no live session, in the whole tree."""
        hub = self.life.server.hub
        for name in task_names():
            kind, _, player = name.rpartition(" of ")
            if kind in ("handlers", "websocket", "sse"):
                live = hub.sessions.get(player)
                require(live is not None, "no task outlives its session", task=name)
                require(kind == "handlers" or live is None or live.connections, "no task outlives its link", task=name)

    def _check_store(self) -> None:
        """The store holds what the model says, and replays it."""
        history = self.history
        with closing(sqlite3.connect(self.path)) as db:
            held = {seq for (seq,) in db.execute("SELECT seq FROM messages")}
            current = dict(db.execute("SELECT player_id, session_id FROM sessions WHERE ended_at IS NULL").fetchall())
            total = db.execute("SELECT count(*) FROM sessions WHERE ended_at IS NULL").fetchone()[0]
        require(len(current) == total, "one current session a player in the store", current=current)
        require(held == history.messages.keys() - history.removed, "what was committed is stored")
        for facts in history.sessions.values():
            require((current.get(facts.player) == facts.id) == (facts.end is None), "current as in the model", of=facts)
            chunk = self.life.database.read(facts.player, facts.id, 0, history.newest, 10_000)
            expected = [fact.seq for fact in history.stream(facts) if fact.seq in held]
            require([m.seq for m in chunk.messages] == expected, "the store replays the stream", session=facts)

    def _check_replies(self) -> None:
        for key, replies in self.replies.items():
            player, _, id = key
            run = self.history.runs.get(key)
            kinds = self.sent.get((player, "", id), set())
            for reply in replies:
                if reply["ok"] and "run" in reply["content"] and kinds.isdisjoint({"look"}):
                    told = reply["content"]["run"]
                    require(told == run, "an answer is that of the stored run", command=key, told=told, stored=run)
                elif not reply["ok"] and "another command" in reply["error"]["message"]:
                    require(len(kinds) > 1, "a conflict needs two commands", command=key, kinds=kinds)
            if kinds <= WITHOUT_EFFECTS and kinds:
                require(run is None, "a handler that fails has done nothing", command=key, kinds=kinds)

    # The end.

    async def finish(self) -> None:
        """Everybody leaves; then nothing is left."""
        await self.quiet()
        for connection in self.connections:
            connection.client.wire.mend()
            self.give_up(connection)
        await trio.sleep(GRACE + 10)
        await self.quiet()
        hub = self.life.server.hub
        require(not hub.sessions, "after the grace time nobody is there", sessions=list(hub.sessions))
        require(not hub.connections and not hub.channels and not hub.apart, "nothing is left of connections")
        for facts in self.history.sessions.values():
            require(not facts.told or facts.told[-1] == "leave", "who joined has left", session=facts)
        await self.drain()
        names = task_names()
        left = [name for name in names if " of " in name or name in ("writer", "dispatcher", "last words")]
        require(not left, "after the drain no task is left", tasks=left)
        require(not self.life.listener.open_wires, "after the drain no socket is left")
        with closing(sqlite3.connect(self.path)) as db:
            owed = db.execute("SELECT player_id, session_id, told, owed FROM sessions WHERE owed <> ''").fetchall()
            require(not owed, "nothing is owed", owed=owed)
            rows = db.execute("SELECT * FROM connections").fetchall()
            require(not rows, "no row of a connection is left", rows=rows)


def task_names() -> list[str]:
    """Of all tasks of this run."""
    names, todo = [], [trio.lowlevel.current_root_task()]
    while todo:
        task = todo.pop()
        if task is not None:
            names.append(task.name)
            todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return names


# Steps. Each is a value whose repr is Python, and does one thing.


@frozen
class Connect:
    """*session*: none, own, new, current, ended. *position*: own, none, old, zero, future."""

    player: str
    page: int
    transport: TransportName
    session: str = "none"
    position: str = "own"
    replaces: bool = False
    header: bool = False
    narrow: bool = False
    """The sockets hold only a few hundred bytes."""

    async def play(self, sim: Simulation) -> None:
        page = sim.pages[self.player, self.page]
        wanted = self._session(sim, page)
        view, position = self._view(sim, page)
        old = page.connections.get(self.transport)
        query = {"session_id": wanted, "position": None if self.header else position}
        if self.replaces and old is not None:
            query["replaces"] = old.received.connection_id or None
        target = "&".join(f"{name}={value}" for name, value in query.items() if value is not None)
        before = Before.of(sim, self.player, wanted)
        connection = await self._open(sim, page, target, view, position)
        if connection is None:
            sim.tell(f"{self.player}: no connection")
            return
        await self._first(sim, connection, before, wanted)

    def _session(self, sim: Simulation, page: Page) -> str | None:
        match self.session:
            case "own":
                return page.session_id
            case "new":
                return f"s{next(sim.numbers)}"
            case "current":
                current = sim.history.current(self.player)
                return None if current is None else current.id
            case "ended":
                ended = [s.id for s in sim.history.sessions.values() if s.player == self.player and s.end is not None]
                return ended[-1] if ended else None
        return None

    def _view(self, sim: Simulation, page: Page) -> tuple[View, str | None]:
        """The view to be fed, and the position to name. All but "own" is a page that was loaded anew."""
        match self.position:
            case "own" if page.view.started:
                return page.view, page.view.position
            case "zero":
                view = View(sim.life.server.hub.epoch, 0)
            case "old" if page.view.started:
                earlier = sorted(seq for seq, _ in page.view.taken)
                view = View(page.view.epoch, earlier[len(earlier) // 2] if earlier else page.view.number)
            case "future":
                view = View(sim.life.server.hub.epoch, sim.history.newest + 10_000)
            case _:
                page.view = View()
                return page.view, None
        page.view = view
        return view, view.position

    async def _open(
        self, sim: Simulation, page: Page, query: str, view: View, position: str | None
    ) -> Connection | None:
        life, began = sim.life, trio.current_time()
        try:
            wire = life.listener.connect(capacity=300 if self.narrow else KERNEL)
        except ConnectionRefusedError:
            return None
        label = f"{self.player}/{self.page} {self.transport} {next(sim.numbers)}"
        received = Received(label, sim.history, view, position)
        client: Client = WebSocketClient(wire) if self.transport == "ws" else SSEClient(wire)
        connection = Connection(self.player, page, self.transport, client, received)
        header = f"Last-Event-ID: {position}\r\n" if self.header and position else ""
        sim.tell(f"{label} connects: {query} {header.strip()}")
        try:
            with trio.move_on_after(60):
                if isinstance(client, WebSocketClient):
                    headers = [(b"Last-Event-ID", position.encode())] if header and position else []
                    await client.open(f"/ws/{self.player}?{query}", headers=headers)
                elif isinstance(client, SSEClient):
                    await client.open(f"/sse/{self.player}?{query}", headers=header)
        except GONE:
            client.close()
            await life.check_answered(began, connection=label)
            return None
        page.connections[self.transport] = connection
        return connection

    async def _first(self, sim: Simulation, connection: Connection, before: Before, wanted: str | None) -> None:
        """Take the first words: welcome, or why not."""
        client, received, life, began = connection.client, connection.received, sim.life, trio.current_time()
        status = client.status if isinstance(client, (WebSocketClient, SSEClient)) else 0
        code = {204: 204, 101: 0, 200: 0}.get(status or 0, status or 1)
        if not code:
            sim.connections.append(connection)
            sim.nursery.start_soon(sim.read, connection, name="client's reader")
            with trio.move_on_after(60):
                while connection.open and connection.reachable and not received.items:
                    await trio.sleep(0.01)
            if not received.items and connection.reachable and not connection.scope.cancel_called:
                await life.check_answered(began, connection=str(connection))
            code = int(received.items[0].get("code", 0)) if received.items else 1
        else:
            client.close()
        sim.tell(f"{connection}: {'welcome to ' + received.session_id if received.welcomed else code}")
        if not received.items and (connection.scope.cancel_called or not connection.reachable):
            return  # somebody has dropped it in the meantime
        if received.welcomed:
            before.check_welcome(sim, self.player, wanted, received)
            if received.named is not None:
                self._note_named(sim, received, before)
        else:
            before.check_refusal(sim, self, wanted, code)

    def _note_named(self, sim: Simulation, received: Received, before: Before) -> None:
        epoch, seq = parse(received.named or "0-0")
        if epoch != received.epoch:
            return
        # After a crash numbers go on above those that had been set aside: what lies between is no future.
        if seq <= sim.life.server.hub.newest:
            sim.claimed[self.player] = max(sim.claimed[self.player], seq)
        if seq <= before.newest and sim.lives == before.life:
            key = self.player, received.session_id
            sim.acknowledged[key] = max(sim.acknowledged.get(key, 0), seq)


@frozen
class Before:
    """What was true when a client asked, to judge the answer."""

    alone: bool
    ended: str | None
    """Why the wanted session has ended, if it has."""
    current: str | None
    full: bool
    known: frozenset[str]
    life: int
    begun: int
    newest: int

    @classmethod
    def of(cls, sim: Simulation, player: str, wanted: str | None) -> Before:
        current = sim.history.current(player)
        facts = sim.history.sessions.get((player, wanted or ""))
        live = sim.life.server.hub.sessions.get(player)
        limit = SETTINGS["max_connections_per_player"]
        return cls(
            sim.alone and (live is None or not live.over),
            facts.reason if facts is not None and facts.end is not None else None,
            current.id if current else None,
            live is not None and len(live.connections) + live.arriving >= limit,
            frozenset(id for name, id in sim.history.sessions if name == player),
            sim.lives,
            sim.begun,
            sim.life.server.hub.newest,
        )

    def still_alone(self, sim: Simulation) -> bool:
        return self.alone and sim.alone and (sim.lives, sim.begun) == (self.life, self.begun)

    def check_welcome(self, sim: Simulation, player: str, wanted: str | None, received: Received) -> None:
        require(self.ended is None, "an id that has ended never begins again", wanted=wanted)
        require(wanted in (None, received.session_id), "the wanted session, or none", wanted=wanted)
        if wanted is None and self.still_alone(sim):
            joined = received.session_id
            right = joined == self.current if self.current else joined not in self.known
            require(right, "without an id: the current session, or a new one", current=self.current, joined=joined)

    def check_refusal(self, sim: Simulation, connect: Connect, wanted: str | None, code: int) -> None:
        if self.ended is not None:
            right = {204} if connect.transport == "sse" else {4503 if self.ended == "removed" else 4501}
            require(code in right | NOT_NOW | {1, 503}, "an ended id is turned away for good", code=code)
            require(not self.still_alone(sim) or self.full or code in right, "and at once", code=code, why=self.ended)
        elif self.still_alone(sim) and not self.full:
            # A browser's own reconnect after a DELETE, within a minute.
            removed = connect.transport == "sse" and connect.header and wanted is None and code == 204
            require(removed, "nothing is in the way of this client", code=code, step=connect)


@frozen
class Drop:
    """*how*: close, reset, cut (nobody is told), stall (what the server sends stays in its kernel), sip (of
    what has stalled as much arrives as the client's kernel has room for), mend."""

    player: str
    page: int
    transport: TransportName
    how: str

    async def play(self, sim: Simulation) -> None:
        other: TransportName = "sse" if self.transport == "ws" else "ws"
        connection = sim.pages[self.player, self.page].open_connection(self.transport, other)
        if connection is None:
            return
        sim.tell(f"{connection}: {self.how}")
        wire = connection.client.wire
        match self.how:
            case "close":
                if wire.unread():
                    sim.unsure.add(self.player)
                sim.give_up(connection)
            case "reset":
                if wire.unread():
                    sim.unsure.add(self.player)
                wire.reset()
                sim.give_up(connection)
            case "cut":
                connection.reachable = False
                wire.cut()
            case "stall":
                connection.reachable = False
                wire._other.stall()
            case "sip" if not connection.reachable:
                wire._other.stall(False)
                wire._other.stall()
            case "mend" if wire._other.was_reset:
                # The reset was lost on the way. A client that hears nothing for two heartbeats connects again.
                sim.unsure.add(self.player)
                sim.give_up(connection)
            case "mend":
                wire.mend()
                connection.reachable = True


@frozen
class Say:
    """A command, by WebSocket or, also if the page has none, by POST. *id*: new, again (the page's newest),
    other (that one's id with another content)."""

    player: str
    page: int
    do: str
    by: Literal["ws", "post"] = "ws"
    id: str = "new"

    async def play(self, sim: Simulation) -> None:
        page = sim.pages[self.player, self.page]
        id, do = f"m{next(sim.numbers)}", self.do
        last = sim.last_said.get((self.player, self.page))
        if last is not None and self.id != "new":
            id = last[0]
            do = last[1] if self.id == "again" else do
        sim.last_said[self.player, self.page] = id, do
        sim.sent.setdefault((self.player, "", id), set()).add(do)
        request = {"type": "command", "id": id, "content": {"do": do}}
        if self.by == "post" or not await say(sim, page, request):
            session_id = page.session_id
            body = request | ({"session_id": session_id} if session_id else {})
            live = sim.life.server.hub.sessions.get(self.player)
            answer = await sim.request("POST", f"/api/connections/{self.player}/commands", body)
            sim.tell(f"{self.player}: POST {id} {do} → {answer}")
            if answer is None:
                return
            status, reply = answer
            require(status in (200, 409, 503), "a command's POST has a known answer", answer=answer)
            if status == 200 and live is not None and session_id in (None, live.session_id):
                sim.heard(self.player, session_id or live.session_id, reply)


async def say(sim: Simulation, page: Page, request: dict[str, Any]) -> bool:
    connection = page.open_connection("ws")
    if connection is None or not isinstance(connection.client, WebSocketClient):
        return False
    sim.tell(f"{connection}: says {request}")
    try:
        with trio.move_on_after(5):
            await connection.client.say(request)
    except GONE:
        return False
    return True


@frozen
class Subscribe:
    player: str
    page: int
    channel: str
    on: bool = True
    by: Literal["ws", "post"] = "ws"

    async def play(self, sim: Simulation) -> None:
        kind = "subscribe" if self.on else "unsubscribe"
        request = {"type": kind, "id": f"m{next(sim.numbers)}", "channel": self.channel}
        if self.by == "ws" and await say(sim, sim.pages[self.player, self.page], request):
            return
        before = Before.of(sim, self.player, None)
        path = f"/api/connections/{self.player}/subscriptions"
        answer = await sim.request("POST", path, {kind: [self.channel]})
        sim.tell(f"{self.player}: POST {kind} {self.channel} → {answer}")
        if before.still_alone(sim) and answer is not None:
            require(answer[0] == (200 if before.current else 409), "subscriptions by POST", answer=answer)


@frozen
class Publish:
    """*to*: players, channels or ``*``; several are a batch. *id*: none, new, again, other. *key*: an
    Idempotency-Key, of which there are few. *lost*: the publisher goes away after so many checkpoints. *bar*:
    of two of these only the newer matters."""

    to: tuple[str, ...]
    id: str = "none"
    key: int | None = None
    lost: int | None = None
    bar: bool = False

    async def play(self, sim: Simulation) -> None:
        body = self._body(sim)
        headers = f"Idempotency-Key: key-{self.key}\r\n" if self.key is not None else ""
        payload = body if len(body) > 1 else body[0]
        held = [sim.history.held(item["message"].get("id", "")) for item in body]
        before = Before.of(sim, "", None)
        answer = await sim.request("POST", "/api/messages", payload, headers, patience=self.lost)
        sim.tell(f"POST {json.dumps(payload)} {headers.strip()} → {answer}")
        if answer is None:
            return
        status, said = answer
        require(status in (202, 409, 503), "a publication has a known answer", answer=answer)
        if status == 202:
            self._check_stored(sim, body, said if isinstance(said, list) else [said], held)
        elif status == 409:
            # Of two that are under way at the same time either may be the first.
            said_twice = [item for item in body if sim.is_said_twice(item["message"].get("id"))]
            caused = self.id in ("other", "again") or self.key is not None or said_twice
            require(bool(caused), "a conflict has a cause", answer=answer)
        else:
            require(not before.still_alone(sim), "nothing is in the way of this publisher", answer=answer)

    def _body(self, sim: Simulation) -> list[dict[str, Any]]:
        items = []
        for index, target in enumerate(self.to):
            where: dict[str, Any] = {"broadcast": True}
            if target != "*":
                where = {"player_id" if target in PLAYERS else "channel": target}
            message: dict[str, Any] = {"type": "line", "content": next(sim.numbers)}
            if self.bar:
                message["replace_key"] = "bar"
            item = where | {"message": message}
            if self.id != "none":
                message["id"] = f"p{next(sim.numbers)}"
            if index == 0 and self.id in ("again", "other") and sim.publications:
                first = sim.publications[-1][1]
                if self.id == "again":
                    item = copy.deepcopy(first)
                else:
                    message["id"] = first["message"]["id"]
            if "id" in item["message"]:
                sim.publications.append((item["message"]["id"], item))
            items.append(item)
        if self.key is not None and self.key in (0, 1):
            # A retry says the same again; key 2 is used by whatever comes.
            items = sim.batches.setdefault(self.key, items)
        return items

    def _check_stored(
        self, sim: Simulation, body: list[dict[str, Any]], answers: list[dict[str, Any]], held: list[Any]
    ) -> None:
        history = sim.history
        for item, answer, before in zip(body, answers, held, strict=True):
            seq, message = answer["seq"], item["message"]
            fact = history.messages.get(seq)
            require(fact is not None and fact.id == answer["id"], "202 means stored", answer=answer, stored=fact)
            assert fact is not None  # for the type checker: required above
            right = fact.json["content"] == message["content"] and fact.target == target_of(item)
            require(right, "202 means stored as it was said", item=item, stored=fact)
            if "duplicate" not in answer:
                require(seq not in sim.first_answers, "the same id again is a duplicate", answer=answer)
                sim.first_answers.add(seq)
            if before is not None and "id" in message and self.key is None:
                require(answer.get("duplicate") and seq == before.seq, "a duplicate has the first seq", answer=answer)
        if self.key is not None:
            text, numbers = json.dumps(body), [answer["seq"] for answer in answers]
            said = sim.keys.setdefault(f"key-{self.key}", (text, numbers, trio.current_time()))
            if trio.current_time() - said[2] < RETENTION - 10:
                require(said[:2] == (text, numbers), "a key names one request", first=said, now=(text, numbers))
            else:
                sim.keys[f"key-{self.key}"] = text, numbers, trio.current_time()


def target_of(item: dict[str, Any]) -> str:
    if "player_id" in item:
        return "@" + str(item["player_id"])
    return "#" + str(item["channel"]) if "channel" in item else "*"


@frozen
class Ack:
    player: str
    page: int
    by: Literal["ws", "post"] = "ws"

    async def play(self, sim: Simulation) -> None:
        page = sim.pages[self.player, self.page]
        if not page.view.started or page.view.epoch != sim.life.server.hub.epoch:
            return
        position, number = page.view.position, page.view.number
        if number > sim.history.newest:
            return
        sim.claimed[self.player] = max(sim.claimed[self.player], number)
        if self.by == "ws" and await say(sim, page, {"type": "ack", "position": position}):
            return
        session_id = page.session_id
        body = {"position": position} | ({"session_id": session_id} if session_id else {})
        answer = await sim.request("POST", f"/api/connections/{self.player}/ack", body)
        sim.tell(f"{self.player}: POST ack {position} → {answer}")
        if answer is not None and answer[0] == 200:
            require(parse(answer[1]["position"])[1] >= number, "an ack counts", answer=answer)
            if session_id:
                key = self.player, session_id
                sim.acknowledged[key] = max(sim.acknowledged.get(key, 0), number)


@frozen
class Switch:
    """POST …/session. *session*: none, new, current, ended."""

    player: str
    session: str = "none"

    async def play(self, sim: Simulation) -> None:
        wanted = Connect(self.player, 0, "ws", self.session)._session(sim, sim.pages[self.player, 0])
        before = Before.of(sim, self.player, wanted)
        body = {} if wanted is None else {"session_id": wanted}
        answer = await sim.request("POST", f"/api/connections/{self.player}/session", body)
        sim.tell(f"{self.player}: POST session {wanted} → {answer}")
        if answer is None:
            return
        status, said = answer
        require(status in (200, 201, 409, 503), "a switch has a known answer", answer=answer)
        if before.ended is not None:
            require(status in (409, 503), "an id that has ended never begins again", answer=answer)
        elif before.still_alone(sim):
            require(status in (200, 201), "nothing is in the way of this switch", answer=answer)
            require(wanted in (None, said["session_id"]), "the wanted session", answer=answer)


@frozen
class Remove:
    """DELETE the player, or one connection."""

    player: str
    page: int | None = None
    transport: TransportName = "ws"

    async def play(self, sim: Simulation) -> None:
        path = f"/api/connections/{self.player}"
        if self.page is not None:
            connection = sim.pages[self.player, self.page].connections.get(self.transport)
            if connection is None or not connection.received.connection_id:
                return
            path += "/" + connection.received.connection_id
        before = Before.of(sim, self.player, None)
        answer = await sim.request("DELETE", path)
        sim.tell(f"DELETE {path} → {answer}")
        if answer is None:
            return
        require(answer[0] in (200, 204, 404, 503), "a removal has a known answer", answer=answer)
        if self.page is None and before.still_alone(sim):
            require((answer[0] == 404) == (before.current is None), "a removal removes", answer=answer)


@frozen
class Restart:
    """*how*: drain, crash, power (what was committed since the last `Sync` is lost)."""

    how: str

    async def play(self, sim: Simulation) -> None:
        sim.tell(f"restart: {self.how}")
        if self.how == "drain":
            await sim.drain()
        else:
            await sim.crash()
        if self.how == "power":
            sim.lose_power()
        else:
            sim.snapshot = None  # opening the store is on the disk
        await sim.start()


@frozen
class Sync:
    """What is stored now survives a power cut."""

    async def play(self, sim: Simulation) -> None:
        sim.take_snapshot()


@frozen
class Wait:
    seconds: float

    async def play(self, sim: Simulation) -> None:
        sim.tell(f"wait {self.seconds}")
        await trio.sleep(self.seconds)


@frozen
class Stick:
    """The disk hangs for so long."""

    seconds: float

    async def play(self, sim: Simulation) -> None:
        sim.life.disk.stuck_until = trio.current_time() + self.seconds
        sim.tell(f"the disk hangs for {self.seconds}")


Step: TypeAlias = Connect | Drop | Say | Subscribe | Publish | Ack | Switch | Remove | Restart | Sync | Wait | Stick
# So many checkpoints before the next step begins; "done": when this one is through; "quiet": when all are.
Pause: TypeAlias = int | Literal["done", "quiet"]
IN_LINE = (Restart, Sync, Wait)


async def _play(sim: Simulation, steps: Sequence[tuple[Step, Pause]]) -> None:
    for step, pause in steps:
        if isinstance(step, IN_LINE):
            await step.play(sim)
        else:
            done = trio.Event()
            sim.running += 1
            sim.begun += 1
            sim.nursery.start_soon(partial(_one, sim, step, done), name=f"step {step}")
            if isinstance(pause, int):
                for _ in range(pause):
                    await trio.lowlevel.checkpoint()
            else:
                await done.wait()
        if pause == "quiet":
            await sim.quiet()
    await sim.finish()


async def _one(sim: Simulation, step: Step, done: trio.Event) -> None:
    try:
        await step.play(sim)
    finally:
        sim.running -= 1
        done.set()


async def _main(seed: int, path: Path, steps: Sequence[tuple[Step, Pause]], trace: list[str]) -> None:
    with logs.capture(logging.INFO) as lines:
        async with trio.open_nursery() as nursery:
            sim = Simulation(seed, path, nursery, lines)
            sim.trace = trace
            await sim.start()
            await _play(sim, steps)
            nursery.cancel_scope.cancel()


def run(
    steps: Sequence[tuple[Step, Pause]], seed: int = 0, *, log: int = 4, chunk: int = 3, write: int = 65536
) -> None:
    """Play *steps*; raises with a trace and a line that does it again.

    :param log: messages that a session's log holds.
    :param chunk: messages that are read from the store at once.
    :param write: bytes of a write to a connection that is behind.
    """
    trace: list[str] = []
    try:
        shared_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with small_bounds(log, chunk, write), tempfile.TemporaryDirectory(dir=shared_memory) as directory:
            run_seeded(_main, seed, Path(directory) / "m.db", steps, trace, seed=seed)
    except BaseException as error:
        error.add_note("What was done:\n" + "\n".join(trace))
        listed = "".join(f"    {step},\n" for step in steps)
        error.add_note(f"Again: run([\n{listed}], seed={seed}, log={log}, chunk={chunk}, write={write})")
        raise


__all__ = [
    "Ack", "Connect", "Drop", "Publish", "Remove", "Restart", "Say", "Step", "Stick", "Subscribe", "Switch", "Sync",
    "Wait", "run",
]  # fmt: skip
