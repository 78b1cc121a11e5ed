"""A game that counts: whatever it is asked to do can be seen afterwards to have been done once, and in order."""

from __future__ import annotations

from typing import Any, Final

import trio

from mythos_trio.game import Command, CommandError, Game, Player

HALL: Final = "hall"
"""A channel to which everybody listens, and to which every `HALL_EVERY`-th count of everybody goes."""
HALL_EVERY: Final = 5
HALVES: Final = ("even", "odd")
"""Channels to each of which every second player listens."""
TICK_SECONDS: Final = 2.0


def half_of(player: str) -> str:
    """Which of `HALVES` a player with a number at the end of the name listens to."""
    return HALVES[int(player.rpartition("-")[2]) % 2]


class Counting(Game):
    """``count``: adds one to the player's count and to that of all, tells it in a line, and replies with it.

    ``look``: both counts, and how often the player's timer has ticked; nothing happens.
    """

    async def on_join(self, player: Player) -> None:
        if "count" not in player.data:
            player.data["count"] = player.data["ticks"] = 0
            player.subscribe(HALL)
            player.subscribe(half_of(player.id))
            player.after(TICK_SECONDS, "tick")

    async def on_command(self, player: Player, command: Command) -> Any:
        match command.text:
            case "look":
                return {
                    "count": player.data["count"],
                    "ticks": player.data["ticks"],
                    "all": player.world.data.get("all", 0),
                }
            case "count":
                return await self._count(player, command.id)
        raise CommandError("count, or look")

    async def _count(self, player: Player, id: str) -> int:
        number: int = player.data["count"] + 1
        everybody = player.world.data.get("all", 0)
        # A wait between reading and writing: a kill can come here, and so can another player's count.
        await trio.sleep(0.001)
        player.data["count"] = number
        player.world.data["all"] = everybody + 1
        player.send("count", {"number": number, "command": id})
        if number % HALL_EVERY == 0:
            player.world.publish(HALL, "hall", {"player": player.id, "number": number})
        return number

    async def on_timer(self, player: Player, name: str, value: Any) -> None:
        player.data["ticks"] = ticks = player.data["ticks"] + 1
        player.send("tick", {"number": ticks})
        player.after(TICK_SECONDS, "tick")


game = Counting()
