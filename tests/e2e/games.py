"""A game that does as it is told, and leaves traces on disk that outlive the server's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from mythos_trio.game import Command, CommandError, Game, Player, World


def _note(text: str) -> None:
    """In one step, so that what has begun is in the file whatever happens next."""
    with Path("ran.txt").open("a") as file:
        file.write(text)


class Puppet(Game):
    """Each command is a word and what it is about. Files lie in the server's working directory.

    ``echo X``    the reply is X; nothing else happens
    ``line X``    the player is sent a line X, which is the reply too
    ``slow X``    a line X, a moment of 5 ms, a line "X again"
    ``wait X``    a line X; tells by the file X.inside that it is there, and waits for the file X.go
    ``join C``    subscribes to the channel C
    ``raise``     a line, which must not come, and an exception
    ``refuse``    a line, which must not come, and a `CommandError`
    ``switch``    a line, and a new session
    """

    async def on_command(self, player: Player, command: Command) -> Any:
        verb, _, rest = command.text.partition(" ")
        _note(f"{command.id}\n")
        return await getattr(self, f"do_{verb}")(player, rest)

    async def do_echo(self, player: Player, text: str) -> str:
        return text

    async def do_line(self, player: Player, text: str) -> str:
        player.send("line", text)
        return text

    async def do_slow(self, player: Player, text: str) -> str:
        player.send("line", text)
        await trio.sleep(0.005)
        player.send("line", f"{text} again")
        return text

    async def do_wait(self, player: Player, name: str) -> str:
        player.send("line", name)
        await trio.Path(f"{name}.inside").touch()
        while not await trio.Path(f"{name}.go").exists():
            await trio.sleep(0.01)
        return name

    async def do_join(self, player: Player, channel: str) -> None:
        player.subscribe(channel)

    async def do_raise(self, player: Player, text: str) -> None:
        player.send("line", "this must not come")
        raise RuntimeError("on purpose")

    async def do_refuse(self, player: Player, text: str) -> None:
        player.send("line", "this must not come")
        raise CommandError("You cannot.", why=text)

    async def do_switch(self, player: Player, text: str) -> None:
        player.send("line", "switching")
        player.new_session()


START_POINTS = 1_000_000
DUELLISTS = ("alice", "bob")


class Duel(Game):
    """Two who fight: blows fall by the world's timer, each breathes by a timer of the player's, and both may
    ``hit`` in between. All of it is numbered, in the data and in what the players are told."""

    async def on_command(self, player: Player, command: Command) -> Any:
        data = player.world.data
        match command.text:
            case "fight" if "blows" not in data:
                data["blows"] = 0
                player.world.after(0.05, "blow")
            case "breathe" if "breaths" not in player.data:
                player.data["breaths"] = 0
                player.after(0.07, "breath")
            case "hit":
                (victim,) = set(DUELLISTS) - {player.id}
                number = data.get("hits", 0)
                await trio.sleep(0.002)
                data["hits"] = number + 1
                await self._strike(player.world, "hit", number, victim, command.id)
                return number
            case "stop":
                player.cancel("breath")
                player.world.cancel("blow")
        return None

    async def on_world_timer(self, world: World, name: str, value: Any) -> None:
        number = world.data["blows"]
        world.data["blows"] = number + 1
        await self._strike(world, "blow", number, DUELLISTS[number % 2], "")
        world.after(0.05 + number % 4 * 0.05, "blow")

    async def _strike(self, world: World, kind: str, number: int, victim: str, id: str) -> None:
        damage = 1 + number % 7
        left = world.data_of(victim).get("points", START_POINTS)
        await trio.sleep(0.002)
        world.data_of(victim)["points"] = left - damage
        for player in DUELLISTS:
            told = {"number": number, "victim": victim, "damage": damage, "left": left - damage, "id": id}
            world.send(player, kind, told)

    async def on_timer(self, player: Player, name: str, value: Any) -> None:
        breaths = player.data["breaths"]
        player.data["breaths"] = breaths + 1
        player.send("breath", {"number": breaths})
        player.after(0.07, "breath")
