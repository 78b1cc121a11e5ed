"""Scenes in the default world."""

from __future__ import annotations

from typing import Any

import pytest

from mythos_trio.game import load_game
from mythos_trio.world import DefaultGame
from mythos_trio.world.fights import HEALING, PATIENCE, ROUND
from mythos_trio.world.places import BEASTS, OPPOSITE, ROOMS, SHORT, START, THINGS
from mythos_trio.world.scene import MAX_HITS, MAX_NAMES
from mythos_trio.world.verbs import MAX_TEXT, VERBS
from tests.support.stage import Stage


@pytest.fixture
async def inn() -> Stage:
    """Alice and Bob are in the tavern, and have heard all of it."""
    stage = Stage(DefaultGame())
    await stage.join("alice", "bob")
    stage.scrolls.clear()
    return stage


def room(stage: Stage, name: str) -> str:
    (channel,) = [channel for channel in stage.channels(name) if channel in ROOMS]
    return channel


# The map


def test_every_way_leads_back() -> None:
    back = {"north": "south", "east": "west", "up": "down"}
    back |= {there: here for here, there in back.items()}
    assert back.keys() == OPPOSITE.keys() == set(SHORT.values())
    for channel, place in ROOMS.items():
        for direction, there in place.exits.items():
            assert ROOMS[there].exits[back[direction]] == channel


async def test_every_room_can_be_walked_to(inn: Stage) -> None:
    path = "d e d e w u w u n e w w u d e n e w n"
    seen = {START}
    for direction in path.split():
        await inn.command("alice", direction)
        seen.add(room(inn, "alice"))
    assert seen == ROOMS.keys()


def test_it_can_be_served_by_its_name() -> None:
    assert isinstance(load_game("mythos_trio.world:DefaultGame"), DefaultGame)


# Comings and goings


async def test_a_newcomer_begins_in_the_tavern() -> None:
    stage = Stage(DefaultGame())
    await stage.join("alice")
    assert room(stage, "alice") == START
    (welcome,) = stage.scrolls["alice"]
    assert welcome["type"] == "room"
    assert welcome["content"].startswith("Welcome, alice. You are in the tavern.")
    assert "Type help" in welcome["content"]
    await stage.join("bob")
    assert stage.heard("alice")[1:] == ["arrive: bob comes in from the road."]
    assert "alice is here." in stage.heard("bob")[0]


async def test_who_comes_back_finds_the_same_place(inn: Stage) -> None:
    await inn.command("alice", "north")
    await inn.leave("alice")
    inn.scrolls.clear()
    await inn.join("alice")
    assert room(inn, "alice") == "room:square"
    assert inn.heard("alice") == ["presence: alice has come back to the world."]
    assert inn.heard("bob") == []


async def test_the_room_is_told_of_lost_connections(inn: Stage) -> None:
    await inn.lose("alice")
    await inn.come_back("alice")
    await inn.leave("alice")
    messages = inn.scrolls["bob"]
    assert [(message["type"], message["presence"], message["player"]) for message in messages] == [
        ("presence", "linkdead", "alice"),
        ("presence", "online", "alice"),
        ("presence", "offline", "alice"),
    ]
    assert messages[0]["content"] == "alice stares into the distance: the connection is lost."
    assert messages[0]["room"] == START


async def test_who_is_nowhere_is_put_into_the_tavern_by_the_next_command(inn: Stage) -> None:
    inn.subscriptions["alice"] = ["room:demolished"]
    assert (await inn.command("alice", "look")).startswith("You are in the tavern.")
    assert room(inn, "alice") == START
    assert inn.heard("bob") == ["arrive: alice appears out of thin air."]
    # Who is nowhere has nobody to tell.
    inn.subscriptions["alice"] = []
    await inn.lose("alice")
    assert inn.heard("bob") == []


# Looking and walking


async def test_look_is_in_sentences(inn: Stage) -> None:
    assert (await inn.command("alice", "look")).splitlines() == [
        f"You are in the tavern. {ROOMS[START].text}",
        "You see a poker.",
        "You can go north to the square or down to the cellar.",
        "bob is here.",
    ]
    await inn.join("carol")
    await inn.lose("bob")
    assert (await inn.command("alice", "l")).endswith("\nbob (link-dead) and carol are here.")
    assert (await inn.command("alice", "down")).endswith("\nYou are alone.")


