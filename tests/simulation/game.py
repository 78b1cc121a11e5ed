"""The game of the simulation: all that it does leaves a trace in data and in messages, so that it can be checked."""

from __future__ import annotations

from itertools import count
from typing import Any, Final

import trio
from attrs import define

from mythos_trio.game import Command, CommandError, Game, Player, World

DAYS: Final = 6
DAY_SECONDS: Final = 2.0
BLOW_SECONDS: Final = 0.7
CHANNELS: Final = ("c1", "c2")


@define(eq=False)
class Arena(Game):
    """Commands are ``{"do": …}``.

    ==========  ===============================================================================
    ``act``     the player's ``acts`` get the command's id, the world's ``sum`` grows by ``n``
    ``slow``    the same, with a pause in which others may change what it has read
    ``look``    nothing happens; the answer is the sum
    ``shout``   a line to channel ``c1``
    ``many``    ``n`` long lines to the player
    ``join``    subscribes to ``c1``; ``leave`` leaves it
    ``fight``   ``n`` blows, one each `BLOW_SECONDS`, by a timer
    ``dawn``    the world's days begin, if they have not: one each `DAY_SECONDS`
    ``hang``    longer than it may; ``raise`` and ``refuse``: it comes to nothing
    ``renew``   a new session; ``kick``: the end of all connections
    ==========  ===============================================================================
    """

    runs: count[int]
    """Each run of a handler has a number of its own, over all lives of the server."""
    restless_until: float = 0.0
    """What a handler has asked for is done a moment after its reply."""

    async def on_command(self, player: Player, command: Command) -> Any:
        what, answer = command.content["do"], self._answer(player, command)
        if what == "hang":
            player.send("did", answer)
            await trio.sleep(1000)
        read = self._read(player, command)
        if what == "slow":
            await trio.sleep(0.3)
        return self._do(player, command, answer, *read)

    def _answer(self, player: Player, command: Command) -> dict[str, Any]:
        return {"run": next(self.runs), "session": player.session_id, "command": command.id}

    def _read(self, player: Player, command: Command) -> tuple[list[Any], int]:
        if command.content["do"] not in ("look", "act", "slow"):
            return [], 0
        return player.data.get("acts", []), player.world.data.get("sum", 0)

    def _do(self, player: Player, command: Command, answer: dict[str, Any], acts: list[Any], total: int) -> Any:
        what = command.content["do"]
        if what == "look":
            return answer | {"sum": total}
        player.send("did", answer)
        if what in ("raise", "hang"):
            raise ValueError("on purpose")
        if what == "refuse":
            raise CommandError("no")
        if what in ("act", "slow"):
            player.data["acts"] = [*acts, [player.session_id, command.id]]
            player.world.data["sum"] = total + command.content["n"]
        elif what in ("renew", "kick"):
            self.restless_until = trio.current_time() + 1
            (player.new_session if what == "renew" else player.disconnect)()
        else:
            getattr(self, f"_{what}")(player, command)
        return answer

    def _shout(self, player: Player, command: Command) -> None:
        player.world.publish("c1", "shout", command.id)

    def _many(self, player: Player, command: Command) -> None:
        for number in range(command.content["n"]):
            player.send("line", f"{command.id} {number} " + "x" * 300)

    def _join(self, player: Player, command: Command) -> None:
        player.subscribe("c1")

    def _leave(self, player: Player, command: Command) -> None:
        player.unsubscribe("c1")

    def _fight(self, player: Player, command: Command) -> None:
        if "fight" in player.data:
            raise CommandError("you fight already")
        player.data["fight"] = {"name": f"{player.session_id}/{command.id}", "blow": 0, "of": command.content["n"]}
        player.after(BLOW_SECONDS, "blow")

    async def on_timer(self, player: Player, name: str, value: Any) -> None:
        fight = player.data["fight"]
        fight["blow"] += 1
        player.send("blow", fight)
        player.world.publish("c1", "seen", {"player": player.id, **fight})
        if fight["blow"] < fight["of"]:
            player.data["fight"] = fight
            player.after(BLOW_SECONDS, "blow")
        else:
            del player.data["fight"]

    def _dawn(self, player: Player, command: Command) -> None:
        if "day" not in player.world.data:
            player.world.data["day"] = 0
            player.world.after(DAY_SECONDS, "day")

    async def on_world_timer(self, world: World, name: str, value: Any) -> None:
        day = world.data["day"] + 1
        world.data["day"] = day
        world.broadcast("day", day)
        if day < DAYS:
            world.after(DAY_SECONDS, "day")

    async def on_subscribe(self, player: Player, channel: str) -> bool:
        return True

    async def on_join(self, player: Player) -> None:
        self._told(player, "join")

    async def on_linkdead(self, player: Player) -> None:
        await trio.sleep(0.2)
        self._told(player, "linkdead")

    async def on_return(self, player: Player) -> None:
        self._told(player, "return")

    async def on_leave(self, player: Player, reason: str) -> None:
        await trio.sleep(0.1)
        self._told(player, "leave")

    def _told(self, player: Player, what: str) -> None:
        player.send("told", {"what": what, "session": player.session_id})


class Brisk(Arena):
    """Waits for nothing, so that commands are run where they are heard: what is slow is not, what hangs fails."""

    async def on_command(self, player: Player, command: Command) -> Any:
        return self._do(player, command, self._answer(player, command), *self._read(player, command))
