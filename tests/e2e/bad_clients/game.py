"""The game that is played while clients are bad."""

from __future__ import annotations

from mythos_trio.game import Player
from tests.e2e.games import Puppet

CHANNEL = "bad"


class Game(Puppet):
    """Bad players hear `CHANNEL` as soon as they are there: a command for each would take its time."""

    async def on_join(self, player: Player) -> None:
        if player.id.startswith("bad"):
            player.subscribe(CHANNEL)