async def test_a_crowd_is_counted(inn: Stage) -> None:
    names = [f"p{number:03}" for number in range(MAX_NAMES + 7)]
    for name in names:
        inn.presences[name] = "online"
        inn.subscriptions[name] = [START]
    seen = await inn.command("alice", "look")
    assert seen.endswith(f"{names[MAX_NAMES - 2]} and 8 more are here.")
    assert (await inn.command("alice", "who")).splitlines()[-1] == "And 9 more."


async def test_walking_is_told_in_both_rooms_and_to_the_walker(inn: Stage) -> None:
    await inn.join("carol")
    await inn.command("carol", "north")
    inn.scrolls.clear()
    reply = await inn.command("alice", "go north")
    assert reply.startswith("You are in the square.")
    assert reply.endswith("carol is here.")
    assert inn.heard("alice") == ["go: You go north to the square."]
    assert inn.heard("bob") == ["leave: alice goes north."]
    assert inn.heard("carol") == ["arrive: alice comes in from the south."]


@pytest.mark.parametrize("line", ["go down", "go d", "GO Down", "down", "d", "D", " go  down "])
async def test_ways_to_say_where(inn: Stage, line: str) -> None:
    await inn.command("alice", line)
    assert room(inn, "alice") == "room:cellar"


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("go west", "You cannot go west"),
        ("w", "You cannot go west"),
        ("go", "Say in which"),
        ("go away", "Say in which"),
    ],
)
async def test_where_there_is_no_way(inn: Stage, line: str, start: str) -> None:
    refusal = await inn.refused("alice", line)
    assert refusal.startswith(start)
    assert refusal.endswith("; you can go north or down.")


# Talking


@pytest.mark.parametrize("line", ["say hi", "'hi", "' hi", "SAY hi", {"text": "say hi"}])
async def test_say_is_heard_by_all_in_the_room_and_the_speaker(inn: Stage, line: object) -> None:
    await inn.join("carol")
    await inn.command("carol", "down")
    inn.scrolls.clear()
    assert await inn.command("alice", line) == "You say: hi"
    assert inn.heard("alice") == ["say: alice says: hi"]
    (message,) = inn.scrolls["bob"]
    assert (message["content"], message["player"], message["room"]) == ("alice says: hi", "alice", START)
    assert inn.heard("carol") == []


@pytest.mark.parametrize("line", ["emote waves", ":waves", "Emote waves"])
async def test_emote(inn: Stage, line: str) -> None:
    assert await inn.command("alice", line) == "You emote: waves"
    assert inn.heard("bob") == inn.heard("alice") == ["emote: alice waves"]


async def test_tell_is_heard_by_the_two(inn: Stage) -> None:
    await inn.join("carol")
    inn.scrolls.clear()
    assert await inn.command("alice", "tell bob meet me at ten") == "bob hears you."
    assert inn.heard("bob") == ["tell: alice tells you: meet me at ten"]
    assert inn.heard("alice") == ["tell: You tell bob: meet me at ten"]
    assert inn.heard("carol") == []


async def test_tell_says_that_it_is_mail(inn: Stage) -> None:
    await inn.lose("bob")
    assert "on coming back" in await inn.command("alice", "tell bob hi")
    reply = await inn.command("alice", "tell Bob hi")
    assert reply == "Bob is not here, and will get it as mail. (But bob is.)"
    assert inn.heard("Bob") == ["tell: alice tells you: hi"]
    assert await inn.command("alice", "tell zoe-1.x hi") == "zoe-1.x is not here, and will get it as mail."


async def test_tell_oneself(inn: Stage) -> None:
    assert await inn.command("alice", "tell alice milk") == "alice hears you."
    assert inn.heard("alice") == ["tell: alice tells you: milk"]


