"""The default game: an inn at the edge of the world, to walk, talk, trade and fight in.

It is also the example to learn from: it imports nothing but the game API, and has no state of its own, no loops
and nothing to wait for. All that is so stands in the data, all that will be is a timer, and all who listen
are subscribers; so a killed server has forgotten nothing. `docs/tutorial.rst` builds a part of it.

What stands where
-----------------

==================  =============================================================================================
subscription        a room is a channel, and who is in it subscribes to it; ``ooc`` is for those who like it
``thing/NAME``      where the thing is: ``room:…``, ``player/NAME`` or ``beast/NAME``. Absent: where it began. One
                    key, one place: a thing cannot be doubled or lost
``beast/NAME``      hit points of a beast that is hurt; 0: dead, and a timer of the world of that name brings the next
player's ``room``   the channel of the room; it outlives the session, as the subscription does not
player's ``hits``   hit points, from 1. Absent: unhurt
player's ``foe``    ``beast/NAME`` or ``player/NAME``, while in a fight (`mythos_trio.world.fights`)
timer ``round``     the player's: the next blow; there is one as long as there is a foe
timer ``heal``      the player's: the next hit point, by the fire
==================  =============================================================================================

`places` is the map, `scene` says who and what is where, `fights` is about blows and wounds, and `verbs` has
what players type. All text is in sentences without escape codes, for screen readers; a message's field ``marks``
says which of its words are a player, a thing, a beast or an exit, for clients that colour.
"""

from __future__ import annotations

from typing import Any, Final

from mythos_trio.game import Command, Game, Player, World
from mythos_trio.world import fights, scene
from mythos_trio.world.places import ROOMS, START
from mythos_trio.world.verbs import OOC, parse

__all__: Final = ["DefaultGame"]


class DefaultGame(Game):
    """The handlers: comings and goings, and what is due."""

    async def on_join(self, player: Player) -> None:
        if player.data.get("room") not in ROOMS:
            scene.enter(player, START, f"{player.id} comes in from the road.")
            scene.show_room(player, f"Welcome, {player.id}. ", "\nType help to learn what you can do.")
        elif scene.is_settled(player):
            tell_presence(player, "online", f"{player.id} has come back to the world.")
        else:
            scene.enter(player, scene.here(player), f"{player.id} has come back to the world.")
            scene.show_room(player)

    async def on_linkdead(self, player: Player) -> None:
        sentence = f"{player.id} stares into the distance: the connection is lost."
        tell_presence(player, "linkdead", sentence + if_fighting(player, " The fight waits."))

    async def on_return(self, player: Player) -> None:
        tell_presence(player, "online", f"{player.id} is back.{if_fighting(player, ' The fight goes on.')}")

    async def on_leave(self, player: Player, reason: str) -> None:
        over = if_fighting(player, " The fight is over.")
        tell_presence(player, "offline", f"{player.id} has left the world.{over}")
        if over:
            fights.end(player)

    async def on_subscribe(self, player: Player, channel: str) -> bool:
        return channel == OOC

    async def on_command(self, player: Player, command: Command) -> str:
        if not scene.is_settled(player):
            scene.enter(player, START, f"{player.id} appears out of thin air.")
        verb, rest = parse(command.text)
        return verb.do(player, rest)

    async def on_timer(self, player: Player, name: str, value: Any) -> None:
        if name == "round":
            fights.next_round(player, value)
        elif name == "heal":
            fights.heal(player)

    async def on_world_timer(self, world: World, name: str, value: Any) -> None:
        fights.come_again(world, name)


def tell_presence(player: Player, presence: str, sentence: str) -> None:
    if scene.is_settled(player):
        scene.tell_room(player, "presence", sentence, presence=presence)


def if_fighting(player: Player, sentence: str) -> str:
    return sentence if fights.foe_of(player.world, player.id) else ""
