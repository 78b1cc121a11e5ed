"""A game that does as it is told, and leaves traces on disk that outlive the server's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from mythos_trio.game import Command, CommandError, Game, Player


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
