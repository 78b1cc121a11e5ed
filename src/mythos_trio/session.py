"""A live session: the player's nursery, its connections, and the handlers of its player.

A session lives in memory while it is online or link-dead. Its nursery (`run`) owns its connections'
tasks and the one task that runs handlers (`_work`), which exists only while there is something to run. A command whose
handler waits for nothing is run where it was heard (`_run_now`).
The nursery ends when the session goes offline, when the registrar ends it, or when something in it
crashes; the registrar, outside, decides what follows.

What a handler says is one transaction (`mythos_trio.core.transaction`). From `Dispatcher.submit` on it
is no longer the session's: it is committed and delivered even if the session is gone by then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import trio
from attrs import evolve

from mythos_trio import logs
from mythos_trio.bell import Bell, Once
from mythos_trio.core import wire
from mythos_trio.core.commands import Commands, Entry, Remembered, digest_of, mark_of
from mythos_trio.core.data import player_key
from mythos_trio.core.deliveries import Deliveries
from mythos_trio.core.errors import BUSY, FAULT, TOLD_BY_GAME, Close, ErrorType, Refusal
from mythos_trio.core.log import Log
from mythos_trio.core.messages import decode_json
from mythos_trio.core.requests import Command as ClientCommand
from mythos_trio.core.requests import command_said
from mythos_trio.core.session import Happening, Presence, State, after, parse_presence
from mythos_trio.core.timeline import Timeline
from mythos_trio.core.transaction import (
    Answer,
    Committed,
    PresenceMark,
    Reason,
    Refused,
    SetTimer,
    Subscribe,
    Transaction,
    Unsubscribe,
)
from mythos_trio.dispatcher import Submission, log_mail, refusal_of
from mythos_trio.game import Command, Gathering
from mythos_trio.handlers import (
    DRAINED,
    MAX_RESTING,
    RETRY_SECONDS,
    Begun,
    Context,
    Deadline,
    SessionView,
    begin,
    draining,
    fire,
    handler_failed,
    new_gathering,
    presence_handler,
    run_handler,
    transact,
)
from mythos_trio.storage import SessionRow, StoreError
from mythos_trio.timers import TimerClock

if TYPE_CHECKING:
    from mythos_trio.connection import Connection
    from mythos_trio.core.backlog import Skipped
    from mythos_trio.core.position import Gap
    from mythos_trio.core.wire import Message

log = logs.get("session")


class Asker(Protocol):
    """Who waits for a command's answer: a connection, or a POST."""

    def offer_reply(self, command_id: str, body: bytes, position: int | None, /) -> None:
        """:param position: the reply's place: behind all messages up to it; None: at once."""
        ...


class Why(Enum):
    """Why a session's nursery has ended."""

    OFFLINE = "offline"
    ENDED = "ended"
    CRASHED = "crashed"


