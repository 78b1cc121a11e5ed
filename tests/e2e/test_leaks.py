"""The check at a server's end: a game that leaks is found out, from outside."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.clients import WebSocket
from tests.e2e.conftest import Make

GAME = """
import os
import socket

import trio
from mythos_trio.game import Command, Game, Player


class Leaky(Game):
    def __init__(self) -> None:
        self.held = []
        self.scope = trio.CancelScope()

    async def on_command(self, player: Player, command: Command) -> str:
        match command.text:
            case "open":
                self.held.append(os.open(os.devnull, os.O_RDONLY))
            case "task":
                trio.lowlevel.spawn_system_task(self.forgotten, name="forgotten")
            case "dup":
                # All of them: one may be a POST's, and gone in a moment.
                clients = [fd for fd in map(int, os.listdir("/proc/self/fd")) if is_client(fd)]
                self.held += [os.dup(fd) for fd in clients]
            case "mend":
                self.scope.cancel()
                while self.held:
                    os.close(self.held.pop())
        return "done"

    async def forgotten(self) -> None:
        with self.scope:
            await trio.sleep_forever()


def is_client(fd: int) -> bool:
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            return False
        with socket.socket(fileno=os.dup(fd)) as copy:
            return copy.family in (socket.AF_INET, socket.AF_INET6) and bool(copy.getpeername())
    except OSError:
        return False
"""


@pytest.mark.parametrize(
    ("command", "found"),
    [("open", "/dev/null"), ("task", "a system task that nobody owns"), ("dup", "socket without a link")],
)
def test_what_a_server_leaks_fails_its_test(make: Make, command: str, found: str) -> None:
    server = make(game="leaky:Leaky")
    (server.directory / "leaky.py").write_text(GAME)
    server.start()
    with WebSocket(f"{server.ws_url}/ws/alice"):
        # The game's commands come by POST.
        answer: Any = server.command("alice", command, "1")
        assert answer.json()["ok"], answer.text
        with pytest.raises(AssertionError, match=found):
            server.check_leaks()
        assert server.command("alice", "mend", "2").json()["ok"]
        server.check_leaks()
