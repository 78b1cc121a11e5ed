"""Running the game's handlers: under a deadline, with their effects gathered.

What escapes from a handler is caught here, around it: its effects are dropped, the player is told, and no
connection ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio
from attrs import define, field, frozen

from mythos_trio import logs
from mythos_trio.core import wire
from mythos_trio.core.data import MAX_RUNS, Value
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
from mythos_trio.dispatcher import refusal_of
from mythos_trio.game import WORLD, CommandError, Game, Gathering, Health, Player, World
from mythos_trio.game import Presence as PresenceText
from mythos_trio.storage import SessionRow
from mythos_trio.timers import TimerClock

if TYPE_CHECKING:
    from mythos_trio.config import Settings
    from mythos_trio.dispatcher import Dispatcher, Submission
    from mythos_trio.hub import Hub
    from mythos_trio.seams import Clock, Randomness
    from mythos_trio.session import LiveSession
    from mythos_trio.statistics import Statistics

T = TypeVar("T")

log = logs.get("session")

# Timers that are due and wait for their turn: more cannot be, since a name has one timer.
MAX_DUE: Final = float("inf")

# A commit that the store refused is tried again after this time; the store heals by itself.
RETRY_SECONDS: Final = 5.0


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
    draining: bool = False
    """From now on no command is taken, and a link-dead connection owes nothing."""
    switch: Callable[[LiveSession], None] = lambda _: None
    """Given by the registrar: begin a new session for this one's player."""
    handlers: dict[trio.CancelScope, None] = field(factory=dict)
    """The handlers that run now: a drain cuts them off after a while."""
    runs: int = 0
    """Runs of handlers, and of these such that had to be repeated since another one came between."""
    reruns: int = 0


@frozen
class LeaveOwed:
    """``on_leave`` of a session that has ended is owed."""

    row: SessionRow
    reason: str
    state: State = State.ENDED


def draining() -> Refusal:
    return Refusal(ErrorType.SYSTEM, "the server is restarting", status=503, close=DRAIN, retry_ms=1000)


@frozen
class SessionView:
    """What the handlers of one session may ask: the hub, and the session's own subscriptions."""

    hub: Hub
    own: tuple[str, list[str]]

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
        if player_id == self.own[0]:
            return self.own[1]
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


def new_gathering(context: Context, row: SessionRow, channels: list[str], *, ended: bool = False) -> Gathering:
    return Gathering(
        SessionView(context.hub, (row.player_id, channels)),
        row.player_id,
        row.session_id,
        now=context.clock.now(),
        randomness=context.randomness,
        max_message_size=context.settings.max_message_size,
        ended=ended,
    )


async def transact(
    context: Context,
    run: Callable[[], Awaitable[tuple[Gathering, T]]],
    complete: Callable[[Gathering, T], Transaction | None],
    joined: Callable[[Submission], None] = lambda _: None,
) -> tuple[Gathering, T, Committed | Refused | None]:
    """Run a handler as a transaction: again if another one has changed what it read (`mythos_trio.core.data`).

    :param run: makes a gathering and runs the handler on it; what it returns is handed to *complete*.
    :param complete: the transaction that stores what it did; None if there is nothing to store.
    :param joined: is told when the transaction has joined the queue: from then on it is the dispatcher's.
    :returns: the last run, and its outcome; None if nothing had to be stored. Then all that it read is.
    :raises Refusal: too much is unsaved, or others have been quicker `MAX_RUNS` times.
    """
    data = context.hub.data
    for _ in range(MAX_RUNS):
        context.runs += 1
        gathering, result = await run()
        await context.dispatcher.wait_room()
        # From here to the queue nothing waits: what is checked is still so when it is done.
        if not data.is_current(gathering.reads):
            context.reruns += 1
            continue
        transaction = complete(gathering, result)
        if transaction is None:
            if await _is_stored(data.rests_on(gathering.reads)):
                return gathering, result, None
            continue
        transaction.reads = {key: version for key, version in gathering.reads.items() if key not in gathering.writes}
        transaction.timers = gathering.timers
        submission = context.dispatcher.submit_nowait(transaction)
        transaction.writes = data.join(gathering.writes, submission)
        joined(submission)
        outcome = await submission.wait()
        if isinstance(outcome, Refused) and outcome.reason == Reason.STALE:
            context.reruns += 1
            continue
        return gathering, result, outcome
    raise Refusal(ErrorType.CAPACITY, "busy: others keep changing what this needs; try again", status=503, retry_ms=200)


async def _is_stored(submissions: list[Submission]) -> bool:
    """Wait for the commits; whether all of them are through."""
    return all([isinstance(await submission.wait(), Committed) for submission in submissions])