class LiveSession:
    """See the module's docstring."""

    # Without a dictionary: a player costs 1.2 KiB less, and a round touches less memory.
    __slots__ = (
        "__weakref__",
        "_begun",
        "_clock",
        "_commands",
        "_context",
        "_deliveries",
        "_due",
        "_grace_over",
        "_hub",
        "_leave_reason",
        "_log",
        "_note_after_paying",
        "_noted_state",
        "_paid",
        "_paying",
        "_resting",
        "_seen_total",
        "_told_index",
        "_view",
        "_working",
        "arriving",
        "channels",
        "comes_after",
        "connections",
        "created_at",
        "finished",
        "fresh",
        "gone",
        "lead",
        "nursery",
        "over",
        "player_id",
        "presence",
        "previous_session_id",
        "ready",
        "rest",
        "row",
        "seen",
        "session_id",
        "sightings",
        "state",
        "why",
    )

    def __init__(
        self,
        row: SessionRow,
        context: Context,
        *,
        complete: bool,
        previous: str | None = None,
        state: State | None = None,
    ) -> None:
        """:param complete: it begins now, so there can be no stored answers that it does not know.
        :param previous: the id of the session that it has replaced.
        """
        self.row = row
        self.player_id = row.player_id
        self.session_id = row.session_id
        self.created_at = row.created_at
        self.previous_session_id = previous
        self.state = state or State.LINKDEAD
        self.presence: Presence = parse_presence(row.told, row.owed)
        self.seen = max(row.seen, context.hub.marked(row.player_id, row.session_id))
        self.channels: dict[str, int] = dict.fromkeys(row.channels, 0)
        self.sightings = Timeline()  # when `seen` moved
        self.connections: dict[str, Connection] = {}
        self.lead: Connection | None = None  # one of those that keep up: for it the session is counted in rounds
        self._log: Log | None = None
        # The log that the next connection goes on with: of a session without one, as long as nothing but its topics has
        # spoken since everything was seen. So who comes, or comes again, to a quiet session needs no reading.
        self.rest: Log | None = None
        # The `total` of the log, or of the rest, when all that it had so far was seen; None if that is not known.
        self._seen_total: int | None = None
        self.ready = Once()  # `nursery` is open, or never will be again
        self.finished = Once()  # nothing of it runs any more
        self.gone = Once()  # and what follows has been seen to
        self.why: Why | None = None
        self.fresh = complete  # it has begun now, and nobody has been connected yet
        self.over = False  # it takes no more connections
        self.arriving = 0  # connections that have been admitted, and wait for the store before they are attached
        self.nursery: trio.Nursery | None = None
        self._context = context
        self._hub = context.hub
        self._commands: Commands[Asker] = Commands(complete=complete)
        self._deliveries = Deliveries(self.seen)
        self._told_index = 0  # while there is a lead: where in the log that stands which `_deliveries` knows of
        self._working = False
        # A command that has been run at once: when it began, and its transaction, which is to be waited for.
        self._begun: tuple[Entry[Asker], float, Begun[tuple[bytes, bool]]] | None = None
        self._view: SessionView | None = None  # made for the first handler
        self._resting: Bell | None = None
        """The task that runs handlers has nothing to do, and waits for this."""
        self._leave_reason = "linkdead"
        # `on_leave` of the player's former session, if that is still being run: all handlers come after it.
        self.comes_after: trio.Event | None = None
        self._grace_over = Bell()
        self._paid: trio.Event | None = None
        self._paying: Submission | None = None
        self._note_after_paying = False
        self._noted_state = State(row.state)
        # Timers that are due: at most one a name.
        self._due: list[SetTimer] = []
        self._clock: TimerClock | None = None

    @property
    def log(self) -> Log | None:
        """The newest part of the stream, while there is a connection."""
        if self._log is not None:
            self._log.pull()
        return self._log

    def is_told(self, message: Message) -> None:
        """The newest message to the player: not of a topic, which the log hears by itself."""
        if self._log is not None:
            self._log.append(message)
        self.rest = None

    @property
    def deliveries(self) -> Deliveries:
        """What became of its messages."""
        self._count_rounds()
        return self._deliveries

    @property
    def online(self) -> bool:
        return self.state is State.ONLINE

    @property
    def waiting_commands(self) -> int:
        return self._commands.waiting

    @property
    def remembered_answers(self) -> int:
        return self._commands.remembered

    @property
    def running_timers(self) -> int:
        return len(self._due) + (0 if self._clock is None else self._clock.running)

    @property
    def running_handler(self) -> bool:
        return self._working

    # The nursery.

    async def run(self) -> None:
        """The player's nursery. Returns when the session is over; `why` says how."""
        try:
            async with trio.open_nursery() as nursery:
                if self.over:  # it was ended before this task's first step
                    nursery.cancel_scope.cancel()
                self.nursery = nursery
                if player_key(self.player_id) in self._hub.timers:
                    self.open_clock()
                self.ready.set()
                self._start_working()
                self._begin_grace()
                await self._live()
                self.why = Why.OFFLINE
                nursery.cancel_scope.cancel()
        except* Exception as group:
            # The one place where what escapes in a session is caught. `Cancelled` is not an
            # Exception and goes on.
            self.why = Why.CRASHED
            log.error(
                "Unexpected error in the session of a player",
                error_type=ErrorType.SYSTEM.value,
                player_id=self.player_id,
                session_id=self.session_id,
                exc_info=group,
            )
        finally:
            self.over = True
            self.nursery = None
            if self._clock is not None:
                self._clock.close()
            close = FAULT if self.why is Why.CRASHED else BUSY
            for connection in list(self.connections.values()):
                connection.end(close)
                self.detach(connection)
            self._context.graces.end(self)
            self._abandon_commands()
            self.why = self.why or Why.ENDED
            self.ready.set()
            self.finished.set()

    async def _live(self) -> None:
        """Until the player has been link-dead for the whole grace time and the game knows it."""
        while True:
            await self._grace_over.wait()
            # A connection may have come, and gone, before this task has run: the grace begins again.
            if self.online or self.arriving or self._context.graces.has(self):
                continue
            if await self._leave():
                return
            self._begin_grace()

    def _begin_grace(self) -> None:
        """The grace time runs from now on, if nobody is there."""
        if not self.online and not self.arriving and not self.over and self.nursery is not None:
            self._context.graces.begin(self)

    def grace_over(self) -> None:
        """It has been link-dead for the whole grace time."""
        self._grace_over.ring()

    async def _leave(self) -> bool:
        """Offline, if the game could be told; False if the store refused, or a drain has begun (then no
        handler is run any more, and the next start goes on from here)."""
        if self._context.draining:
            return False
        self.over = True  # newcomers wait until this is decided
        self._owe(self.presence.left())
        with trio.move_on_after(2 * self._context.settings.handler_timeout + RETRY_SECONDS):
            while (self.presence.owed or self._working) and not self._context.draining:
                self._paid = trio.Event()
                self._start_working()
                await self._paid.wait()
        if self.presence.owed or self._working:
            self.over = False
            return False
        self.state = after(self.state, Happening.GRACE_OVER)
        return await self._store_offline()

    async def _store_offline(self) -> bool:
        self._hub.drop_presence(self.player_id, self.session_id)
        mark = PresenceMark(self.player_id, self.session_id, State.OFFLINE.value, self.presence.told.value, "")
        try:
            submission = await self._context.dispatcher.submit(Transaction(presence=[mark]))
            outcome = await submission.wait()
        except Refusal:
            outcome = None
        if isinstance(outcome, Committed):
            return True
        self.state = State.LINKDEAD
        self.over = False
        return False

    def cancel(self, close: Close, *, by: str, reason: str) -> None:
        """End it: last words to its connections, then its nursery is cancelled. Await `finished`."""
        self.over = True
        self._leave_reason = reason
        for connection in list(self.connections.values()):
            connection.end(close, by=by)
        if self.nursery is not None:
            self.nursery.cancel_scope.cancel()

    # Connections.

    @property
    def accepts(self) -> bool:
        """Whether connections can be attached, and their tasks started, in this moment."""
        # The last: it has crashed, and has not come to its end yet.
        return not self.over and self.nursery is not None and not self.nursery.cancel_scope.cancel_called

    @contextlib.contextmanager
    def awaiting(self) -> Iterator[None]:
        """A connection has been admitted, and waits for something before it is attached: no grace ends meanwhile."""
        self.arriving += 1
        try:
            yield
        finally:
            self.arrived()

    def arrived(self) -> None:
        """One that has been counted as `arriving` waits no longer."""
        self.arriving -= 1
        self._begin_grace()

    def attach(self, connection: Connection) -> None:
        """A connection has been accepted: from now on it reads the log."""
        self.state = after(self.state, Happening.ATTACH)
        self._context.graces.end(self)
        if self._log is None:
            # Without a rest nothing is known of what is not newer: the connection has read that from the store.
            if self.rest is None:
                self._seen_total = None
            self._log = self._hub.begin_log(self, self._hub.newest) if self.rest is None else self.rest
            self.rest = None
        self.fresh = False
        self.connections[connection.id] = connection
        self._hub.connections[connection.id] = connection
        connection.attached = True
        self._owe(self.presence.arrived())

    def detach(self, connection: Connection) -> None:
        """A connection is gone. Only this session is touched, and only if it was attached here."""
        if self.connections.pop(connection.id, None) is None:
            return
        connection.leave_cohort()
        connection.link.on_express = None
        self._hub.connections.pop(connection.id, None)
        self._hub.apart.pop(connection, None)
        if self.connections:
            return
        if (log := self.log) is not None and log.locate(self.seen) == log.head:
            self._keep_rest(log)
        self._log = None
        if self.state is State.ONLINE:
            self.state = after(self.state, Happening.LAST_DETACH)
        if not self.over and not self._context.draining:
            self._owe(self.presence.lost())
        self._begin_grace()

    def begin_rest(self, after: int) -> None:
        """There is nothing of its stream after *after*. As long as only its topics speak, `rest` says so."""
        self.rest = self._hub.begin_log(self, after)
        self._seen_total = self.rest.total

    def _keep_rest(self, log: Log) -> None:
        """All of *log* has been seen."""
        if log:
            self.begin_rest(self.seen)
        else:
            self.rest, self._seen_total = log, log.total

    @property
    def floor(self) -> int:
        """From which number on its stream is in memory, or would be if a connection came now."""
        held = self.log
        if held is None and (held := self.rest) is not None:
            held.pull()
        return self._hub.newest if held is None else held.floor

    def saw(self, seq: int) -> None:
        """Everything up to *seq* has surely arrived at a client.

        It is counted when somebody asks (`deliveries`): the log, which that looks into, would else take over each
        message to everybody for each player once a second.
        """
        if seq > self.seen:
            self.sightings.add(self.seen, seq, self._context.clock.now())
            self.seen = seq
            self._hub.mark(self.player_id, self.session_id, seq)

    @property
    def has_seen_all(self) -> bool:
        """Whether there is nothing in its stream that has not surely arrived: nobody has to ask the kernel, and no mark
        has to move, if only others were spoken to."""
        return self._log is not None and self._log.total == self._seen_total

    def saw_all(self, seq: int) -> None:
        """As `saw`, and there is nothing newer than *seq* in its stream."""
        self.saw(seq)
        self._seen_total = None if self._log is None else self._log.total

    # What has been delivered.

    def keeps_up(self, connection: Connection) -> None:
        """It has joined a cohort: what it is written from now on is counted by `_count_rounds`."""
        cohort, log = connection.cohort, self.log
        if self.lead is None and cohort is not None and log is not None:
            self.lead = connection
            self._told_index = log.head
            cohort.leads += 1

    def falls_behind(self, connection: Connection) -> None:
        """It is about to leave its cohort."""
        if self.lead is not connection or connection.cohort is None:
            return
        self._count_rounds()
        connection.cohort.leads -= 1
        others = (other for other in self.connections.values() if other is not connection)
        self.lead = next((other for other in others if other.cohort is not None), None)
        if self.lead is not None and self.lead.cohort is not None:
            self.lead.cohort.leads += 1

    def _count_rounds(self) -> None:
        """Count what rounds have written to the lead since the last time, and what has surely arrived."""
        log, lead = self.log, self.lead
        if lead is not None and log is not None and log.head != self._told_index:
            if self.seen < lead.written:
                self._count_round(log, self.seen)
                self._deliveries.confirm(self.seen)
            self._count_round(log, lead.written)
        self._deliveries.confirm(self.seen)

    def _count_round(self, log: Log, upto: int) -> None:
        index = log.locate(upto)
        if index is not None and index > self._told_index:
            self._deliveries.wrote(log.number_before(index), index - self._told_index)
            self._told_index = index

    def skipped_for(self, connection: Connection, skipped: Sequence[Skipped]) -> None:
        """*skipped* are not written to *connection*, but what replaces them: told before `delivered_to`."""
        deliveries = self.deliveries
        deliveries.replaced += sum(one.seq > deliveries.upto for one in skipped)
        self._context.statistics.replaced(len(skipped))

    def delivered_to(self, connection: Connection, messages: Sequence[Message]) -> None:
        """*messages* have been written to *connection*, which is apart: count those that are new to the player."""
        deliveries = self.deliveries
        upto = deliveries.upto
        if messages[-1].seq <= upto:
            return
        while self.lead is not None:
            # In the middle of a round that has not come to it: it would be counted there once more.
            self.lead.leave_cohort()
        count = 0
        mail: list[Message] = []
        for message in messages:
            if message.seq > upto:
                count += 1
                message.received_by(self.player_id)
                if message.accepted_at:
                    mail.append(message)
        deliveries.wrote(messages[-1].seq, count)
        if mail:
            self._context.statistics.delivered(len(mail), ())
            log_mail(mail, self._context.clock.now())

    def gap_told(self, connection: Connection, gap: Gap) -> None:
        self.deliveries.fail(self._context.clock.now(), f"gap: {gap.reason}")
        self._context.statistics.failed(1, gap.reason)
        log.warning(
            "Message delivery failed",
            error_type=ErrorType.DELIVERY.value,
            delivery_error="gap",
            reason=gap.reason,
            after=str(gap.after),
            position=str(gap.position),
            player_id=self.player_id,
            session_id=self.session_id,
            connection_id=connection.id,
        )

    # Commands.

    async def submit(self, request: ClientCommand, asker: Asker) -> None:
        """As `submit_now`. Waits only for the store, and only for an id that an earlier life of the session may have
        answered.
        """
        if self.has_to_ask(request):
            self._check_open()
            assert request.id is not None  # else there is nothing to ask for
            await self._ask_store(request.id)
        self.submit_now(request, asker)

    def has_to_ask(self, request: ClientCommand) -> bool:
        """Whether only the store knows if the command's id has its answer already."""
        commands = self._commands
        return not commands.complete and request.id is not None and not commands.has_answered(request.id)

    def submit_now(self, request: ClientCommand, asker: Asker) -> None:
        """Take a command: it is answered to *asker*, now or later, once.

        Raises a refusal that is not remembered: the same id runs again.
        """
        if self.over or self._context.draining:
            self._check_open()
        id = request.id or self._context.randomness.token()
        said = command_said(request)
        remembered = self._commands.answered(id, said)
        if remembered is not None:
            asker.offer_reply(id, remembered.body, remembered.position or None)
            return
        if request.kind == "command" and self._can_run_now():
            self._run_now(request, id, said, asker)
            return
        entry: Entry[Asker] = Entry(id, said, request.content, request.kind, given=request.id is not None)
        if self._commands.submit(entry, asker) and not self._working:
            self._wake_worker()

    def _check_open(self) -> None:
        if self._context.draining:
            raise draining()
        if self.over:
            raise Refusal(ErrorType.SESSION, "this session is over: connect again", status=409, close=BUSY)

    async def _ask_store(self, id: str) -> None:
        """Remember the answer that *id* got in an earlier life of the session, if it did."""
        try:
            answer = await self._hub.storage.find_answer(self.player_id, self.session_id, id)
        except StoreError as error:
            raise Refusal(ErrorType.PERSISTENCE, str(error), status=503, retry_ms=2000) from None
        # What has been answered while the store was being asked counts.
        if answer is not None and not self._commands.has_answered(id):
            remembered = Remembered(answer.digest, answer.body, trio.current_time(), self._hub.newest)
            self._commands.remember(id, remembered)

    def _abandon_commands(self) -> None:
        """The session is over before they were answered: nothing is remembered, they can be asked again."""
        body = wire.error_body(ErrorType.SESSION, "the session ended before this command was answered")
        _answer_all(self._commands.abandon(), body)

    def drain(self) -> None:
        """The server stops: what waits is answered with an error; what runs goes on."""
        _answer_all(self._commands.give_up_waiting(), DRAINED)

    # Handlers: one task, while there is something to run.

    def _owe(self, presence: Presence) -> None:
        """Note what is owed now, and the state, where that has changed. What the game has no handler for it is not
        owed: that saves each visit two transactions."""
        presence = presence.without(self._context.unheard)
        if presence == self.presence and self.state is self._noted_state:
            return
        # With nothing to pay before and after it no mark is under way that this one could overtake; and to a start
        # after a crash online and link-dead are the same.
        quiet = not self.presence.owed and not presence.owed and self._noted_state is not State.OFFLINE
        self.presence = presence
        self._noted_state = self.state
        if quiet:
            self._hub.note_presence(self._mark(), self._context.clock.now())
        else:
            self._note_presence()
            self._start_working()

    def _note_presence(self) -> None:
        """What is owed is written by the change that owes it; nobody waits for that."""
        if self._paying is not None:
            # Behind the commit that pays, this would say that it is still owed; and ahead of its outcome,
            # that it is paid, is not known. After a crash until then the session is link-dead anyway.
            self._note_after_paying = True
            return
        # If too much is unsaved, the handler's own commit says the same, later.
        with contextlib.suppress(Refusal):
            self._context.dispatcher.submit_nowait(Transaction(presence=[self.mark()]))

    def snapshot(self, state: State = State.LINKDEAD) -> SessionRow:
        """The session as a row, for the one that takes its place."""
        presence = self.presence.not_paid()
        return evolve(
            self.row,
            seen=self.seen,
            state=state.value,
            told=presence.told.value,
            owed=presence.owed_text,
            channels=tuple(self.channels),
        )

    def mark(self) -> PresenceMark:
        """For a transaction: what waits to be written behind is older."""
        self._hub.drop_presence(self.player_id, self.session_id)
        return self._mark()

    def _mark(self) -> PresenceMark:
        state = State.ONLINE if self.state is State.ONLINE else State.LINKDEAD
        return PresenceMark(
            self.player_id, self.session_id, state.value, self.presence.told.value, self.presence.owed_text
        )

    def _start_working(self) -> None:
        if not self._working and self._has_work():
            self._wake_worker()

    def _wake_worker(self) -> None:
        if self._resting is not None:
            self._working = True
            self._resting.ring()
        elif self.nursery is not None and not self.nursery.cancel_scope.cancel_called:
            self._working = True
            self.nursery.start_soon(self._work, name=f"handlers of {self.player_id}")

    async def _work(self) -> None:
        """Run what there is to run; then wait for more, unless too many do (`MAX_RESTING`)."""
        context, bell = self._context, Bell()
        try:
            with Deadline(context) as deadline:
                await self._run_all(deadline)
                self._stop_working()
                while context.resting < MAX_RESTING and not context.draining:
                    await self._rest(bell)
                    await self._run_all(deadline)
                    self._stop_working()
        finally:
            self._stop_working()

    async def _rest(self, bell: Bell) -> None:
        """Until there is something to run."""
        self._resting = bell
        self._context.resting += 1
        try:
            await bell.wait()
        finally:
            self._context.resting -= 1
            self._resting = None

    def _stop_working(self) -> None:
        if self._working:
            self._working = False
            if self._paid is not None:
                self._paid.set()
            if self._context.draining:
                self._context.handler_ended()

    async def _run_all(self, deadline: Deadline) -> None:
        """Run what is owed, then what is due, then commands, one at a time, until there is nothing left."""
        context, commands = self._context, self._commands
        while self._begun is not None or (self._has_work() and not context.draining):
            # A crash may have cancelled this nursery before this task's first step: a handler begun
            # now would run to its first wait, and the session that follows would run it again.
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._begun is not None:
                await self._finish_begun(deadline)
            elif self.comes_after is not None:
                await self.comes_after.wait()
                self.comes_after = None
            elif self.presence.owed:
                if not await self._pay_presence(deadline) and not context.draining:
                    await trio.sleep(RETRY_SECONDS)
            elif self._due:
                await self._fire(self._due.pop(0), deadline)
            elif (entry := commands.next()) is not None:
                await self._run_command(entry, deadline)

    def _has_work(self) -> bool:
        return bool(self._commands.queue or self.presence.owed or self._due or self._begun is not None)

    def _tell_paid(self) -> None:
        if self._paid is not None:
            self._paid.set()

    async def _pay_presence(self, deadline: Deadline) -> bool:
        """Run the handler that is owed first; False if its commit failed (it is still owed)."""
        self.presence = self.presence.started()
        owed = self.presence.owed[0]

        async def run() -> tuple[Gathering, None]:
            gathering = self._gathering()
            await presence_handler(owed, gathering, deadline, self._leave_reason)
            return gathering, None

        def complete(gathering: Gathering, _: None) -> Transaction:
            # Made when the handler has ended: more may be owed by now.
            paid = self.presence.paid()
            mark = evolve(self.mark(), told=paid.told.value, owed=paid.owed_text)
            return Transaction(effects=gathering.effects, presence=[mark])

        def joined(submission: Submission) -> None:
            self._paying = submission

        try:
            gathering, _, _ = await transact(self._context, run, complete, joined)
        except Refusal:
            self._paid_or_not(self.presence.not_paid())
            return False
        if not await self.settle():
            return False
        self._tell_paid()
        self._carry_out(gathering)
        return True

    async def settle(self) -> bool:
        """Wait for the commit that pays presence, if one is under way; whether it is through.

        When the session has been cancelled in the middle of it, the registrar calls this before it
        goes on: else the same handler would be run again.
        """
        if self._paying is None:
            return True
        stored = isinstance(await self._paying.wait(), Committed)
        self._paid_or_not(self.presence.paid() if stored else self.presence.not_paid())
        return stored

    def _paid_or_not(self, presence: Presence) -> None:
        self._paying = None
        self.presence = presence
        if self._note_after_paying:
            self._note_after_paying = False
            self._note_presence()

    # Timers: they run while the session lives, and rest while the player is offline.

    def open_clock(self) -> None:
        """The player has timers: from now on they run. Most players have none, and then there is no clock."""
        if self._clock is None and self.nursery is not None:
            self._clock = TimerClock(self._hub, player_key(self.player_id), self._ring, self._start_timer)
            self._clock.open()

    def _start_timer(self, function: Callable[[], Awaitable[None]]) -> None:
        """Not in a nursery that ends: between the end of its last task and the next step of `run` it takes none, and
        the dispatcher, which may be asking just then, would end with the server."""
        if self.nursery is not None and not self.nursery.cancel_scope.cancel_called:
            self.nursery.start_soon(function)

    def _ring(self, timer: SetTimer) -> None:
        self._due.append(timer)
        self._start_working()

    async def _fire(self, timer: SetTimer, deadline: Deadline) -> None:
        value = decode_json(timer.value)
        try:
            gathering, done = await fire(
                deadline,
                timer,
                self._gathering,
                lambda gathering: self._context.game.on_timer(gathering.player, timer.name, value),
            )
        except Refusal:
            done = False
        if done:
            self._carry_out(gathering)
        elif self._clock is not None:
            self._clock.again(timer, RETRY_SECONDS)

    def _can_run_now(self) -> bool:
        """Whether a command can be run in this turn: nothing is before it, and its handler waits for nothing."""
        context = self._context
        return (
            context.stage.open
            and not self._working
            and self.nursery is not None
            and not self._has_work()
            and self.comes_after is None
            and context.dispatcher.has_room
            and context.stage.fits(context.game.on_command)
        )

    def _run_now(self, request: ClientCommand, id: str, said: bytes, asker: Asker) -> None:
        """Run a command to its end. If there is something to store, the session's task waits for that."""
        started = trio.current_time()
        self._context.statistics.ran()
        gathering = self._gathering()
        answer = self._answer_now(Command(id, request.content), gathering)
        if not gathering.rests_on_nothing:
            self._begin(
                Entry(id, said, request.content, given=request.id is not None), asker, started, gathering, answer
            )
            return
        gathering.tell()
        now = trio.current_time()
        if request.id is not None:
            self._commands.remember(id, Remembered(mark_of(said), answer[0], now, 0))
        self._context.statistics.command(now, (now - started) * 1000, answer[1])
        if gathering.asks_for_more:
            asker.offer_reply(id, answer[0], None)
            self._carry_out(gathering)
        else:
            self._context.stage.reply_later(asker, id, answer[0])

    def _answer_now(self, command: Command, gathering: Gathering) -> tuple[bytes, bool]:
        """As `_answer_of`, for a handler that never waits."""
        context = self._context
        try:
            content = context.stage.run(context.game.on_command, "on_command", gathering.player, command)
            return gathering.answer(content), True
        except Exception as error:
            return self._failed("on_command", gathering, error), False
        finally:
            gathering.close()

    def _begin(
        self, entry: Entry[Asker], asker: Asker, started: float, gathering: Gathering, answer: tuple[bytes, bool]
    ) -> None:
        """Have stored what a command has done that was run at once, and have what it has read waited for."""
        self._commands.begin(entry, asker)
        begun = begin(self._context, gathering, answer, partial(self._transaction, entry))
        if begun.submission is None and not self._hub.data.rests_on(gathering.reads):
            self._conclude(entry, started, gathering, answer, None)
        else:
            self._begun = (entry, started, begun)
            self._wake_worker()

    async def _finish_begun(self, deadline: Deadline) -> None:
        assert self._begun is not None  # for the type checker
        (entry, started, begun), self._begun = self._begun, None
        await self._store_command(entry, started, deadline, begun=begun)

    async def _run_command(self, entry: Entry[Asker], deadline: Deadline) -> None:
        started = trio.current_time()
        self._context.statistics.ran()
        gathering = self._gathering()
        answer = await self._answer_of(entry, gathering, deadline)
        if gathering.rests_on_nothing:
            gathering.tell()
            self._conclude(entry, started, gathering, answer, None)
        else:
            await self._store_command(entry, started, deadline, first=(gathering, answer))

    async def _store_command(
        self,
        entry: Entry[Asker],
        started: float,
        deadline: Deadline,
        *,
        first: tuple[Gathering, tuple[bytes, bool]] | None = None,
        begun: Begun[tuple[bytes, bool]] | None = None,
    ) -> None:
        """Make what its first run has done a transaction, if it is still true; else run it again."""

        async def run() -> tuple[Gathering, tuple[bytes, bool]]:
            again = self._gathering()
            return again, await self._answer_of(entry, again, deadline)

        complete = partial(self._transaction, entry)
        try:
            done = await transact(self._context, run, complete, first=first, begun=begun)
        except Refusal as refusal:
            self._answer(entry, wire.error_body(refusal.error_type, refusal.message), None, None)
        else:
            self._conclude(entry, started, *done)

    def _transaction(self, entry: Entry[Asker], gathering: Gathering, answer: tuple[bytes, bool]) -> Transaction | None:
        """What a command's handler did, with its answer."""
        if not gathering.has_effects:
            return None
        kept = Answer(self.player_id, self.session_id, entry.id, digest_of(entry.said), answer[0])
        return Transaction(effects=gathering.effects, answer=kept if entry.given else None)

    def _conclude(
        self,
        entry: Entry[Asker],
        started: float,
        gathering: Gathering,
        answer: tuple[bytes, bool],
        outcome: Committed | Refused | None,
    ) -> None:
        """A command has been run, and what it did is stored, or not."""
        now = trio.current_time()
        body, position, remembered = self._answer_for(entry, answer[0], outcome, now)
        self._answer(entry, body, position, remembered)
        self._context.statistics.command(now, (now - started) * 1000, answer[1])
        if remembered is not None:
            self._carry_out(gathering)

    def _answer(self, entry: Entry[Asker], body: bytes, position: int | None, remembered: Remembered | None) -> None:
        for asker in self._commands.finish(entry, remembered):
            asker.offer_reply(entry.id, body, position)

    def _answer_for(
        self, entry: Entry[Asker], body: bytes, outcome: Committed | Refused | None, now: float
    ) -> tuple[bytes, int | None, Remembered | None]:
        """What became of a command: (reply, its place, what to remember)."""
        if outcome is None:
            return body, None, Remembered(mark_of(entry.said), body, now, 0)
        if isinstance(outcome, Committed):
            return body, outcome.last, Remembered(mark_of(entry.said), body, now, outcome.last)
        if outcome.reason == Reason.ANSWERED and outcome.answer is not None:
            first = Remembered(outcome.answer.digest, outcome.answer.body, now, self._hub.newest)
            return first.body, first.position, first
        failure = refusal_of(outcome)
        return wire.error_body(failure.error_type, failure.message), None, None

    async def _answer_of(self, entry: Entry[Asker], gathering: Gathering, deadline: Deadline) -> tuple[bytes, bool]:
        """Run the handler; its answer's body. A handler that fails leaves no effects."""
        if entry.kind == "command":
            command = Command(entry.id, entry.content)
            call = lambda: self._context.game.on_command(gathering.player, command)  # noqa: E731
        else:
            call = lambda: self._on_subscribe(gathering, entry.kind, entry.content)  # noqa: E731
        try:
            content = await run_handler(call, gathering, deadline, self.player_id, "on_" + entry.kind)
            return gathering.answer(content), True
        except Exception as error:
            return self._failed("on_" + entry.kind, gathering, error), False

    def _failed(self, handler: str, gathering: Gathering, error: Exception) -> bytes:
        """What its player is told of a command whose handler has raised *error*."""
        if isinstance(error, Refusal):
            gathering.drop()
            return wire.error_body(error.error_type, error.message, error.details)
        return handler_failed(gathering, self.player_id, handler, error)

    async def _on_subscribe(self, gathering: Gathering, kind: str, channel: str) -> Any:
        """A client's ``subscribe``: the game says whether; then it is done."""
        game = self._context.game
        if not await game.on_subscribe(gathering.player, channel):
            raise Refusal(
                ErrorType.VALIDATION, f"the game does not let you {kind}", status=403, details={"channel": channel}
            )
        effect = Subscribe if kind == "subscribe" else Unsubscribe
        gathering.effects.append(effect(self.player_id, self.session_id, channel))
        return {"channel": channel, "subscribed": kind == "subscribe"}

    def _gathering(self) -> Gathering:
        if self._view is None:
            self._view = SessionView(self._hub, self.player_id, self.channels)
        return new_gathering(self._context, self.row, self._view)

    def _carry_out(self, gathering: Gathering) -> None:
        """What a handler asked for that is done after its commit and its reply."""
        if gathering.disconnect_wanted is not None:
            close = Close(TOLD_BY_GAME.code, gathering.disconnect_wanted, ErrorType.SESSION)
            for connection in list(self.connections.values()):
                connection.end(close, by="server")
        if gathering.new_session_wanted:
            self._context.switch(self)


def _answer_all(entries: list[Entry[Asker]], body: bytes) -> None:
    for entry in entries:
        for asker in entry.askers:
            asker.offer_reply(entry.id, body, None)
