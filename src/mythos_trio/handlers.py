"""Running the game's handlers: under a deadline, with their effects gathered.

What escapes from a handler is caught here, around it: its effects are dropped, the player is told, and no
connection ends.
"""

from __future__ import annotations

import contextvars
import time
import types
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import trio
from attrs import define, field, frozen

from mythos_trio import logs
from mythos_trio.core import wire
from mythos_trio.core.data import MAX_RUNS, PLAYER, Value
from mythos_trio.core.errors import DRAIN, ErrorType, Refusal
from mythos_trio.core.messages import decode_json
from mythos_trio.core.session import Owed, State, parse_presence
from mythos_trio.core.transaction import (
    Committed,
    PresenceMark,
    Reason,
    Refused,
    SetTimer,
    Transaction,
)
from mythos_trio.delays import Delays
from mythos_trio.dispatcher import refusal_of
from mythos_trio.game import WORLD, CommandError, Game, GameError, Gathering, Health, Player, World, never_waits
from mythos_trio.game import Presence as PresenceText
from mythos_trio.storage import SessionRow
from mythos_trio.timers import TimerClock

if TYPE_CHECKING:
    from mythos_trio.config import Settings
    from mythos_trio.dispatcher import Dispatcher, Submission
    from mythos_trio.hub import Hub
    from mythos_trio.seams import Clock, Randomness
    from mythos_trio.session import Asker, LiveSession
    from mythos_trio.statistics import Statistics

T = TypeVar("T")

log = logs.get("session")

# Timers that are due and wait for their turn: more cannot be, since a name has one timer.
MAX_DUE: Final = float("inf")

# A commit that the store refused is tried again after this time; the store heals by itself.
RETRY_SECONDS: Final = 5.0

# Who has to run again waits for its turn so long, and then runs without one: a handler that is slow holds up
# the others on the same key no longer than this.
TURN_SECONDS: Final = 1.0

# A handler that runs for so long without an `await` that waits is named in the log: meanwhile nobody is served.
BLOCKED_SECONDS: Final = 0.1

# A background of the game that has failed begins again after a wait, which doubles as long as it fails.
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0


# Sessions' tasks that have nothing to run may wait for the next command: to wake one costs 1 µs, to start one and end
# it 3.4. One that waits takes 3 KiB; so many may, the others end.
MAX_RESTING: Final = 1000


class Turns:
    """Handlers that have to run again come one after another, key by key.

    Else, if a hundred that await something want the same key, in every round one is through and ninety-nine
    have run in vain, until they have used up their runs.
    """

    def __init__(self) -> None:
        self._locks: dict[str, trio.Lock] = {}

    async def take(self, keys: list[str]) -> list[str]:
        """Wait for the turn on *keys*, `TURN_SECONDS` at most. They are in order, so nobody waits in a circle.

        :returns: the keys to `give_back`.
        """
        held: list[str] = []
        try:
            with trio.move_on_after(TURN_SECONDS):
                for key in keys:
                    await self._locks.setdefault(key, trio.Lock()).acquire()
                    held.append(key)
        except BaseException:
            self.give_back(held)
            raise
        return held

    def give_back(self, held: list[str]) -> None:
        for key in held:
            lock = self._locks[key]
            lock.release()
            if not lock.locked():  # nobody has been waiting for it
                del self._locks[key]


class Graced(Protocol):
    def grace_over(self) -> None:
        """It has been link-dead for the whole grace time."""
        ...


