"""Small stand-ins for the live parts of a server, for tests of what is told about them.

The hub, the statistics and the monitor are the real ones; sessions and connections are only what may be
read of them, and the store is a few dicts.
"""

from __future__ import annotations

from typing import Any, cast

import trio
from attrs import define, field

from mythos_trio.config import Settings
from mythos_trio.core.backlog import Replaced
from mythos_trio.core.deliveries import Deliveries
from mythos_trio.core.errors import Close, ErrorType, Refusal
from mythos_trio.core.log import Log
from mythos_trio.core.position import Position
from mythos_trio.core.session import State
from mythos_trio.core.timeline import Timeline
from mythos_trio.hub import Hub
from mythos_trio.ledger import Ledger
from mythos_trio.machine import Disk, Machine, Memory
from mythos_trio.monitor import Monitor
from mythos_trio.registrar import SwitchResult
from mythos_trio.statistics import Statistics
from mythos_trio.storage import Chunk, Expired, SessionRow, StoredMessage, StoreError

NOW = 1_700_000_000.0
"""2023-11-14T22:13:20.000Z"""


@define
class FakeClock:
    posix: float = NOW

    def now(self) -> float:
        return self.posix


def make_row(player_id: str, session_id: str, **more: Any) -> SessionRow:
    fields: dict[str, Any] = {
        "start": 1,
        "mail_from": 0,
        "seen": 0,
        "lost": 0,
        "state": "offline",
        "told": "absent",
        "owed": "",
        "created_at": NOW - 100,
        "last_online": NOW - 50,
    }
    return SessionRow(player_id=player_id, session_id=session_id, **(fields | more))


@define(eq=False)
class FakeLink:
    unsent: int = 0
    closed: bool = False


@define(eq=False)
class FakeConnection:
    id: str
    transport: str
    session: FakeSession
    opened: float
    opened_at: float = NOW - 10
    address: str = "127.0.0.1"
    written: int = 0
    acknowledged: int = 0
    behind: int = 0
    replaced: Replaced = field(factory=Replaced)
    waiting_for: str | None = None
    last_activity: float = NOW - 1
    why: str | None = None
    starts_after: int = 0
    late_writes: Timeline = field(factory=Timeline)
    acknowledgements: Timeline = field(factory=Timeline)
    waiting_replies: int = 0
    over: Close | None = None
    link: FakeLink = field(factory=lambda: FakeLink())

    @property
    def healthy(self) -> bool:
        return self.why is None

    @property
    def player_id(self) -> str:
        return self.session.player_id

    @property
    def session_id(self) -> str:
        return self.session.session_id


@define(eq=False)
class FakeSession:
    row: SessionRow
    state: State = State.LINKDEAD
    seen: int = 0
    channels: dict[str, int] = field(factory=dict)
    connections: dict[str, FakeConnection] = field(factory=dict)
    deliveries: Deliveries = field(factory=lambda: Deliveries(0))
    nursery: trio.Nursery | None = None
    finished: trio.Event = field(factory=trio.Event)
    over: bool = False
    log: Log | None = None
    arriving: int = 0
    waiting_commands: int = 0
    running_handler: bool = False
    running_timers: int = 0
    sightings: Timeline = field(factory=Timeline)

    @property
    def player_id(self) -> str:
        return self.row.player_id

    @property
    def session_id(self) -> str:
        return self.row.session_id

    @property
    def created_at(self) -> float:
        return self.row.created_at