async def run_handler(
    context: Context, call: Callable[[], Awaitable[Any]], gathering: Gathering, player_id: str, name: str
) -> Any:
    """Run one handler under its deadline. Afterwards what it was handed can no longer be used."""
    with trio.move_on_after(context.settings.handler_timeout) as scope:
        context.handlers[scope] = None
        try:
            return await call()
        finally:
            gathering.close()
            del context.handlers[scope]
    if scope.cancelled_caught and context.draining:
        raise draining()
    if scope.cancelled_caught:
        raise Refusal(
            ErrorType.SYSTEM,
            f"the game took longer than {context.settings.handler_timeout:g} seconds; nothing has happened",
            status=503,
            details={"handler": name},
        )
    return None


def handler_failed(context: Context, player_id: str, name: str, error: Exception) -> bytes:
    """The error reply for a handler that raised *error*, which has then done nothing."""
    if isinstance(error, CommandError):
        return wire.error_body(ErrorType.VALIDATION, error.message, error.details)
    log.error(
        f"Unexpected error in {name}",
        error_type=ErrorType.SYSTEM.value,
        player_id=player_id,
        handler=name,
        exc_info=error,
    )
    return wire.error_body(ErrorType.SYSTEM, "the game made a mistake; nothing has happened", {"handler": name})


async def presence_handler(context: Context, owed: Owed, player: Player, gathering: Gathering, reason: str) -> None:
    """Run a handler of presence. One that fails has told the game nothing, but is paid: it would only
    fail again. One that a drain has cut off raises a refusal: it is still owed."""
    game = context.game
    calls: dict[Owed, Callable[[], Awaitable[None]]] = {
        Owed.JOIN: lambda: game.on_join(player),
        Owed.LINKDEAD: lambda: game.on_linkdead(player),
        Owed.RETURN: lambda: game.on_return(player),
        Owed.LEAVE: lambda: game.on_leave(player, reason),
    }
    name = f"on_{owed.value}"
    try:
        await run_handler(context, calls[owed], gathering, player.id, name)
    except Refusal as refusal:
        if context.draining:
            raise
        gathering.drop()
        log.error(
            f"Unexpected error in {name}",
            error_type=refusal.error_type.value,
            player_id=player.id,
            reason=refusal.message,
        )
    except Exception as error:
        gathering.drop()
        handler_failed(context, player.id, name, error)


async def pay_leave(owed: LeaveOwed, context: Context) -> None:
    """Run what an ended session still owes, ``on_leave`` last, until its commit is through."""
    row = owed.row
    presence = parse_presence(row.told, row.owed)
    channels = list(row.channels)
    while presence.owed and not context.draining:
        due, paid = presence.owed[0], presence.paid()
        mark = PresenceMark(row.player_id, row.session_id, owed.state.value, paid.told.value, paid.owed_text)

        async def run(due: Owed = due) -> tuple[Gathering, None]:
            gathering = new_gathering(context, row, channels, ended=True)
            await presence_handler(context, due, gathering.player, gathering, owed.reason)
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
        SessionView(context.hub, ("", [])),
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
        if context.draining:
            raise draining()

        async def run() -> tuple[Gathering, T]:
            gathering = world_gathering(context)
            result: T = await run_handler(context, lambda: function(gathering.world), gathering, "", "game.run")
            return gathering, result

        def complete(gathering: Gathering, _: T) -> Transaction | None:
            return Transaction(effects=gathering.effects) if gathering.has_effects else None

        _, result, outcome = await transact(context, run, complete)
        if isinstance(outcome, Refused):
            raise refusal_of(outcome)
        return result


async def fire(
    context: Context, timer: SetTimer, gather: Callable[[], Gathering], call: Callable[[Gathering], Awaitable[None]]
) -> tuple[Gathering, bool]:
    """Run a timer's handler in the transaction that removes the timer; False if that could not be stored.

    A handler that fails has done nothing, and its timer has fired all the same: it would only fail again.
    """

    async def run() -> tuple[Gathering, None]:
        gathering = gather()
        try:
            await run_handler(context, lambda: call(gathering), gathering, timer.owner, "on_timer")
        except Refusal:
            if context.draining:
                raise
            gathering.drop()
            log.error(
                "Unexpected error in on_timer: it took longer than HANDLER_TIMEOUT",
                error_type=ErrorType.SYSTEM.value,
                timer=timer.name,
                owner=timer.owner,
            )
        except Exception as error:
            gathering.drop()
            handler_failed(context, timer.owner.removeprefix("player/"), "on_timer", error)
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
                    _, done = await fire(
                        context,
                        timer,
                        lambda: world_gathering(context),
                        lambda g, t=timer, v=value: context.game.on_world_timer(g.world, t.name, v),  # type: ignore[misc]
                    )
                except Refusal:
                    done = False
                if not done:
                    clock.again(timer, RETRY_SECONDS)