@define(eq=False)
class Context:
    """What all sessions share."""

    hub: Hub
    dispatcher: Dispatcher
    game: Game
    settings: Settings
    statistics: Statistics
    clock: Clock
    randomness: Randomness
    turns: Turns = field(factory=Turns)
    stage: Stage = field(factory=lambda: Stage())
    graces: Delays[Graced] = field(init=False)
    """The grace times of who is link-dead."""
    unheard: frozenset[Owed] = field(init=False)
    """The handlers of presence that the game does not have."""
    draining: bool = False
    """From now on no command is taken, and a link-dead connection owes nothing."""
    switch: Callable[[LiveSession], None] = lambda _: None
    """Given by the registrar: begin a new session for this one's player."""
    resting: int = 0
    """How many sessions' tasks wait for the next command."""
    handlers: dict[Deadline, None] = field(factory=dict)
    """The handlers that run now, in the order in which they began: a drain cuts them off after a while."""
    _one_ended: trio.Event = field(factory=trio.Event)

    @graces.default
    def _make_graces(self) -> Delays[Graced]:
        return Delays(self.settings.linkdead_grace, lambda session: session.grace_over())

    @unheard.default
    def _find_unheard(self) -> frozenset[Owed]:
        game = type(self.game)
        return frozenset(owed for owed in Owed if getattr(game, f"on_{owed}") is getattr(Game, f"on_{owed}"))

    def handler_ended(self) -> None:
        """A handler, or a session's turn of them, is over: a drain looks again. Costs nothing otherwise."""
        if self.draining:
            self._one_ended.set()
            self._one_ended = trio.Event()

    async def wait_handlers(self) -> None:
        """While draining: until no handler runs."""
        while self.handlers or any(session.running_handler for session in self.hub.sessions.values()):
            await self._one_ended.wait()

    def in_handler(self, task: trio.lowlevel.Task | None) -> bool:
        """Whether *task* runs a handler just now."""
        return any(deadline.task is task for deadline in self.handlers)

    async def keep_deadlines(self) -> None:
        """Cut off each handler that runs for HANDLER_TIMEOUT, to the moment. Runs until it is cancelled.

        Nobody has to wake this task: who begins while it sleeps has more time left than it sleeps.
        """
        while True:
            now = trio.current_time()
            wake = now + self.settings.handler_timeout
            for deadline in self.handlers:  # who began first has to end first
                if deadline.at > now:
                    wake = deadline.at
                    break
                deadline.cut_off()
            await trio.sleep_until(wake)


# When the scope of a `Deadline` would end by itself: what a handler has left open, with an earlier end or with a
# shield, shows in what is in effect after it.
_FAR: Final = 1e9


class Deadline:
    """HANDLER_TIMEOUT of the handlers that one task runs, one after another.

    A cancel scope with a deadline for each of them costs 4 µs. This scope stays entered from handler to handler, and
    one task keeps the time for all (`Context.keep_deadlines`). When it has been cancelled, or a handler has left
    something open inside of it, it is left and another one is entered.
    """

    __slots__ = ("_cut", "_outer", "_scope", "at", "context", "task")

    def __init__(self, context: Context) -> None:
        self.context = context
        self.task: trio.lowlevel.Task | None = None
        self.at = 0.0
        """When the handler that runs is cut off, of `trio.current_time`."""
        self._outer = 0.0

    def __enter__(self) -> Deadline:
        self.task = trio.lowlevel.current_task()
        self._enter()
        return self

    def _enter(self) -> None:
        self._cut = False
        self._scope = trio.CancelScope(deadline=trio.current_time() + _FAR)
        self._scope.__enter__()
        self._outer = trio.current_effective_deadline()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            self._scope.__exit__(kind, error, trace)
        except RuntimeError as open_inside:
            _warn_open(open_inside)

    def cut_off(self) -> None:
        """The time is over, or the server stops."""
        self._cut = True
        self._scope.cancel()

    def begin(self) -> None:
        """A handler begins."""
        context = self.context
        self.at = trio.current_time() + context.settings.handler_timeout
        context.handlers[self] = None

    def end(self, error: BaseException | None) -> bool:
        """It has ended, by *error* if there is one; whether that says only that it was cut off.

        :raises BaseExceptionGroup: what else there is in *error*.
        :raises RuntimeError: it has left a nursery open, or a scope with a deadline: that would cut off a later one.
        """
        context = self.context
        del context.handlers[self]
        if context.draining:
            context.handler_ended()
        if not self._cut and not self._left_open():
            return False
        kind = None if error is None else type(error)
        try:
            return self._scope.__exit__(kind, error, None if error is None else error.__traceback__)
        finally:
            self._enter()

    def _left_open(self) -> bool:
        assert self.task is not None  # it has been entered
        if self.task.child_nurseries:
            return True
        # To ask goes up the tree of scopes, 1.5 µs: who does not ask leaves a later command without an answer.
        return trio.current_effective_deadline() != self._outer


