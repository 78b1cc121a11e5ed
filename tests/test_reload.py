"""``serve --reload``: a child is started anew when code changes, and ends in order."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mythos_trio import reload
from mythos_trio.reload import Reloader, code_of, times_of

# Writes a line for each thing that happens to it; ends after SIGTERM with exit code 0, as the server does.
CHILD = """
    import signal, sys, time
    from pathlib import Path
    log = Path("log")
    def note(text):
        with log.open("a") as file:
            file.write(text + "\\n")
    def end(number, frame):
        note(f"signal {number}")
        if number != signal.SIGHUP:
            sys.exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    note("start " + Path("game.py").read_text())
    if Path("game.py").read_text() == "broken":
        sys.exit(7)
    while True:
        time.sleep(0.01)
"""


class Scene:
    """A child in a directory of its own, and a thread that plays the developer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "child.txt").write_text(textwrap.dedent(CHILD))
        self.write("one")
        self.said: list[str] = []
        self.reloader = Reloader(
            [sys.executable, "child.txt"], [directory], drain_seconds=0, say=self.said.append, poll_seconds=0.02
        )

    def write(self, text: str) -> None:
        fresh = self.directory / "game.tmp"
        fresh.write_text(text)
        fresh.rename(self.directory / "game.py")

    @property
    def log(self) -> list[str]:
        path = self.directory / "log"
        return path.read_text().splitlines() if path.exists() else []

    def wait(self, test: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while not test():
            assert time.monotonic() < until, (self.log, self.said)
            time.sleep(0.01)

    def run(self, *steps: Callable[[], None]) -> int:
        """The reloader in this thread (signals are the main thread's), the steps in another."""
        failures: list[BaseException] = []

        def play() -> None:
            try:
                for step in steps:
                    step()
            except BaseException as error:  # noqa: ASYNC103  # a thread without Trio
                failures.append(error)
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=play)
        thread.start()
        try:
            return self.reloader.run()
        finally:
            thread.join()
            assert failures == []


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.chdir(tmp_path)
    return Scene(tmp_path)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def test_changed_code_is_started_anew(scene: Scene) -> None:
    code = scene.run(
        lambda: scene.wait(lambda: scene.log == ["start one"]),
        lambda: scene.write("two"),
        lambda: scene.wait(lambda: scene.log[-1] == "start two"),
        kill(signal.SIGTERM),
    )
    assert code == 0
    assert scene.log == ["start one", "signal 15", "start two", "signal 15"]
    assert any("game.py has changed" in text for text in scene.said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once(scene: Scene, number: int) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    code = scene.run(
        lambda: scene.wait(lambda: scene.log == ["start one"]),
        kill(signal.SIGHUP),
        lambda: scene.wait(lambda: "signal 1" in scene.log),
        kill(number),
    )
    assert code == 0
    assert scene.log == ["start one", "signal 1", f"signal {number}"]
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_a_first_start_that_fails_is_the_end(scene: Scene) -> None:
    scene.write("broken")
    assert scene.run() == 7


def test_broken_code_waits_for_the_next_change(scene: Scene) -> None:
    code = scene.run(
        lambda: scene.wait(lambda: scene.log == ["start one"]),
        lambda: scene.write("broken"),
        lambda: scene.wait(lambda: any("exit code 7" in text for text in scene.said)),
        lambda: scene.write("three"),
        lambda: scene.wait(lambda: scene.log[-1] == "start three"),
        kill(signal.SIGTERM),
    )
    assert code == 0


def test_broken_code_and_then_the_end(scene: Scene) -> None:
    code = scene.run(
        lambda: scene.wait(lambda: scene.log == ["start one"]),
        lambda: scene.write("broken"),
        lambda: scene.wait(lambda: any("exit code 7" in text for text in scene.said)),
        kill(signal.SIGTERM),
    )
    assert code == 7


def test_what_does_not_stop_is_killed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "EXTRA_SECONDS", 0.1)
    child = scene.directory / "child.txt"
    child.write_text(child.read_text().replace("sys.exit(0)", "pass"))
    process = scene.reloader._start()
    scene.wait(lambda: scene.log == ["start one"])
    scene.reloader._stop()
    assert process.returncode == -signal.SIGKILL
    assert any("killing" in text for text in scene.said)


def test_which_files_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "pack/b.py", "pack/c.txt", ".hidden/d.py", "venv/e.py", "__pycache__/f.py", ".env"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert {str(path.relative_to(tmp_path)) if path.is_absolute() else str(path) for path in times_of([tmp_path])} == {
        "a.py",
        "pack/b.py",
        ".env",
    }


def test_where_a_games_code_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "single_file_game.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "package_game").mkdir()
    (tmp_path / "package_game" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    assert code_of("single_file_game:game") == [tmp_path]
    assert code_of("package_game.inner:game") == [tmp_path / "package_game"]
    assert code_of("no_such_game:game") == [tmp_path]
    assert code_of("mythos_trio.world:DefaultGame") == [Path(reload.__file__).parent]
