"""The registrar: who is in which session. It serialises all changes of one player.

There is at most one change of a player at a time (`_changes`); who needs another one, or only wants to join,
waits for it. Every wait has a deadline, after which the asker is told to try again (4009).

Most changes are an admission: a connection comes, and no session of its player lives. The current one goes on, or the
first one begins, in one trip through the writer (`core.transaction.Admit`), and the session lives from the moment in
which that is applied. All others (switch, end, expire, and what the store would not admit) run as a task of the
registrar's own nursery. Neither is a matter of who asked for it: a client that goes away in the middle of a switch
leaves no half of it behind.

The order of a switch is what keeps two sessions of a player apart: the old one's connections are told,
its nursery is cancelled *and awaited*, one commit ends it and begins the new one, and only then does the
new one exist.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from attrs import define, evolve, field, frozen

from mythos_trio import logs
from mythos_trio.bell import Once
from mythos_trio.core.errors import BUSY, REMOVED, REPLACED, Close, ErrorType, Refusal, busy
from mythos_trio.core.position import Position
from mythos_trio.core.session import Admission, Owed, Presence, State, Told, admission, parse_presence
from mythos_trio.core.transaction import (
    Admit,
    Begin,
    Committed,
    Effect,
    End,
    Outcome,
    PresenceMark,
    Refused,
    Subscribe,
    Transaction,
    Unsubscribe,
)
from mythos_trio.delays import Delays
from mythos_trio.dispatcher import Submission, raise_if_refused
from mythos_trio.handlers import Context, LeaveOwed, draining, pay_leave
from mythos_trio.session import LiveSession, Why
from mythos_trio.storage import SessionRow, StoreError
from mythos_trio.turns import Turns

if TYPE_CHECKING:
    from mythos_trio.hub import Hub

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

log = logs.get("session")

JOIN_SECONDS: Final = 10.0
END_SECONDS: Final = 5.0
COMMIT_SECONDS: Final = 5.0
# With a commit that takes longer than this the store is first asked by reading: joining needs no write.
SLOW_SECONDS: Final = 0.5
# A browser's own reconnect after its player was removed is turned away for this long.
REMOVED_SECONDS: Final = 60.0
CRASHES_A_MINUTE: Final = 3
MAX_REMEMBERED: Final = 10_000


@define(eq=False)
class _Change:
    """A change of one player that is under way."""

    done: Once = field(factory=Once)
    answered: Once = field(factory=Once)
    """Set with *done*, or with *late*."""
    late: bool = False
    """It takes too long: who waits is told to try again; it goes on by itself."""
    error: Refusal | None = None
    result: object = None
    transaction: Transaction | None = None
    """Of an admission."""

    def tell_late(self) -> None:
        self.late = True
        self.answered.set()

    def check(self) -> None:
        """After the wait for *answered*: raise why it came to nothing, or that it has not come to its end."""
        if self.error is not None:
            raise self.error
        if self.late and not self.done.is_set():
            raise busy("the store is slow: try again")


@frozen
class SwitchResult:
    session_id: str
    previous_session_id: str | None
    connections: int
    """How many connections of the previous session were told."""


class Registrar:
    """See the module's docstring. `run` is its nursery."""

    def __init__(self, context: Context, turns: Turns) -> None:
        self._context = context
        self._lines = logs.Gathered(log, turns.at_end)
        self._arrival = Presence(Told.ABSENT, (Owed.JOIN,)).without(context.unheard)
        """What is owed when a session begins with a connection."""
        self._changes: dict[str, _Change] = {}
        self._crashes: OrderedDict[str, deque[float]] = OrderedDict()
        self._removed: OrderedDict[str, float] = OrderedDict()
        # Sessions that were begun by POST, to what they replaced: told to who connects first.
        self._replaced: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._nursery: trio.Nursery | None = None
        # The last `on_leave` that is being run for a player: the next one, and the handlers of the
        # player's next session, come after it.
        self._leaving: dict[str, trio.Event] = {}
        self._patience: Delays[_Change] = Delays(COMMIT_SECONDS, self._give_up)
        context.switch = self._switch_for_handler

    @property
    def _is_over(self) -> bool:
        """Whether nothing can be started any more: the server is stopping, hard, or something has crashed."""
        return self._nursery is None or self._nursery.cancel_scope.cancel_called

    @property
    def _hub(self) -> Hub:
        return self._context.hub

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Owns every session's task and every change. Runs until it is cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._patience.run()

    # Asking.

    async def join(self, player_id: str, wanted: str | None) -> LiveSession:
        """The player's live session: the current one, or a new one, as *wanted* says.

        It `accepts` connections as long as the caller does not wait. Raises a refusal with the close code to tell.
        """
        session = self.joinable(player_id, wanted)
        if session is None and not self._is_here(player_id) and self._store_is_quick():
            # The usual way in: one commit, which has its own deadline.
            await self._admit(player_id, wanted)
            session = self.joinable(player_id, wanted)
        return await self._join_in_turn(player_id, wanted) if session is None else session

    def joinable(self, player_id: str, wanted: str | None) -> LiveSession | None:
        """The player's live session if it can be joined in this moment; raises a refusal if none can be."""
        if self._context.draining:
            raise draining()
        self._refuse_if_crashing(player_id)
        session = self._hub.sessions.get(player_id)
        if session is None or player_id in self._changes or wanted not in (None, session.session_id):
            return None
        return session if session.accepts else None

    def admit(self, player_id: str, wanted: str | None, then: Callable[[Callable[[], None]], None]) -> bool:
        """Have the player's current session go on, or the first one begin, in the writer's next commit.

        *then* is called when that is done, or has come to nothing, or takes too long, with a function that raises the
        refusal if there is one. It must not raise. False: this is not the way in just now.
        """
        if self._is_here(player_id) or not self._store_is_quick() or not self._context.dispatcher.has_room:
            return False
        change = self._begin_change(player_id)
        self._submit_admission(player_id, wanted, change)
        change.answered.then(partial(then, change.check))
        return True

    def _is_here(self, player_id: str) -> bool:
        return player_id in self._hub.sessions or player_id in self._changes

    async def _join_in_turn(self, player_id: str, wanted: str | None) -> LiveSession:
        """After what has to come first: a change that is under way, the end of a session, a switch."""
        with trio.move_on_after(JOIN_SECONDS):
            while (joinable := self.joinable(player_id, wanted)) is None:
                session = self._hub.sessions.get(player_id)
                if player_id in self._changes:
                    await self._wait_change(player_id)
                elif session is not None and session.over:
                    await self._wait_finished(session)
                elif session is not None and wanted in (None, session.session_id):
                    await (self._wait_finished(session) if session.ready.is_set() else session.ready.wait())
                elif session is None and self._store_is_quick():
                    await self._admit(player_id, wanted)
                else:
                    await self._change(player_id, partial(self._let_in, player_id, wanted, None))
            return joinable
        raise busy("the player's session is being changed: try again")

    async def switch(self, player_id: str, session_id: str | None) -> SwitchResult:
        """Begin a new session, ending the one before it if there is one."""
        result = await self._change_when_free(player_id, partial(self._switch_to, player_id, session_id))
        assert isinstance(result, SwitchResult)
        return result

    async def end(self, player_id: str) -> int:
        """Remove the player's session; how many connections were closed. 404 if there is none."""
        result = await self._change_when_free(player_id, partial(self._remove, player_id))
        assert isinstance(result, int)
        return result

    async def expire(self, player_id: str, session_id: str) -> bool:
        """End a session that has been offline for too long; False if it no longer is."""
        if player_id in self._changes or player_id in self._hub.sessions or self._context.draining:
            return False
        return bool(await self._change(player_id, partial(self._expire, player_id, session_id)))

    def disconnect(self, player_id: str, connection_id: str) -> bool:
        """End one connection, as the operator; False if there is none such."""
        connection = self._hub.connections.get(connection_id)
        if connection is None or connection.player_id != player_id:
            return False
        connection.end(REMOVED, by="operator")
        return True

    async def subscriptions(
        self, player_id: str, session_id: str | None, subscribe: Sequence[str], unsubscribe: Sequence[str]
    ) -> Position:
        """Change the subscriptions of the player's current session, live or not."""
        result = await self._change_when_free(
            player_id, partial(self._change_subscriptions, player_id, session_id, subscribe, unsubscribe)
        )
        assert isinstance(result, int)
        return Position(self._hub.epoch, result)

    def was_removed(self, player_id: str) -> bool:
        """Whether the operator has removed the player within the last minute."""
        at = self._removed.get(player_id)
        return at is not None and trio.current_time() - at < REMOVED_SECONDS

    @property
    def changes(self) -> int:
        """How many changes are under way."""
        return len(self._changes)

    def is_changing(self, player_id: str) -> bool:
        """Whether a change of the player's session is under way."""
        return player_id in self._changes

    async def current(self, player_id: str) -> SessionRow | None:
        """The player's current session as a row, live or not."""
        session = self._hub.sessions.get(player_id)
        if session is not None:
            return session.snapshot(session.state)
        return await _reading(self._hub.storage.current_session(player_id))

    def recover(self, rows: Sequence[SessionRow]) -> None:
        """After a start: what was online or link-dead is link-dead with a full grace; what is owed is run."""
        for row in rows:
            if row.ended_at is None and row.state in (State.ONLINE, State.LINKDEAD):
                self._begin_living(LiveSession(row, self._context, complete=False))
                self._context.statistics.session("recovered")
                log.info(
                    f"Recovered session {row.session_id} for player {row.player_id}",
                    player_id=row.player_id,
                    session_id=row.session_id,
                )
            elif row.owed:
                state = State.OFFLINE if row.ended_at is None else State.ENDED
                self._pay_leave(LeaveOwed(row, row.end_reason or "linkdead", state))

    # Changes, one at a time for each player.

    async def _wait_change(self, player_id: str) -> None:
        change = self._changes[player_id]
        await change.answered.wait()
        if change.late and not change.done.is_set():
            raise busy("the player's session is being changed, and the store is slow: try again")

    async def _wait_finished(self, session: LiveSession) -> None:
        with trio.move_on_after(END_SECONDS):
            await session.gone.wait()
            return
        raise busy("the player's former session has not ended yet: try again")

    async def _change_when_free(self, player_id: str, act: Callable[[_Change], Awaitable[object]]) -> object:
        with trio.move_on_after(JOIN_SECONDS):
            while True:
                if self._context.draining:
                    raise draining()
                session = self._hub.sessions.get(player_id)
                if player_id in self._changes:
                    await self._wait_change(player_id)
                elif session is not None and session.over:
                    await self._wait_finished(session)
                else:
                    return await self._change(player_id, act)
        raise busy("the player's session is being changed: try again")

    async def _change(self, player_id: str, act: Callable[[_Change], Awaitable[object]]) -> object:
        """Run *act* as the player's one change and wait for it."""
        change = self._begin_change(player_id)
        self._start(self._run_change, player_id, change, act)
        await change.answered.wait()
        change.check()
        return change.result

    def _begin_change(self, player_id: str) -> _Change:
        if self._is_over:
            # Something in it has crashed. Who waits would begin one change after the other, and the nursery, and
            # with it the process, could never end.
            raise draining()
        change = self._changes[player_id] = _Change()
        return change

    def _end_change(self, player_id: str, change: _Change) -> None:
        del self._changes[player_id]
        self._patience.end(change)
        change.done.set()
        change.answered.set()

    async def _run_change(self, player_id: str, change: _Change, act: Callable[[_Change], Awaitable[object]]) -> None:
        try:
            change.result = await act(change)
        except Refusal as refusal:
            change.error = refusal
        finally:
            self._end_change(player_id, change)

    def _start(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        if self._nursery is None:
            raise RuntimeError("the registrar does not run")
        self._nursery.start_soon(function, *args)

    # Admissions.

    def _store_is_quick(self) -> bool:
        """Whether the writer is the shortest way. In trouble it is asked last: joining a session needs no write."""
        storage = self._hub.storage
        return storage.trouble is None and storage.writing_seconds < SLOW_SECONDS

    async def _admit(self, player_id: str, wanted: str | None) -> None:
        """Let the current session go on, or begin the first one, in one trip through the writer."""
        change = self._begin_change(player_id)
        try:
            await self._context.dispatcher.wait_room()
            self._submit_admission(player_id, wanted, change)
        except BaseException:
            self._end_change(player_id, change)
            raise
        try:
            await change.answered.wait()
        finally:
            self._give_up(change)
        change.check()

    def _submit_admission(self, player_id: str, wanted: str | None, change: _Change) -> None:
        change.transaction = Transaction(admit=self._new_admit(player_id, wanted))
        self._context.dispatcher.submit_nowait(change.transaction, partial(self._admitted, change))
        self._patience.begin(change)

    def _give_up(self, change: _Change) -> None:
        """Nobody waits for an admission any more: it is taken back, if the writer has not begun with it."""
        self._patience.end(change)
        # When it is done, `answered` is the session's `ready`, and only the session may say that.
        if change.transaction is not None and not change.answered.is_set() and not change.done.is_set():
            change.transaction.abandoned = True
            change.tell_late()

    def _new_admit(self, player_id: str, wanted: str | None) -> Admit:
        presence = self._arrival
        return Admit(
            player_id,
            wanted,
            self._context.randomness.token(),
            self._hub.marked(player_id),
            presence.told.value,
            presence.owed_text,
        )

    def _admitted(self, change: _Change, submission: Submission) -> None:
        """The dispatcher has applied an admission, or the store has refused it. Nothing here waits."""
        admit, outcome = submission.transaction.admit, submission.outcome
        assert admit is not None  # for the type checker: `_admit` has made it
        if self._is_over:
            change.error = draining()
            self._end_change(admit.player_id, change)
        elif isinstance(outcome, Committed) and outcome.session is not None:
            self._enter(outcome.session, outcome, change)
        elif isinstance(outcome, Refused) and outcome.session is not None:
            change.error = ended(outcome.session)
            self._end_change(admit.player_id, change)
        elif submission.transaction.abandoned:
            self._end_change(admit.player_id, change)
        else:
            # Another session is current, or the store cannot be written.
            act = partial(self._let_in, admit.player_id, admit.wanted, outcome)
            self._start(self._run_change, admit.player_id, change, act)

    def _enter(self, row: SessionRow, outcome: Committed, change: _Change) -> None:
        """A session that was admitted lives from now on."""
        begun = outcome.begun
        previous = None if begun else self._replaced.pop((row.player_id, row.session_id), None)
        session = LiveSession(row, self._context, complete=begun, previous=previous)
        if not outcome.mail:
            session.begin_rest(row.mail_from)
        if not change.late:
            # Who has asked is woken when connections can be taken, and not before.
            session.ready = change.answered
        del self._changes[row.player_id]
        self._patience.end(change)
        change.done.set()
        self._begin_living(session)
        if begun:
            self._tell_begun(row)

    def _tell_begun(self, row: SessionRow) -> None:
        self._context.statistics.session("created")
        self._lines.info(
            "Session begun after session validation: the player had none",
            {"player_id": row.player_id, "session_id": row.session_id},
        )

    # The other changes.

    async def _let_in(self, player_id: str, wanted: str | None, refused: Outcome | None, change: _Change) -> None:
        """Let a connection in where a session has to be replaced, or the store may not be written.

        :param refused: what became of the admission, if there was one.
        """
        live = self._hub.sessions.get(player_id)
        row = live.row if live else await _reading(self._hub.storage.current_session(player_id))
        over = await self._find_ended(player_id, wanted, row)
        verdict = admission(wanted, None if row is None else row.session_id, ended=over is not None)
        if over is not None and verdict is Admission.ENDED:
            raise ended(over)
        new_id = wanted or self._context.randomness.token()
        if row is None:
            if refused is not None:
                _stored(refused)  # what has kept the writer from it would keep it from this
            await self._begin(player_id, new_id, change)
        elif verdict is Admission.SWITCH:
            await self._replace(row, live, new_id, change, with_connection=True)
        elif live is None:
            previous = self._replaced.pop((player_id, row.session_id), None)
            self._begin_living(LiveSession(row, self._context, complete=False, previous=previous))

    async def _find_ended(self, player_id: str, wanted: str | None, current: SessionRow | None) -> SessionRow | None:
        """The session of the id that is wanted, if it has ended: an id that has ended never begins again."""
        if wanted is None or (current is not None and current.session_id == wanted):
            return None
        found = await _reading(self._hub.storage.find_session(player_id, wanted))
        return None if found is None or found.ended_at is None else found

    async def _begin(self, player_id: str, session_id: str, change: _Change) -> None:
        """The player's first session, or the first after the last one was removed or expired."""
        mail_from = await self._mail_from(player_id)
        presence = self._arrival
        transaction = Transaction(
            effects=[Begin(player_id, session_id, mail_from)],
            presence=[_mark(player_id, session_id, State.ONLINE, presence)],
        )
        outcome = await self._commit(transaction, change)
        row = self._new_row(player_id, session_id, outcome.seqs[-1], mail_from, presence)
        self._begin_living(LiveSession(row, self._context, complete=True))
        self._tell_begun(row)

    async def _switch_to(self, player_id: str, wanted: str | None, change: _Change) -> SwitchResult:
        """POST …/session: a new session, offline until somebody connects."""
        live = self._hub.sessions.get(player_id)
        row = live.row if live else await _reading(self._hub.storage.current_session(player_id))
        if row is not None and wanted == row.session_id:
            log.info(f"Player {player_id} already in session {wanted}", player_id=player_id, session_id=wanted)
            return SwitchResult(wanted, wanted, 0)
        if (over := await self._find_ended(player_id, wanted, row)) is not None:
            raise ended(over)
        new_id = wanted or self._context.randomness.token()
        if row is not None:
            count = await self._replace(row, live, new_id, change, with_connection=False)
            return SwitchResult(new_id, row.session_id, count)
        mail_from = await self._mail_from(player_id)
        mark = _mark(player_id, new_id, State.OFFLINE, Presence())
        await self._commit(Transaction(effects=[Begin(player_id, new_id, mail_from)], presence=[mark]), change)
        self._context.statistics.session("created")
        return SwitchResult(new_id, None, 0)

    async def _replace(
        self, row: SessionRow, live: LiveSession | None, new_id: str, change: _Change, *, with_connection: bool
    ) -> int:
        """End *row*'s session and begin *new_id*, in one commit; how many connections were told."""
        player_id = row.player_id
        count = 0
        if live is not None:
            count = len(live.connections)
            row = await self._stop(live, change, REPLACED, by="server", reason="switched")
        seen = max(row.seen, self._hub.marked(player_id, row.session_id))
        presence = self._arrival if with_connection else Presence()
        state = State.ONLINE if with_connection else State.OFFLINE
        leave = parse_presence(row.told, row.owed).left().without(self._context.unheard)
        transaction = Transaction(
            effects=[End(player_id, row.session_id, "switched"), Begin(player_id, new_id, seen)],
            presence=[
                _mark(player_id, row.session_id, State.ENDED, leave),
                _mark(player_id, new_id, state, presence),
            ],
        )
        try:
            outcome = await self._commit(transaction, change)
        except Refusal:
            self._stay(live)
            raise
        if live is not None:
            self._hub.remove(live)
        owed = evolve(row, told=leave.told.value, owed=leave.owed_text)
        if with_connection:
            fresh = self._new_row(player_id, new_id, outcome.seqs[-1], seen, presence)
            self._pay_leave(LeaveOwed(owed, "switched"))
            self._begin_living(LiveSession(fresh, self._context, complete=True, previous=row.session_id))
        else:
            self._pay_leave(LeaveOwed(owed, "switched"))
            _remember(self._replaced, (player_id, new_id), row.session_id)
        self._context.statistics.session("replaced")
        log.info(
            f"Player {player_id} switched from {row.session_id} to {new_id}",
            player_id=player_id,
            session_id=new_id,
            previous_session_id=row.session_id,
        )
        return count

    async def _remove(self, player_id: str, change: _Change) -> int:
        """The operator's DELETE."""
        live = self._hub.sessions.get(player_id)
        row = live.row if live else await _reading(self._hub.storage.current_session(player_id))
        if row is None:
            raise Refusal(ErrorType.SESSION, f"player {player_id!r} has no session", status=404)
        count = len(live.connections) if live else 0
        if live is not None:
            row = await self._stop(live, change, REMOVED, by="operator", reason="removed")
        leave = await self._end_row(row, live, "removed", change)
        _remember(self._removed, player_id, trio.current_time())
        if leave.owed:
            owed = evolve(row, told=leave.told.value, owed=leave.owed_text)
            self._pay_leave(LeaveOwed(owed, "removed"))
        return count

    async def _expire(self, player_id: str, session_id: str, change: _Change) -> bool:
        row = await _reading(self._hub.storage.current_session(player_id))
        if row is None or row.session_id != session_id or row.state != State.OFFLINE:
            return False
        await self._end_row(row, None, "expired", change)
        return True

    async def _end_row(self, row: SessionRow, live: LiveSession | None, reason: str, change: _Change) -> Presence:
        leave = parse_presence(row.told, row.owed).left().without(self._context.unheard)
        transaction = Transaction(
            effects=[End(row.player_id, row.session_id, reason)],
            presence=[_mark(row.player_id, row.session_id, State.ENDED, leave)],
        )
        try:
            await self._commit(transaction, change)
        except Refusal:
            self._stay(live)
            raise
        if live is not None:
            self._hub.remove(live)
        self._context.statistics.session("ended")
        log.info(f"Session ended: {reason}", player_id=row.player_id, session_id=row.session_id, reason=reason)
        return leave

    async def _change_subscriptions(
        self,
        player_id: str,
        session_id: str | None,
        subscribe: Sequence[str],
        unsubscribe: Sequence[str],
        change: _Change,
    ) -> int:
        live = self._hub.sessions.get(player_id)
        row = live.row if live else await _reading(self._hub.storage.current_session(player_id))
        if row is None:
            raise Refusal(ErrorType.SESSION, f"player {player_id!r} has no session", status=409)
        check_current(row.session_id, session_id)
        effects: list[Effect] = [Unsubscribe(player_id, row.session_id, name) for name in unsubscribe]
        effects += [Subscribe(player_id, row.session_id, name) for name in subscribe]
        if not effects:
            return self._hub.newest
        return (await self._commit(Transaction(effects=effects), change)).last

    # Parts of changes.

    async def _mail_from(self, player_id: str) -> int:
        """The mark of the player's last session: what is newer waits for the next one."""
        stored = await _reading(self._hub.storage.last_seen(player_id))
        return max(stored, self._hub.marked(player_id))

    async def _stop(self, live: LiveSession, change: _Change, close: Close, *, by: str, reason: str) -> SessionRow:
        """End a live session's tasks and wait for them; its row as it stood then.

        It stays in the hub until its end is stored: what was queued before that is still its own, and if
        the store refuses the end it goes on with it.
        """
        live.cancel(close, by=by, reason=reason)
        with trio.move_on_after(END_SECONDS):
            await live.finished.wait()
            await live.settle()
            return live.snapshot()
        if live.finished.is_set():
            # A handler's commit is under way. Its outcome decides what is owed, so it is waited for;
            # then the session stays.
            change.tell_late()
            await live.settle()
            self._stay(live)
            raise busy("the store is slow: try again")
        self._hub.stuck.append(live)
        log.error(
            "Unexpected error in a session: its tasks do not end",
            error_type=ErrorType.SESSION.value,
            player_id=live.player_id,
            session_id=live.session_id,
        )
        raise busy("the player's former session has not ended yet: try again")

    def _stay(self, live: LiveSession | None) -> None:
        """The commit failed: the old session stays, link-dead, if it was alive."""
        if live is not None:
            self._hub.remove(live)
            self._begin_living(LiveSession(live.snapshot(), self._context, complete=False))

    async def _commit(self, transaction: Transaction, change: _Change) -> Committed:
        """Commit a change. After `COMMIT_SECONDS` who waits is told to try again, and the change is taken
        back if the writer has not begun with it; else it is waited for, since its outcome is not known."""
        submission = await self._context.dispatcher.submit(transaction)
        with trio.move_on_after(COMMIT_SECONDS):
            return _stored(await submission.wait())
        transaction.abandoned = True
        change.tell_late()
        return await self._wait_late(submission)

    async def _wait_late(self, submission: Submission) -> Committed:
        return _stored(await submission.wait())

    def _new_row(self, player_id: str, session_id: str, start: int, mail_from: int, presence: Presence) -> SessionRow:
        now = self._context.clock.now()
        return SessionRow(
            player_id=player_id,
            session_id=session_id,
            start=start,
            mail_from=mail_from,
            seen=mail_from,
            lost=0,
            state=State.ONLINE.value,
            told=presence.told.value,
            owed=presence.owed_text,
            created_at=now,
            last_online=now,
        )

    # Sessions' tasks.

    def _begin_living(self, session: LiveSession) -> None:
        session.comes_after = self._leaving.get(session.player_id)
        self._hub.add(session)
        self._start(self._watch, session)

    def _pay_leave(self, owed: LeaveOwed) -> None:
        """Run ``on_leave`` of a session that has ended, before all handlers of the player's next one.

        It runs here and not in the next session, which may itself be ended before its turn comes.
        """
        if owed.row.owed:
            done = trio.Event()
            before = self._leaving.get(owed.row.player_id)
            self._leaving[owed.row.player_id] = done
            self._start(self._pay_leave_in_turn, owed, before, done)

    async def _pay_leave_in_turn(self, owed: LeaveOwed, before: trio.Event | None, done: trio.Event) -> None:
        try:
            if before is not None:
                await before.wait()
            await pay_leave(owed, self._context)
        finally:
            done.set()
            if self._leaving.get(owed.row.player_id) is done:
                del self._leaving[owed.row.player_id]

    async def _watch(self, session: LiveSession) -> None:
        """Run a session's nursery, and see to what follows when it ends by itself."""
        await session.run()
        if session in self._hub.stuck:
            self._hub.stuck.remove(session)
        if session.why is Why.CRASHED:
            self._crashed(session.player_id)
            await session.settle()
        while (change := self._changes.get(session.player_id)) is not None:
            # It may be what has ended the session; if not, nothing else may begin in between.
            await change.done.wait()
        if self._hub.sessions.get(session.player_id) is session:
            # Nobody has ended it on purpose: it went offline, or it crashed and stays, link-dead.
            self._hub.remove(session)
            if session.why is Why.CRASHED and not self._context.draining:
                self._begin_living(LiveSession(session.snapshot(), self._context, complete=False))
        session.gone.set()

    def _crashed(self, player_id: str) -> None:
        times = self._crashes.get(player_id, deque(maxlen=16))
        times.append(trio.current_time())
        _remember(self._crashes, player_id, times)

    def _refuse_if_crashing(self, player_id: str) -> None:
        """Three crashes in a minute: 4009 with growing ``retry_ms``."""
        if player_id not in self._crashes:
            return
        now = trio.current_time()
        recent = [at for at in self._crashes.get(player_id, ()) if now - at < 60]
        if len(recent) >= CRASHES_A_MINUTE:
            retry = 2000 * 2 ** min(len(recent) - CRASHES_A_MINUTE, 5)
            raise busy("the player's session has crashed repeatedly: try again later", retry_ms=retry)

    def _switch_for_handler(self, session: LiveSession) -> None:
        """A handler asked for a new session: done after its commit and reply, outside of its nursery."""
        self._start(self._switch_quietly, session.player_id, session.session_id)

    async def _switch_quietly(self, player_id: str, session_id: str) -> None:
        session = self._hub.sessions.get(player_id)
        if session is None or session.session_id != session_id:
            return  # it has been replaced already
        try:
            await self.switch(player_id, None)
        except Refusal as refusal:
            log.warning(
                "A handler's new session could not begin",
                error_type=refusal.error_type.value,
                player_id=player_id,
                session_id=session_id,
                reason=refusal.message,
            )


def ended(row: SessionRow) -> Refusal:
    """The refusal for a session id that has ended."""
    close = REMOVED if row.end_reason == "removed" else REPLACED
    return Refusal(
        ErrorType.SESSION,
        f"session {row.session_id!r} has ended ({row.end_reason}); an ended id never begins again",
        status=409,
        close=close,
    )


def _remember(memory: OrderedDict[K, V], key: K, value: V) -> None:
    """Keep the newest `MAX_REMEMBERED`."""
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)


def check_current(current: str, named: str | None) -> None:
    """A POST may name the session it is for: another one than the current is refused."""
    if named is not None and named != current:
        raise Refusal(
            ErrorType.SESSION,
            f"session {named!r} is not the player's current one",
            status=409,
            details={"session_id": current},
        )


def _mark(player_id: str, session_id: str, state: State, presence: Presence) -> PresenceMark:
    return PresenceMark(player_id, session_id, state.value, presence.told.value, presence.owed_text)


def _stored(outcome: Outcome) -> Committed:
    """*outcome* if it is stored; else the client should come back (4009)."""
    try:
        return raise_if_refused(outcome)
    except Refusal as refusal:
        if refusal.status == 409:
            raise
        raise Refusal(refusal.error_type, refusal.message, status=503, close=BUSY, retry_ms=2000) from None


async def _reading(reading: Awaitable[T]) -> T:
    """A store that cannot be read now: the client should come back."""
    try:
        return await reading
    except StoreError as error:
        raise Refusal(ErrorType.PERSISTENCE, str(error), status=503, close=BUSY, retry_ms=2000) from None
