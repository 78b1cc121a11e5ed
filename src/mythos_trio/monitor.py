"""What the server knows of itself, computed when somebody asks: the answers of the API and of the
monitoring pages, as dicts of JSON values.

Nothing here keeps a number of its own: what is true of connections and sessions is read from the hub,
what has happened is counted by `mythos_trio.statistics`, what the process uses is asked of the machine.
Times that people read are RFC 3339; ages and deadlines are of Trio's clock, which does not jump.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar

import msgspec
import trio
from attrs import define, field, frozen

from mythos_trio import __version__, config
from mythos_trio.core import names, verdicts
from mythos_trio.core.deliveries import Deliveries
from mythos_trio.core.errors import ErrorType, Refusal
from mythos_trio.core.session import State
from mythos_trio.core.verdicts import Finding, Status
from mythos_trio.explain import Explainer, expired_by_its_time
from mythos_trio.machine import Machine
from mythos_trio.seams import rfc3339
from mythos_trio.storage import SessionRow, StoreError

if TYPE_CHECKING:
    from mythos_trio.checker import Checker
    from mythos_trio.config import Settings
    from mythos_trio.connection import Connection
    from mythos_trio.dispatcher import Dispatcher
    from mythos_trio.hub import Hub
    from mythos_trio.ledger import Ledger
    from mythos_trio.seams import Clock
    from mythos_trio.session import LiveSession
    from mythos_trio.statistics import Statistics
    from mythos_trio.storage import Storage

Answer: TypeAlias = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")

TRANSPORTS: Final = ("websocket", "sse")

# A health check that hangs tells nothing: a store that does not answer in this time is in trouble.
STORE_SECONDS: Final = 2.0
# `/health` may be asked many times a second, by many; the store's figures are not read for each.
FIGURES_SECONDS: Final = 2.0

TREND_SECONDS: Final = 10.0

MAX_RECEIVERS: Final = 100
MAX_UNHEALTHY: Final = 50
MAX_TASKS: Final = 2000
MAX_PLAYERS: Final = 200
# Of the tasks of one player: a handler may start as many as it likes.
MAX_NAMES: Final = 50
# Waiting messages are counted up to here; beyond it, "more" is all that anybody needs to know.
MAX_PENDING: Final = 1000

_AGES: Final = (
    ("under_1_minute", 60.0),
    ("under_10_minutes", 600.0),
    ("under_1_hour", 3600.0),
    ("under_24_hours", 86400.0),
    ("over_24_hours", float("inf")),
)


class Stage(StrEnum):
    """Where the server is between its start and its exit."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@frozen
class Component:
    """One part of the server: how it is, and the values by which it was judged."""

    finding: Finding
    measured: Answer

    def show(self) -> Answer:
        return {"status": self.finding.status.value, "why": self.finding.why, **self.measured}


