"""A stage for games: it runs their handlers, and carries out what they say, without a server."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from mythos_trio.core import names
from mythos_trio.core.data import ABSENT, Value, player_key
from mythos_trio.core.transaction import Append, CancelTimer, SetTimer, Subscribe, Unsubscribe
from mythos_trio.game import WORLD, Command, CommandError, Game, Gathering, Health, Player, Presence, World
from mythos_trio.seams import SeededRandomness

NOW = 1_767_225_600.0  # 2026-01-01T00:00:00Z


class Stage:
    """A `mythos_trio.game.View` that changes as transactions are committed.

    *scrolls* has what each player was sent, decoded, in order; *values* the data, by key; *timers* those that are
    set, by owner and name, each with the *now* at which it is due. A player's rest while the player is offline.
    """

    def __init__(self, game: Game | None = None) -> None:
        self.game = game or Game()
        self.presences: dict[str, Presence] = {}
        self.subscriptions: dict[str, list[str]] = {}
        self.scrolls: dict[str, list[dict[str, Any]]] = {}
        self.values: dict[str, Value] = {}
        self.timers: dict[tuple[str, str], tuple[float, SetTimer]] = {}
        self.now = 0.0
        self.randomness = SeededRandomness(1)
        self.game.bind(self.run)

    # The view.

    def present(self) -> list[str]:
        return [name for name, presence in self.presences.items() if presence != "offline"]

    def presence(self, player_id: str) -> Presence:
        return self.presences.get(player_id, "offline")

    def subscribers(self, channel: str) -> list[str]:
        return [name for name in self.present() if channel in self.subscriptions.get(name, [])]

    def channels(self, player_id: str) -> list[str]:
        return self.subscriptions.get(player_id, [])

    def health(self, player_id: str) -> Health:
        return "healthy" if self.presence(player_id) == "online" else "unhealthy"

    def value(self, key: str) -> Value:
        return self.values.get(key, ABSENT)

    def data(self, key: str) -> Any:
        """The value under *key*, decoded; None if there is none."""
        body = self.value(key).body
        return None if body is None else json.loads(body)

    # What happens.

    async def join(self, *players: str) -> None:
        for name in players:
            if self.presence(name) == "offline":
                self.wind(player_key(name))
            self.presences[name] = "online"
            await self.handle(name, self.game.on_join)

    async def lose(self, name: str) -> None:
        self.presences[name] = "linkdead"
        await self.handle(name, self.game.on_linkdead)

    async def come_back(self, name: str) -> None:
        self.presences[name] = "online"
        await self.handle(name, self.game.on_return)

    async def leave(self, name: str, reason: str = "offline") -> None:
        self.presences[name] = "offline"
        await self.handle(name, self.game.on_leave, reason)

    async def command(self, name: str, content: object) -> Any:
        """The reply's content."""
        return await self.handle(name, self.game.on_command, Command("c1", content))

    async def refused(self, name: str, content: object) -> str:
        """The message of the refusal, after a look that nothing else has happened."""
        before = self.moment()
        try:
            reply = await self.command(name, content)
        except CommandError as error:
            assert self.moment() == before
            return error.message
        raise AssertionError(f"not refused: {reply}")

    async def subscribe(self, name: str, channel: str) -> Any:
        return await self.handle(name, self.game.on_subscribe, channel)

    async def new_session(self, name: str) -> None:
        """Another session begins in place of the present one: without its subscriptions."""
        before = list(self.channels(name))
        await self.leave(name, "replaced")
        for channel in before:
            if channel in self.channels(name):
                self.subscriptions[name].remove(channel)
        await self.join(name)

    async def later(self, seconds: float) -> None:
        """Time passes, and what is due happens, one after another."""
        end = self.now + seconds
        while due := [timer for timer in self.timers.values() if timer[0] <= end and self.is_running(timer[1])]:
            at, timer = min(due, key=lambda entry: entry[0])
            self.now = max(self.now, at)
            await self.fire(timer)
        self.now = end

    def is_running(self, timer: SetTimer) -> bool:
        return timer.owner == WORLD or self.presence(timer.owner.removeprefix("player/")) != "offline"

    async def fire(self, timer: SetTimer) -> None:
        """The timer is gone when what its handler did is stored."""
        name = None if timer.owner == WORLD else timer.owner.removeprefix("player/")
        gathering = self.gathering(name)
        value = json.loads(timer.value)
        if name is None:
            await self.game.on_world_timer(gathering.world, timer.name, value)
        else:
            await self.game.on_timer(gathering.player, timer.name, value)
        del self.timers[timer.owner, timer.name]
        self.commit(gathering)

    def wind(self, owner: str | None = None) -> None:
        """All timers, or those of *owner*, wait their full time again: so it is after ``kill -9``."""
        for key, (_, timer) in self.timers.items():
            if owner in (None, timer.owner):
                self.timers[key] = (self.now + timer.seconds, timer)

    async def run(self, function: Callable[[World], Awaitable[Any]]) -> Any:
        gathering = self.gathering()
        result = await function(gathering.world)
        self.commit(gathering)
        return result

    async def handle(self, name: str, handler: Callable[..., Awaitable[Any]], *arguments: object) -> Any:
        gathering = self.gathering(name)
        player: Player = gathering.player
        try:
            result = await handler(player, *arguments)
        finally:
            gathering.close()
        gathering.answer(result)
        self.commit(gathering)
        return result

    def gathering(self, name: str | None = None) -> Gathering:
        session = None if name is None else f"{name}-1"
        return Gathering(self, name, session, now=NOW, randomness=self.randomness, max_message_size=65536)

    def commit(self, gathering: Gathering) -> None:
        gathering.close()
        for effect in gathering.effects:
            match effect:
                case Subscribe(player_id, _, channel):
                    assert channel not in self.channels(player_id)
                    self.subscriptions.setdefault(player_id, []).append(channel)
                case Unsubscribe(player_id, _, channel):
                    self.subscriptions[player_id].remove(channel)
                case Append(target):
                    for name in self.receivers(target):
                        self.scrolls.setdefault(name, []).append(json.loads(effect.body))
                case _:
                    raise AssertionError(effect)
        for key, body in gathering.writes.items():
            self.values[key] = Value(body, self.value(key).version + 1)
        for change in gathering.timers:
            if isinstance(change, SetTimer):
                self.timers[change.owner, change.name] = (self.now + change.seconds, change)
            else:
                assert isinstance(change, CancelTimer)
                self.timers.pop((change.owner, change.name), None)

    def receivers(self, target: str) -> list[str]:
        if target == names.EVERYONE:
            return list(self.presences)
        if target.startswith("@"):
            return [target[1:]]
        return [name for name, channels in self.subscriptions.items() if target[1:] in channels]

    def moment(self) -> str:
        return repr((self.presences, self.subscriptions, self.scrolls, self.values, self.timers))

    def heard(self, name: str) -> list[str]:
        """What *name* was sent since the last time, as lines "type: content"."""
        scroll = self.scrolls.pop(name, [])
        return [f"{message['type']}: {message['content']}" for message in scroll]
