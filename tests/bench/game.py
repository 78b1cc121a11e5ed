"""The game of the bench: a command has no effects, its reply is what it said; everybody may enter every room."""

from __future__ import annotations

from typing import Any

from mythos_trio.game import Command, Game, Player


class Bench(Game):
    async def on_command(self, player: Player, command: Command) -> Any:
        return command.content

    async def on_subscribe(self, player: Player, channel: str) -> bool:
        return True
