"""The API that games are handed, its bounds, and how a game is found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mythos_trio.core.names import EVERYONE
from mythos_trio.core.transaction import MAX_EFFECT_BYTES, MAX_EFFECTS, Append, Effect, Subscribe, Unsubscribe
from mythos_trio.game import (
    Command,
    CommandError,
    Game,
    GameError,
    GameSpecError,
    Gathering,
    Player,
    PlayerData,
    World,
    WorldData,
    load_game,
)
from mythos_trio.seams import SeededRandomness
from tests.support.stage import NOW, Stage


@pytest.fixture
def stage() -> Stage:
    stage = Stage()
    stage.presences = {"alice": "online", "bob": "linkdead", "carol": "offline"}
    stage.subscriptions = {"alice": ["inn", "ooc"], "bob": ["inn"], "carol": ["inn"]}
    return stage


def gather(stage: Stage, *, max_message_size: int = 65536, ended: bool = False) -> Gathering:
    return Gathering(
        stage, "alice", "a-1", now=NOW, randomness=SeededRandomness(1), max_message_size=max_message_size, ended=ended
    )


def body(effect: Effect) -> Any:
    assert isinstance(effect, Append)
    return json.loads(effect.body)


# What is gathered


def test_effects_are_gathered_in_the_order_of_the_calls(stage: Stage) -> None:
    gathering = gather(stage)
    player, world = gathering.player, gathering.player.world
    player.unsubscribe("inn")
    world.publish("inn", "leave", "alice leaves.")
    player.send("go", "You go.")
    player.subscribe("garden")
    world.send("carol", "tell", "hi")
    world.broadcast("news", "it rains")
    kinds = [(type(effect), getattr(effect, "target", None)) for effect in gathering.effects]
    assert kinds == [
        (Unsubscribe, None),
        (Append, "#inn"),
        (Append, "@alice"),
        (Subscribe, None),
        (Append, "@carol"),
        (Append, EVERYONE),
    ]
    assert gathering.effects[0] == Unsubscribe("alice", "a-1", "inn")
    assert gathering.effects[3] == Subscribe("alice", "a-1", "garden")


def test_a_message_has_its_fields_beside_its_type_and_content(stage: Stage) -> None:
    gathering = gather(stage)
    gathering.world.publish("inn", "say", {"text": "hi"}, player="alice", replace_key="k")
    (effect,) = gathering.effects
    assert isinstance(effect, Append)
    assert effect.body.startswith(b'{"id":"')
    assert body(effect) == {
        "id": effect.id,
        "type": "say",
        "content": {"text": "hi"},
        "timestamp": "2026-01-01T00:00:00.000Z",
        "player": "alice",
        "replace_key": "k",
    }
    # Nobody else can know this id, so the store need not look for it.
    assert effect.digest is None


def test_each_message_has_an_id_of_its_own(stage: Stage) -> None:
    gathering = gather(stage)
    gathering.player.send("a", 1)
    gathering.player.send("a", 1)
    assert len({body(effect)["id"] for effect in gathering.effects}) == 2


def test_content_is_taken_when_it_is_said(stage: Stage) -> None:
    gathering = gather(stage)
    things = ["sword"]
    gathering.player.send("things", things)
    things.append("shield")
    assert body(gathering.effects[0])["content"] == ["sword"]


def test_subscribing_twice_or_leaving_what_one_is_not_in_has_no_effect(stage: Stage) -> None:
    gathering = gather(stage)
    gathering.player.subscribe("inn")
    gathering.player.unsubscribe("garden")
    assert gathering.effects == []


def test_a_new_session_and_a_disconnect_are_asked_for(stage: Stage) -> None:
    gathering = gather(stage)
    assert (gathering.new_session_wanted, gathering.disconnect_wanted) == (False, None)
    gathering.player.new_session()
    gathering.player.disconnect("you have been eaten")
    assert (gathering.new_session_wanted, gathering.disconnect_wanted) == (True, "you have been eaten")
    assert gathering.effects == []


# What is read


def test_the_world_is_read_as_committed(stage: Stage) -> None:
    world = gather(stage).world
    assert world.present() == ["alice", "bob"]
    assert [world.presence(name) for name in ("alice", "bob", "carol", "dora")] == [
        "online",
        "linkdead",
        "offline",
        "offline",
    ]
    assert world.subscribers("inn") == ["alice", "bob"]
    assert gather(stage).player.health == "healthy"


def test_a_handler_reads_its_own_changes(stage: Stage) -> None:
    gathering = gather(stage)
    player, world = gathering.player, gathering.world
    player.unsubscribe("inn")
    player.subscribe("garden")
    assert player.channels == ["ooc", "garden"]
    assert world.subscribers("inn") == ["bob"]
    assert world.subscribers("garden") == ["alice"]
    player.unsubscribe("garden")
    assert player.channels == ["ooc"]
    assert world.subscribers("garden") == []


def test_a_channel_that_was_left_and_joined_again_is_the_newest(stage: Stage) -> None:
    gathering = gather(stage)
    gathering.player.unsubscribe("inn")
    gathering.player.subscribe("inn")
    assert gathering.player.channels == ["ooc", "inn"]
    assert gathering.world.subscribers("inn") == ["bob", "alice"]
    assert [type(effect) for effect in gathering.effects] == [Unsubscribe, Subscribe]


def test_what_others_commit_meanwhile_is_seen_beside_its_own_changes(stage: Stage) -> None:
    gathering = gather(stage)
    gathering.player.subscribe("garden")
    stage.subscriptions["alice"] += ["garden", "auction"]
    assert gathering.player.channels == ["inn", "ooc", "auction", "garden"]


def test_an_ended_session_has_no_subscriptions_to_change(stage: Stage) -> None:
    gathering = gather(stage, ended=True)
    gathering.player.unsubscribe("inn")
    assert gathering.player.channels == ["ooc"]
    assert gathering.effects == []
    with pytest.raises(GameError, match="has ended"):
        gathering.player.subscribe("garden")
    gathering.world.publish("inn", "leave", "alice leaves.")
    assert len(gathering.effects) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("look", "look"),
        ({"text": "look"}, "look"),
        ({"text": 1}, ""),
        ({}, ""),
        (["look"], ""),
        (None, ""),
    ],
)
def test_a_commands_text(content: object, text: str) -> None:
    assert Command("c1", content).text == text


# Mistakes, in the author's terms


def circle() -> list[Any]:
    content: list[Any] = []
    content.append(content)
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (object(), "cannot be written as JSON"),
        (lambda: 1, "cannot be written as JSON"),
        ({(1, 2): 3}, "cannot be written as JSON"),
        ("\ud800", "cannot be written as JSON"),
        (circle(), "contains itself"),
    ],
)
def test_content_that_is_not_json(stage: Stage, content: object, words: str) -> None:
    gathering = gather(stage)
    with pytest.raises(GameError, match=f"^send: .*{words}"):
        gathering.player.send("thing", content)
    with pytest.raises(GameError, match=f"^send: .*{words}"):
        gathering.player.send("thing", "", more=content)
    with pytest.raises(GameError, match=f"^on_command returned: .*{words}"):
        gathering.answer(content)
    assert gathering.effects == []


def test_an_answer(stage: Stage) -> None:
    assert gather(stage).answer({"hp": 3}) == b'{"ok":true,"content":{"hp":3}}'
    with pytest.raises(GameError, match="MAX_MESSAGE_SIZE is 100"):
        gather(stage, max_message_size=100).answer("x" * 100)


@pytest.mark.parametrize("bad", ["reply", "welcome", "", "x" * 65, 7, None])
def test_a_type_that_games_cannot_use(stage: Stage, bad: Any) -> None:
    with pytest.raises(GameError, match=r"^publish: .*type"):
        gather(stage).world.publish("inn", bad, "hi")


@pytest.mark.parametrize("field", ["id", "seq", "epoch", "replaces", "timestamp", "type", "content"])
def test_fields_that_are_the_servers(stage: Stage, field: str) -> None:
    with pytest.raises(GameError, match=f"^send: the server sets {field}"):
        gather(stage).player.send("say", "hi", **{field: 1})


def test_a_replace_key_is_text(stage: Stage) -> None:
    with pytest.raises(GameError, match="replace_key"):
        gather(stage).player.send("hp", 3, replace_key=3)


@pytest.mark.parametrize("bad", ["", "the inn", "x" * 129, "naïve", None])
def test_bad_channels(stage: Stage, bad: Any) -> None:
    player = gather(stage).player
    for call in (
        player.subscribe,
        player.unsubscribe,
        player.world.subscribers,
        lambda name: player.world.publish(name, "say", "hi"),
    ):
        with pytest.raises(GameError, match="a channel has 1-128"):
            call(bad)


@pytest.mark.parametrize("bad", ["", "..", "stats", "a b", 1])
def test_bad_player_ids(stage: Stage, bad: Any) -> None:
    with pytest.raises(GameError, match=r"^send: a player id has .*; not "):
        gather(stage).world.send(bad, "tell", "hi")


@pytest.mark.parametrize("bad", ["", "é" * 62, None])
def test_a_reason_fits_into_a_close_frame(stage: Stage, bad: Any) -> None:
    gather(stage).player.disconnect("é" * 61)
    with pytest.raises(GameError, match=r"1-123 bytes"):
        gather(stage).player.disconnect(bad)


def test_a_handler_has_a_bounded_number_of_effects(stage: Stage) -> None:
    gathering = gather(stage)
    gathering.player.subscribe("garden")
    for _ in range(MAX_EFFECTS - 1):
        gathering.player.send("tick", None)
    with pytest.raises(GameError, match=r"1,000 times in all\. .* a channel"):
        gathering.player.send("tick", None)
    with pytest.raises(GameError, match=r"1,000 times in all\. "):
        gathering.player.subscribe("tower")
    assert len(gathering.effects) == MAX_EFFECTS
    assert gathering.player.channels == ["inn", "ooc", "garden"]


def test_a_handler_has_a_bounded_number_of_bytes(stage: Stage) -> None:
    gathering = gather(stage)
    gathering.player.send("map", "x" * 60_000)
    (effect,) = gathering.effects
    assert isinstance(effect, Append)
    for _ in range(MAX_EFFECT_BYTES // len(effect.body) - 1):
        gathering.player.send("map", "x" * 60_000)
    with pytest.raises(GameError, match="1,048,576 bytes in all"):
        gathering.player.send("map", "x" * 60_000)
    assert len(gathering.effects) == MAX_EFFECT_BYTES // len(effect.body)
    # What still fits can still be said.
    gathering.player.send("note", "too much to carry")


def test_a_message_has_a_bounded_number_of_bytes(stage: Stage) -> None:
    gathering = gather(stage, max_message_size=200)
    gathering.player.send("say", "x")
    with pytest.raises(GameError, match="MAX_MESSAGE_SIZE is 200"):
        gathering.player.send("say", "é" * 100)
    assert len(gathering.effects) == 1


def test_after_the_handler_every_use_is_an_error_that_names_the_way(stage: Stage) -> None:
    gathering = gather(stage)
    player, world = gathering.player, gathering.player.world
    gathering.close()
    for use in (
        lambda: player.send("say", "hi"),
        lambda: player.subscribe("garden"),
        lambda: player.unsubscribe("inn"),
        lambda: player.channels,
        lambda: player.health,
        lambda: player.new_session(),
        lambda: player.disconnect("bye"),
        lambda: world.publish("inn", "say", "hi"),
        lambda: world.send("bob", "say", "hi"),
        lambda: world.broadcast("say", "hi"),
        lambda: world.present(),
        lambda: world.presence("bob"),
        lambda: world.subscribers("inn"),
    ):
        with pytest.raises(GameError, match=r"await game\.run\(function\)"):
            use()
    assert gathering.effects == []
    assert (gathering.new_session_wanted, gathering.disconnect_wanted) == (False, None)
    assert (player.id, player.session_id, repr(player)) == ("alice", "a-1", "<Player alice>")


# Game


async def test_a_game_without_handlers_is_a_game(stage: Stage) -> None:
    with pytest.raises(CommandError, match="no commands"):
        await stage.command("alice", "look")
    assert await stage.subscribe("alice", "garden") is False
    await stage.join("dora")
    await stage.lose("dora")
    await stage.come_back("dora")
    await stage.leave("dora")
    assert stage.scrolls == {}


async def test_a_games_own_task_runs_functions_as_transactions(stage: Stage) -> None:
    async def rain(world: World) -> int:
        world.publish("inn", "weather", "It rains.")
        return len(world.subscribers("inn"))

    assert await stage.game.run(rain) == 2
    assert stage.heard("alice") == ["weather: It rains."]


async def test_run_says_what_it_needs() -> None:
    async def rain(world: World) -> None: ...

    with pytest.raises(GameError, match="mythos-trio serve"):
        await Game().run(rain)


def test_a_function_of_a_games_own_task_has_no_player(stage: Stage) -> None:
    gathering = stage.gathering()
    with pytest.raises(GameError, match="no player here"):
        _ = gathering.player
    assert gathering.world.subscribers("inn") == ["alice", "bob"]


def test_a_refusal_has_details_for_programs() -> None:
    error = CommandError("You cannot go west.", exits=["north"])
    assert (str(error), error.message, error.details) == (
        "You cannot go west.",
        "You cannot go west.",
        {"exits": ["north"]},
    )


# load_game


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes ``mygame.py`` into the working directory, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "mygame", raising=False)

    def write(text: str, name: str = "mygame.py") -> None:
        (tmp_path / name).write_text(f"from mythos_trio.game import *\n{text}\n")

    yield write
    sys.modules.pop("mygame", None)


ECHO = """
class Echo(Game):
    async def on_command(self, player, command):
        return command.text
