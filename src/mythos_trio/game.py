"""What a game's author writes, and what they are handed.

A game is a class with async handlers, one for each thing that can happen to a player (`Game`). A
handler is handed a `Player` and says what it wants: send, publish, subscribe. None of these waits, and
none happens at once: what a handler says is gathered (`Gathering`), and when it returns all of it is
stored in one commit, with the command's answer, and then delivered. A handler that raises has done
nothing. So there is no moment at which half of a command has happened, also not if the server is killed.

This module is all that a game imports. The part below "For the server" is what runs the handlers.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar

import msgspec

from mythos_trio.core import messages, names, wire
from mythos_trio.core.data import PLAYER, TORN, Value, check_key, max_bytes, player_key
from mythos_trio.core.errors import Refusal
from mythos_trio.core.transaction import (
    MAX_EFFECT_BYTES,
    MAX_EFFECTS,
    Append,
    CancelTimer,
    Effect,
    SetTimer,
    Subscribe,
    TimerChange,
    Unsubscribe,
)
from mythos_trio.seams import Randomness, rfc3339

__all__ = ["Command", "CommandError", "Game", "GameError", "Health", "Player", "Presence", "World"]

T = TypeVar("T")

# The owner of the world's timers; a player's is `player_key`.
WORLD: Final = "world"
MAX_TIMER_SECONDS: Final = 366 * 86400

Presence: TypeAlias = Literal["online", "linkdead", "offline"]
Health: TypeAlias = Literal["healthy", "degraded", "unhealthy"]


class CommandError(Exception):
    """Raise it in `Game.on_command` to turn a command down: "You cannot go west."

    The player gets *message* as the reply (``"ok": false``), with *details* for programs. Nothing else
    that the handler said happens.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class GameError(Exception):
    """The game has a mistake: what is wrong, and what to do about it, for its author."""


class GameSpecError(GameError):
    """There is no game where ``mythos-trio serve MODULE:NAME`` was told to look."""


class Command(msgspec.Struct, frozen=True):
    """What a player wants. *content* is any JSON; *id* stays the same when a client asks again, so a
    game that does something outside of this server can tell by it."""

    id: str
    content: Any

    @property
    def text(self) -> str:
        """The command's line of text: the content, or its ``text``; empty if it has none."""
        content = self.content.get("text") if isinstance(self.content, dict) else self.content
        return content if isinstance(content, str) else ""


class WorldData:
    """The world's data: JSON values under keys, such as ``room:cellar/sword``. Valid until the handler ends.

    What is read is a copy: a change counts when it is put back. ``data["chest"] = {"gold": 3}`` is stored when
    the handler ends, with all else that it did. If another handler has changed what this one has read
    before that, this one is run again from its beginning, so that nothing is lost between the two. A
    player's data stands under ``player/NAME``; `World.data_of` is the comfortable way to it.
    """

    __slots__ = ("_gathering",)

    def __init__(self, gathering: Gathering) -> None:
        self._gathering = gathering

    def __getitem__(self, key: str) -> Any:
        value = self._gathering.read_value(key)
        if value is None:
            raise KeyError(key)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        value = self._gathering.read_value(key)
        return default if value is None else value

    def __contains__(self, key: str) -> bool:
        return self._gathering.read_value(key) is not None

    def __setitem__(self, key: str, value: object) -> None:
        if value is None:
            raise GameError(f"data[{key!r}] = None: None means that there is nothing; use `del data[{key!r}]`")
        self._gathering.write_value(key, value)

    def __delitem__(self, key: str) -> None:
        self[key]
        self._gathering.write_value(key, None)

    def pop(self, key: str, default: Any = None) -> Any:
        """Take the value out, or *default* if there is none."""
        value = self._gathering.read_value(key)
        if value is None:
            return default
        self._gathering.write_value(key, None)
        return value