@pytest.mark.parametrize("who", ["a,b", "stats", "x" * 65, "é"])
async def test_tell_nobody_who_could_be(inn: Stage, who: str) -> None:
    assert (await inn.refused("alice", f"tell {who} hi")).endswith("cannot be a player's name.")


async def test_ooc_is_heard_by_who_listens(inn: Stage) -> None:
    assert await inn.subscribe("bob", "ooc") is True
    assert await inn.subscribe("bob", "room:tower") is False
    inn.subscriptions["bob"].append("ooc")
    await inn.command("bob", "north")
    inn.scrolls.clear()
    await inn.command("alice", "ooc hello all")
    assert inn.heard("bob") == inn.heard("alice") == ["ooc: alice says out of character: hello all"]
    await inn.command("alice", "ooc again")
    assert len(inn.heard("bob")) == 1


@pytest.mark.parametrize("line", ["say", "say  ", "'", "emote", ":", "tell", "tell bob", "ooc"])
async def test_to_say_nothing_is_refused(inn: Stage, line: str) -> None:
    assert (await inn.refused("alice", line)).startswith("Type ")


async def test_to_say_too_much_is_refused(inn: Stage) -> None:
    await inn.command("alice", "say " + "x" * MAX_TEXT)
    assert "1,001 characters" in await inn.refused("alice", "say " + "x" * (MAX_TEXT + 1))


async def test_nobody_can_send_escape_codes_or_forge_lines(inn: Stage) -> None:
    await inn.command("alice", "say hi\nbob says: \x1b[31mI quit\x00 \u202e")
    assert inn.heard("bob") == ["say: alice says: hi bob says: [31mI quit"]


async def test_joined_emojis_stay_together(inn: Stage) -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert await inn.command("alice", f"say {family}") == f"You say: {family}"


# Things


async def test_every_thing_and_beast_begins_somewhere() -> None:
    assert {thing.start for thing in THINGS.values()} <= {*ROOMS, *(f"beast/{beast}" for beast in BEASTS)}
    assert {beast.room for beast in BEASTS.values()} <= ROOMS.keys()
    for name, thing in THINGS.items():
        assert name in thing.name.split()  # the word that is typed is the word that is seen


async def test_take_drop_and_give(inn: Stage) -> None:
    assert await inn.command("alice", "inventory") == "You carry nothing."
    assert await inn.command("alice", "take Poker") == "You take a poker."
    assert await inn.command("alice", "i") == "You carry a poker."
    assert "poker" not in await inn.command("bob", "look")
    assert await inn.command("alice", "give the poker to Bob") == "You give a poker to bob."
    assert await inn.command("bob", "i") == "You carry a poker."
    assert await inn.command("bob", "drop poker") == "You drop a poker."
    assert "You see a poker." in await inn.command("alice", "look")
    assert inn.heard("alice") == [
        "take: alice takes a poker.",
        "give: alice gives a poker to bob.",
        "drop: bob drops a poker.",
    ]
    assert inn.scrolls["bob"][1]["marks"] == {"alice": "player", "bob": "player", "a poker": "thing"}


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("take", "Type take THING"),
        ("take coin", "There is no coin here to take."),
        ("take pokre", "There is no pokre here to take. Did you mean poker?"),
        ("drop poker", "You do not carry any poker."),
        ("give poker to bob", "You do not carry any poker."),
        ("give", "Type give THING to WHO"),
        ("look sword", "You see no sword here."),
    ],
)
async def test_what_cannot_be_done_with_things(inn: Stage, line: str, start: str) -> None:
    assert (await inn.refused("alice", line)).startswith(start)


async def test_nobody_is_given_anything_who_is_not_there(inn: Stage) -> None:
    await inn.command("alice", "take poker")
    assert await inn.refused("alice", "give poker") == "Type give THING to WHO."
    assert await inn.refused("alice", "give poker to bbo") == "There is nobody called bbo here. Did you mean bob?"
    assert "nobody called alice" in await inn.refused("alice", "give poker to alice")
    await inn.command("bob", "north")
    assert "nobody called bob" in await inn.refused("alice", "give poker to bob")


