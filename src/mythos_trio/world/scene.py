"""Who and what is where, and how it is told.

All of it is asked of the data, and all changes go through here, so that this is the place to read what the
keys mean; `mythos_trio.world` lists them.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

from mythos_trio.game import CommandError, Player, World
from mythos_trio.world.places import BEASTS, OPPOSITE, ROOMS, START, THINGS

MAX_NAMES: Final = 50  # players in one list
MAX_HITS: Final = 12  # hit points of a player who is not hurt


# Places. A place is a room's channel, ``player/NAME`` or ``beast/NAME``.


def holder(player_id: str) -> str:
    """The place where a player's things are."""
    return f"player/{player_id}"


def room_of(world: World, player_id: str) -> str:
    """The channel of the room where the player is, or was last."""
    room = world.data_of(player_id).get("room")
    return room if room in ROOMS else START


def here(player: Player) -> str:
    return room_of(player.world, player.id)


def is_settled(player: Player) -> bool:
    """Whether the player hears what is said where the player is. A new session hears nothing yet."""
    return player.data.get("room") in ROOMS and here(player) in player.channels


def enter(player: Player, room: str, sentence: str) -> None:
    """Those in *room* are told; then *player* is one of them, and is nowhere else."""
    for channel in player.channels:
        if channel in ROOMS:
            player.unsubscribe(channel)
    marks = mark(players=[player.id])
    player.world.publish(room, "arrive", sentence, player=player.id, room=room, marks=marks)
    player.data["room"] = room
    player.subscribe(room)


def walk(player: Player, direction: str) -> None:
    """Out by an exit of the room, and into the next one."""
    room = here(player)
    there = ROOMS[room].exits[direction]
    marks = mark(players=[player.id], exits=[direction])
    player.unsubscribe(room)
    player.world.publish(room, "leave", f"{player.id} goes {direction}.", player=player.id, room=room, marks=marks)
    player.send("go", f"You go {direction} to {ROOMS[there].name}.", room=there, marks=mark(exits=[direction]))
    enter(player, there, f"{player.id} comes in {OPPOSITE[direction]}.")


def others_here(player: Player) -> list[str]:
    """The other players in the room, link-dead ones included: their bodies stay."""
    return [name for name in player.world.subscribers(here(player)) if name != player.id]


def player_here(player: Player, word: str) -> str:
    """The other player whom *word* means.

    :raises CommandError: nobody in the room is called so.
    """
    word = word.lower()
    room = here(player)
    for name in others_here(player):
        # The list is of what is stored; the data also know who is just about to leave.
        if name.lower() == word and room_of(player.world, name) == room:
            return name
    raise CommandError(f"There is nobody called {word[:40]} here.{did_you_mean(word, others_here(player))}")


# Things: each has one place, so there can never be two of it, nor none.


def place_of(world: World, thing: str) -> str:
    place: str = world.data.get(f"thing/{thing}", THINGS[thing].start)
    return place


def move(world: World, thing: str, place: str) -> None:
    world.data[f"thing/{thing}"] = place


def things_at(world: World, place: str) -> list[str]:
    return [thing for thing in THINGS if place_of(world, thing) == place]


def thing_at(world: World, place: str, word: str, otherwise: str) -> str:
    """The thing at *place* that *word* means.

    :raises CommandError: there is no such thing there; *otherwise* says so.
    """
    word = word.lower().removeprefix("the ")
    things = things_at(world, place)
    if word in things:
        return word
    raise CommandError(otherwise + did_you_mean(word, things))


def named(things: Iterable[str]) -> list[str]:
    return [THINGS[thing].name for thing in things]


# Telling. Messages are sentences; `marks` says which words of them are what, for clients that colour them.


def mark(
    players: Iterable[str] = (), things: Iterable[str] = (), beasts: Iterable[str] = (), exits: Iterable[str] = ()
) -> dict[str, str]:
    """What the words in a message's content are: a client may colour each by its kind."""
    kinds = {
        "player": players,
        "thing": named(things),
        "beast": [BEASTS[beast].name for beast in beasts],
        "exit": exits,
    }
    return {word: kind for kind, words in kinds.items() for word in words}


def tell_room(player: Player, type_: str, sentence: str, **fields: object) -> None:
    """To everybody where *player* is, the player included."""
    room = here(player)
    fields.setdefault("marks", mark(players=[player.id]))
    player.world.publish(room, type_, sentence, player=player.id, room=room, **fields)


def show_room(player: Player, before: str = "", after: str = "") -> None:
    """As a message, for those who find themselves somewhere without having asked."""
    room = here(player)
    marks = mark(others_here(player)[:MAX_NAMES], things_at(player.world, room), beasts_in(player.world, room))
    exits = dict.fromkeys(ROOMS[room].exits, "exit")
    player.send("room", f"{before}{view(player)}{after}", room=room, marks=marks | exits)


def view(player: Player) -> str:
    """What the player sees."""
    world, channel = player.world, here(player)
    room = ROOMS[channel]
    lines = [f"You are in {room.name}. {room.text}"]
    if things := named(things_at(world, channel)):
        lines.append(f"You see {listed(things)}.")
    lines += [f"{capital(BEASTS[beast].name)} is here{hurt(world, beast)}." for beast in beasts_in(world, channel)]
    ways = [f"{direction} to {ROOMS[there].name}" for direction, there in room.exits.items()]
    lines.append(f"You can go {listed(ways, 'or')}.")
    others = crowd(world, others_here(player))
    lines.append(f"{listed(others)} {'is' if len(others) == 1 else 'are'} here." if others else "You are alone.")
    return "\n".join(lines)


# Beasts: their hit points stand in the data while they are hurt or away.


def hits_of(world: World, beast: str) -> int:
    hits: int = world.data.get(f"beast/{beast}", BEASTS[beast].hits)
    return hits


def hurt(world: World, beast: str) -> str:
    return ", hurt" if hits_of(world, beast) < BEASTS[beast].hits else ""


def beasts_in(world: World, room: str) -> list[str]:
    return [name for name, beast in BEASTS.items() if beast.room == room and hits_of(world, name) > 0]


# Sentences.


def crowd(world: World, names: list[str]) -> list[str]:
    """*names* as a look shows them; of a crowd the first ones, and how many more."""
    shown = [describe(world, name) for name in names[:MAX_NAMES]]
    return [*shown, f"{len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else shown


def describe(world: World, name: str) -> str:
    return f"{name} (link-dead)" if world.presence(name) == "linkdead" else name


def listed(words: Iterable[str], last: str = "and") -> str:
    """``"a, b and c"``."""
    *first, final = words
    return f"{', '.join(first)} {last} {final}" if first else final


def capital(words: str) -> str:
    return words[0].upper() + words[1:]


def did_you_mean(word: str, there: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in there}
    close = get_close_matches(word.lower(), by_lower, 3)
    return f" Did you mean {listed([by_lower[name] for name in close], 'or')}?" if close else ""
