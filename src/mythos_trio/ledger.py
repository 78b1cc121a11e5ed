"""The ledger of what runs: every link, task, connection, log and buffer has an owner that is alive, or is a leak.

Nothing is told to the ledger but which links there are (`Tended`, kept by the front door: one entry a link).
All else is found by looking, when somebody asks: at the hub, at the tree of Trio's tasks, at the process's open
descriptors. So it cannot be wrong about what it was not told.

What is between two owners in the moment of a look (a task that was started and has not run yet) is no leak: what
can be in such a moment is one only if it is found on two looks, `SETTLE_SECONDS` apart. What has a deadline is one
when that has passed by more than that. A look is taken in slices, and never holds up the event loop for long.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import trio
from attrs import define, evolve, field, frozen

from mythos_trio import logs
from mythos_trio.connection import Connection
from mythos_trio.core.data import PLAYER
from mythos_trio.core.errors import ErrorType
from mythos_trio.link import LINGER_SECONDS, Link
from mythos_trio.registrar import Registrar
from mythos_trio.timers import TimerClock

if TYPE_CHECKING:
    from mythos_trio.hub import Hub
    from mythos_trio.session import LiveSession

log = logs.get("server")

SETTLE_SECONDS: Final = 2.0
SLICE: Final = 500
# A leak is told in the log once; of so many it is remembered that they were.
MAX_TOLD: Final = 1000

HANDSHAKE: Final = "handshake"
REQUEST: Final = "request"
IDLE: Final = "idle"
LAST_WORDS: Final = "last words"
HANDED_ON: Final = "connection"
STAGES: Final = (HANDSHAKE, REQUEST, IDLE, HANDED_ON, LAST_WORDS)

# The server's own tasks, as `mythos_trio.server` names them.
PARTS: Final = frozenset(
    {
        "writer",
        "dispatcher",
        "poller",
        "registrar",
        "streams",
        "monitor",
        "the world's timers",
        "grace times",
        "bridge",
        "front door",
        "newcomers",
        "background of the game",
        "deadlines of handlers",
    }
)
TRANSPORTS: Final = ("websocket", "sse")
CHECKER: Final = "health checker: "
_TRIO: Final = "trio."


def task_name(function: Callable[..., object]) -> str:
    """What Trio calls a task that was started with *function* and no name."""
    return f"{function.__module__}.{function.__qualname__}"


_WATCH: Final = task_name(Registrar._watch)
_FLUSH: Final = task_name(Link._flush)
_CATCH_UP: Final = task_name(Connection._catch_up)
_TIMERS: Final = task_name(TimerClock._run)
_REGISTRAR: Final = frozenset(
    {
        _WATCH,
        task_name(Registrar._run_change),
        task_name(Registrar._pay_leave_in_turn),
        task_name(Registrar._switch_quietly),
    }
)


@define(eq=False)
class Tended:
    """A link, from its acceptance until it is closed and its task has ended. *since*: `trio.current_time`.

    *owner* is a task of the front door, or what the front door has instead of one, as long as the link is the front
    door's; then it is a connection's.
    """

    link: Link
    stage: str = HANDSHAKE
    since: float = field(factory=trio.current_time)
    owner: object = None

    def at(self, stage: str, since: float | None = None) -> None:
        self.stage = stage
        self.since = trio.current_time() if since is None else since


@frozen
class Bounds:
    """How long a link may stay in each stage at the front door, in seconds; the settings make them."""

    handshake: float = 60.0
    request: float = 600.0
    idle: float = 120.0

    def of(self, stage: str) -> float:
        return {HANDSHAKE: self.handshake, REQUEST: self.request, IDLE: self.idle}.get(stage, LINGER_SECONDS)


@frozen
class Leak:
    """Something whose owner is gone, or that should be over. *key* is the same at each look.

    *sure*: it cannot be a moment between two states; else it takes two looks.
    """

    kind: str
    key: Hashable
    name: str
    why: str
    player_id: str | None = None
    session_id: str | None = None
    connection_id: str | None = None
    sure: bool = False
    age: float = 0.0
    thing: object = field(default=None, repr=False)
    """Held, so that its `id` in the key is no other's before the second look."""

    def show(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "player_id": self.player_id,
            "session_id": self.session_id,
            "connection_id": self.connection_id,
            "age_seconds": round(self.age, 3),
            "why": self.why,
        }


def _of_session(kind: str, session: LiveSession, why: str, *, name: str = "", sure: bool = False) -> Leak:
    return Leak(
        kind,
        (kind, id(session), name or why),
        name or f"session {session.session_id}",
        why,
        player_id=session.player_id,
        session_id=session.session_id,
        sure=sure,
        thing=session,
    )