def _warn_open(open_inside: RuntimeError) -> None:
    """Nothing has told of it before, and nothing has come of it."""
    log.warning("A handler of the game has left a cancel scope open", reason=str(open_inside).partition("\n")[0])


class Stage:
    """Where handlers run that wait for nothing (`never_waits`): in the turn of the task that has heard the command.

    Such a handler cannot be cancelled, and nobody can come between its steps, so it needs no task, no deadline and
    no place in a queue: 4 of 27 µs for each command. What it could leave behind in a task that is not its own are
    context variables, so it has a copy of them, and open scopes. Those that can be seen fail the handler; all of them
    are closed when the turn is over, before that task waits again: until then a scope does nothing to anybody.

    The replies of a turn are sent when it is over. One by one, between commands, each of them finds that its client's
    processor has just gone to sleep, and the kernel wakes it: 5 µs for each command.
    """

    __slots__ = ("_code", "_never_waits", "_replies", "_scope", "_until", "open")

    def __init__(self) -> None:
        self.open = False
        """Whether this is such a turn: each is a ``with`` of the stage, without an ``await``."""
        self._replies: list[tuple[Asker, str, bytes]] = []
        self._scope: trio.CancelScope | None = None  # entered for the first handler of a turn
        self._until = 0.0
        self._code: object = None
        self._never_waits = False

    def __enter__(self) -> None:
        self.open = True

    def __exit__(self, *_: object) -> None:
        self.open = False
        if self._scope is not None:
            try:
                self._close()
            except RuntimeError as open_inside:
                _warn_open(open_inside)
        if self._replies:
            replies, self._replies = self._replies, []
            for asker, id, body in replies:
                _reply(asker, id, body)

    def reply_later(self, asker: Asker, id: str, body: bytes) -> None:
        """Answer a command when the turn is over; its reply need not wait for its place in the stream."""
        self._replies.append((asker, id, body))

    def fits(self, handler: Callable[..., object]) -> bool:
        """Whether *handler* can be `run`."""
        code = getattr(handler, "__code__", None)
        if code is not self._code:
            self._code, self._never_waits = code, never_waits(handler)
        return self._never_waits

    def run(self, handler: Callable[..., Awaitable[T]], name: str, player: Player, *arguments: object) -> T:
        """Run *handler* to its end.

        :raises Exception: whatever it raises; `RuntimeError` if it has left a scope open.
        """
        if self._scope is None:
            self._enter()
        try:
            return _run_through(handler, name, player, *arguments)
        finally:
            # Below a shield, so that asking does not go up the tree of scopes: 0.15 µs instead of 1.3.
            if trio.current_effective_deadline() != self._until:
                self._close()

    def _enter(self) -> None:
        self._scope = trio.CancelScope(deadline=trio.current_time() + _FAR, shield=True)
        self._scope.__enter__()
        self._until = trio.current_effective_deadline()

    def _close(self) -> None:
        assert self._scope is not None  # for the type checker
        scope, self._scope = self._scope, None
        scope.__exit__(None, None, None)


def _reply(asker: Asker, id: str, body: bytes) -> None:
    """What escapes would end the task that has heard the command, and with it the server."""
    try:
        asker.offer_reply(id, body, None)
    except Exception as error:
        log.error("Unexpected error in a reply", error_type=ErrorType.SYSTEM.value, exc_info=error)


def _run_through(handler: Callable[..., Awaitable[T]], name: str, player: Player, *arguments: object) -> T:
    """As `contained`, for a handler that never waits."""
    steps = handler(player, *arguments).__await__()
    began = time.perf_counter()
    try:
        contextvars.copy_context().run(next, steps)
    except StopIteration as stop:
        result: T = stop.value
        return result
    except Exception:
        raise
    except BaseException as error:
        raise _ends_nothing(name, error) from error  # noqa: ASYNC104 - nothing has waited
    finally:
        if (seconds := time.perf_counter() - began) >= BLOCKED_SECONDS:
            _warn_blocked(name, player.id, seconds)
    raise RuntimeError(f"{name} waits, and there is no `await` in it")


