"""Scenes in the default world."""

from __future__ import annotations

import pytest

from mythos_trio.game import load_game
from mythos_trio.world import DefaultGame
from mythos_trio.world.places import OPPOSITE, ROOMS, SHORT, START
from mythos_trio.world.scene import MAX_NAMES
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


# The rest


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
    for line in ("look", "who", "help", "help say", "test"):
        await inn.command("alice", line)
    assert inn.moment() == before
