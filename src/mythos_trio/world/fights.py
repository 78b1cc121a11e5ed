"""Fights, wounds, and the fire that heals them.

Who fights has a *foe* in the player's data, ``beast/rat`` or ``player/bob``, and a timer, ``round``. When it is
due there is one exchange of blows, and the timer is set again: it is the fight's heartbeat, and since it is
stored with the blows, nothing that happens to the server can skip one or strike one twice.

In a duel each of the two has such a timer, and it brings the blow of the *other*. A handler can move only its
own player, so whoever falls has to fall in a handler of their own.
"""

from __future__ import annotations

import random
from typing import Final

from mythos_trio.game import CommandError, Player, World
from mythos_trio.world.places import BEASTS, START, THINGS
from mythos_trio.world.scene import (
    MAX_HITS,
    beasts_in,
    capital,
    enter,
    here,
    hits_of,
    holder,
    mark,
    move,
    player_here,
    room_of,
    show_room,
    tell_room,
    things_at,
)

ROUND: Final = 3.0  # seconds between two blows
PATIENCE: Final = 10  # rounds that a challenge waits for its answer
HEALING: Final = 5.0  # seconds by the fire for one hit point
MAX_BLOW: Final = 3  # of a player's bare hands


# Beginning.


def attack(player: Player, word: str) -> str:
    """Begin a fight with a beast, a challenge, or the duel to which the player was challenged."""
    world = player.world
    refuse_while_fighting(player, "fight anybody else")
    beast = word.lower().removeprefix("the ")
    if beast in beasts_in(world, here(player)):
        name = BEASTS[beast].name
        begin(player, f"beast/{beast}", f"{player.id} attacks {name}!", "attack")
        return f"You attack {name}. (You can flee.)"
    other = player_here(player, word)
    theirs = foe_of(world, other)
    if theirs == holder(player.id):
        begin(player, holder(other), f"{player.id} takes up the fight with {other}!", "attack")
        return f"You fight {other}. (You can flee.)"
    if theirs is not None:
        raise CommandError(f"{other} is fighting {name_of(theirs)}; wait until that is over.")
    if world.presence(other) != "online":
        raise CommandError(f"{other} has lost the connection, and cannot answer.")
    begin(player, holder(other), f"{player.id} challenges {other} to a fight.", "challenge")
    return f"You challenge {other}, who may now type: fight {player.id}"


def begin(player: Player, foe: str, sentence: str, kind: str) -> None:
    player.data["foe"] = foe
    tell_fight(player, sentence, kind, foe)
    player.after(ROUND, "round", 0)


# Rounds.


def next_round(player: Player, waited: int) -> None:
    """The timer ``round`` is due. *waited*: so many rounds has a challenge gone without an answer."""
    foe = foe_of(player.world, player.id)
    if foe is None:
        warm(player)  # the other has fallen, fled or left
        return
    kind, _, name = foe.partition("/")
    if kind == "beast":
        round_with_beast(player, name)
    else:
        round_of_duel(player, name, waited)


def round_with_beast(player: Player, beast: str) -> None:
    world, name = player.world, BEASTS[beast].name
    if world.presence(player.id) != "online":
        player.after(ROUND, "round", 0)  # it waits for who cannot see it
    elif beast not in beasts_in(world, here(player)):
        tell_fight(player, f"{player.id} looks around for {name}: the fight is over.", "end", f"beast/{beast}")
        end(player)
    elif not kills(player, beast):
        suffer(player, f"beast/{beast}", random.randint(0, BEASTS[beast].harm))


def round_of_duel(player: Player, other: str, waited: int) -> None:
    world = player.world
    presences = {world.presence(player.id), world.presence(other)}
    answered = foe_of(world, other) == holder(player.id)
    gone = room_of(world, other) != here(player) or world.presence(other) == "offline"
    if gone or (not answered and waited >= PATIENCE):
        tell_fight(player, f"{player.id} no longer waits for {other}.", "end", holder(other))
        end(player)
    elif answered and presences == {"online"}:
        suffer(player, holder(other), blow(world, other))
    else:
        player.after(ROUND, "round", waited if answered else waited + 1)


def blow(world: World, player_id: str) -> int:
    """Hit points that a blow of the player takes: the best weapon counts."""
    best = max((THINGS[thing].harm for thing in things_at(world, holder(player_id))), default=0)
    return random.randint(0, MAX_BLOW + best)