class PlayerData:
    """A player's data: names and JSON values, at most 16 KiB together. Valid until the handler ends.

    It belongs to the player and passes from session to session. As with `WorldData`, what is read is a copy.
    """

    __slots__ = ("_gathering", "_key")

    def __init__(self, gathering: Gathering, player_id: str) -> None:
        self._gathering = gathering
        self._key = player_key(player_id)

    def _all(self) -> dict[str, Any]:
        value = self._gathering.read_value(self._key)
        return value if isinstance(value, dict) else {}

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self._all().get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __setitem__(self, name: str, value: object) -> None:
        if not isinstance(name, str):
            raise GameError(f"data[{name!r}]: a name is a string")
        self._gathering.write_value(self._key, {**self._all(), name: value})

    def __delitem__(self, name: str) -> None:
        everything = self._all()
        del everything[name]
        self._gathering.write_value(self._key, everything)

    def pop(self, name: str, default: Any = None) -> Any:
        everything = self._all()
        if name not in everything:
            return default
        value = everything.pop(name)
        self._gathering.write_value(self._key, everything)
        return value


class World:
    """Everybody and every place. Valid until the handler that was handed it ends.

    Where a message can have more *fields* than its type and content, they stand beside these in the
    message: ``publish("room:inn", "say", "ann says: hi", player="ann")``. A field ``replace_key`` says that
    of two messages to the same target with the same key only the newer one matters to a client that has fallen
    behind.
    """

    __slots__ = ("_gathering",)

    def __init__(self, gathering: Gathering) -> None:
        self._gathering = gathering

    def publish(self, channel: str, type_: str, content: object, /, **fields: object) -> None:
        """Send to all who subscribe to *channel* when this is stored."""
        target = names.to_channel(_channel("publish", channel))
        self._gathering.append("publish", target, type_, content, fields)

    def send(self, player_id: str, type_: str, content: object, /, **fields: object) -> None:
        """Send to one player; who is absent finds it on coming back, like mail."""
        target = names.to_player(_checked("send", names.player_id, player_id))
        self._gathering.append("send", target, type_, content, fields)

    @property
    def data(self) -> WorldData:
        """Values that belong to nobody: the state of rooms, things, monsters."""
        return WorldData(self._gathering)

    def data_of(self, player_id: str) -> PlayerData:
        """A player's data, present or not."""
        return PlayerData(self._gathering, _checked("data_of", names.player_id, player_id))

    def after(self, seconds: float, name: str, value: object = None) -> None:
        """Have `Game.on_world_timer` run in *seconds*, once, whatever happens to the server meanwhile.

        A timer of the world with the same name is replaced.
        """
        self._gathering.set_timer(WORLD, seconds, name, value)

    def cancel(self, name: str) -> None:
        """Stop the world's timer *name*, if there is one."""
        self._gathering.cancel_timer(WORLD, name)

    def broadcast(self, type_: str, content: object, /, **fields: object) -> None:
        """Send to everyone who has a session."""
        self._gathering.append("broadcast", names.EVERYONE, type_, content, fields)

    def present(self) -> list[str]:
        """The ids of all players who are online or link-dead."""
        return list(self._gathering.view("present").present())

    def presence(self, player_id: str) -> Presence:
        """``"online"``; ``"linkdead"`` (connection lost, may be back in a moment); else ``"offline"``."""
        return self._gathering.view("presence").presence(player_id)

    def subscribers(self, channel: str) -> list[str]:
        """The ids of all present players who subscribe to *channel*."""
        return self._gathering.subscribers(_channel("subscribers", channel))