@frozen
class LeaveOwed:
    """``on_leave`` of a session that has ended is owed."""

    row: SessionRow
    reason: str
    state: State = State.ENDED


def draining(retry_ms: int = 1000) -> Refusal:
    return Refusal(ErrorType.SYSTEM, "the server is restarting", status=503, close=DRAIN, retry_ms=retry_ms)


DRAINED: Final = wire.error_body(draining().error_type, draining().message)
"""The answer to a command that a drain has kept from being run, or cut off: nothing has happened."""


@define
class SessionView:
    """What the handlers of one session may ask: the hub, and the session's own subscriptions as they are committed."""

    hub: Hub
    player_id: str
    own: Collection[str]

    def present(self) -> Iterable[str]:
        return self.hub.present()

    def presence(self, player_id: str) -> PresenceText:
        session = self.hub.sessions.get(player_id)
        if session is None:
            return "offline"
        return "online" if session.state is State.ONLINE else "linkdead"

    def subscribers(self, channel: str) -> Iterable[str]:
        return self.hub.subscribers(channel)

    def channels(self, player_id: str) -> Iterable[str]:
        if player_id == self.player_id:
            return self.own
        session = self.hub.sessions.get(player_id)
        return () if session is None else list(session.channels)

    def value(self, key: str) -> Value:
        return self.hub.data.newest(key)

    def health(self, player_id: str) -> Health:
        session = self.hub.sessions.get(player_id)
        healthy = [] if session is None else [c.healthy for c in session.connections.values()]
        if not any(healthy):
            return "unhealthy"
        return "healthy" if all(healthy) else "degraded"


def new_gathering(context: Context, row: SessionRow, view: SessionView, *, ended: bool = False) -> Gathering:
    return Gathering(
        view,
        row.player_id,
        row.session_id,
        now=context.clock.now(),
        randomness=context.randomness,
        max_message_size=context.settings.max_message_size,
        ended=ended,
    )


@frozen
class Begun(Generic[T]):
    """A run of a handler that counts, and the transaction that stores what it did, if it did anything."""

    gathering: Gathering
    result: T
    submission: Submission | None


async def transact(
    context: Context,
    run: Callable[[], Awaitable[tuple[Gathering, T]]],
    complete: Callable[[Gathering, T], Transaction | None],
    joined: Callable[[Submission], None] = lambda _: None,
    first: tuple[Gathering, T] | None = None,
    begun: Begun[T] | None = None,
) -> tuple[Gathering, T, Committed | Refused | None]:
    """Run a handler as a transaction: again if another one has changed what it read (`mythos_trio.core.data`).

    :param run: makes a gathering and runs the handler on it; what it returns is handed to *complete*.
    :param first: what the first run has come to, if that has been made already.
    :param begun: the same, if its transaction has joined the queue too (`begin`).
    :param complete: the transaction that stores what it did; None if there is nothing to store.
    :param joined: is told when the transaction has joined the queue: from then on it is the dispatcher's.
    :returns: the last run, and its outcome; None if nothing had to be stored. Then all that it read is.
    :raises Refusal: too much is unsaved, or others have been quicker `MAX_RUNS` times.
    """
    data = context.hub.data
    changed: list[str] = []
    for _ in range(MAX_RUNS):
        if begun is None:
            turn = await context.turns.take(changed) if changed else []
            try:
                if first is None:
                    context.statistics.ran()
                    gathering, result = await run()
                else:
                    (gathering, result), first = first, None
                await context.dispatcher.wait_room()
                # From here to the queue nothing waits: what is checked is still so when it is done.
                if gathering.reads and not data.is_current(gathering.reads):
                    context.statistics.to_be_repeated()
                    changed = data.changed(gathering.reads)
                    continue
                begun = begin(context, gathering, result, complete)
                if begun.submission is not None:
                    joined(begun.submission)
            finally:
                if turn:
                    context.turns.give_back(turn)
        gathering, result, submission = begun.gathering, begun.result, begun.submission
        begun = None
        if submission is None:
            if not gathering.reads or await _is_stored(data.rests_on(gathering.reads)):
                return gathering, result, None
            continue
        outcome = await submission.wait()
        if isinstance(outcome, Refused) and outcome.reason == Reason.STALE:
            context.statistics.to_be_repeated()
            continue
        return gathering, result, outcome
    raise Refusal(ErrorType.CAPACITY, "busy: others keep changing what this needs; try again", status=503, retry_ms=200)