"""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"{ECHO}game = Echo()", "game"),
        (ECHO, "Echo"),
        (f"{ECHO}def make():\n    return Echo()", "make"),
        (f"{ECHO}class games:\n    best = Echo()", "games.best"),
        (ECHO.replace("(Game)", ""), "Echo"),
        (ECHO.replace("(Game)", "") + "game = Echo()", "game"),
    ],
    ids=["instance", "class", "function", "dotted", "any class", "any object"],
)
async def test_a_game_is_an_instance_or_what_makes_one(module: Any, text: str, name: str) -> None:
    module(text)
    game = load_game(f"mygame:{name}")
    assert isinstance(game, Game)
    stage = Stage(game)
    await stage.join("alice")
    assert await stage.command("alice", "hello") == "hello"


def problem(spec: str) -> str:
    with pytest.raises(GameSpecError) as caught:
        load_game(spec)
    assert isinstance(caught.value, GameError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("mygame", '"mygame:game"'),
        ("mygame.py:world", '"mygame:world"'),
        ("./mygame.py", '"mygame:game"'),
        ("", "MODULE:NAME"),
        ("mygame:", "MODULE:NAME"),
        (":game", "MODULE:NAME"),
        ("my game:game", "MODULE:NAME"),
    ],
)
def test_a_spec_that_is_none(spec: str, hint: str) -> None:
    assert hint in problem(spec)


@pytest.mark.parametrize(
    ("text", "spec", "words"),
    [
        ("", "mygam:game", ["no module 'mygam'", "did you mean mygame?"]),
        ("game = Game()", "mygame:gane", ["mygame has no 'gane'", "game"]),
        ("game = Game()", "mygame:game.inner", ["Game has no 'inner'"]),
        ("import nonexistent_thing", "mygame:game", ["imports 'nonexistent_thing'", "not installed"]),
        ("1 / 0", "mygame:game", ["importing mygame failed: ZeroDivisionError", "mygame.py, line 2"]),
        ("game = = 1", "mygame:game", ["SyntaxError", "mygame.py, line 2"]),
        ("game = 5", "mygame:game", ["not a game (5)", "on_join, on_command"]),
        ("class game: pass", "mygame:game", ["not a game"]),
        ("def game(name): pass", "mygame:game", ["without arguments", "TypeError"]),
        ("def game(): return None", "mygame:game", ["not a game (None)"]),
        ("async def game(): pass", "mygame:game", ["async function"]),
        ("class game(Game):\n    def on_join(self, player): pass", "mygame:game", ["async def on_join(self, player)"]),
        ("class game(Game):\n    async def on_join(self): pass", "mygame:game", ["async def on_join(self, player)"]),
        ("class game(Game):\n    on_leave = None", "mygame:game", ["async def on_leave(self, player, reason)"]),
        ("class game(Game):\n    async def on_comand(self, p, c): pass", "mygame:game", ["is on_command meant?"]),
    ],
)
def test_what_is_wrong_with_a_game_is_said(module: Any, text: str, spec: str, words: list[str]) -> None:
    module(text)
    said = problem(spec)
    assert said.startswith((f"{spec}: ", f"{spec} is "))
    for word in words:
        assert word in said


def test_a_games_own_method_may_begin_with_on(module: Any) -> None:
    module(f"{ECHO}    def on_full_moon(self): pass")
    load_game("mygame:Echo")


# The page of the manual


PAGE = Path(__file__).parents[1] / "docs" / "game.rst"


def example() -> str:
    """The first code block of the page whose caption is ``mygame.py``."""
    _, _, after = PAGE.read_text().partition(":caption: mygame.py\n")
    lines = []
    for line in after.splitlines():
        if line and not line.startswith("   "):
            break
        lines.append(line.removeprefix("   "))
    return "\n".join(lines)


async def test_the_pages_example_plays(tmp_path: Path, module: Any) -> None:
    (tmp_path / "mygame.py").write_text(example())
    stage = Stage(load_game("mygame:game"))
    await stage.join("alice", "bob")
    assert stage.heard("alice") == ["arrive: alice sits down.", "arrive: bob sits down."]
    assert await stage.command("bob", "say hi") == "You say: hi"
    assert stage.heard("alice") == ["say: bob says: hi"]
    rolled = await stage.command("alice", "roll 1")
    assert rolled == "You roll a 1."
    assert stage.heard("bob")[-1] == "roll: alice rolls a die with 1 sides: 1."
    assert "1 to 1000" in await stage.refused("alice", "roll 0")
    assert "dance" in await stage.refused("alice", "dance")
    await stage.lose("bob")
    assert stage.heard("alice")[-1] == "leave: bob nods off."


def test_the_pages_example_is_typed(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "mygame.py"
    file.write_text(example())
    report, errors, status = api.run(["--strict", "--no-incremental", "--config-file=", str(file)])
    assert (status, errors) == (0, ""), report


def test_every_name_of_the_api_stands_on_the_page() -> None:
    page = PAGE.read_text()
    for thing in (Game, Player, World, Command, WorldData, PlayerData):
        for name in vars(thing):
            if not name.startswith("_"):
                assert f"``{name}" in page or f".{name}" in page, f"{thing.__name__}.{name}"


def test_a_handler_that_fails_has_asked_for_nothing() -> None:
    gathering = Gathering(
        Stage(Game()),
        "ann",
        "s1",
        now=0.0,
        randomness=SeededRandomness(1),
        max_message_size=1000,
    )
    gathering.player.send("a", "b")
    gathering.player.new_session()
    gathering.player.disconnect("bye")
    gathering.drop()
    assert gathering.effects == []
    assert not gathering.new_session_wanted
    assert gathering.disconnect_wanted is None