class Player:
    """The player whom a handler is about. Valid until the handler ends; *id* and *session_id* stay
    readable."""

    __slots__ = ("_gathering", "id", "session_id")

    def __init__(self, gathering: Gathering, player_id: str, session_id: str) -> None:
        self._gathering = gathering
        self.id: Final = player_id
        self.session_id: Final = session_id

    @property
    def world(self) -> World:
        """Everybody and every place."""
        return World(self._gathering)

    def send(self, type_: str, content: object, /, **fields: object) -> None:
        """Send to this player, on all connections. For *fields* see `World`."""
        self._gathering.append("send", names.to_player(self.id), type_, content, fields)

    def subscribe(self, channel: str) -> None:
        """From here on the player gets what is published to *channel*, also by later lines of this handler."""
        self._gathering.subscribe(_channel("subscribe", channel))

    def unsubscribe(self, channel: str) -> None:
        """From here on the player no longer gets what is published to *channel*."""
        self._gathering.unsubscribe(_channel("unsubscribe", channel))

    @property
    def data(self) -> PlayerData:
        """The player's own values: they pass from session to session."""
        return PlayerData(self._gathering, self.id)

    def after(self, seconds: float, name: str, value: object = None) -> None:
        """Have `Game.on_timer` run in *seconds*, once, whatever happens to the server meanwhile.

        A player's timers rest while the player is offline, and then wait their full time again; so they do
        after a restart. A timer of the same player and name is replaced.
        """
        self._gathering.set_timer(player_key(self.id), seconds, name, value)

    def cancel(self, name: str) -> None:
        """Stop the player's timer *name*, if there is one."""
        self._gathering.cancel_timer(player_key(self.id), name)

    @property
    def channels(self) -> list[str]:
        """What the player subscribes to, in the order of subscribing. A new session begins with none."""
        return self._gathering.channels()

    @property
    def health(self) -> Health:
        """How well the player's connections do: all of them, some of them or none of them healthy."""
        return self._gathering.view("health").health(self.id)

    def new_session(self) -> None:
        """Begin a new session for the player, after this handler: a new stream, no subscriptions."""
        self._gathering.ask_for_new_session()

    def disconnect(self, reason: str = "disconnected by the game") -> None:
        """End the player's connections, after this handler and its reply. They are told *reason*, and not
        to come back by themselves."""
        self._gathering.ask_to_disconnect(reason)

    def __repr__(self) -> str:
        return f"<Player {self.id}>"


class Runner(Protocol):
    """How the server runs a function of the game's own tasks as a transaction."""

    async def __call__(self, function: Callable[[World], Awaitable[T]], /) -> T: ...


class Game:
    """The handlers, with what happens if a game leaves one out.

    One handler of a player runs at a time. A handler that raises, or takes longer than
    ``HANDLER_TIMEOUT``, has done nothing; the player is told, and nobody else is touched.
    """

    _runner: Runner | None = None

    async def on_join(self, player: Player) -> None:
        """The player has come into the world: for the first time, with a new session, or after having been
        offline. `Player.channels` tells: an old session still has its subscriptions."""

    async def on_command(self, player: Player, command: Command) -> Any:
        """The player wants something. What is returned (any JSON) is the content of the reply.

        :raises CommandError: the player is told no.
        """
        raise CommandError("This game has no commands.")

    async def on_subscribe(self, player: Player, channel: str) -> bool:
        """The player's client asks to subscribe to *channel*, or, if it is one of `Player.channels`, to
        leave it. Return whether it may; it is then done."""
        return False

    async def on_timer(self, player: Player, name: str, value: Any) -> None:
        """A timer of the player's is due (`Player.after`). It is gone when this is stored, so it runs once."""

    async def on_world_timer(self, world: World, name: str, value: Any) -> None:
        """A timer of the world's is due (`World.after`)."""

    async def on_linkdead(self, player: Player) -> None:
        """The player's last connection is gone. There are ``LINKDEAD_GRACE`` seconds to come back."""

    async def on_return(self, player: Player) -> None:
        """A link-dead player is back."""

    async def on_leave(self, player: Player, reason: str) -> None:
        """The player has left the world: link-dead for too long, or the session has ended."""

    async def background(self) -> None:
        """The game's own task, such as weather: it begins when the server is ready, with `run` for what it does,
        and is cancelled when the server stops. If it raises, that is logged, and it begins again after a pause."""

    async def run(self, function: Callable[[World], Awaitable[T]]) -> T:
        """Do something that no player asked for: from a task of the game's own, not from a handler.

        *function* is a handler too, but is handed the `World`: what it says is stored at once when it
        returns, and not at all if it raises. Returns what *function* returns.
        """
        if self._runner is None:
            raise GameError(
                "game.run() works while the server runs this game, and on that same object: start it by "
                "`mythos-trio serve MODULE:NAME`. What is to happen at the start belongs into on_join."
            )
        return await self._runner(function)

    def bind(self, runner: Runner) -> None:
        """The server calls this once, before any handler."""
        self._runner = runner


