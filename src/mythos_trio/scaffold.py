"""``mythos-trio new NAME``: a small game to begin with, its tests, and how to run both."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from pathlib import Path
from typing import Final

GAME: Final = '''\
"""NAME: a hall with a stone and a lamp.

What a handler says happens when it returns: all of it, or nothing if it raises.
"""

from __future__ import annotations

from typing import Any

from mythos_trio.game import Command, CommandError, Game, Player, World

HALL = "hall"
LAMP_SECONDS = 60


class Hall(Game):
    async def on_join(self, player: Player) -> None:
        player.subscribe(HALL)
        player.world.publish(HALL, "arrive", f"{player.id} comes in.")

    async def on_leave(self, player: Player, reason: str) -> None:
        player.world.publish(HALL, "leave", f"{player.id} goes out.")

    async def on_command(self, player: Player, command: Command) -> str:
        word, _, rest = command.text.partition(" ")
        match word:
            case "look":
                return look(player)
            case "say" if rest:
                player.world.publish(HALL, "say", f"{player.id} says: {rest}")
                return f"You say: {rest}"
            case "take":
                return take(player)
            case "light":
                return light(player)
        raise CommandError("You can: look, say TEXT, take, light.")

    async def on_world_timer(self, world: World, name: str, value: Any) -> None:
        if name == "lamp":
            del world.data["lamp"]
            world.publish(HALL, "lamp", "The lamp goes out.")


def look(player: Player) -> str:
    lamp = "A lamp burns." if "lamp" in player.world.data else "It is dark."
    holder = player.world.data.get("stone")
    stone = "A stone lies here." if holder is None else f"{holder} has the stone."
    return f"{lamp} {stone}"


def take(player: Player) -> str:
    # What is in the data is kept, also when the server is killed. Two who take at once: one of them gets it.
    holder = player.world.data.get("stone")
    if holder is not None:
        raise CommandError(f"{holder} has it.")
    player.world.data["stone"] = player.id
    player.world.publish(HALL, "take", f"{player.id} takes the stone.")
    return "Taken."


def light(player: Player) -> str:
    # A timer is kept as well: it fires once, whatever happens to the server meanwhile.
    player.world.data["lamp"] = True
    player.world.after(LAMP_SECONDS, "lamp")
    player.world.publish(HALL, "lamp", f"{player.id} lights the lamp.")
    return "It burns."


game = Hall()
'''

TESTS: Final = '''\
"""Scenes of NAME, in virtual time: an hour takes no time."""

from __future__ import annotations

from mythos_trio.testing import in_virtual_time, play
from NAME import LAMP_SECONDS, Hall


@in_virtual_time
async def test_what_one_says_the_other_hears() -> None:
    async with play(Hall) as world:
        alice = await world.connect("alice")
        bob = await world.connect("bob")
        reply = await alice.command("say hello")
        assert reply.content == "You say: hello"
        assert bob.heard("say") == ["alice says: hello"]


@in_virtual_time
async def test_there_is_one_stone() -> None:
    async with play(Hall) as world:
        alice = await world.connect("alice")
        bob = await world.connect("bob")
        assert (await alice.command("take")).ok
        refused = await bob.command("take")
        assert refused.error == "alice has it."
        assert world.data["stone"] == "alice"


@in_virtual_time
async def test_the_stone_and_the_lamp_survive_kill_9() -> None:
    async with play(Hall) as world:
        alice = await world.connect("alice")
        await alice.command("take")
        await alice.command("light")
        await world.crash()
        assert (await alice.command("look")).content == "A lamp burns. alice has the stone."
        await world.sleep(10 * LAMP_SECONDS)
        assert alice.heard("lamp") == ["alice lights the lamp.", "The lamp goes out."]


@in_virtual_time
async def test_who_loses_the_connection_misses_nothing() -> None:
    async with play(Hall) as world:
        alice = await world.connect("alice")
        bob = await world.connect("bob")
        alice.cut()
        await bob.command("say are you there?")
        await alice.reconnect()
        assert alice.heard("say") == ["bob says: are you there?"]
'''

README: Final = """\
NAME
====

A game for mythos-trio. It is in ``NAME.py``, its tests are in ``test_NAME.py``.

Run it; after each change of the code it starts anew, and players stay where they are::

    mythos-trio serve NAME:game --reload

Play it, in another terminal, or in two::

    mythos-trio connect alice
    mythos-trio connect bob

Test it::

    pip install pytest
    python -m pytest

What is stored lies in ``data``, the log in ``logs``. Without ``data`` the world begins afresh.
"""

IGNORE: Final = "data/\nlogs/\n.env\n__pycache__/\n"


class CannotWrite(Exception):
    """There is no game at that name, and will not be: why."""


def write_game(name: str, parent: Path) -> list[Path]:
    """Write the game *name* into the new directory *name* below *parent*; the files. Nothing is overwritten.

    :raises CannotWrite:
    """
    check_name(name)
    directory = parent / name
    files = {
        directory / f"{name}.py": GAME,
        directory / f"test_{name}.py": TESTS,
        directory / "README.rst": README,
        directory / ".gitignore": IGNORE,
    }
    try:
        directory.mkdir()
    except FileExistsError:
        raise CannotWrite(f"{directory} exists already; it has not been touched") from None
    except OSError as error:
        raise CannotWrite(f"{directory} cannot be made: {error.strerror}") from None
    for path, text in files.items():
        path.write_text(_filled(text, name))
    return list(files)


def _filled(text: str, name: str) -> str:
    # A heading's line is as long as the heading.
    text = text.replace("NAME\n====\n", f"{name}\n{'=' * len(name)}\n")
    return text.replace("NAME", name)


def check_name(name: str) -> None:
    """:raises CannotWrite: a module of that name could not be imported, or would hide another."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) or keyword.iskeyword(name):
        raise CannotWrite(f"{name!r} cannot be a module's name: small letters, digits and _, such as mygame")
    if name in sys.stdlib_module_names or name == "mythos_trio":
        raise CannotWrite(f"{name!r} is a module already: another name, such as my{name}")
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and Path(spec.origin).parent != Path.cwd() / name:
        raise CannotWrite(f"{name!r} is a module already ({spec.origin}): another name, such as my{name}")
