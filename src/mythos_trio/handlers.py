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
from mythos_trio.core.errors import DRAIN, ErrorType, Refusal
from mythos_trio.core.session import Owed, State, parse_presence
from mythos_trio.core.transaction import Committed, PresenceMark, Transaction
from mythos_trio.game import CommandError, Game, Gathering, Health, Player, World
from mythos_trio.game import Presence as PresenceText
from mythos_trio.storage import SessionRow

if TYPE_CHECKING:
    from mythos_trio.config import Settings
    from mythos_trio.dispatcher import Dispatcher
    from mythos_trio.hub import Hub
    from mythos_trio.seams import Clock, Randomness
    from mythos_trio.session import LiveSession
    from mythos_trio.statistics import Statistics

T = TypeVar("T")

log = logs.get("session")

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
        gathering = new_gathering(context, row, channels, ended=True)
        paid = presence.paid()
        mark = PresenceMark(row.player_id, row.session_id, owed.state.value, paid.told.value, paid.owed_text)
        try:
            await presence_handler(context, presence.owed[0], gathering.player, gathering, owed.reason)
            submission = await context.dispatcher.submit(Transaction(effects=gathering.effects, presence=[mark]))
            stored = isinstance(await submission.wait(), Committed)
        except Refusal:
            stored = False
        if stored:
            presence = paid
        elif not context.draining:
            await trio.sleep(RETRY_SECONDS)


class GameRunner:
    """`Game.run`: what a game's own task does is a transaction too."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, function: Callable[[World], Awaitable[T]], /) -> T:
        """Run *function* and store what it did; raises the refusal if it could not be stored."""
        context = self._context
        if context.draining:
            raise draining()
        gathering = Gathering(
            SessionView(context.hub, ("", [])),
            None,
            None,
            now=context.clock.now(),
            randomness=context.randomness,
            max_message_size=context.settings.max_message_size,
        )
        result: T = await run_handler(context, lambda: function(gathering.world), gathering, "", "game.run")
        if gathering.effects:
            await context.dispatcher.commit(Transaction(effects=gathering.effects))
        return result