def _of_connection(kind: str, connection: Connection, why: str, *, sure: bool = False) -> Leak:
    return Leak(
        kind,
        (kind, id(connection), why),
        f"connection {connection.id}",
        why,
        player_id=connection.player_id,
        session_id=connection.session_id,
        connection_id=connection.id,
        sure=sure,
        thing=connection,
    )


def _of_task(task: trio.lowlevel.Task, why: str, player_id: str | None = None) -> Leak:
    return Leak("task", ("task", id(task)), task.name, why, player_id=player_id, thing=task)


class Ledger:
    """See the module's docstring. The server fills in its parts as they come to be.

    :param hub: whose sessions and connections are the live ones.
    """

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.links: dict[Link, Tended] = {}
        """Every open link. Kept by the front door."""
        self.bounds = Bounds()
        self.nursery: trio.Nursery | None = None
        """The server's."""
        self.registrar: Registrar | None = None
        self.ports: frozenset[int] = frozenset()
        """Where the server listens."""
        self.found: list[Leak] = []
        """What the newest look has found."""
        self.looked_at: float | None = None
        """`trio.current_time` of the newest look."""
        self._first_seen: dict[Hashable, float] = {}
        self._told: set[Hashable] = set()

    # Links: one entry each.

    def admit(self, link: Link, since: float) -> Tended:
        """A link was accepted: it is known until it is closed, and the front door has done with it.

        :param since: of `trio.current_time`.
        """
        tended = self.links[link] = Tended(link, since=since)
        link.on_closed = self._closed
        return tended

    def _closed(self, link: Link) -> None:
        tended = self.links.get(link)
        if tended is not None and tended.owner is None:
            del self.links[link]

    def hand_on(self, tended: Tended) -> None:
        """The front door has done with it."""
        tended.owner = None
        tended.at(HANDED_ON)
        if tended.link.closed:
            self.links.pop(tended.link, None)

    # Looking.

    async def look(self) -> list[Leak]:
        """Everything that has no owner, or should be over. Takes `SETTLE_SECONDS` if a second look is needed."""
        leaks = await self._look_once()
        if not all(leak.sure for leak in leaks):
            first = {leak.key for leak in leaks}
            await trio.sleep(SETTLE_SECONDS)
            leaks = [leak for leak in await self._look_once() if leak.sure or leak.key in first]
        self.found = leaks
        self.looked_at = trio.current_time()
        self._tell(leaks)
        return leaks

    async def _look_once(self) -> list[Leak]:
        found: dict[Hashable, Leak] = {}
        for count, leak in enumerate(self.examine()):
            if leak is not None:
                found[leak.key] = leak
            if count % SLICE == 0:
                await trio.lowlevel.checkpoint()
        now = trio.current_time()
        self._first_seen = {key: self._first_seen.get(key, now) for key in found}
        return [_aged(leak, now - self._first_seen[key]) for key, leak in found.items()]

    def _tell(self, leaks: list[Leak]) -> None:
        """A WARNING names each leak once."""
        self._told &= {leak.key for leak in leaks}
        for leak in leaks:
            if leak.key not in self._told and len(self._told) < MAX_TOLD:
                self._told.add(leak.key)
                log.warning(f"Leak of a {leak.kind}", error_type=ErrorType.SYSTEM.value, **leak.show())

    def examine(self) -> Iterator[Leak | None]:
        """One look: something for each thing that was looked at, None if it has its owner.

        It may be taken in slices: what was gone in between is not told.
        """
        return chain(
            self._sessions(),
            self._connections(),
            self._channels(),
            self._timers(),
            self._data(),
            self._links(),
            self._server_tasks(),
            self._system_tasks(),
            self._descriptors(),
        )

    # What the hub holds.

    def _is_live(self, session: LiveSession) -> bool:
        return self.hub.sessions.get(session.player_id) is session

    def _sessions(self) -> Iterator[Leak | None]:
        for session in list(self.hub.stuck):
            if not session.finished.is_set():
                yield _of_session("session", session, "it has ended, but its tasks have not", sure=True)
        for session in list(self.hub.sessions.values()):
            if self._is_live(session):
                yield from self._session(session)

    def _session(self, session: LiveSession) -> Iterator[Leak | None]:
        yield None
        if session.log is not None and not session.connections:
            yield _of_session("log", session, "it has no connection, but a log in memory", name="log", sure=True)
        if session.finished.is_set() and not self._changing(session.player_id):
            yield _of_session("session", session, "its tasks have ended, but it is still held")
        if session.waiting_commands and not session.running_handler and not session.over:
            yield _of_session("command", session, "commands wait, and nobody runs them", name="commands")
        for connection in list(session.connections.values()):
            if self.hub.connections.get(connection.id) is not connection:
                yield _of_connection("connection", connection, "only its session knows it")
        if session.nursery is not None:
            yield from self._session_tasks(session, session.nursery)

    def _changing(self, player_id: str) -> bool:
        return self.registrar is not None and self.registrar.is_changing(player_id)

    def _session_tasks(self, session: LiveSession, nursery: trio.Nursery) -> Iterator[Leak | None]:
        """The tasks of a player's nursery: those of its connections, its handlers, its timers."""
        connections = list(session.connections.values())
        streams = {
            f"{transport} of {session.player_id}": len(connections) + session.arriving for transport in TRANSPORTS
        }
        allowed = streams | {
            f"handlers of {session.player_id}": 1,
            _TIMERS: 1,
            _CATCH_UP: sum(connection.waiting_for is not None for connection in connections),
            _FLUSH: len(connections) + session.arriving,
        }
        counts = Counter(task.name for task in nursery.child_tasks)
        if sum(counts[name] for name in streams) > len(connections) + session.arriving:
            yield _of_session("task", session, "a connection's task without a connection", name=" or ".join(streams))
        for name, count in counts.items():
            yield None
            if name not in allowed:
                yield _of_session("task", session, "a task that no session has of itself", name=name)
            elif count > allowed[name] and name not in streams:
                yield _of_session("task", session, f"{count} of them where {allowed[name]} may be", name=name)

    def _connections(self) -> Iterator[Leak | None]:
        for connection in list(self.hub.connections.values()):
            yield None
            if self.hub.connections.get(connection.id) is not connection:
                continue  # gone while this look was taken
            if not self._is_live(connection.session) and connection.session not in self.hub.stuck:
                yield _of_connection("connection", connection, "its session is over", sure=True)
            elif connection.over is not None or connection.link.closed:
                yield _of_connection("connection", connection, "it is over, and still attached")
        for connection in list(self.hub.apart):
            if connection in self.hub.apart and self.hub.connections.get(connection.id) is not connection:
                yield _of_connection("connection", connection, "it is gone, and still to be written to")

    def _channels(self) -> Iterator[Leak | None]:
        for channel, listeners in list(self.hub.channels.items()):
            for session in list(listeners):
                yield None
                if session in listeners and not self._is_live(session):
                    why = f"its session is over, but it listens to {channel}"
                    yield _of_session("subscription", session, why, name=channel, sure=True)

    def _timers(self) -> Iterator[Leak | None]:
        for owner, clock in list(self.hub.clocks.items()):
            yield None
            if not owner.startswith(PLAYER) or self.hub.clocks.get(owner) is not clock:
                continue
            player_id = owner.removeprefix(PLAYER)
            session = self.hub.sessions.get(player_id)
            if session is None or session.finished.is_set():
                key = ("timer", id(clock))
                why = "its player's session is over, and its timers run"
                yield Leak("timer", key, f"timers of {player_id}", why, player_id=player_id, thing=clock)

    def _data(self) -> Iterator[Leak | None]:
        for key, submission in self.hub.data.waiting():
            yield None
            if submission.outcome is not None:
                why = "its transaction is over, and it still waits for that"
                yield Leak("data", ("data", key, id(submission)), f"a value of {key}", why, thing=submission)

    # Links.

    def _links(self) -> Iterator[Leak | None]:
        attached = {connection.link for connection in self.hub.connections.values()}
        now = trio.current_time()
        for link, tended in list(self.links.items()):
            yield None
            if self.links.get(link) is not tended:
                continue
            if (why := self._why_ownerless(tended, link in attached, now)) is not None:
                yield Leak("link", ("link", id(link)), f"link of {link.peer}:{link.peer_port}", why, thing=link)

    def _why_ownerless(self, tended: Tended, attached: bool, now: float) -> str | None:
        link = tended.link
        if tended.owner is not None:
            late = now - tended.since - self.bounds.of(tended.stage)
            return None if late < SETTLE_SECONDS else f"in the stage {tended.stage!r} for too long"
        if link.lingers_until is not None:
            return None if now < link.lingers_until + SETTLE_SECONDS else "its last words have no end"
        return None if attached else "it is open, and no request, connection or last words have it"

    def stages(self) -> dict[str, int]:
        """How many links there are, by who has them."""
        counts = dict.fromkeys(STAGES, 0)
        for link, tended in self.links.items():
            counts[LAST_WORDS if link.lingers_until is not None else tended.stage] += 1
        return counts

    # Tasks: the tree, from the server's nursery down.

    def _server_tasks(self) -> Iterator[Leak | None]:
        if self.nursery is None:
            return
        for part in list(self.nursery.child_tasks):
            yield None
            if part.name == "registrar":
                yield from self._registrar_tasks(part)
            elif part.name == "streams":
                lingering = sum(link.lingers_until is not None for link in self.links)
                yield from self._known(part, {LAST_WORDS: lingering, _FLUSH: len(self.links)})
            elif part.name == "front door":
                yield from self._front_tasks(part)
            elif part.name not in PARTS and not part.name.startswith(CHECKER):
                yield _of_task(part, "the server has no task of this name")

    def _registrar_tasks(self, part: trio.lowlevel.Task) -> Iterator[Leak | None]:
        """Sessions' tasks hang below these; they are looked at with their sessions."""
        yield from self._known(part, dict.fromkeys(_REGISTRAR))
        watches = [task for task in _children(part) if task.name == _WATCH]
        live = {id(s.nursery) for s in chain(self.hub.sessions.values(), self.hub.stuck) if s.nursery is not None}
        changes = 0 if self.registrar is None else self.registrar.changes
        strangers = [t for t in watches if not any(id(nursery) in live for nursery in t.child_nurseries)]
        # Without a nursery of its own it is before its session's first step or after its last, in a change.
        over = [task for task in strangers if task.child_nurseries]
        waiting = len(strangers) - len(over)
        for task in over:
            yield _of_task(task, "a session's tasks, and nobody holds the session")
        held = changes + sum(s.nursery is None for s in chain(self.hub.sessions.values(), self.hub.stuck))
        if waiting > held:
            yield Leak("task", ("task", _WATCH), _WATCH, f"{waiting} wait where {held} may wait")

    def _front_tasks(self, part: trio.lowlevel.Task) -> Iterator[Leak | None]:
        tending = {tended.owner for tended in self.links.values()}
        for task in _children(part):
            yield None
            if task not in tending and task.name != _FLUSH:
                yield _of_task(task, "the front door has done with its connection")

    def _known(self, part: trio.lowlevel.Task, allowed: dict[str, int | None]) -> Iterator[Leak | None]:
        """The tasks directly under *part*: of each name at most so many."""
        counts: Counter[str] = Counter()
        for task in _children(part):
            yield None
            counts[task.name] += 1
            if task.name not in allowed:
                yield _of_task(task, f"the {part.name} has no task of this name")
        for name, most in allowed.items():
            if most is not None and counts[name] > most:
                why = f"{counts[name]} of them where {most} may be"
                yield Leak("task", ("task", part.name, name), name, why)

    def _system_tasks(self) -> Iterator[Leak | None]:
        """Beside the main task and Trio's own there are none."""
        root = trio.lowlevel.current_root_task()
        for nursery in () if root is None or self.nursery is None else root.child_nurseries:
            for task in list(nursery.child_tasks):
                yield None
                if not task.name.startswith((_TRIO, "<")) and not _is_main(task):
                    yield _of_task(task, "a system task that nobody owns")

    # What the kernel says.

    def _descriptors(self) -> Iterator[Leak | None]:
        """Sockets of clients that no link has: those on the server's ports."""
        if not self.ports:
            return
        known = {link.fileno() for link in self.links}
        for number in _open_descriptors():
            yield None
            if number in known or (inode := _client_socket(number, self.ports)) is None:
                continue
            yield Leak("socket", ("socket", inode), f"descriptor {number}", "a client's socket without a link")

    def held(self) -> dict[str, Any]:
        """What the server itself holds just now."""
        hub = self.hub
        return {
            "links": self.stages(),
            "descriptors": len(_open_descriptors()),
            "channels": len(hub.channels),
            "subscriptions": sum(len(listeners) for listeners in hub.channels.values()),
            "timers_set": sum(len(timers) for timers in hub.timers.values()),
            "clocks": len(hub.clocks),
            "data_bytes": hub.data.bytes,
            "data_pending": hub.data.pending,
            "behind": len(hub.apart),
            "notes": hub.waiting_notes,
            "unsent_bytes": sum(link.unsent for link in self.links),
        }


def _aged(leak: Leak, age: float) -> Leak:
    return evolve(leak, age=age)


def _children(task: trio.lowlevel.Task) -> list[trio.lowlevel.Task]:
    return [child for nursery in task.child_nurseries for child in nursery.child_tasks]


def _is_main(task: trio.lowlevel.Task) -> bool:
    """Whether this very code runs below *task*."""
    current: trio.lowlevel.Task | None = trio.lowlevel.current_task()
    while current is not None:
        if current is task:
            return True
        current = None if current.parent_nursery is None else current.parent_nursery.parent_task
    return False


def _open_descriptors() -> list[int]:
    """The process's open descriptors; none where the system does not tell."""
    with suppress(OSError):
        return [int(name) for name in os.listdir("/proc/self/fd")]
    return []


def _client_socket(number: int, ports: frozenset[int]) -> int | None:
    """The inode of a connected socket whose own port is one of *ports*; None if it is anything else."""
    try:
        if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
            return None
        inode = os.fstat(number).st_ino
        with socket.socket(fileno=os.dup(number)) as copy:
            if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.getsockname()[1] not in ports:
                return None
            copy.getpeername()
    except OSError:  # closed meanwhile, or a listener, which has no peer
        return None
    return inode
