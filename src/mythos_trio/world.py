"""The default game: a small inn at the edge of the world, to walk, talk and listen in.

It is also the example to learn from: it imports nothing but the game API. A room is a channel, and to
be in a room is to subscribe to its channel; the world remembers nothing else. What happens is told in
messages, so a player's every terminal shows it; a reply only answers the one who asked. All text is
in sentences and has no escape codes, for screen readers and for clients that colour by a message's type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Final

from attrs import frozen

from mythos_trio.game import Command, CommandError, Game, GameError, Player, World

MAX_TEXT: Final = 1000  # characters of one thing said
MAX_NAMES: Final = 50  # players in one list
JOINERS: Final = "\u200c\u200d"  # not printable, but Persian and family emojis are spelt with them
OOC: Final = "ooc"  # "out of character": the channel for everybody, wherever they are


@frozen
class Room:
    """*name* follows "in" and "to"; *exits* lead from a direction to a room's channel."""

    name: str
    text: str
    exits: dict[str, str]


START: Final = "room:tavern"
ROOMS: Final = {
    "room:tavern": Room(
        "the tavern",
        "A fire mutters in the hearth. The tables have been carved by people with time on their hands.",
        {"north": "room:square", "down": "room:cellar"},
    ),
    "room:cellar": Room(
        "the cellar",
        "Barrels, dust, and a draught from a wall that ought not to have one.",
        {"up": "room:tavern"},
    ),
    "room:square": Room(
        "the square",
        "Four roads meet at a dry fountain. Somebody has left a coin in it, for luck or for later.",
        {"south": "room:tavern", "east": "room:garden", "west": "room:library"},
    ),
    "room:garden": Room(
        "the garden",
        "Everything here is overgrown and seems pleased about it. Bees go about their business.",
        {"west": "room:square"},
    ),
    "room:library": Room(
        "the library",
        "Shelves to the ceiling. The silence has been here longer than the books.",
        {"east": "room:square", "up": "room:tower"},
    ),
    "room:tower": Room(
        "the tower",
        "Wind, and the whole world below: roofs, woods, and a sea that you had not known of.",
        {"down": "room:library"},
    ),
}
OPPOSITE: Final = {
    "north": "from the south",
    "south": "from the north",
    "east": "from the west",
    "west": "from the east",
    "up": "from below",
    "down": "from above",
}
SHORT: Final = {direction[0]: direction for direction in OPPOSITE}


class DefaultGame(Game):
    """The handlers: comings and goings, and `VERBS` for what players do."""

    async def on_join(self, player: Player) -> None:
        if room_of(player) is None:
            enter(player, START, f"{player.id} comes in from the road.")
            player.send("room", f"Welcome, {player.id}. {look(player, '')}\nType help to learn what you can do.")
        else:
            tell_presence(player, "online", f"{player.id} has come back to the world.")

    async def on_linkdead(self, player: Player) -> None:
        tell_presence(player, "linkdead", f"{player.id} stares into the distance: the connection is lost.")

    async def on_return(self, player: Player) -> None:
        tell_presence(player, "online", f"{player.id} is back.")

    async def on_leave(self, player: Player, reason: str) -> None:
        tell_presence(player, "offline", f"{player.id} has left the world.")

    async def on_subscribe(self, player: Player, channel: str) -> bool:
        return channel == OOC

    async def on_command(self, player: Player, command: Command) -> str:
        if room_of(player) is None:
            enter(player, START, f"{player.id} appears out of thin air.")
        verb, rest = parse(command.text)
        return verb.do(player, rest)


# What players do. Each function is handed the rest of the line, and returns the reply.


def look(player: Player, rest: str) -> str:
    channel = room_of(player) or START
    room = ROOMS[channel]
    exits = [f"{direction} to {ROOMS[there].name}" for direction, there in room.exits.items()]
    others = crowd(player.world, [name for name in player.world.subscribers(channel) if name != player.id])
    company = f"{listed(others)} {'is' if len(others) == 1 else 'are'} here." if others else "You are alone."
    return f"You are in {room.name}. {room.text}\nYou can go {listed(exits, 'or')}.\n{company}"


def go(player: Player, rest: str) -> str:
    here = room_of(player) or START
    exits = ROOMS[here].exits
    direction = SHORT.get(rest.lower(), rest.lower())
    if direction not in exits:
        asked = f"You cannot go {direction} from here" if direction in OPPOSITE else "Say in which direction"
        raise CommandError(f"{asked}; you can go {listed(exits, 'or')}.", exits=list(exits))
    there = exits[direction]
    player.unsubscribe(here)
    player.world.publish(here, "leave", f"{player.id} goes {direction}.", player=player.id, room=here)
    player.send("go", f"You go {direction} to {ROOMS[there].name}.", room=there)
    enter(player, there, f"{player.id} comes in {OPPOSITE[direction]}.")
    return look(player, "")


def say(player: Player, rest: str) -> str:
    words = said(rest, "say TEXT")
    publish(player, "say", f"{player.id} says: {words}")
    return f"You say: {words}"


def emote(player: Player, rest: str) -> str:
    deed = said(rest, "emote TEXT")
    publish(player, "emote", f"{player.id} {deed}")
    return f"You emote: {deed}"


def tell(player: Player, rest: str) -> str:
    who, _, rest = rest.partition(" ")
    words = said(rest, "tell WHO TEXT")
    world = player.world
    presence = world.presence(who)
    try:
        world.send(who, "tell", f"{player.id} tells you: {words}", player=player.id, to=who)
    except GameError:
        raise CommandError(f"{who[:40]} cannot be a player's name.") from None
    if who != player.id:
        player.send("tell", f"You tell {who}: {words}", player=player.id, to=who)
    if presence == "online":
        return f"{who} hears you."
    if presence == "linkdead":
        return f"{who} has lost the connection, and will see it on coming back."
    alike = [name for name in world.present() if name.lower() == who.lower()]
    return f"{who} is not here, and will get it as mail." + (f" (But {listed(alike)} is.)" if alike else "")