def begin(
    context: Context, gathering: Gathering, result: T, complete: Callable[[Gathering, T], Transaction | None]
) -> Begun[T]:
    """A run of a handler counts, since what it has read is current: its transaction joins the queue, if it needs one.

    :raises Refusal: too much is unsaved.
    """
    gathering.tell()
    transaction = complete(gathering, result)
    return Begun(gathering, result, None if transaction is None else _join(context, transaction, gathering))


def _join(context: Context, transaction: Transaction, gathering: Gathering) -> Submission:
    """Its writes become the newest values, and it goes to the end of the writer's queue."""
    transaction.reads = {key: version for key, version in gathering.reads.items() if key not in gathering.writes}
    transaction.timers = gathering.timers
    submission = context.dispatcher.submit_nowait(transaction)
    transaction.writes = context.hub.data.join(gathering.writes, submission)
    return submission


async def _is_stored(submissions: list[Submission]) -> bool:
    """Wait for the commits; whether all of them are through."""
    return all([isinstance(await submission.wait(), Committed) for submission in submissions])


async def run_handler(
    call: Callable[[], Awaitable[Any]], gathering: Gathering, deadline: Deadline, player_id: str, name: str
) -> Any:
    """Run one handler under its deadline. Afterwards what it was handed can no longer be used."""
    deadline.begin()
    try:
        result = await contained(call, name, player_id)
    except BaseException as error:  # noqa: ASYNC103 - a scope's end: it tells whether all of it was its own
        if not deadline.end(error):
            raise
    else:
        deadline.end(None)
        return result
    finally:
        gathering.close()
    raise _cut_off(deadline.context, gathering, player_id, name)


def _cut_off(context: Context, gathering: Gathering, player_id: str, name: str) -> Refusal:
    """What the player of a handler that was cut off is told."""
    if context.draining:
        return draining()
    seconds = context.settings.handler_timeout
    log.error(
        f"Unexpected error in {name}: it took longer than HANDLER_TIMEOUT",
        error_type=ErrorType.SYSTEM.value,
        player_id=player_id,
        handler=name,
        seconds=seconds,
    )
    # Whatever it has read: it is not run again, to take as long once more.
    gathering.reads.clear()
    return Refusal(
        ErrorType.SYSTEM,
        f"the game took longer than {seconds:g} seconds; nothing has happened",
        status=503,
        details={"handler": name},
    )


@types.coroutine
def contained(call: Callable[[], Awaitable[T]], name: str, player_id: str) -> Generator[Any, Any, T]:
    """Run code of the game's: what escapes is an `Exception`, or Trio's `Cancelled`; what blocks is named."""
    steps = call().__await__()
    go: Callable[[Any], Any] = steps.send
    value: Any = None
    while True:
        began = time.perf_counter()
        try:
            message = go(value)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except BaseException as error:
            if _may_escape(error):
                raise
            # sys.exit() in a handler would end the server, for all.
            raise _ends_nothing(name, error) from error  # noqa: ASYNC104 - it is none of Trio's
        finally:
            if (seconds := time.perf_counter() - began) >= BLOCKED_SECONDS:
                _warn_blocked(name, player_id, seconds)
        try:
            go, value = steps.send, (yield message)
        except BaseException as error:  # noqa: ASYNC103 - it is handed on above
            go, value = steps.throw, error


def _may_escape(error: BaseException) -> bool:
    if isinstance(error, (Exception, trio.Cancelled)):
        return True
    return isinstance(error, BaseExceptionGroup) and error.subgroup(trio.Cancelled) is not None