def kills(player: Player, beast: str) -> bool:
    """The player strikes the beast: is that its end?"""
    world, name, foe = player.world, BEASTS[beast].name, f"beast/{beast}"
    harm = blow(world, player.id)
    left = max(0, hits_of(world, beast) - harm)
    if harm:
        world.data[foe] = left
    tell_fight(player, f"{player.id} {'hits' if harm else 'misses'} {name}.", "hit" if harm else "miss", foe)
    if left:
        return False
    for thing in things_at(world, foe):
        move(world, thing, here(player))
    world.after(BEASTS[beast].away, foe)
    tell_fight(player, f"{capital(name)} is dead. {player.id} has won.", "win", foe)
    end(player)
    return True


def come_again(world: World, foe: str) -> None:
    """The world's timer of a dead beast is due: here is the next one."""
    beast = BEASTS[foe.removeprefix("beast/")]
    del world.data[foe]
    marks = {beast.name: "beast"}
    world.publish(beast.room, "arrive", f"Out of the dark comes {beast.name}.", room=beast.room, marks=marks)


def suffer(player: Player, foe: str, harm: int) -> None:
    """A blow of *foe* falls, and perhaps the player."""
    left = max(0, player_hits(player) - harm)
    tell_fight(player, f"{subject(foe)} {'hits' if harm else 'misses'} {player.id}.", "hit" if harm else "miss", foe)
    if not left:
        fall(player, foe)
        return
    if harm:
        set_hits(player, left)
    player.after(ROUND, "round", 0)


# Ends.


def end(player: Player) -> None:
    """The fight is over, for both. The other's next round finds that out."""
    foe = player.data.pop("foe", "")
    player.cancel("round")
    kind, _, name = foe.partition("/")
    if kind == "player" and foe_of(player.world, name) == holder(player.id):
        del player.world.data_of(name)["foe"]
    warm(player)


def fall(player: Player, foe: str) -> None:
    """Death is soft: the things stay where they are, and the player wakes up by the tavern's fire."""
    world, where = player.world, here(player)
    tell_fight(player, f"{player.id} falls. {subject(foe)} has won.", "fall", foe)
    for thing in things_at(world, holder(player.id)):
        move(world, thing, where)
    end(player)
    enter(player, START, f"{player.id} is carried in, and laid down by the fire.")
    set_hits(player, 1)
    warm(player)
    show_room(player, "It is dark, then it is warm. ")


# Wounds.


def player_hits(player: Player) -> int:
    hits: int = player.data.get("hits", MAX_HITS)
    return hits


def set_hits(player: Player, hits: int) -> None:
    player.data["hits"] = hits
    player.send("hits", state_of(player), hits=hits, max_hits=MAX_HITS, replace_key="hits")


def state_of(player: Player) -> str:
    return f"You have {player_hits(player)} of {MAX_HITS} hit points."


def warm(player: Player) -> None:
    """By the fire the hurt get better, in their time; not while they fight."""
    if player_hits(player) < MAX_HITS and here(player) == START and foe_of(player.world, player.id) is None:
        player.after(HEALING, "heal")


def heal(player: Player) -> None:
    """The timer ``heal`` is due. Who has left the fire meanwhile has not been healed."""
    if player_hits(player) < MAX_HITS and here(player) == START and foe_of(player.world, player.id) is None:
        set_hits(player, player_hits(player) + 1)
        warm(player)


# Foes.


def foe_of(world: World, player_id: str) -> str | None:
    foe: str | None = world.data_of(player_id).get("foe")
    return foe


def name_of(foe: str) -> str:
    kind, _, name = foe.partition("/")
    return BEASTS[name].name if kind == "beast" else name


def subject(foe: str) -> str:
    """The foe's name at the beginning of a sentence. A player's is spelt as it is."""
    return capital(name_of(foe)) if foe.startswith("beast/") else name_of(foe)


def refuse_while_fighting(player: Player, deed: str) -> None:
    foe = foe_of(player.world, player.id)
    if foe is not None:
        raise CommandError(f"You cannot {deed} while you fight {name_of(foe)}; you can flee.")


def tell_fight(player: Player, sentence: str, kind: str, foe: str) -> None:
    """To the room. *kind* is for clients that colour: attack, challenge, hit, miss, win, fall, end."""
    both, _, name = foe.partition("/")
    marks = mark([player.id, name]) if both == "player" else mark([player.id], beasts=[name])
    tell_room(player, "fight", sentence, kind=kind, foe=name, marks=marks)
