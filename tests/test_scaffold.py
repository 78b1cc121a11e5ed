"""``mythos-trio new``: what it writes runs, passes its tests, and is typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mythos_trio import scaffold
from mythos_trio.cli import main
from mythos_trio.game import load_game
from mythos_trio.scaffold import CannotWrite, write_game

SOURCE = Path(scaffold.__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # -p no:…: only pytest itself is needed to test a game.
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONWARNINGS": "error::ResourceWarning"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=50
    )


def test_the_games_tests_pass(here: Path) -> None:
    write_game("mygame", here)
    done = python("pytest", "-q", "-p", "no:trio", "-p", "no:randomly", cwd=here / "mygame")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_the_games_tests_can_fail(here: Path) -> None:
    write_game("mygame", here)
    game = here / "mygame" / "mygame.py"
    game.write_text(game.read_text().replace('player.world.data["stone"] = player.id', "pass"))
    done = python("pytest", "-q", "-p", "no:trio", "-p", "no:randomly", cwd=here / "mygame")
    assert done.returncode == 1
    assert "2 failed" in done.stdout


def test_the_game_is_typed(here: Path) -> None:
    write_game("mygame", here)
    done = python(
        "mypy", "--strict", "--cache-dir", str(here / "cache"), "mygame.py", "test_mygame.py", cwd=here / "mygame"
    )
    assert done.returncode == 0, done.stdout


def test_the_game_can_be_served(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_game("a_served_game", here)
    monkeypatch.chdir(here / "a_served_game")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert type(load_game("a_served_game:game")).__name__ == "Hall"


def test_every_place_has_the_name(here: Path) -> None:
    for path in write_game("cellar9", here):
        text = path.read_text()
        assert "NAME" not in text
        assert text.endswith("\n")
    assert "mythos-trio serve cellar9:game --reload" in (here / "cellar9" / "README.rst").read_text()
    assert (here / "cellar9" / "README.rst").read_text().startswith("cellar9\n=======\n")


def test_the_command_says_what_to_do_next(here: Path) -> None:
    done = CliRunner().invoke(main, ["new", "mygame"])
    assert done.exit_code == 0, done.output
    assert "written: mygame/mygame.py" in done.output
    assert "mythos-trio serve mygame:game --reload" in done.output
    again = CliRunner().invoke(main, ["new", "mygame"])
    assert again.exit_code == 1
    assert "exists already; it has not been touched" in again.output


def test_nothing_is_overwritten(here: Path) -> None:
    (here / "mygame").mkdir()
    with pytest.raises(CannotWrite, match="exists already"):
        write_game("mygame", here)
    assert list((here / "mygame").iterdir()) == []
    (here / "file").write_text("mine")
    with pytest.raises(CannotWrite, match="exists already"):
        write_game("file", here)
    assert (here / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "My", "9lives", "a-b", "a/b", "../up", "class", "é", "a.b", "x" * 65])
def test_what_cannot_be_a_modules_name(here: Path, name: str) -> None:
    with pytest.raises(CannotWrite, match="cannot be a module's name"):
        write_game(name, here)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["json", "mythos_trio", "trio", "pytest"])
def test_no_module_is_hidden(here: Path, name: str) -> None:
    with pytest.raises(CannotWrite, match="is a module already"):
        write_game(name, here)


def test_where_nothing_can_be_written(here: Path) -> None:
    with pytest.raises(CannotWrite, match="cannot be made"):
        write_game("mygame", here / "missing")
