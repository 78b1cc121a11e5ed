"""The tutorial's game, built from the page's code blocks as a reader would, and played after each step."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mythos_trio.game import Game
from tests.support.play import play
from tests.support.stage import Stage

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.rst"
# The steps' headings, the first word of the page's own and the last one left out.
STEPS = ("A room", "Talking", "A sword that two want", "A rat that bites back")


def blocks(section: str) -> list[str]:
    """The Python code blocks of a section of the page."""
    found = re.search(
        rf"^{re.escape(section)}\n-+\n(.*?)(?=^[^\n]+\n---+\n|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, section
    code = re.findall(r"^\.\. code-block:: python\n(?:   :.*\n)*\n((?:(?:   .*)?\n)+)", found[1], re.MULTILINE)
    return [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in code]


def key_of(statement: ast.stmt) -> str:
    """What a reader would replace when the page shows it again."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
        case _:
            return ast.unparse(statement)


def game_after(step: str) -> str:
    """The file ``mygame.py`` as it stands after *step*: what is shown again takes the place of what it was."""
    statements: dict[str, ast.stmt] = {}
    for section in STEPS[: STEPS.index(step) + 1]:
        for block in blocks(section):
            for statement in ast.parse(block).body:
                statements[key_of(statement)] = statement
    imports = [each for each in statements.values() if isinstance(each, (ast.Import, ast.ImportFrom))]
    docstring, *rest = [each for each in statements.values() if each not in imports]
    assert isinstance(docstring, ast.Expr)
    # The instance stands at the end of the file.
    rest.sort(key=lambda each: key_of(each) == "game")
    return "\n\n".join(ast.unparse(each) for each in (docstring, *imports, *rest)) + "\n"


def load(step: str) -> Game:
    module = ModuleType("mygame")
    exec(compile(game_after(step), "mygame.py", "exec"), vars(module))
    game = module.game
    assert isinstance(game, Game)
    return game


async def stage_after(step: str) -> Stage:
    """Alice and Bob have come into the cellar and heard all of it."""
    stage = Stage(load(step))
    await stage.join("alice", "bob")
    stage.scrolls.clear()
    return stage


def test_every_code_block_of_the_page_belongs_to_a_step() -> None:
    assert all(blocks(step) for step in STEPS)
    assert sum(len(blocks(step)) for step in STEPS) == PAGE.read_text().count(".. code-block:: python")


async def test_a_room() -> None:
    stage = Stage(load("A room"))
    await stage.join("alice", "bob")
    assert stage.heard("alice") == [
        "room: You are in a cellar. With you: nobody.",
        "arrive: bob comes down the stairs.",
    ]
    assert stage.heard("bob") == ["room: You are in a cellar. With you: alice."]
    assert await stage.command("alice", "look") == "You are in a cellar. With you: bob."
    assert await stage.refused("alice", "dance wildly") == "You cannot dance here."
    await stage.leave("bob")
    await stage.join("bob")
    assert stage.heard("alice") == []


async def test_talking() -> None:
    stage = await stage_after("Talking")
    assert await stage.command("alice", "say hi") == "You say: hi"
    assert stage.heard("alice") == stage.heard("bob") == ["say: alice says: hi"]
    assert await stage.command("alice", "tell bob meet me at ten") == "You tell bob: meet me at ten"
    assert (stage.heard("alice"), stage.heard("bob")) == ([], ["tell: alice tells you: meet me at ten"])
    await stage.refused("alice", "say")
    await stage.lose("bob")
    await stage.come_back("bob")
    assert stage.heard("alice") == ["presence: bob stares into the distance.", "presence: bob is back."]


async def test_a_sword_that_two_want() -> None:
    stage = await stage_after("A sword that two want")
    assert (await stage.command("alice", "look")).endswith("There is a sword here.")
    assert await stage.command("alice", "take") == "You take the sword."
    assert await stage.refused("bob", "take") == "alice has it."
    assert await stage.refused("bob", "drop") == "You do not have it."
    assert (await stage.command("alice", "look")).endswith("You have the sword.")
    assert (await stage.command("bob", "look")).endswith("alice has the sword.")
    await stage.command("alice", "drop")
    assert await stage.command("bob", "take") == "You take the sword."
    assert stage.heard("alice") == [
        "take: alice takes the sword.",
        "drop: alice drops the sword.",
        "take: bob takes the sword.",
    ]


@pytest.mark.parametrize("roll", [max, min, lambda low, high: high // 2])
async def test_a_rat_that_bites_back(monkeypatch: pytest.MonkeyPatch, roll: Any) -> None:
    monkeypatch.setattr("random.randint", lambda low, high: roll(low, high))
    stage = await stage_after("A rat that bites back")
    assert await stage.command("alice", "fight") == "You attack the rat."
    assert await stage.refused("alice", "fight") == "You are fighting."
    await stage.command("bob", "fight")
    await stage.later(60)
    lines = stage.heard("bob")
    if roll is min:
        assert lines[-1] == "fight: The rat has 6 hit points, bob has 12."
        return
    (won,) = [line for line in lines if "has won" in line]  # it dies once
    assert won == lines[-1]
    assert won.startswith("fight: The rat is dead.")
    assert await stage.refused("bob", "fight") == "The rat is dead."
    assert stage.data("player/alice").keys() == stage.data("player/bob").keys() == {"hits"}
    await stage.later(60)
    assert stage.heard("bob") == ["arrive: Out of the dark comes another rat."]
    assert stage.timers == {}


async def test_who_falls_gets_up_again_and_who_is_link_dead_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # The player always misses, the rat always bites.
    rolls = iter([0, 2] * 6)
    monkeypatch.setattr("random.randint", lambda low, high: next(rolls))
    stage = await stage_after("A rat that bites back")
    await stage.command("alice", "fight")
    await stage.later(7)
    await stage.lose("alice")
    before = stage.data("player/alice")
    await stage.later(100)
    assert stage.data("player/alice") == before == {"foe": "beast/rat", "hits": 8}
    await stage.come_back("alice")
    await stage.later(60)
    assert stage.heard("bob")[-1] == "fight: alice falls, and gets up again when nobody looks."
    assert stage.data("player/alice") == {"hits": 12}
    assert stage.timers == {}


async def test_the_fight_goes_on_after_a_kill(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolls = iter([1, 2] * 20)
    monkeypatch.setattr("random.randint", lambda low, high: next(rolls))
    path = tmp_path / "m.db"
    async with play(path, game=load("A rat that bites back"), crash=True) as world:
        alice = await world.websocket("alice")
        await alice.command("take")
        await alice.command("fight")
        await alice.until(lambda m: m["content"] == "The rat has 5 hit points, alice has 10.")
        await trio.sleep(2)
    async with play(path, game=load("A rat that bites back")) as world:
        alice = await world.websocket("alice", f"position={alice.position}")
        start = trio.current_time()
        await alice.until(lambda m: m["type"] == "fight")
        assert 2.9 < trio.current_time() - start < 3.5
        await alice.until(lambda m: "has won" in str(m.get("content")))
        assert [line for line in alice.lines if "hit points" in line] == [
            f"The rat has {left} hit points, alice has {2 * left}." for left in (4, 3, 2, 1)
        ]
        assert (await alice.command("look"))["content"].endswith("You have the sword.")
        alice.close()


@pytest.mark.parametrize("step", STEPS)
def test_it_is_typed(step: str, tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "mygame.py"
    file.write_text(game_after(step))
    report, errors, status = api.run(["--strict", "--no-incremental", "--config-file=", str(file)])
    assert (status, errors) == (0, ""), report