def _ends_nothing(name: str, error: BaseException) -> GameError:
    return GameError(f"{name} raised {error!r}: a game cannot end the server; to turn a player down raise CommandError")


def _warn_blocked(name: str, player_id: str, seconds: float) -> None:
    log.warning(
        f"The game blocked the server: {name} ran for {seconds:.2f} s without waiting; meanwhile nobody was served",
        handler=name,
        player_id=player_id,
        seconds=round(seconds, 3),
        fix="await trio.to_thread.run_sync(function) for what takes long; trio.sleep instead of time.sleep",
    )


def handler_failed(gathering: Gathering, player_id: str, name: str, error: Exception) -> bytes:
    """The error reply for a handler that raised *error*, which has then done nothing.

    It is logged if the run counts: what was read may not have belonged together, and then it is run again.
    """
    gathering.drop()
    if isinstance(error, CommandError):
        return wire.error_body(ErrorType.VALIDATION, error.message, error.details)
    gathering.report = lambda: log.error(
        f"Unexpected error in {name}",
        error_type=ErrorType.SYSTEM.value,
        player_id=player_id,
        handler=name,
        exc_info=error,
    )
    return wire.error_body(ErrorType.SYSTEM, "the game made a mistake; nothing has happened", {"handler": name})


async def presence_handler(owed: Owed, gathering: Gathering, deadline: Deadline, reason: str) -> None:
    """Run a handler of presence. One that fails has told the game nothing, but is paid: it would only
    fail again. One that a drain has cut off raises a refusal: it is still owed."""
    context, player = deadline.context, gathering.player
    game = context.game
    calls: dict[Owed, Callable[[], Awaitable[None]]] = {
        Owed.JOIN: lambda: game.on_join(player),
        Owed.LINKDEAD: lambda: game.on_linkdead(player),
        Owed.RETURN: lambda: game.on_return(player),
        Owed.LEAVE: lambda: game.on_leave(player, reason),
    }
    name = f"on_{owed.value}"
    try:
        await run_handler(calls[owed], gathering, deadline, player.id, name)
    except Refusal:
        if context.draining:
            raise
        gathering.drop()
    except Exception as error:
        handler_failed(gathering, player.id, name, error)


async def pay_leave(owed: LeaveOwed, context: Context) -> None:
    """Run what an ended session still owes, ``on_leave`` last, until its commit is through."""
    row = owed.row
    presence = parse_presence(row.told, row.owed)
    view = SessionView(context.hub, row.player_id, row.channels)
    while presence.owed and not context.draining:
        due, paid = presence.owed[0], presence.paid()
        mark = PresenceMark(row.player_id, row.session_id, owed.state.value, paid.told.value, paid.owed_text)

        async def run(due: Owed = due) -> tuple[Gathering, None]:
            gathering = new_gathering(context, row, view, ended=True)
            with Deadline(context) as deadline:
                await presence_handler(due, gathering, deadline, owed.reason)
            return gathering, None

        def complete(gathering: Gathering, _: None, mark: PresenceMark = mark) -> Transaction:
            return Transaction(effects=gathering.effects, presence=[mark])

        try:
            _, _, outcome = await transact(context, run, complete)
        except Refusal:
            outcome = None
        if isinstance(outcome, Committed):
            presence = paid
        elif not context.draining:
            await trio.sleep(RETRY_SECONDS)


def world_gathering(context: Context) -> Gathering:
    """For a function that is about nobody: it is handed the `World`."""
    return Gathering(
        SessionView(context.hub, "", ()),
        None,
        None,
        now=context.clock.now(),
        randomness=context.randomness,
        max_message_size=context.settings.max_message_size,
    )


