"""What players do: each function is handed the rest of the line, and returns the reply.

What happens is told in messages, so a player's every terminal shows it; a reply only answers the one who asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from attrs import frozen

from mythos_trio.game import CommandError, GameError, Player
from mythos_trio.world.fights import attack, end, foe_of, name_of, refuse_while_fighting, state_of, tell_fight, warm
from mythos_trio.world.places import BEASTS, OPPOSITE, ROOMS, SHORT, THINGS
from mythos_trio.world.scene import (
    MAX_NAMES,
    beasts_in,
    describe,
    did_you_mean,
    here,
    holder,
    listed,
    mark,
    move,
    named,
    player_here,
    tell_room,
    thing_at,
    things_at,
    view,
    walk,
)

MAX_TEXT: Final = 1000  # characters of one thing said
JOINERS: Final = "\u200c\u200d"  # not printable, but Persian and family emojis are spelt with them
OOC: Final = "ooc"  # "out of character": the channel for everybody, wherever they are


# Places.


def look(player: Player, rest: str) -> str:
    if not rest:
        return view(player)
    world, room = player.world, here(player)
    word = rest.lower().removeprefix("at ").removeprefix("the ")
    if word in beasts_in(world, room):
        return BEASTS[word].text
    seen = [thing for place in (room, holder(player.id)) for thing in things_at(world, place)]
    if word in seen:
        return THINGS[word].text
    raise CommandError(f"You see no {word[:40]} here.{did_you_mean(word, seen)}")


def go(player: Player, rest: str) -> str:
    refuse_while_fighting(player, "walk away")
    exits = ROOMS[here(player)].exits
    direction = SHORT.get(rest.lower(), rest.lower())
    if direction not in exits:
        asked = f"You cannot go {direction} from here" if direction in OPPOSITE else "Say in which direction"
        raise CommandError(f"{asked}; you can go {listed(exits, 'or')}.", exits=list(exits))
    walk(player, direction)
    warm(player)
    return view(player)


# Things.


def take(player: Player, rest: str) -> str:
    world, room = player.world, here(player)
    word = said(rest, "take THING")
    thing = thing_at(world, room, word, f"There is no {word[:40]} here to take.")
    move(world, thing, holder(player.id))
    tell_thing(player, "take", thing, f"{player.id} takes {THINGS[thing].name}.")
    return f"You take {THINGS[thing].name}."


def drop(player: Player, rest: str) -> str:
    world = player.world
    word = said(rest, "drop THING")
    thing = thing_at(world, holder(player.id), word, f"You do not carry any {word[:40]}.")
    move(world, thing, here(player))
    tell_thing(player, "drop", thing, f"{player.id} drops {THINGS[thing].name}.")
    return f"You drop {THINGS[thing].name}."


def give(player: Player, rest: str) -> str:
    world = player.world
    word, _, whom = said(rest, "give THING to WHO").partition(" to ")
    thing = thing_at(world, holder(player.id), word, f"You do not carry any {word[:40]}.")
    other = player_here(player, said(whom, "give THING to WHO"))
    move(world, thing, holder(other))
    tell_thing(player, "give", thing, f"{player.id} gives {THINGS[thing].name} to {other}.", to=other)
    return f"You give {THINGS[thing].name} to {other}."


def inventory(player: Player, rest: str) -> str:
    things = named(things_at(player.world, holder(player.id)))
    return f"You carry {listed(things)}." if things else "You carry nothing."


def tell_thing(player: Player, type_: str, thing: str, sentence: str, to: str | None = None) -> None:
    marks = mark([player.id] if to is None else [player.id, to], [thing])
    tell_room(player, type_, sentence, thing=thing, marks=marks)


# Fights.


def fight(player: Player, rest: str) -> str:
    return attack(player, said(rest, "fight WHO"))


def flee(player: Player, rest: str) -> str:
    foe = foe_of(player.world, player.id)
    if foe is None:
        raise CommandError("You are not fighting.")
    direction = random.choice(list(ROOMS[here(player)].exits))
    tell_fight(player, f"{player.id} flees from {name_of(foe)}!", "flee", foe)
    end(player)
    walk(player, direction)
    warm(player)
    return f"You flee. {view(player)}"


def score(player: Player, rest: str) -> str:
    foe = foe_of(player.world, player.id)
    return state_of(player) + ("" if foe is None else f" You are fighting {name_of(foe)}.")


# Talk.


def say(player: Player, rest: str) -> str:
    words = said(rest, "say TEXT")
    tell_room(player, "say", f"{player.id} says: {words}")
    return f"You say: {words}"


def emote(player: Player, rest: str) -> str:
    deed = said(rest, "emote TEXT")
    tell_room(player, "emote", f"{player.id} {deed}")
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


def said(text: str, usage: str) -> str:
    """*text* if there is something to say, and not too much."""
    if not text:
        raise CommandError(f"Type {usage}.")
    if len(text) > MAX_TEXT:
        raise CommandError(f"That is {len(text):,} characters; at most {MAX_TEXT:,} at a time.")
    return text


# The rest.


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


# What they type.


@frozen
class Verb:
    """A word that players can begin a line with. Where a *short* form is a sign, the text may follow at once."""

    name: str
    short: tuple[str, ...]
    usage: str
    help: str
    do: Callable[[Player, str], str]


VERBS: Final = (
    Verb("look", ("l",), "look [THING]", "where you are, which ways lead out, and who and what is with you.", look),
    Verb("go", (), "go DIRECTION", "walk to another room.", go),
    Verb("take", ("get",), "take THING", "pick it up.", take),
    Verb("drop", (), "drop THING", "put it down.", drop),
    Verb("give", (), "give THING to WHO", "put it into somebody's hands.", give),
    Verb("inventory", ("i",), "inventory", "what you carry.", inventory),
    Verb("fight", (), "fight WHO", "attack a beast, challenge a player, or take up a challenge.", fight),
    Verb("flee", (), "flee", "run out of a fight by the first way that you see.", flee),
    Verb("score", (), "score", "how well you are. The tavern's fire heals.", score),
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