def ooc(player: Player, rest: str) -> str:
    words = said(rest, "ooc TEXT")
    player.subscribe(OOC)
    player.world.publish(OOC, "ooc", f"{player.id} says out of character: {words}", player=player.id)
    return "Everybody who listens to ooc hears you, and you listen too."


def who(player: Player, rest: str) -> str:
    world = player.world
    place = {name: room.name for channel, room in ROOMS.items() for name in world.subscribers(channel)}
    present = sorted(world.present())
    lines = [f"{describe(world, name)} is in {place.get(name, 'no room')}." for name in present[:MAX_NAMES]]
    if len(present) > MAX_NAMES:
        lines.append(f"And {len(present) - MAX_NAMES} more.")
    return "\n".join(lines) or "Nobody is here."


def help_(player: Player, rest: str) -> str:
    if not rest:
        lines = [f"{verb.usage}: {verb.help}" for verb in VERBS]
        return "\n".join(["You can type:", *lines, "A direction alone, like north or n, goes there."])
    verb = find_verb(rest.lower())
    other = f" Or, for short: {listed(verb.short, 'or')}." if verb.short else ""
    return f"{verb.usage}: {verb.help}{other}"


def test(player: Player, rest: str) -> str:
    return f"ok. You are {player.id}, and your connections are {player.health}."


@frozen
class Verb:
    """A word that players can begin a line with. Where a *short* form is a sign, the text may follow at once."""

    name: str
    short: tuple[str, ...]
    usage: str
    help: str
    do: Callable[[Player, str], str]


VERBS: Final = (
    Verb("look", ("l",), "look", "where you are, which ways lead out, and who is with you.", look),
    Verb("go", (), "go DIRECTION", "walk to another room.", go),
    Verb("say", ("'",), "say TEXT", "everybody in the room hears it.", say),
    Verb("emote", (":",), "emote TEXT", "do something, in words: emote waves.", emote),
    Verb("tell", (), "tell WHO TEXT", "only WHO hears it; who is absent gets it as mail.", tell),
    Verb("ooc", (), "ooc TEXT", "everybody who listens to ooc hears it, in every room.", ooc),
    Verb("who", (), "who", "everybody in the world, and where they are.", who),
    Verb("help", ("?",), "help [COMMAND]", "what you can do.", help_),
    Verb("test", (), "test", "see whether the world answers.", test),
)
WORDS: Final = {word: verb for verb in VERBS for word in (verb.name, *verb.short)}
SIGNS: Final = tuple(word for word in WORDS if not word.isalpha())


def parse(line: str) -> tuple[Verb, str]:
    """The verb of *line*, and the rest of it as one line of printable text."""
    line = " ".join("".join(letter if letter.isprintable() or letter in JOINERS else " " for letter in line).split())
    if not line:
        raise CommandError('Say what you want to do, as a text like "look". Type help to learn what you can do.')
    if line.startswith(SIGNS):
        return WORDS[line[0]], line[1:].lstrip()
    word, _, rest = line.partition(" ")
    word = word.lower()
    if not rest and (word in OPPOSITE or word in SHORT):
        return WORDS["go"], word
    return find_verb(word), rest


def find_verb(word: str) -> Verb:
    if word in WORDS:
        return WORDS[word]
    hint = did_you_mean(word, [*WORDS, *OPPOSITE])
    raise CommandError(f"There is no command {word[:40]}.{hint} Type help to learn what you can do.")


# Places, sentences.


def room_of(player: Player) -> str | None:
    """The channel of the room where *player* is."""
    return next((channel for channel in player.channels if channel in ROOMS), None)


def enter(player: Player, room: str, sentence: str) -> None:
    """Those in *room* are told; then *player* is one of them."""
    player.world.publish(room, "arrive", sentence, player=player.id, room=room)
    player.subscribe(room)


def publish(player: Player, type_: str, sentence: str, **fields: str) -> None:
    """To everybody where *player* is, the player included."""
    room = room_of(player)
    if room is not None:
        player.world.publish(room, type_, sentence, player=player.id, room=room, **fields)


def tell_presence(player: Player, presence: str, sentence: str) -> None:
    publish(player, "presence", sentence, presence=presence)


def said(text: str, usage: str) -> str:
    """*text* if there is something to say, and not too much."""
    if not text:
        raise CommandError(f"Type {usage}.")
    if len(text) > MAX_TEXT:
        raise CommandError(f"That is {len(text):,} characters; at most {MAX_TEXT:,} at a time.")
    return text


def crowd(world: World, names: list[str]) -> list[str]:
    """*names* as `look` shows them; of a crowd the first ones, and how many more."""
    shown = [describe(world, name) for name in names[:MAX_NAMES]]
    return [*shown, f"{len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else shown


def describe(world: World, name: str) -> str:
    return f"{name} (link-dead)" if world.presence(name) == "linkdead" else name


def listed(words: Iterable[str], last: str = "and") -> str:
    """``"a, b and c"``."""
    *first, final = words
    return f"{', '.join(first)} {last} {final}" if first else final


def did_you_mean(word: str, there: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in there}
    close = get_close_matches(word.lower(), by_lower, 3)
    return f" Did you mean {listed([by_lower[name] for name in close], 'or')}?" if close else ""