# For the server.


class View(Protocol):
    """What a handler may ask: the state of the world as committed."""

    def present(self) -> Iterable[str]: ...
    def presence(self, player_id: str) -> Presence: ...
    def subscribers(self, channel: str) -> Iterable[str]:
        """Those who are present."""
        ...

    def channels(self, player_id: str) -> Iterable[str]:
        """In the order of subscribing."""
        ...

    def health(self, player_id: str) -> Health: ...
    def value(self, key: str) -> Value:
        """The newest value of the game's data, stored or not."""
        ...


class Gathering:
    """What one handler says, in the order of its calls.

    :param player_id: whom the handler is about; None for a function of `Game.run`.
    :param session_id: their session; None goes with a *player_id* of None.
    :param now: POSIX seconds, the timestamp of all its messages.
    :param max_message_size: bytes of one message, and of the answer.
    :param ended: the session is over (`Game.on_leave` after a switch): there is nothing to subscribe.
    """

    __slots__ = (
        "_bytes",
        "_closed",
        "_ended",
        "_joined",
        "_left",
        "_max_message_size",
        "_now",
        "_player_id",
        "_randomness",
        "_session_id",
        "_view",
        "disconnect_wanted",
        "effects",
        "new_session_wanted",
        "reads",
        "report",
        "timers",
        "writes",
    )

    def __init__(
        self,
        view: View,
        player_id: str | None,
        session_id: str | None,
        *,
        now: float,
        randomness: Randomness,
        max_message_size: int,
        ended: bool = False,
    ) -> None:
        self.effects: list[Effect] = []
        self.reads: dict[str, int] = {}
        """The version of every key of the data that the handler has read or written."""
        self.writes: dict[str, bytes | None] = {}
        self.timers: list[TimerChange] = []
        self.new_session_wanted = False
        self.disconnect_wanted: str | None = None
        self.report: Callable[[], None] | None = None
        """What to log if this run of the handler counts."""
        self._player_id = player_id
        self._session_id = session_id
        self._view = view
        self._now = now
        self._randomness = randomness
        self._max_message_size = max_message_size
        self._ended = ended
        self._bytes = 0
        self._closed = False
        # The handler's own changes. A channel that was left and joined again is in both.
        self._left: set[str] = set()
        self._joined: dict[str, None] = {}

    @property
    def player(self) -> Player:
        """What a handler is handed."""
        if self._player_id is None or self._session_id is None:
            raise GameError("no player here: the function of game.run() is handed a World")
        return Player(self, self._player_id, self._session_id)

    @property
    def world(self) -> World:
        """What a function of `Game.run` is handed."""
        return World(self)

    def close(self) -> None:
        """The handler has ended: every later use of what it was handed raises `GameError`."""
        self._closed = True

    def drop(self) -> None:
        """The handler has failed: it has done, and asked for, nothing."""
        self.effects.clear()
        self.writes.clear()
        self.timers.clear()
        self.new_session_wanted = False
        self.disconnect_wanted = None

    def tell(self) -> None:
        """This run of the handler counts."""
        if self.report is not None:
            self.report()

    def answer(self, content: object) -> bytes:
        """What a handler returned as the body of a `mythos_trio.core.transaction.Answer`.

        :raises GameError: it is not JSON, or too big.
        """
        body = _as_json("on_command returned", wire.answer_body, content)
        self._check_size("on_command returned", body)
        return body

    def view(self, call: str) -> View:
        """For reading."""
        self._check_open(call)
        return self._view

    def append(self, call: str, target: str, type_: str, content: object, fields: dict[str, object]) -> None:
        self._check_open(call)
        type_ = _checked(call, messages.message_type, type_)
        _check_fields(call, fields)
        message_id = self._randomness.message_id()
        body = _as_json(call, messages.make_body, message_id, type_, content, rfc3339(self._now), fields)
        self._check_size(call, body)
        self._gather(Append(target, message_id, body), len(body))

    def subscribe(self, channel: str) -> None:
        self._check_open("subscribe")
        if channel in self.channels():
            return
        if self._ended:
            raise GameError(f"subscribe({channel!r}): this session has ended; subscribe in on_join of the next one")
        self._gather(Subscribe(*self._who, channel), len(channel))
        self._joined[channel] = None

    def unsubscribe(self, channel: str) -> None:
        self._check_open("unsubscribe")
        if channel not in self.channels():
            return
        # The subscriptions of an ended session have ended with it.
        if not self._ended:
            self._gather(Unsubscribe(*self._who, channel), len(channel))
        self._joined.pop(channel, None)
        self._left.add(channel)

    def channels(self) -> list[str]:
        player_id, _ = self._who
        committed = self.view("channels").channels(player_id)
        changed = self._left | self._joined.keys()
        return [channel for channel in committed if channel not in changed] + list(self._joined)

    def subscribers(self, channel: str) -> list[str]:
        committed = list(self.view("subscribers").subscribers(channel))
        if channel not in self._joined and channel not in self._left:
            return committed
        player_id, _ = self._who
        others = [name for name in committed if name != player_id]
        return [*others, player_id] if channel in self._joined else others

    def read_value(self, key: str) -> Any:
        """The handler's own value, else the newest: a copy. None if there is none."""
        self._check_open("data")
        key = _checked("data", check_key, key)
        body = self.writes[key] if key in self.writes else self._newest(key)
        return None if body is None else messages.decode_json(body)

    def _newest(self, key: str) -> bytes | None:
        # If another handler has finished since the first look, this one is run again when it ends: until then it
        # may see what it could not have seen together, but nothing of that counts.
        value = self._view.value(key)
        if self.reads.setdefault(key, value.version) != value.version:
            # For good: what it saw second may be taken back by a commit that fails, and what it saw first is the
            # newest again when it ends.
            self.reads[key] = TORN
        return value.body

    def write_value(self, key: str, value: object) -> None:
        self._check_open("data")
        key = _checked("data", check_key, key)
        self._newest(key)
        if key.startswith(PLAYER) and value is not None and not isinstance(value, dict):
            raise GameError(f"data[{key!r}]: a player's data are names and values: a dict, not {_brief(value)}")
        body = None if value is None else _as_json(f"data[{key!r}]", wire.encode, value)
        if body is not None and len(body) > max_bytes(key):
            raise GameError(f"data[{key!r}]: {len(body):,} bytes; there is room for {max_bytes(key):,}")
        if key not in self.writes:
            self._count(len(key))
        self._weigh(len(body or b""))
        self.writes[key] = body

    def set_timer(self, owner: str, seconds: float, name: str, value: object) -> None:
        self._check_open("after")
        name = _checked("after", names.message_id, name)
        if not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_TIMER_SECONDS:
            raise GameError(f"after: seconds are a number from 0 to {MAX_TIMER_SECONDS:,}, not {_brief(seconds)}")
        body = _as_json("after", wire.encode, value)
        self._check_size("after", body)
        self._count(len(body))
        self.timers.append(SetTimer(owner, name, self._randomness.token(), float(seconds), body))

    def cancel_timer(self, owner: str, name: str) -> None:
        self._check_open("cancel")
        self._count(len(name))
        self.timers.append(CancelTimer(owner, _checked("cancel", names.message_id, name)))

    @property
    def rests_on_nothing(self) -> bool:
        """Whether it has looked at no data, and has done nothing: then there is nothing to check and to store."""
        return not (self.reads or self.effects or self.timers)

    @property
    def has_effects(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.effects or self.writes or self.timers)

    @property
    def asks_for_more(self) -> bool:
        """Whether something is to be done after the reply."""
        return self.new_session_wanted or self.disconnect_wanted is not None

    def ask_for_new_session(self) -> None:
        self._check_open("new_session")
        self.new_session_wanted = True

    def ask_to_disconnect(self, reason: str) -> None:
        self._check_open("disconnect")
        # It goes into a close frame, which has room for 123 bytes (RFC 6455, section 5.5).
        if not isinstance(reason, str) or not 1 <= len(reason.encode(errors="replace")) <= 123:
            raise GameError(f"disconnect: the reason is a text of 1-123 bytes, not {_brief(reason)}")
        self.disconnect_wanted = reason

    @property
    def _who(self) -> tuple[str, str]:
        """The player's id and session."""
        player = self.player
        return player.id, player.session_id

    def _gather(self, effect: Effect, size: int) -> None:
        self._count(size)
        self.effects.append(effect)

    def _count(self, size: int) -> None:
        """One more effect of *size* bytes."""
        if len(self.effects) + len(self.writes) + len(self.timers) >= MAX_EFFECTS:
            raise GameError(
                f"one handler may send, publish and subscribe {MAX_EFFECTS:,} times in all. To reach many players "
                "publish once to a channel that they subscribe to."
            )
        self._weigh(size)

    def _weigh(self, size: int) -> None:
        if self._bytes + size > MAX_EFFECT_BYTES:
            raise GameError(
                f"one handler's messages and data may have {MAX_EFFECT_BYTES:,} bytes in all. Send less, or "
                "publish once to a channel instead of the same to each player."
            )
        self._bytes += size

    def _check_size(self, call: str, body: bytes) -> None:
        if len(body) > self._max_message_size:
            raise GameError(f"{call}: {len(body):,} bytes; MAX_MESSAGE_SIZE is {self._max_message_size:,}")

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise GameError(
                f"{call}: the handler that was handed this has ended, and its transaction with it. Do it before the "
                "handler returns; a task of the game's own does it by `await game.run(function)`, where "
                "function(world) is async."
            )