@define
class FakeStorage:
    trouble: str | None = None
    last_commit_ms: float | None = 0.5
    commits: int = 7
    writing_seconds: float = 0.0
    error: str | None = None
    """Why nothing can be read."""
    hangs: bool = False
    bytes_in_use: int = 1000
    rows: dict[str, SessionRow] = field(factory=dict)
    messages: dict[str, StoredMessage] = field(factory=dict)
    expired: dict[str, Expired] = field(factory=dict)
    receiving: list[SessionRow] = field(factory=list)
    asked_figures: int = 0

    async def _look(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.hangs:
            await trio.sleep_forever()
        if self.error is not None:
            raise StoreError(self.error)

    async def figures(self) -> dict[str, Any]:
        await self._look()
        self.asked_figures += 1
        return {"driver": "sqlite3", "bytes_in_use": self.bytes_in_use}

    async def current_session(self, player_id: str) -> SessionRow | None:
        await self._look()
        return self.rows.get(player_id)

    async def read(self, player_id: str, session_id: str, after: int, upto: int, limit: int) -> Chunk:
        await self._look()
        found = [m for m in self.messages.values() if after < m.seq <= upto and m.target == "@" + player_id]
        return Chunk(found[:limit], upto)

    async def find_message(self, message_id: str) -> StoredMessage | None:
        await self._look()
        return self.messages.get(message_id)

    async def find_expired(self, message_id: str) -> Expired | None:
        await self._look()
        return self.expired.get(message_id)

    async def receivers(self, message: StoredMessage, limit: int) -> tuple[list[SessionRow], int]:
        await self._look()
        return self.receiving[:limit], len(self.receiving)


@define
class FakeDispatcher:
    queued: int = 0
    capacity: int = 4096
    rounds: Timeline = field(factory=lambda: Timeline(4))


@define
class FakeChecker:
    last_round: float = field(factory=trio.current_time)


class FakeMachine(Machine):
    """A machine that is as well as it is told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.percent = 40.0
        self.free_bytes = 50 << 30

    def memory(self) -> Memory:
        return Memory(self.percent, 60 << 20, 5 << 30, 8 << 30)

    def disk(self, path: object) -> Disk:
        return Disk("/data", self.free_bytes, 100 << 30)


@define
class FakeRegistrar:
    """Writes down what it is asked to do."""

    asked: list[tuple[Any, ...]] = field(factory=list)
    refusal: Refusal | None = None
    crash: Exception | None = None

    async def _ask(self, *what: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.asked.append(what)
        if self.refusal is not None:
            raise self.refusal
        if self.crash is not None:
            raise self.crash

    async def switch(self, player_id: str, session_id: str | None) -> SwitchResult:
        await self._ask("switch", player_id, session_id)
        return SwitchResult(session_id or "made-up", "before", 2)

    async def end(self, player_id: str) -> int:
        await self._ask("end", player_id)
        if player_id == "nobody":
            raise Refusal(ErrorType.SESSION, "player 'nobody' has no session", status=404)
        return 2

    def disconnect(self, player_id: str, connection_id: str) -> bool:
        self.asked.append(("disconnect", player_id, connection_id))
        return connection_id == "c1"

    async def subscriptions(
        self, player_id: str, session_id: str | None, subscribe: list[str], unsubscribe: list[str]
    ) -> Position:
        await self._ask("subscriptions", player_id, session_id, subscribe, unsubscribe)
        return Position(3, 42)


class Stand:
    """All of it together. Make it inside of a Trio run; the hub starts at epoch 3, number 100."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings(server_id="node-1")
        self.clock = FakeClock()
        self.storage = FakeStorage()
        self.hub = Hub(cast(Any, self.storage), self.settings.server_id)
        self.hub.epoch = 3
        self.hub.newest = 100
        self.dispatcher = FakeDispatcher()
        self.checker = FakeChecker()
        self.statistics = Statistics()
        self.machine = FakeMachine()
        self.ledger = Ledger(self.hub)
        self.monitor = Monitor(
            self.hub,
            cast(Any, self.dispatcher),
            cast(Any, self.checker),
            cast(Any, self.storage),
            self.statistics,
            self.settings,
            self.clock,
            self.ledger,
            self.machine,
        )

    def session(self, player_id: str, session_id: str = "s1", *, state: State = State.LINKDEAD) -> FakeSession:
        """A live session without connections."""
        session = FakeSession(make_row(player_id, session_id), state)
        self.storage.rows[player_id] = session.row
        self.hub.add(cast(Any, session))
        return session

    def connect(self, session: FakeSession, connection_id: str, transport: str, **more: Any) -> FakeConnection:
        connection = FakeConnection(connection_id, transport, session, trio.current_time(), **more)
        session.state = State.ONLINE
        session.connections[connection_id] = connection
        self.hub.connections[connection_id] = cast(Any, connection)
        return connection

    def message(self, message_id: str, seq: int, target: str, *receivers: SessionRow) -> None:
        """A stored message, and the sessions that it is for."""
        body = b'{"id":"%b","type":"test","content":1,"timestamp":"2023-11-14T22:13:19.000Z"}' % message_id.encode()
        self.storage.messages[message_id] = StoredMessage(seq, message_id, target, body, NOW - 1)
        self.storage.receiving = list(receivers)
        self.hub.newest = max(self.hub.newest, seq)