@define(eq=False)
class Monitor:
    """Make it when the hub has taken over what the store was recovered to.

    *stage* is set by the server.
    """

    hub: Hub
    dispatcher: Dispatcher
    checker: Checker
    storage: Storage
    statistics: Statistics
    settings: Settings
    clock: Clock
    ledger: Ledger
    machine: Machine = field(factory=Machine)
    stage: Stage = Stage.STARTING
    _started: float = field(factory=trio.current_time, init=False)
    _newest_at_start: int = field(init=False)
    _figures: tuple[float, Answer] | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._newest_at_start = self.hub.newest

    def _stamped(self, **fields: Any) -> Answer:
        """An answer that speaks for this process."""
        return {"server_id": self.hub.server_id, "timestamp": rfc3339(self.clock.now()), **fields}

    # Health.

    async def health(self) -> tuple[Status, Answer]:
        found = verdicts.worst(component.finding for component in (await self._components()).values())
        return found.status, self._health(found)

    async def health_detailed(self) -> tuple[Status, Answer]:
        components = await self._components()
        found = verdicts.worst(component.finding for component in components.values())
        shown = {name: component.show() for name, component in components.items()}
        return found.status, {**self._health(found), "components": shown}

    def ready(self) -> tuple[bool, Answer]:
        """Whether it takes connections: not while it starts or drains."""
        ready = self.stage is Stage.READY
        return ready, self._stamped(ready=ready, stage=self.stage.value)

    def _health(self, found: Finding) -> Answer:
        return self._stamped(
            status=found.status.value,
            why=found.why,
            version=__version__,
            uptime_seconds=round(trio.current_time() - self._started, 3),
        )

    async def _components(self) -> dict[str, Component]:
        return {
            "database": await self._database(),
            "dispatcher": self._dispatcher(),
            "health_checker": self._health_checker(),
            "memory": self._memory(),
            "event_loop": self._event_loop(),
            "disk": self._disk(),
            "ledger": self._ledger(),
        }

    async def _database(self) -> Component:
        measured: Answer = {"last_commit_ms": self.storage.last_commit_ms, "commits": self.storage.commits}
        trouble = self.storage.trouble
        try:
            figures = await self._store_figures()
        except StoreError as error:
            figures = {}
            trouble = trouble or str(error)
        limit = self.settings.max_store_bytes
        measured |= {**figures, "max_store_bytes": limit, "writing_seconds": round(self.storage.writing_seconds, 3)}
        return Component(verdicts.database(trouble, figures.get("bytes_in_use"), limit), measured)

    async def _store_figures(self) -> Answer:
        """The store's own figures, at most `FIGURES_SECONDS` old."""
        now = trio.current_time()
        if self._figures is not None and now - self._figures[0] < FIGURES_SECONDS:
            return self._figures[1]
        with trio.move_on_after(STORE_SECONDS):
            figures = await self.storage.figures()
            self._figures = (now, figures)
            return figures
        raise StoreError(f"the store did not answer within {STORE_SECONDS:g} s")

    def _dispatcher(self) -> Component:
        queued, capacity = self.dispatcher.queued, self.dispatcher.capacity
        measured = {"queued": queued, "capacity": capacity, "newest": self.hub.newest}
        return Component(verdicts.dispatcher(queued, capacity), measured)

    def _health_checker(self) -> Component:
        seconds = round(trio.current_time() - self.checker.last_round, 3)
        measured = {
            "seconds_since_round": seconds,
            "interval_seconds": self.settings.health_check_interval,
            "connections": len(self.hub.connections),
        }
        return Component(verdicts.health_checker(seconds), measured)

    def _memory(self) -> Component:
        memory = self.machine.memory()
        measured = {
            "percent": memory.percent,
            "rss_bytes": memory.rss_bytes,
            "available_bytes": memory.available_bytes,
            "limit_bytes": memory.limit_bytes,
        }
        return Component(verdicts.memory(memory.percent), measured)

    def _event_loop(self) -> Component:
        lag = self.statistics.lag()
        measured = {"lag_ms": lag["p99_ms"], "max_lag_ms": lag["max_ms"], "tasks": _count_tasks()}
        return Component(verdicts.event_loop(lag["p99_ms"]), measured)

    def _disk(self) -> Component:
        try:
            disk = self.machine.disk(config.store_path(self.settings))
        except OSError as error:
            return Component(Finding(Status.DEGRADED, f"the disk cannot be asked: {error}"), {})
        measured = {"path": disk.path, "free_bytes": disk.free_bytes, "total_bytes": disk.total_bytes}
        return Component(verdicts.disk(disk.free_bytes, disk.total_bytes), measured)

    def _ledger(self) -> Component:
        """Leaks, as the newest look has found them."""
        kinds = dict(Counter(leak.kind for leak in self.ledger.found))
        measured: Answer = {"leaks": len(self.ledger.found), "kinds": kinds, "links": len(self.ledger.links)}
        return Component(verdicts.leaks(len(self.ledger.found)), measured)

    async def watch(self) -> None:
        """Note the connections' health now and then, for its trend. Runs until it is cancelled."""
        while True:
            healthy, unhealthy = _split_healthy(self.hub.connections.values())
            self.statistics.health(len(healthy), len(unhealthy))
            await trio.sleep(TREND_SECONDS)

    # Players and connections.

    def stats(self) -> Answer:
        """``/api/connections/stats``."""
        connections = list(self.hub.connections.values())
        healthy, unhealthy = _split_healthy(connections)
        return {
            "total_players": sum(1 for session in self.hub.sessions.values() if session.connections),
            "total_connections": len(connections),
            "connection_distribution": self._distribution(),
            "session_statistics": {
                "total_sessions": len(self.hub.sessions),
                "average_connections_per_session": _average(len(connections), len(self.hub.sessions)),
            },
            "health_statistics": {
                "healthy_connections": len(healthy),
                "unhealthy_connections": len(unhealthy),
                "health_percentage": verdicts.percentage(len(healthy), len(connections)),
            },
            "nodes": {self.hub.server_id: len(connections)},
            **self._stamped(),
        }

    def _distribution(self) -> dict[str, int]:
        """Players by what they are connected with."""
        counts = dict.fromkeys(("websocket_only", "sse_only", "dual_connections"), 0)
        for session in self.hub.sessions.values():
            transports = {connection.transport for connection in session.connections.values()}
            if transports:
                name = "dual_connections" if len(transports) == 2 else f"{transports.pop()}_only"
                counts[name] += 1
        return counts

    async def player(self, player_id: str) -> Answer:
        """``/api/connections/{player}``. A player that nobody has heard of is offline."""
        live = self.hub.sessions.get(player_id)
        row = await self._current_row(player_id, live)
        connections = list(live.connections.values()) if live is not None else []
        session_id = live.session_id if live is not None else row.session_id if row is not None else None
        return {
            "player_id": player_id,
            "session_id": session_id,
            "connections": {name: self._transport(connections, name) for name in TRANSPORTS},
            "presence": {
                "status": self.hub.presence(player_id),
                "last_seen": self._last_seen(connections, row),
                "total_connections": len(connections),
            },
            "health": _player_health(connections),
            "message_delivery_stats": await self._delivery(player_id, live, row),
            **self._stamped(),
        }

    async def _current_row(self, player_id: str, live: LiveSession | None) -> SessionRow | None:
        """The stored session, which is not needed if the player is online."""
        if live is not None and live.connections:
            return None
        return await self._read(self.storage.current_session, player_id)

    def _transport(self, connections: Sequence[Connection], transport: str) -> Answer:
        mine = [connection for connection in connections if connection.transport == transport]
        last = max((connection.last_activity for connection in mine), default=None)
        return {
            "count": len(mine),
            "connection_ids": [connection.id for connection in mine],
            "last_activity": _time(last),
            "connections": [self._connection(connection) for connection in mine],
        }

    def _connection(self, connection: Connection) -> Answer:
        return {
            "connection_id": connection.id,
            "server_id": self.hub.server_id,
            "address": connection.address,
            "opened": rfc3339(connection.opened_at),
            "written": connection.written,
            "acknowledged": connection.acknowledged,
            "behind": connection.behind,
            "replaced": connection.replaced.count,
            "waiting_for": connection.waiting_for,
            "healthy": connection.healthy,
            "why": connection.why,
        }

    def _last_seen(self, connections: Sequence[Connection], row: SessionRow | None) -> str | None:
        if connections:
            return _time(max(connection.last_activity for connection in connections))
        return _time(row.last_online if row is not None else None)

    async def _delivery(self, player_id: str, live: LiveSession | None, row: SessionRow | None) -> Answer:
        """What became of the player's messages since the session is in memory, and what waits.

        Every connection carries all of the stream, so a message is delivered when one has got it.
        """
        counts = Deliveries(0) if live is None else live.deliveries
        pending = await self._pending(player_id, live, row)
        last = counts.last_failure
        return {
            "sent": counts.delivered + counts.replaced + pending,
            "delivered": counts.delivered,
            "replaced": counts.replaced,
            "acknowledged": counts.acknowledged,
            "pending": pending,
            "failed": counts.failed,
            "delivery_success_rate": verdicts.percentage(counts.delivered, counts.delivered + counts.failed),
            "last_failure": None if last is None else {"when": rfc3339(last[0]), "reason": last[1]},
        }

    async def _pending(self, player_id: str, live: LiveSession | None, row: SessionRow | None) -> int:
        """Messages that no connection has been written yet; at most `MAX_PENDING` are counted."""
        if live is not None and live.connections:
            return min(connection.behind for connection in live.connections.values())
        if row is None:
            return 0
        after = max(self._seen(row, live), live.deliveries.upto if live is not None else 0)
        chunk = await self._read(self.storage.read, player_id, row.session_id, after, self.hub.newest, MAX_PENDING)
        return len(chunk.messages)

    def _seen(self, row: SessionRow, live: LiveSession | None) -> int:
        """The session's mark: what is in memory is newer than what is stored."""
        return live.seen if live is not None else max(row.seen, self.hub.marked(row.player_id, row.session_id))

    async def session(self, player_id: str) -> Answer:
        """``/api/connections/{player}/session``."""
        live = self.hub.sessions.get(player_id)
        row = live.row if live is not None else await self._read(self.storage.current_session, player_id)
        connections = list(live.connections.values()) if live is not None else []
        state = live.state.value if live is not None else State.OFFLINE.value
        return {
            "player_id": player_id,
            "session_id": row.session_id if row is not None else None,
            "session_created": rfc3339(row.created_at) if row is not None else None,
            "active_connections": len(connections),
            "connection_types": sorted({connection.transport for connection in connections}),
            "owner": self.hub.server_id if live is not None else None,
            "state": state if row is not None else None,
            **self._stamped(),
        }

    # Explaining a message.

    async def message(self, message_id: str) -> Answer:
        """``/api/messages/{id}``: what is known of a message, or a 404 refusal."""
        message = await self._read(self.storage.find_message, message_id)
        if message is None:
            return await self._gone(message_id)
        rows, total = await self._read(self.storage.receivers, message, MAX_RECEIVERS)
        explainer = Explainer(self.hub, self.dispatcher.rounds, self._newest_at_start)
        receivers = [receiver for row in rows for receiver in explainer.receivers(message, row)]
        return {
            "id": message.id,
            "state": "stored",
            "why": None,
            "seq": message.seq,
            "epoch": self.hub.epoch,
            "target": names.target_fields(message.target),
            "accepted_at": msgspec.json.decode(message.body).get("timestamp"),
            "stored_at": rfc3339(message.stored_at),
            "receivers": receivers[:MAX_RECEIVERS],
            "receivers_total": total,
            **self._stamped(),
        }

    async def _gone(self, message_id: str) -> Answer:
        settings = self.settings
        expired = await self._read(self.storage.find_expired, message_id)
        if expired is not None:
            why = f"retention removed it at {rfc3339(expired.removed_at)}"
        elif expired_by_its_time(message_id, self.clock.now(), settings.message_retention):
            why = "as far as its id says, which begins with the time when it was made: it is not remembered"
        else:
            raise Refusal(
                ErrorType.VALIDATION,
                f"no message has the id {message_id!r}: it was never accepted, or it has expired long ago",
                status=404,
                details={"id": message_id},
            )
        return {
            "id": message_id,
            "state": "expired",
            "why": f"{why} (MESSAGE_RETENTION, MESSAGE_RETENTION_COUNT, MAX_STORE_BYTES)",
            "seq": None if expired is None else expired.seq,
            "epoch": None if expired is None else self.hub.epoch,
            "target": None if expired is None else names.target_fields(expired.target),
            "accepted_at": None,
            "stored_at": None,
            "receivers": [],
            "receivers_total": 0,
            **self._stamped(),
        }

    async def _read(self, reading: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Ask the store, within `STORE_SECONDS`; a store that cannot answer is a 503 refusal."""
        why = f"the store did not answer within {STORE_SECONDS:g} s"
        with trio.move_on_after(STORE_SECONDS):
            try:
                return await reading(*args, **kwargs)
            except StoreError as error:
                why = str(error)
        raise Refusal(ErrorType.PERSISTENCE, why, status=503, retry_ms=2000)

    # Monitoring pages: they speak for this process alone.

    def dual_connections(self) -> Answer:
        distribution: dict[str, int | float] = {**self._distribution()}
        players = int(sum(distribution.values()))
        dual = int(distribution["dual_connections"])
        distribution["dual_connection_percentage"] = round(100 * dual / players, 2) if players else 0.0
        sessions = list(self.hub.sessions.values())
        now = self.clock.now()
        ages = sum(max(0.0, now - session.created_at) for session in sessions)
        return self._stamped(
            connection_distribution=distribution,
            connection_health=self._overall_health(),
            session_analytics={
                "total_sessions": len(sessions),
                "linkdead": sum(1 for session in sessions if session.state is State.LINKDEAD),
                **self.statistics.sessions(),
                "average_connections_per_session": _average(len(self.hub.connections), len(sessions)),
                "average_age_seconds": _average(ages, len(sessions)),
            },
        )

    def performance(self) -> Answer:
        lag = self.statistics.lag()
        return self._stamped(
            connection_establishment=self.statistics.establishment(),
            message_delivery=self.statistics.delivery(),
            commands=self.statistics.commands(),
            transactions=self.statistics.transactions(),
            system_performance={
                "cpu_percent": self.machine.cpu_percent(),
                "memory_rss_bytes": self.machine.memory().rss_bytes,
                "open_fds": self.machine.open_files(),
                "tasks": _count_tasks(),
                "loop_lag_ms": lag["p99_ms"],
            },
            rates=self.statistics.rates(),
        )

    def connection_health(self) -> Answer:
        _, unhealthy = _split_healthy(self.hub.connections.values())
        by_type: Answer = {name: self._transport_health(name) for name in TRANSPORTS}
        by_type["unhealthy"] = [
            {"connection_id": connection.id, "player_id": connection.player_id, "why": connection.why}
            for connection in unhealthy[:MAX_UNHEALTHY]
        ]
        return self._stamped(
            overall_health=self._overall_health(),
            connection_type_health=by_type,
            health_trends=self.statistics.health_trends(),
            connection_age_distribution=self._ages(),
        )

    def errors(self) -> Answer:
        return self._stamped(**self.statistics.errors())

    def _overall_health(self) -> Answer:
        healthy, unhealthy = _split_healthy(self.hub.connections.values())
        return {"status": verdicts.connections(len(healthy), len(unhealthy)).value, **_shares(healthy, unhealthy)}

    def _transport_health(self, transport: str) -> Answer:
        return _shares(*_split_healthy(c for c in self.hub.connections.values() if c.transport == transport))

    def _ages(self) -> dict[str, int]:
        now = trio.current_time()
        counts = dict.fromkeys((name for name, _ in _AGES), 0)
        for connection in self.hub.connections.values():
            age = now - connection.opened
            counts[next(name for name, bound in _AGES if age < bound)] += 1
        return counts

    # Tasks and leaks.

    async def tasks(self, player_id: str | None = None) -> Answer:
        """``/monitoring/tasks``: who runs in which nursery and holds what, and what should be gone and is not.

        :param player_id: only this player in ``players``, and no tree.
        """
        leaks = await self.ledger.look()
        root = trio.lowlevel.current_root_task()
        tree = _Tree({id(session.nursery): session for session in self._sessions() if session.nursery is not None})
        shown = tree.grow(root) if root is not None and player_id is None else None
        players = [session for session in self._sessions() if player_id in (None, session.player_id)]
        total = _count_tasks()
        return self._stamped(
            total_tasks=total,
            leaks=len(leaks),
            leaked=[leak.show() for leak in leaks[:MAX_TASKS]],
            players={session.player_id: _runs_for(session) for session in players[:MAX_PLAYERS]},
            players_total=len(players),
            server={**self.ledger.held(), "queued": self.dispatcher.queued, "players": len(self.hub.sessions)},
            tree=shown,
            left_out=max(0, total - tree.shown) if player_id is None else 0,
        )

    def _sessions(self) -> list[LiveSession]:
        return [*self.hub.sessions.values(), *self.hub.stuck]

    def metrics(self) -> bytes:
        """``/metrics``, for Prometheus. What is dear to find is of the checker's newest look."""
        lines: list[str] = []
        for name, help_, values in self._gauges():
            lines += [f"# HELP mythos_{name} {help_}", f"# TYPE mythos_{name} gauge"]
            lines += [f"mythos_{name}{labels} {value}" for labels, value in values.items()]
        return ("\n".join(lines) + "\n").encode()

    def _gauges(self) -> Iterator[tuple[str, str, dict[str, float]]]:
        """(name, help, values by their labels)."""
        looked_at = self.ledger.looked_at
        transports = Counter(connection.transport for connection in self.hub.connections.values())
        yield "leaks", "What is left of something that is over, at the newest look.", {"": len(self.ledger.found)}
        age = trio.current_time() - (self._started if looked_at is None else looked_at)
        yield "leaks_looked_seconds", "Since the newest look for leaks, or the start.", {"": round(age, 3)}
        yield "tasks", "Tasks of the process.", {"": _count_tasks()}
        yield "sessions", "Players online or link-dead.", {"": len(self.hub.sessions)}
        by_transport: dict[str, float] = {f'{{transport="{name}"}}': transports[name] for name in TRANSPORTS}
        yield "connections", "Open connections.", by_transport
        by_stage: dict[str, float] = {f'{{stage="{name}"}}': n for name, n in self.ledger.stages().items()}
        yield "links", "Open sockets of clients, by who has them.", by_stage
        yield "open_fds", "Open descriptors of the process.", {"": self.machine.open_files()}
        yield "memory_rss_bytes", "Memory of the process.", {"": self.machine.memory().rss_bytes}


class _Tree:
    """The tasks under one task, as far as they are shown: at most `MAX_TASKS`."""

    def __init__(self, owners: Mapping[int, LiveSession]) -> None:
        """:param owners: the session that each player's nursery (its ``id()``) belongs to."""
        self._owners = owners
        self.shown = 0

    def grow(self, task: trio.lowlevel.Task, owner: LiveSession | None = None) -> Answer:
        self.shown += 1
        nurseries = [self._nursery(nursery, owner) for nursery in task.child_nurseries]
        return {"name": task.name, "nurseries": nurseries} if nurseries else {"name": task.name}

    def _nursery(self, nursery: trio.Nursery, owner: LiveSession | None) -> Answer:
        owner = self._owners.get(id(nursery), owner)
        tasks = []
        for task in nursery.child_tasks:
            if self.shown >= MAX_TASKS:
                break
            tasks.append(self.grow(task, owner))
        player = {} if owner is None else {"player_id": owner.player_id}
        return {**player, "tasks": tasks}


def _runs_for(session: LiveSession) -> Answer:
    """What runs and is held for one player."""
    names = Counter(_names_under(session.nursery)) if session.nursery is not None else Counter[str]()
    held = session.log
    return {
        "session_id": session.session_id,
        "state": session.state.value,
        "tasks": names.total(),
        "names": dict(names.most_common(MAX_NAMES)),
        "connections": [_runs_on(connection) for connection in session.connections.values()],
        "arriving": session.arriving,
        "log": None if held is None else {"messages": len(held), "bytes": held.bytes},
        "channels": len(session.channels),
        "waiting_commands": session.waiting_commands,
        "running_handler": session.running_handler,
        "timers": session.running_timers,
    }


def _runs_on(connection: Connection) -> Answer:
    return {
        "connection_id": connection.id,
        "transport": connection.transport,
        "age_seconds": round(trio.current_time() - connection.opened, 3),
        "unsent_bytes": connection.link.unsent,
        "waiting_replies": connection.waiting_replies,
        "behind": connection.behind,
        "waiting_for": connection.waiting_for,
    }


def _names_under(nursery: trio.Nursery) -> Iterator[str]:
    for task in nursery.child_tasks:
        yield task.name
        for below in task.child_nurseries:
            yield from _names_under(below)


def _count_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def _player_health(connections: Sequence[Connection]) -> Answer:
    """None for a transport that the player does not use."""
    by_transport: Answer = {}
    for name in TRANSPORTS:
        healthy = [connection.healthy for connection in connections if connection.transport == name]
        by_transport[f"{name}_health"] = verdicts.player(healthy).value if healthy else None
    overall = verdicts.player([connection.healthy for connection in connections])
    return {"overall_health": overall.value, **by_transport}


def _split_healthy(connections: Iterable[Connection]) -> tuple[list[Connection], list[Connection]]:
    healthy: list[Connection] = []
    unhealthy: list[Connection] = []
    for connection in connections:
        (healthy if connection.healthy else unhealthy).append(connection)
    return healthy, unhealthy


def _shares(healthy: Sequence[Connection], unhealthy: Sequence[Connection]) -> Answer:
    return {
        "healthy": len(healthy),
        "unhealthy": len(unhealthy),
        "health_percentage": verdicts.percentage(len(healthy), len(healthy) + len(unhealthy)),
    }


def _average(total: float, count: int) -> float:
    return round(total / count, 2) if count else 0.0


def _time(posix: float | None) -> str | None:
    return None if posix is None else rfc3339(posix)