def _checked(call: str, check: Callable[[object], str], value: object) -> str:
    """*value* if the rule *check* lets it pass; its refusal in the author's terms."""
    try:
        return check(value)
    except Refusal as refusal:
        raise GameError(f"{call}: {refusal.message}; not {_brief(value)}") from None


def _channel(call: str, value: str) -> str:
    return _checked(call, names.channel, value)


def _check_fields(call: str, fields: dict[str, object]) -> None:
    taken = fields.keys() & (messages.OWN_FIELDS | messages.SERVER_FIELDS)
    if taken:
        raise GameError(f"{call}: the server sets {', '.join(sorted(taken))}; name the field otherwise")
    if "replace_key" in fields:
        _checked(call, messages.replace_key, fields["replace_key"])


def _as_json(call: str, encode: Callable[..., bytes], *arguments: object) -> bytes:
    try:
        return encode(*arguments)
    except RecursionError:
        raise GameError(f"{call}: the content contains itself, or is nested too deeply") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise GameError(f"{call}: the content cannot be written as JSON: {error}") from None


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def never_waits(handler: Callable[..., object]) -> bool:
    """Whether *handler* is an async function that surely never waits: there is no ``await``, ``async with`` or
    ``async for`` in it, so the first step of a call is also its last."""
    code = getattr(handler, "__code__", None)
    if code is None or not inspect.iscoroutinefunction(handler):
        return False
    # Each of the three is compiled to a loop that hands on what the awaited one yields.
    return not any(instruction.opname in ("SEND", "YIELD_VALUE") for instruction in dis.get_instructions(code))


