"""A game that cannot be cancelled does not keep the process, and harms nothing that is stored."""

from __future__ import annotations

import pytest
import trio

from mythos_trio.client import DualClient
from tests.e2e.conftest import Make
from tests.e2e.servers import Server

GAME = """
import trio
from mythos_trio.game import Command, Game, Player


class Stubborn(Game):
    async def on_command(self, player: Player, command: Command) -> str:
        if command.text == "count":
            player.data["count"] = player.data.get("count", 0) + 1
            return str(player.data["count"])
        player.data["count"] = -1
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()
        return ""
"""


async def ask(server: Server, player: str, content: str) -> str:
    async with DualClient(server.url, player) as client:
        return str((await client.send_command(content))["content"])


def test_a_drain_ends_without_it(make: Make) -> None:
    server = make(game="stubborn:Stubborn", HANDLER_TIMEOUT="1", DRAIN_TIMEOUT="4")
    (server.directory / "stubborn.py").write_text(GAME)
    server.start()
    assert trio.run(ask, server, "alice", "count") == "1"
    with pytest.raises(trio.TooSlowError):
        trio.run(_hold, server)
    assert trio.run(ask, server, "bob", "count") == "1"  # nobody else is touched
    server.terminate()
    assert server.wait_exit() == 0
    server.wait_logged("The game does not let the server end", exit_code=0)
    server.start()
    assert trio.run(ask, server, "alice", "count") == "2"
    server.terminate()
    assert server.wait_exit() == 0


async def _hold(server: Server) -> None:
    with trio.fail_after(2):
        await ask(server, "alice", "hold")
