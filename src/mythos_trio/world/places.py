"""What there is in the default world, and never changes: rooms, things, beasts. The map to draw your own by."""

from __future__ import annotations

from typing import Final

from attrs import frozen


@frozen
class Room:
    """*name* follows "in" and "to"; *exits* lead from a direction to a room's channel."""

    name: str
    text: str
    exits: dict[str, str]


@frozen
class Thing:
    """*start*: the place where it is until somebody moves it. *harm*: what it adds to a blow of its holder."""

    name: str
    text: str
    start: str
    harm: int = 0


@frozen
class Beast:
    """*hits*: hit points when it is unhurt. *harm*: the most that a blow of it takes. *away*: seconds from its
    death until another one comes."""

    name: str
    text: str
    room: str
    hits: int
    harm: int
    away: float


START: Final = "room:tavern"
ROOMS: Final = {
    "room:tavern": Room(
        "the tavern",
        "A fire mutters in the hearth: it is good for wounds. The tables have been carved by people with time on "
        "their hands.",
        {"north": "room:square", "down": "room:cellar"},
    ),
    "room:cellar": Room(
        "the cellar",
        "Barrels, dust, and a draught from a hole in the wall that somebody has gnawed and somebody else widened.",
        {"up": "room:tavern", "east": "room:tunnel"},
    ),
    "room:tunnel": Room(
        "the tunnel",
        "You walk stooped, then crouched. From below comes a snore that the stones repeat.",
        {"west": "room:cellar", "down": "room:cavern"},
    ),
    "room:cavern": Room(
        "the cavern",
        "The roof is out of sight. The floor is not: it is bones, and some of them had boots on.",
        {"up": "room:tunnel", "east": "room:lake"},
    ),
    "room:lake": Room(
        "the black lake",
        "Water without a ripple. Whoever rowed here left no boat, and no other way out.",
        {"west": "room:cavern"},
    ),
    "room:square": Room(
        "the square",
        "Four roads meet at a dry fountain, where people throw coins for luck and others find them for lunch.",
        {"south": "room:tavern", "east": "room:garden", "west": "room:library", "north": "room:bridge"},
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
    "room:bridge": Room(
        "the bridge",
        "Planks over a river in a hurry. Some of them are new; you learn which ones are not.",
        {"south": "room:square", "north": "room:woods", "east": "room:mill"},
    ),
    "room:mill": Room(
        "the mill",
        "The wheel turns, the stone turns, nothing is ground. Flour lies on the sills like old snow.",
        {"west": "room:bridge"},
    ),
    "room:woods": Room(
        "the woods",
        "The path divides, and divides again, and has you where it wants you: back at the oak.",
        {"south": "room:bridge"},
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

# The key is the word that players type; `mythos_trio.world.scene` says where it stands in the data.
THINGS: Final = {
    "coin": Thing("a brass coin", "One side has a crown on it, the other a troll.", "room:square"),
    "poker": Thing("a poker", "Black iron, warm at one end. It would do to keep rats off.", START, harm=1),
    "lantern": Thing(
        "a lantern", "It burns with a small green flame, and gives its opinion by flickering.", "room:cellar"
    ),
    "apple": Thing("a red apple", "The worm in it has been very happy.", "room:garden"),
    "book": Thing(
        "a thin book", '"On Trolls". The last page says that one should not have come alone.', "room:library"
    ),
    "spyglass": Thing("a spyglass", "Through it you see somebody with a spyglass.", "room:tower"),
    "sack": Thing("a sack of flour", "The only one that the mill ever finished.", "room:mill"),
    "sword": Thing("a rusty sword", "It has been lost by better fighters.", "room:woods", harm=2),
    "pearl": Thing("a black pearl", "It is heavier than it looks, and it looks back.", "room:lake"),
    "crown": Thing("a crown", "Too small for the troll; he wore it on a finger.", "beast/troll"),
}

BEASTS: Final = {
    "rat": Beast("the rat", "It has the build of a dog and the manners of a rat.", "room:cellar", 6, 2, 60.0),
    "troll": Beast("the troll", "He has stopped snoring, to look at you.", "room:cavern", 20, 4, 300.0),
}