# Finding the game.

# What each handler is handed.
HANDLERS: Final = {
    "on_join": ("player",),
    "on_command": ("player", "command"),
    "on_subscribe": ("player", "channel"),
    "on_timer": ("player", "name", "value"),
    "on_world_timer": ("world", "name", "value"),
    "on_linkdead": ("player",),
    "on_return": ("player",),
    "on_leave": ("player", "reason"),
    "background": (),
}
_SPEC: Final = re.compile(r"([\w.]+):([\w.]+)")


def load_game(spec: str) -> Game:
    """The game at *spec*, ``MODULE:NAME``, looked for in the working directory too.

    NAME is a `Game`, any object with some of its handlers, or a class or function that makes one
    without arguments.

    :raises GameSpecError: there is none; what was looked for, what is there that looks like it, or
        what is wrong with its handlers.
    """
    match = _SPEC.fullmatch(spec)
    if match is None or match[1].endswith(".py"):
        raise GameSpecError(f'{spec!r} is not a game: write MODULE:NAME, like "mygame:game"{_spec_hint(spec)}')
    # A console script's path has the script's directory first, not the working directory.
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    module_name, path = match.groups()
    found = reduce(lambda parent, name: _attribute(spec, parent, name), path.split("."), _module(spec, module_name))
    return make_game(spec, found)


