"""``mythos-trio connect``: at a pipe and in a pseudo-terminal, through crashes of the server."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.clients import Message, Program, without_escapes
from tests.e2e.servers import Server, wait_until


class Connect(Program):
    """At a pipe: what the game says comes on stdout, what is said of the connection on stderr."""

    def __init__(self, server: Server, player: str, *options: str) -> None:
        self.said: list[str] = []
        command = [sys.executable, "-m", "mythos_trio", "connect", player, "--url", server.url, *options]
        super().__init__(command, server.environment)

    def take(self, line: str) -> None:
        self.said.append(line)

    def wait_said(self, text: str, seconds: float = 15.0) -> None:
        self.wait_until(lambda: text in self.said, f"{text!r}; it said {self.said}", seconds)


def test_a_pipe_through_a_crash(server: Server) -> None:
    with Connect(server, "alice", "--stay") as alice:
        alice.wait_said("Type help to learn what you can do.")
        alice.type("say one")
        alice.wait_said("alice says: one")
        alice.wait_said("You say: one")
        server.kill9()
        server.start()
        server.published("alice", "while nobody was there")
        alice.wait_said("while nobody was there", 20)
        alice.type("say two")
        alice.wait_said("alice says: two")
        alice.wait_said("You say: two")
        lines = ["alice says: one", "You say: one", "while nobody was there", "alice says: two", "You say: two"]
        assert [alice.said.count(line) for line in lines] == [1] * 5
        assert [line for line in alice.said if line in lines] == lines


def test_a_command_is_typed_while_the_server_is_down(server: Server) -> None:
    with Connect(server, "alice", "--stay") as alice:
        alice.wait_said("Type help to learn what you can do.")
        server.kill9()
        alice.type("say are you there?")
        server.start()
        alice.wait_said("alice says: are you there?", 20)
        alice.wait_said("You say: are you there?")
        server.published("alice", "last")
        alice.wait_said("last")
        assert alice.said.count("alice says: are you there?") == 1


def test_a_script(server: Server) -> None:
    """Commands from a pipe, one after the other; it leaves at the end of them, with exit code 0."""
    done = subprocess.run(
        [sys.executable, "-m", "mythos_trio", "connect", "alice", "--url", server.url],
        input="say hello\nnorth\nwho\n",
        capture_output=True,
        text=True,
        timeout=30,
        env=server.environment,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines.count("alice says: hello") == 1
    assert lines.count("You go north to the square.") == 1
    assert lines[-1] == "alice is in the square."


def test_it_leaves_when_the_session_is_taken_over(server: Server) -> None:
    with Connect(server, "alice", "--stay") as alice:
        alice.wait_said("Type help to learn what you can do.")
        answer: Message = server.http.post("/api/connections/alice/session", json={}).json()
        assert answer["success"]
        assert alice.wait_exit(15) == 1
        alice.wait_ended()
        assert any("session" in line for line in alice.errors)


class Screen:
    """A program in a pseudo-terminal; *text* is all that it has written, without control sequences."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._leader, follower = pty.openpty()
        # Wide, so that nothing is wrapped.
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 400, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=env, start_new_session=True
        )
        os.close(follower)
        self._bytes = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._leader, 65536):
                self._bytes += data
                # prompt_toolkit asks where the cursor is: a terminal answers.
                if b"\x1b[6n" in data:
                    os.write(self._leader, b"\x1b[1;1R")
        except OSError:
            pass  # the program has ended: EIO on Linux

    @property
    def text(self) -> str:
        return without_escapes(bytes(self._bytes).decode(errors="replace"))

    def type(self, keys: str) -> None:
        os.write(self._leader, keys.encode())

    def wait(self, text: str, seconds: float = 15.0) -> None:
        wait_until(lambda: text in self.text, f"{text!r} on the screen", seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        os.close(self._leader)
        print(f"--- screen\n{self.text[-3000:]}")


@contextmanager
def screen(server: Server, player: str) -> Iterator[Screen]:
    command = [sys.executable, "-m", "mythos_trio", "connect", player, "--url", server.url]
    opened = Screen(command, {**os.environ, **server.environment, "TERM": "xterm"})
    try:
        yield opened
    finally:
        opened.close()


def test_a_person_at_a_terminal(server: Server) -> None:
    with screen(server, "alice") as alice:
        alice.wait("Type help to learn what you can do.")
        # What changes in the line below is drawn by the letter, so more of it than this cannot be looked for.
        alice.wait("websocket connect")
        alice.wait("sse connect")
        alice.type("say good day\r")
        alice.wait("alice says: good day\n")
        alice.wait("You say: good day\n")
        server.kill9()
        server.start()
        server.published("alice", "a line from elsewhere")
        alice.wait("a line from elsewhere\n", 20)
        assert alice.text.count("a line from elsewhere\n") == 1
        assert alice.text.count("alice says: good day\n") == 1
        alice.type("\x04")
        assert alice.process.wait(10) == 0