class GameRunner:
    """`Game.run`: what a game's own task does is a transaction too."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, function: Callable[[World], Awaitable[T]], /) -> T:
        """Run *function* and store what it did; raises the refusal if it could not be stored."""
        context = self._context
        if context.in_handler(trio.lowlevel.current_task()):
            raise GameError(
                "game.run() in a handler: what it does would happen even if the handler fails. The handler's own "
                "player.world does it, in one with the rest; game.run() is for tasks of the game's own."
            )
        if context.draining:
            raise draining()

        async def run() -> tuple[Gathering, T]:
            gathering = world_gathering(context)
            with Deadline(context) as deadline:
                result: T = await run_handler(lambda: function(gathering.world), gathering, deadline, "", "game.run")
            return gathering, result

        def complete(gathering: Gathering, _: T) -> Transaction | None:
            return Transaction(effects=gathering.effects) if gathering.has_effects else None

        _, result, outcome = await transact(context, run, complete)
        if isinstance(outcome, Refused):
            raise refusal_of(outcome)
        return result


async def fire(
    deadline: Deadline, timer: SetTimer, gather: Callable[[], Gathering], call: Callable[[Gathering], Awaitable[None]]
) -> tuple[Gathering, bool]:
    """Run a timer's handler in the transaction that removes the timer; False if that could not be stored.

    A handler that fails has done nothing, and its timer has fired all the same: it would only fail again.
    """
    context = deadline.context
    player_id = timer.owner.removeprefix(PLAYER)

    async def run() -> tuple[Gathering, None]:
        gathering = gather()
        try:
            await run_handler(lambda: call(gathering), gathering, deadline, player_id, "on_timer")
        except Refusal:
            if context.draining:
                raise
            gathering.drop()
        except Exception as error:
            handler_failed(gathering, player_id, "on_timer", error)
        return gathering, None

    def complete(gathering: Gathering, _: None) -> Transaction:
        return Transaction(effects=gathering.effects, fired=timer)

    gathering, _, outcome = await transact(context, run, complete)
    gone = isinstance(outcome, Refused) and outcome.reason == Reason.GONE
    return gathering, gone or isinstance(outcome, Committed)


class WorldTimers:
    """The world's timers: run one at a time, in a nursery of the server's."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ring, self._due = trio.open_memory_channel[SetTimer](MAX_DUE)

    async def run(self) -> None:
        """Runs until it is cancelled."""
        context = self._context
        async with trio.open_nursery() as nursery:
            clock = TimerClock(context.hub, WORLD, self._ring.send_nowait, nursery.start_soon)
            clock.open()
            async for timer in self._due:
                if context.draining:
                    continue  # it rests until the next start
                value = decode_json(timer.value)
                try:
                    with Deadline(context) as deadline:
                        _, done = await fire(
                            deadline,
                            timer,
                            lambda: world_gathering(context),
                            lambda g, t=timer, v=value: context.game.on_world_timer(g.world, t.name, v),  # type: ignore[misc]
                        )
                except Refusal:
                    done = False
                if not done:
                    clock.again(timer, RETRY_SECONDS)


class Background:
    """`Game.background`: the game's own task, run from the server's start to its drain.

    What escapes from it is logged, and it begins again after a pause: it ends no process, and touches no player.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._scope = trio.CancelScope()
        self._task: trio.lowlevel.Task | None = None

    async def run(self) -> None:
        """Runs until it returns by itself, or is stopped."""
        self._task = trio.lowlevel.current_task()
        pause = FIRST_PAUSE
        with self._scope:
            while not self._context.draining:
                began = trio.current_time()
                if await self._attempt():
                    return
                if trio.current_time() - began > LONGEST_PAUSE:
                    pause = FIRST_PAUSE
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _attempt(self) -> bool:
        """Whether it ended by itself, or since the server stops."""
        try:
            await contained(self._context.game.background, "background", "")
        except Exception as error:
            if self._context.draining:
                return True  # what it still wanted to do was refused
            log.error(
                "Unexpected error in background: it begins again after a pause",
                error_type=ErrorType.SYSTEM.value,
                handler="background",
                exc_info=error,
            )
            return False
        return True

    def stop(self) -> None:
        """The drain begins: nothing new. A `Game.run` that is under way may end, as handlers may."""
        if not self._context.in_handler(self._task):
            self._scope.cancel()

    def cancel(self) -> None:
        """No longer."""
        self._scope.cancel()
