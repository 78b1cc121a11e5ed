"""What the server holds in memory: live sessions, who listens to which channel, open connections.

Everything here is plain and synchronous: a change is whole before another task can see it. Committed
transactions are applied in the order of their numbers (`apply`), by the dispatcher alone, so what is
live is the stream that the store would replay.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, Final

from attrs import define

from mythos_trio.core import names
from mythos_trio.core.backlog import Replaced
from mythos_trio.core.data import PLAYER, Data
from mythos_trio.core.log import Log, Topic
from mythos_trio.core.session import State
from mythos_trio.core.timeline import Timeline
from mythos_trio.core.transaction import (
    Append,
    Committed,
    PresenceMark,
    SetTimer,
    Subscribe,
    TimerChange,
    Transaction,
    Unsubscribe,
)
from mythos_trio.core.wire import Message
from mythos_trio.rounds import Cohorts, Fresh
from mythos_trio.storage import ConnectionRow, Notes, Storage

if TYPE_CHECKING:
    from mythos_trio.connection import Connection
    from mythos_trio.core.position import Epochs
    from mythos_trio.dispatcher import Submission
    from mythos_trio.session import LiveSession
    from mythos_trio.storage import Recovered
    from mythos_trio.timers import TimerClock


# Of a session; and of so many sessions. About 1 KiB each at most, a fifth of that as a rule.
MAX_DEPARTED: Final = 4
MAX_DEPARTED_SESSIONS: Final = 10_000


# Not frozen: each connection leaves one, and to set an attribute of a frozen one costs three times as much.
@define(eq=False)
class Departed:
    """What is remembered of a connection that is over. *closed_at*: POSIX seconds; the rest as there."""

    id: str
    player_id: str
    session_id: str
    transport: str
    starts_after: int
    written: int
    acknowledged: int
    late_writes: Timeline
    acknowledgements: Timeline
    replaced: Replaced
    closed_at: float
    reason: str


# Rows of connections that wait to be removed while the store cannot be written. Those beyond it stay until the next
# start, which removes all before it lets anybody in.
MAX_CLOSED: Final = 100_000


class Hub:
    """*newest*: the newest number that is applied; all that is handed to clients is up to it."""

    def __init__(self, storage: Storage, server_id: str) -> None:
        self.storage = storage
        self.server_id = server_id
        self.sessions: dict[str, LiveSession] = {}
        self.channels: dict[str, dict[LiveSession, None]] = {}
        self.connections: dict[str, Connection] = {}
        self.stuck: list[LiveSession] = []
        self.newest = 0
        self.epochs: Epochs | None = None
        self.epoch = 0
        # What everybody hears, and what those in a channel do; a channel is here as long as it has listeners.
        self.everyone = Topic()
        self.topics: dict[str, Topic] = {}
        # Connections that keep up, and those that each round has to look at, in the order in which they fell behind.
        self.cohorts = Cohorts()
        self.apart: dict[Connection, None] = {}
        # What the next round writes.
        self.fresh = Fresh()
        self.data: Data[Submission] = Data()
        self.timers: dict[str, dict[str, SetTimer]] = {}
        # Who lets an owner's timers run: live sessions, and the world's.
        self.clocks: dict[str, TimerClock] = {}
        self._marks: dict[str, dict[str, int]] = {}
        self._opened: dict[str, ConnectionRow] = {}
        self._closed: list[str] = []
        self._last_online: dict[tuple[str, str], float] = {}
        self._presence: dict[tuple[str, str], tuple[PresenceMark, float]] = {}
        self.departed: OrderedDict[tuple[str, str], tuple[Departed, ...]] = OrderedDict()
        """The newest connections that are over, by player and session. (A deque takes 760 bytes whatever is in it.)"""

    def start(self, recovered: Recovered) -> None:
        """Take over what the store was recovered to."""
        self.epochs = recovered.epochs
        self.epoch = recovered.epochs.present
        self.newest = recovered.newest
        self.cohorts.move(self.newest)
        self.data.load(recovered.values)
        for timer in recovered.timers:
            self.timers.setdefault(timer.owner, {})[timer.name] = timer

    # Sessions.

    def add(self, session: LiveSession) -> None:
        self.sessions[session.player_id] = session
        for channel in session.channels:
            self._enter(session, channel)

    def remove(self, session: LiveSession) -> None:
        """Forget a session that is over; another one of the player is not touched."""
        if self.sessions.get(session.player_id) is session:
            del self.sessions[session.player_id]
        for channel in session.channels:
            self._leave(session, channel)

    def live(self, player_id: str, session_id: str) -> LiveSession | None:
        session = self.sessions.get(player_id)
        return session if session is not None and session.session_id == session_id else None

    # Committed transactions.

    def apply(self, transaction: Transaction, outcome: Committed) -> tuple[list[Message], list[int]]:
        """Make a committed transaction true in memory.

        :returns: its new messages, and for every effect the number of connections that it is, or
            will be, written to.
        """
        messages: list[Message] = []
        connections: list[int] = []
        for index, (effect, seq) in enumerate(zip(transaction.effects, outcome.seqs, strict=True)):
            count = 0
            match effect:
                case Append():
                    message = None
                    if index not in outcome.duplicates:
                        message = Message(seq, effect.id, effect.target, effect.body)
                        messages.append(message)
                    count = self._append(effect.target, message)
                case Subscribe():
                    self._subscribe(effect, seq)
                case Unsubscribe():
                    session = self.live(effect.player_id, effect.session_id)
                    if session is not None and session.channels.pop(effect.channel, None) is not None:
                        self._leave(session, effect.channel)
            connections.append(count)
        self.newest = max(self.newest, outcome.last)
        self.data.stored(transaction.writes)
        if transaction.fired is not None:
            self._drop_timer(transaction.fired)
        for change in transaction.timers:
            self._change_timer(change)
        return messages, connections

    # Timers: those of all players and of the world, as stored.

    def _drop_timer(self, timer: SetTimer) -> None:
        mine = self.timers.get(timer.owner, {})
        known = mine.get(timer.name)
        if known is not None and known.id == timer.id:
            del mine[timer.name]
            if not mine:
                del self.timers[timer.owner]

    def _change_timer(self, change: TimerChange) -> None:
        mine = self.timers.get(change.owner, {})
        if isinstance(change, SetTimer):
            self.timers.setdefault(change.owner, {})[change.name] = change
        elif mine.pop(change.name, None) is not None and not mine:
            del self.timers[change.owner]
        clock = self.clocks.get(change.owner)
        if clock is not None:
            clock.changed(change.name)
        elif change.owner.startswith(PLAYER) and change.owner in self.timers:
            session = self.sessions.get(change.owner.removeprefix(PLAYER))
            if session is not None:
                session.open_clock()

    def _append(self, target: str, message: Message | None) -> int:
        """Let the next round write *message*, and all logs have it when somebody looks into them. None: it has been
        written before.

        :returns: how many connections *target* has.
        """
        if target.startswith("@"):
            session = self.sessions.get(target[1:])
            if session is None:
                return 0
            if message is not None:
                self.fresh.add(message, (session,))
                session.is_told(message)
            return len(session.connections)
        if target == names.EVERYONE:
            if message is not None:
                self.everyone.append(message)
                self.fresh.everyone.append(message)
            return len(self.connections)
        listeners = self.channels.get(target[1:], {})
        if message is not None and listeners:
            self.fresh.add(message, listeners)
            self.topics[target[1:]].append(message)
        return sum([len(session.connections) for session in listeners])

    def _subscribe(self, effect: Subscribe, seq: int) -> None:
        session = self.live(effect.player_id, effect.session_id)
        if session is not None and effect.channel not in session.channels:
            session.channels[effect.channel] = seq
            self._enter(session, effect.channel)

    def _enter(self, session: LiveSession, channel: str) -> None:
        self.channels.setdefault(channel, {})[session] = None
        topic = self.topics.setdefault(channel, Topic())
        if session.log is not None:
            session.log.hear(topic)
        session.rest = None

    def _leave(self, session: LiveSession, channel: str) -> None:
        listeners = self.channels.get(channel)
        if listeners is not None:
            if session.log is not None:
                session.log.stop_hearing(self.topics[channel])
            session.rest = None
            listeners.pop(session, None)
            if not listeners:
                del self.channels[channel], self.topics[channel]

    def begin_log(self, session: LiveSession, floor: int) -> Log:
        """A log for a session whose stream has nothing between *floor* and the newest number."""
        log = Log(floor)
        log.hear(self.everyone)
        for channel in session.channels:
            log.hear(self.topics[channel])
        return log

    # What handlers and operators see.

    def presence(self, player_id: str) -> str:
        session = self.sessions.get(player_id)
        return State.OFFLINE.value if session is None else session.state.value

    def present(self) -> list[str]:
        """Players who are online or link-dead, in alphabetical order."""
        return sorted(self.sessions)

    def subscribers(self, channel: str) -> list[str]:
        return sorted(session.player_id for session in self.channels.get(channel, ()))

    # What is written behind.

    def mark(self, player_id: str, session_id: str, seen: int) -> None:
        self._marks.setdefault(player_id, {})[session_id] = seen

    def marked(self, player_id: str, session_id: str | None = None) -> int:
        """The mark that is not stored yet, of one or of any session of the player; 0 if there is none."""
        marks = self._marks.get(player_id, {})
        return max(marks.values(), default=0) if session_id is None else marks.get(session_id, 0)

    def note_presence(self, mark: PresenceMark, now: float) -> None:
        """A change of presence with which nothing is owed, neither before it nor after."""
        self._presence[mark.player_id, mark.session_id] = mark, now

    def drop_presence(self, player_id: str, session_id: str) -> None:
        """A transaction is about to say something newer."""
        self._presence.pop((player_id, session_id), None)

    def note_opened(self, row: ConnectionRow) -> None:
        self._opened[row.connection_id] = row

    def note_closed(self, connection: Connection, now: float) -> None:
        if self._opened.pop(connection.id, None) is None and len(self._closed) < MAX_CLOSED:
            self._closed.append(connection.id)
        self._last_online[connection.player_id, connection.session_id] = now
        self._remember(connection, now)

    def _remember(self, connection: Connection, now: float) -> None:
        """What it has carried, for whoever asks what became of a message."""
        close = connection.over or connection.link.ended
        gone = Departed(
            id=connection.id,
            player_id=connection.player_id,
            session_id=connection.session_id,
            transport=connection.transport,
            starts_after=connection.starts_after,
            written=connection.written,
            acknowledged=connection.acknowledged,
            late_writes=connection.late_writes,
            acknowledgements=connection.acknowledgements,
            replaced=connection.replaced,
            closed_at=now,
            reason="lost" if close is None else close.reason,
        )
        key = connection.player_id, connection.session_id
        earlier = self.departed.pop(key, ())
        self.departed[key] = (*earlier[1 - MAX_DEPARTED :], gone)
        if len(self.departed) > MAX_DEPARTED_SESSIONS:
            self.departed.popitem(last=False)

    @property
    def waiting_notes(self) -> int:
        """How much has gathered to be written behind."""
        marks = sum(map(len, self._marks.values()))
        return marks + len(self._opened) + len(self._closed) + len(self._last_online) + len(self._presence)

    def notes(self, limit: int) -> Notes | None:
        """What has gathered first to be written behind, of each kind *limit* at most; None if nothing has."""
        if not (self._marks or self._opened or self._closed or self._last_online or self._presence):
            return None
        marks = (
            ((player_id, session_id), mark)
            for player_id, marks in self._marks.items()
            for session_id, mark in marks.items()
        )
        return Notes(
            dict(islice(marks, limit)),
            tuple(islice(self._opened.values(), limit)),
            tuple(self._closed[:limit]),
            dict(islice(self._last_online.items(), limit)),
            dict(islice(self._presence.items(), limit)),
        )

    def noted(self, notes: Notes) -> None:
        """*notes* are stored: forget them, but not what has changed since."""
        for (player_id, session_id), seen in notes.seen.items():
            marks = self._marks.get(player_id, {})
            if marks.get(session_id) == seen:
                del marks[session_id]
                if not marks:
                    del self._marks[player_id]
        for row in notes.opened:
            if self._opened.pop(row.connection_id, None) is None:
                self._closed.append(row.connection_id)  # it has been closed while it was being stored
        del self._closed[: len(notes.closed)]
        for key, at in notes.last_online.items():
            if self._last_online.get(key) == at:
                del self._last_online[key]
        for key, noted in notes.presence.items():
            if self._presence.get(key) is noted:
                del self._presence[key]
