"""``serve --supervise``: the child is started anew when it dies, and the port is open all the time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mythos_trio import supervisor
from mythos_trio.supervisor import Supervisor

# The play has a thread of its own, which waits; the supervisor's process has one thread only.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

# Answers whoever connects with its number; writes a line for each thing that happens to it.
CHILD = """
    import fcntl, os, signal, socket, sys, time
    from pathlib import Path
    def note(text):
        with Path("log").open("a") as file:
            file.write(text + "\\n")
    def end(number, frame):
        note(f"signal {number}")
        if number != signal.SIGHUP and not Path("stubborn").exists():
            sys.exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    note(f"start {os.getpid()}")
    if Path("fails").exists():
        sys.exit(int(Path("fails").read_text()))
    if "--standby" in sys.argv:
        while Path("slow").exists():
            time.sleep(0.01)
        try:
            os.write(int(sys.argv[-1]), b"1")
        except BrokenPipeError:
            pass
    store = open("store", "w")
    fcntl.flock(store, fcntl.LOCK_EX)
    listening = socket.socket(fileno=int(sys.argv[1]))
    while True:
        sock, _ = listening.accept()
        sock.sendall(str(os.getpid()).encode())
        sock.close()
"""


class Scene:
    """A supervisor in this thread (signals are the main thread's), and a play in another."""

    def __init__(self, directory: Path, listening: socket.socket) -> None:
        self.directory = directory
        (directory / "child.txt").write_text(textwrap.dedent(CHILD))
        self.said: list[str] = []
        self.listening = listening
        self.command = [sys.executable, "-S", "child.txt", str(listening.fileno())]
        self.supervisor = Supervisor(self.command, [listening.fileno()], drain_seconds=0.2, say=self.said.append)

    @property
    def log(self) -> list[str]:
        path = self.directory / "log"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def starts(self) -> list[int]:
        return [int(line.removeprefix("start ")) for line in self.log if line.startswith("start ")]

    def wait(self, test: Callable[[], object]) -> None:
        until = time.monotonic() + 20
        while not test():
            assert time.monotonic() < until, (self.log, self.said)
            time.sleep(0.01)

    def asked(self) -> int:
        """The pid of who answers at the port. Nobody is ever refused."""
        answer = b""
        while not answer:  # it was let in by one that has been killed
            with socket.create_connection(self.listening.getsockname(), 20) as sock:
                answer = sock.recv(100)
        return int(answer)

    def run(self, *steps: Callable[[], object]) -> int:
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
            return self.supervisor.run()
        finally:
            thread.join()
            assert failures == []


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "EXTRA_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Scene(tmp_path, listening)


def signal_to(pid: int, number: int) -> Callable[[], None]:
    return lambda: os.kill(pid, number)


def to_itself(number: int) -> Callable[[], None]:
    return signal_to(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_so_is_the_exit_code(scene: Scene, number: int) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)]
    code = scene.run(
        scene.asked,
        to_itself(signal.SIGHUP),
        lambda: scene.wait(lambda: "signal 1" in scene.log),
        to_itself(number),
    )
    assert code == 0
    assert scene.log[1:] == ["signal 1", f"signal {number}"]
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)]


def test_who_is_killed_is_started_anew_and_nobody_is_refused(scene: Scene) -> None:
    answers: list[int] = []

    def kill() -> None:
        answers.append(scene.asked())
        os.kill(answers[-1], signal.SIGKILL)

    code = scene.run(kill, kill, lambda: answers.append(scene.asked()), to_itself(signal.SIGTERM))
    assert code == 0
    assert answers == scene.starts
    assert len(set(answers)) == 3
    assert scene.said == [
        "the server ended by signal 9: starting it anew",
        "the server ended by signal 9 again: starting it anew in 0.2 s",
    ]


def test_who_has_lived_long_is_started_anew_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 1000.0)
    assert scene.run(lambda: os.kill(scene.asked(), signal.SIGKILL), scene.asked, to_itself(signal.SIGTERM)) == 0


def test_asked_to_it_drains_the_server_and_starts_it_anew(scene: Scene) -> None:
    answers: list[int] = []
    code = scene.run(
        lambda: answers.append(scene.asked()),
        to_itself(signal.SIGUSR2),
        lambda: scene.wait(lambda: "signal 15" in scene.log),
        lambda: answers.append(scene.asked()),
        to_itself(signal.SIGTERM),
    )
    assert code == 0
    assert answers == scene.starts
    assert scene.log[2] == "signal 15"  # the new one was there before the old one was told
    assert scene.said == ["starting a new server"]