async def test_things_pass_to_the_next_session_with_the_place(inn: Stage) -> None:
    await inn.command("alice", "take poker")
    await inn.command("alice", "north")
    inn.scrolls.clear()
    await inn.new_session("alice")
    assert room(inn, "alice") == "room:square"
    assert await inn.command("alice", "i") == "You carry a poker."
    assert inn.heard("alice")[-1].startswith("room: You are in the square.")


async def test_look_at(inn: Stage) -> None:
    assert await inn.command("alice", "look at the poker") == THINGS["poker"].text
    await inn.command("alice", "take poker")
    await inn.command("alice", "down")
    assert await inn.command("alice", "look poker") == THINGS["poker"].text
    assert await inn.command("alice", "look rat") == BEASTS["rat"].text


# Fights


@pytest.fixture
def dice(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the next blows take, in order; afterwards all miss."""
    rolls: list[int] = []
    monkeypatch.setattr("random.randint", lambda low, high: min(high, rolls.pop(0)) if rolls else low)
    return rolls


@pytest.fixture
async def cellar(inn: Stage) -> Stage:
    """Alice and Bob have gone down to the rat."""
    for name in ("alice", "bob"):
        await inn.command(name, "down")
    inn.scrolls.clear()
    return inn


def player(stage: Stage, name: str) -> Any:
    return stage.data(f"player/{name}")


async def test_a_rat_fights_back_and_is_killed_and_comes_again(cellar: Stage, dice: list[int]) -> None:
    dice += [3, 2, 0, 0, 3]
    assert await cellar.command("alice", "fight the rat") == "You attack the rat. (You can flee.)"
    assert await cellar.command("alice", "score") == "You have 12 of 12 hit points. You are fighting the rat."
    await cellar.later(ROUND)
    assert "The rat is here, hurt." in await cellar.command("bob", "look")
    await cellar.later(2 * ROUND)
    assert cellar.heard("bob") == [
        "fight: alice attacks the rat!",
        "fight: alice hits the rat.",
        "fight: The rat hits alice.",
        "fight: alice misses the rat.",
        "fight: The rat misses alice.",
        "fight: alice hits the rat.",
        "fight: The rat is dead. alice has won.",
    ]
    assert await cellar.command("alice", "score") == "You have 10 of 12 hit points."
    assert (
        cellar.scrolls["alice"][3] | {"replace_key": "hits", "hits": 10, "max_hits": 12} == cellar.scrolls["alice"][3]
    )
    assert "rat" not in await cellar.command("bob", "look")
    assert "nobody called rat" in await cellar.refused("bob", "fight rat")
    await cellar.later(BEASTS["rat"].away)
    assert cellar.heard("bob") == ["arrive: Out of the dark comes the rat."]
    assert "The rat is here.\n" in await cellar.command("bob", "look")
    assert cellar.timers == {}


async def test_two_can_fight_one_beast_and_one_of_them_wins(cellar: Stage, dice: list[int]) -> None:
    dice += [3, 0, 3]
    await cellar.command("alice", "fight rat")
    await cellar.command("bob", "fight rat")
    await cellar.later(ROUND)
    assert cellar.heard("bob")[-1] == "fight: The rat is dead. bob has won."
    await cellar.later(ROUND)
    assert cellar.heard("bob") == ["fight: alice looks around for the rat: the fight is over."]
    assert "foe" not in player(cellar, "alice")
    assert "foe" not in player(cellar, "bob")


async def test_the_best_weapon_counts(cellar: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.randint", lambda low, high: high)
    cellar.subscriptions["alice"] = []
    cellar.values.clear()
    for line in ("take poker", "n", "n", "n", "take sword", "s", "s", "s", "d", "fight rat"):
        await cellar.command("alice", line)
    await cellar.later(ROUND)
    assert cellar.data("beast/rat") == 1


async def test_death_is_soft(cellar: Stage, dice: list[int]) -> None:
    await cellar.command("alice", "take lantern")
    await cellar.command("alice", "fight rat")
    dice += [0, 2] * 6
    cellar.scrolls.clear()
    await cellar.later(6 * ROUND)
    assert cellar.heard("bob")[-1] == "fight: alice falls. The rat has won."
    assert "You see a lantern." in await cellar.command("bob", "look")
    assert room(cellar, "alice") == START
    *_, hits, woke = cellar.heard("alice")
    assert hits == "hits: You have 1 of 12 hit points."
    assert woke.startswith("room: It is dark, then it is warm. You are in the tavern.")
    assert player(cellar, "alice") == {"room": START, "hits": 1}
    # By the fire it gets better, and nowhere else.
    await cellar.later(3 * HEALING)
    assert player(cellar, "alice")["hits"] == 4
    await cellar.command("alice", "north")
    await cellar.later(100)
    assert player(cellar, "alice")["hits"] == 4
    await cellar.command("alice", "south")
    await cellar.later(100)
    assert player(cellar, "alice")["hits"] == MAX_HITS
    assert cellar.timers == {}


async def test_a_fallen_trolls_crown_lies_in_the_cavern(inn: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("d", "e", "d"):
        await inn.command("alice", line)
    assert "crown" not in await inn.command("alice", "look")
    monkeypatch.setattr("random.randint", lambda low, high: high if high == 3 else 0)
    await inn.command("alice", "fight troll")
    await inn.later(30)
    assert await inn.command("alice", "take crown") == "You take a crown."


async def test_who_fights_cannot_walk_away_but_flee(cellar: Stage, dice: list[int]) -> None:
    assert await cellar.refused("alice", "flee") == "You are not fighting."
    await cellar.command("alice", "fight rat")
    assert await cellar.refused("alice", "up") == "You cannot walk away while you fight the rat; you can flee."
    assert "while you fight the rat" in await cellar.refused("alice", "fight bob")
    assert (await cellar.command("alice", "flee")).startswith("You flee. You are in ")
    assert cellar.heard("bob")[1:2] == ["fight: alice flees from the rat!"]
    assert room(cellar, "alice") in ROOMS["room:cellar"].exits.values()
    assert cellar.timers == {}


async def duel(stage: Stage) -> None:
    assert await stage.command("alice", "fight Bob") == "You challenge bob, who may now type: fight alice"
    assert await stage.command("bob", "fight alice") == "You fight alice. (You can flee.)"
    stage.scrolls.clear()


async def test_a_duel(inn: Stage, dice: list[int]) -> None:
    await duel(inn)
    dice += [1, 3, 0, 3, 0, 3, 0, 3]
    await inn.later(4 * ROUND)
    assert [line for line in inn.heard("alice") if line.startswith("fight")] == [
        "fight: bob hits alice.",
        "fight: alice hits bob.",
        "fight: bob misses alice.",
        "fight: alice hits bob.",
        "fight: bob misses alice.",
        "fight: alice hits bob.",
        "fight: bob misses alice.",
        "fight: alice hits bob.",
        "fight: bob falls. alice has won.",
    ]
    assert (player(inn, "alice")["hits"], player(inn, "bob")["hits"]) == (11, 1)
    await inn.later(ROUND + HEALING * MAX_HITS)
    assert player(inn, "alice")["hits"] == player(inn, "bob")["hits"] == MAX_HITS
    assert inn.timers == {}


async def test_a_challenge_is_not_a_fight_until_it_is_taken_up(inn: Stage, dice: list[int]) -> None:
    await inn.join("carol")
    dice += [3] * 100
    await inn.command("alice", "fight bob")
    assert await inn.refused("carol", "fight alice") == "alice is fighting bob; wait until that is over."
    inn.scrolls.clear()
    await inn.later(PATIENCE * ROUND)
    assert inn.heard("bob") == []
    await inn.later(ROUND)
    assert inn.heard("bob") == ["fight: alice no longer waits for bob."]
    assert player(inn, "alice") == {"room": START}
    # Nor if the other walks away.
    await inn.command("alice", "fight bob")
    await inn.command("bob", "north")
    await inn.later(ROUND)
    assert "foe" not in player(inn, "alice")
    assert inn.timers == {}


async def test_a_duel_waits_for_who_is_link_dead(inn: Stage, dice: list[int]) -> None:
    await duel(inn)
    await inn.lose("bob")
    dice += [3] * 100
    await inn.later(100)
    assert inn.heard("alice") == [
        "presence: bob stares into the distance: the connection is lost. The fight waits.",
    ]
    assert (await inn.command("alice", "score")).endswith("You are fighting bob.")
    await inn.come_back("bob")
    await inn.later(ROUND)
    assert inn.heard("alice")[:2] == ["presence: bob is back. The fight goes on.", "fight: bob hits alice."]


@pytest.mark.parametrize("how", ["leaves", "begins a new session", "flees"])
async def test_a_duel_ends_for_both_when_one(inn: Stage, dice: list[int], how: str) -> None:
    await duel(inn)
    match how:
        case "leaves":
            await inn.leave("bob")
            assert inn.heard("alice") == ["presence: bob has left the world. The fight is over."]
        case "flees":
            await inn.command("bob", "flee")
        case _:
            await inn.new_session("bob")
    assert "foe" not in player(inn, "alice")
    assert "foe" not in player(inn, "bob")
    await inn.later(2 * ROUND)
    assert inn.timers == {}


async def test_nobody_challenges_who_cannot_answer(inn: Stage) -> None:
    await inn.lose("bob")
    assert await inn.refused("alice", "fight bob") == "bob has lost the connection, and cannot answer."
    assert "nobody called alice" in await inn.refused("alice", "fight alice")
    assert await inn.refused("alice", "fight") == "Type fight WHO."


async def test_a_fight_with_a_beast_waits_too(cellar: Stage, dice: list[int]) -> None:
    await cellar.command("alice", "fight rat")
    await cellar.lose("alice")
    dice += [2] * 100
    await cellar.later(100)
    assert player(cellar, "alice") == {"room": "room:cellar", "foe": "beast/rat"}
    await cellar.leave("alice")
    assert player(cellar, "alice") == {"room": "room:cellar"}
    assert cellar.timers == {}


# The rest


async def test_a_message_says_which_of_its_words_are_what(cellar: Stage) -> None:
    await cellar.new_session("alice")
    (message,) = [message for message in cellar.scrolls["alice"] if message["type"] == "room"]
    assert message["marks"] == {
        "bob": "player",
        "a lantern": "thing",
        "the rat": "beast",
        "up": "exit",
        "east": "exit",
    }
    assert "\x1b" not in message["content"]


async def test_who(inn: Stage) -> None:
    await inn.command("bob", "north")
    await inn.lose("bob")
    inn.presences["carol"] = "online"
    assert (await inn.command("alice", "who")).splitlines() == [
        "alice is in the tavern.",
        "bob (link-dead) is in the square.",
        "carol is in no room.",
    ]


async def test_test_is_ok(inn: Stage) -> None:
    assert await inn.command("alice", "test") == "ok. You are alice, and your connections are healthy."


async def test_help_names_every_command(inn: Stage) -> None:
    text = await inn.command("alice", "help")
    for verb in VERBS:
        assert f"\n{verb.usage}: " in text
        assert (await inn.command("alice", f"help {verb.name}")).startswith(f"{verb.usage}: ")
    assert await inn.command("alice", "? '") == "say TEXT: everybody in the room hears it. Or, for short: '."
    assert "no command dance" in await inn.refused("alice", "help dance")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("lok", "Did you mean look?"),
        ("nroth", "Did you mean north or south?"),
        ("xyzzy", "no command xyzzy. Type help"),
    ],
)
async def test_an_unknown_command_is_refused_with_a_hint(inn: Stage, line: str, hint: str) -> None:
    assert hint in await inn.refused("alice", line)


@pytest.mark.parametrize("content", ["", "  ", "\x00", None, 7, [], {}, {"text": ""}, {"text": None}, {"say": "hi"}])
async def test_a_command_without_text_is_refused_with_an_example(inn: Stage, content: object) -> None:
    assert '"look"' in await inn.refused("alice", content)


async def test_what_only_reads_says_nothing_to_anybody(inn: Stage) -> None:
    before = inn.moment()
    for line in ("look", "look poker", "i", "score", "who", "help", "help say", "test"):
        await inn.command("alice", line)
    assert inn.moment() == before