def make_game(spec: str, found: object) -> Game:
    """*found* as a game: it is one, or has some of the handlers, or makes one without arguments.

    :param spec: how its author calls it, for the error.
    :raises GameSpecError: it is none, or its handlers are not as they have to be.
    """
    return _as_game(spec, _made(spec, found))


def _spec_hint(spec: str) -> str:
    file, _, name = spec.partition(":")
    if file.endswith(".py"):
        return f'; the module, not the file: "{Path(file).stem}:{name or "game"}"'
    return "" if ":" in spec else f'; perhaps "{spec}:game"'


def _module(spec: str, name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            there = [path.stem for path in Path.cwd().glob("*.py")]
            raise GameSpecError(
                f"{spec}: there is no module {error.name!r} in {Path.cwd()} or among the installed packages"
                f"{_did_you_mean(name, there)}"
            ) from None
        raise GameSpecError(f"{spec}: {name} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        raise GameSpecError(f"{spec}: importing {name} failed{_where(error)}") from error


def _attribute(spec: str, parent: object, name: str) -> object:
    try:
        return getattr(parent, name)
    except AttributeError:
        there = [attribute for attribute in dir(parent) if not attribute.startswith("_")]
        where = getattr(parent, "__name__", type(parent).__name__)
        raise GameSpecError(f"{spec}: {where} has no {name!r}{_did_you_mean(name, there)}") from None


def _made(spec: str, found: object) -> object:
    """*found*, or what it makes if it is a class or a function."""
    if not inspect.isclass(found) and (_handlers(found) or not callable(found)):
        return found
    if inspect.iscoroutinefunction(found):
        raise GameSpecError(f"{spec} is an async function; a game is made by a plain one, or is an object")
    try:
        return found()
    except Exception as error:
        raise GameSpecError(f"{spec}: making the game, without arguments, failed{_where(error)}") from error


def _as_game(spec: str, author: object) -> Game:
    _check_spelling(spec, author)
    handlers = _handlers(author)
    if not handlers:
        raise GameSpecError(f"{spec} is not a game ({_brief(author)}): it has none of {', '.join(HANDLERS)}")
    for name, handler in handlers.items():
        _check_handler(spec, name, handler)
    return author if isinstance(author, Game) else _Adapted(handlers)


class _Adapted(Game):
    """An object with some of the handlers, as a `Game`."""

    def __init__(self, handlers: dict[str, Any]) -> None:
        for name, handler in handlers.items():
            setattr(self, name, handler)


def _handlers(author: object) -> dict[str, Any]:
    return {name: getattr(author, name) for name in HANDLERS if hasattr(author, name)}


def _check_spelling(spec: str, author: object) -> None:
    """A handler whose name is misspelt would never be called, and nothing would say so."""
    for name in dir(author):
        if name.startswith("on_") and name not in HANDLERS:
            close = get_close_matches(name, HANDLERS, 1, 0.8)
            if close:
                raise GameSpecError(f"{spec}: {name} is not a handler; is {close[0]} meant?")


def _check_handler(spec: str, name: str, handler: object) -> None:
    arguments = HANDLERS[name]
    wanted = f"async def {name}({', '.join(('self', *arguments))})"
    if not inspect.iscoroutinefunction(handler):
        raise GameSpecError(f"{spec}: {name} is not async; write `{wanted}`")
    try:
        inspect.signature(handler).bind(*arguments)
    except TypeError as error:
        raise GameSpecError(f"{spec}: {name} cannot be called as `{wanted}`: {error}") from None


def _did_you_mean(name: str, there: list[str]) -> str:
    close = get_close_matches(name, there, 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _where(error: Exception) -> str:
    """The error and the line that raised it. (A `SyntaxError` says its line itself.)"""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, SyntaxError) else f" ({frame.filename}, line {frame.lineno})"
    return f": {type(error).__name__}: {error}{place}"