def test_if_the_new_one_does_not_start_the_old_one_goes_on(scene: Scene) -> None:
    fails = scene.directory / "fails"
    answers: list[int] = []
    code = scene.run(
        lambda: answers.append(scene.asked()),
        lambda: fails.write_text("2"),
        to_itself(signal.SIGUSR2),
        lambda: scene.wait(lambda: len(scene.said) == 2),
        lambda: answers.append(scene.asked()),
        fails.unlink,
        to_itself(signal.SIGUSR2),
        lambda: scene.wait(lambda: "signal 15" in scene.log),
        lambda: answers.append(scene.asked()),
        to_itself(signal.SIGTERM),
    )
    assert code == 0
    assert scene.said[1] == "the new server has ended with exit code 2: the old one goes on"
    assert answers[0] == answers[1] == scene.starts[0]
    assert answers[2] == scene.starts[2]


def test_a_new_one_that_takes_too_long_is_given_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STANDBY_SECONDS", 0.3)
    (scene.directory / "slow").touch()
    code = scene.run(
        scene.asked,
        to_itself(signal.SIGUSR2),
        lambda: scene.wait(lambda: len(scene.said) == 2),
        to_itself(signal.SIGTERM),
    )
    assert code == 0
    assert scene.said[1] == "the new server does not come to stand by: the old one goes on"
    assert scene.log[-1] == "signal 15"


def test_the_old_one_dies_before_the_new_one_stands_by(scene: Scene) -> None:
    slow = scene.directory / "slow"
    slow.touch()
    answers: list[int] = []
    code = scene.run(
        scene.asked,
        to_itself(signal.SIGUSR2),
        to_itself(signal.SIGUSR2),  # one new server is enough
        lambda: scene.wait(lambda: len(scene.starts) == 2),
        lambda: os.kill(scene.starts[0], signal.SIGKILL),
        lambda: scene.wait(lambda: len(scene.said) == 2),
        slow.unlink,
        lambda: answers.append(scene.asked()),
        to_itself(signal.SIGTERM),
    )
    assert code == 0
    assert answers == scene.starts[1:]


@pytest.mark.parametrize("slow", [False, True])
def test_the_end_comes_while_a_new_one_is_started(scene: Scene, slow: bool) -> None:
    if slow:
        (scene.directory / "slow").touch()
    code = scene.run(
        scene.asked,
        to_itself(signal.SIGUSR2),
        lambda: scene.wait(lambda: len(scene.starts) == 2),
        to_itself(signal.SIGTERM),
    )
    assert code == 0
    for pid in scene.starts:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_server_that_was_stopped_itself_is_the_end(scene: Scene) -> None:
    assert scene.run(lambda: os.kill(scene.asked(), signal.SIGTERM)) == 0
    assert len(scene.starts) == 1


def test_a_first_start_that_fails_is_the_end(scene: Scene) -> None:
    (scene.directory / "fails").write_text("4")
    assert scene.run() == 4
    assert len(scene.starts) == 1


def test_a_later_start_that_fails_is_tried_again_until_it_is_mended(scene: Scene) -> None:
    fails = scene.directory / "fails"

    def break_it() -> None:
        pid = scene.asked()
        fails.write_text("2")
        os.kill(pid, signal.SIGKILL)

    code = scene.run(
        break_it,
        lambda: scene.wait(lambda: len(scene.starts) == 3),
        fails.unlink,
        scene.asked,
        to_itself(signal.SIGTERM),
    )
    assert code == 0
    assert "the server ended with exit code 2 again: starting it anew in 0.2 s" in scene.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_between_two_lives(scene: Scene, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It ends the pause: for good, or by a start."""
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 1000.0)
    steps: list[Callable[[], object]] = [
        lambda: os.kill(scene.asked(), signal.SIGKILL),
        lambda: scene.wait(lambda: scene.said),
        to_itself(number),
    ]
    if number == signal.SIGUSR2:
        steps += [lambda: scene.wait(lambda: len(scene.starts) == 2), scene.asked, to_itself(signal.SIGTERM)]
    assert scene.run(*steps) == (0 if number == signal.SIGUSR2 else 128 + signal.SIGKILL)


def test_who_does_not_stop_is_killed(scene: Scene) -> None:
    (scene.directory / "stubborn").touch()
    assert scene.run(scene.asked, to_itself(signal.SIGTERM)) == 128 + signal.SIGKILL
    assert "signal 15" in scene.log
    assert scene.said == ["the server does not stop: killing it"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_when_the_supervisor_is_killed_the_server_is_told_to_stop(scene: Scene) -> None:
    parent = (
        "import sys; from mythos_trio.supervisor import Supervisor; "
        "Supervisor(sys.argv[1:], [int(sys.argv[-1])], drain_seconds=1, say=print).run()"
    )
    fd = scene.listening.fileno()
    with subprocess.Popen([sys.executable, "-c", parent, *scene.command], pass_fds=[fd]) as process:
        scene.asked()
        process.kill()
    scene.wait(lambda: "signal 15" in scene.log)
