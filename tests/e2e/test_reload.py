"""``serve --reload`` with a game as ``mythos-trio new`` writes it: the code changes, players stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from mythos_trio.client import DualClient
from mythos_trio.scaffold import write_game
from tests.e2e.servers import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_game("mygame", tmp_path)
    server = Server(tmp_path / "mygame", game="mygame:game", LINKDEAD_GRACE="60")
    server.options = ("--reload",)
    server.start()
    try:
        yield server
        server.terminate()  # to the parent, which passes it on
        assert server.wait_exit() == 0
    finally:
        server.close()


async def test_players_stay_where_they_are(server: Server) -> None:
    heard: list[dict[str, Any]] = []

    async def listen(client: DualClient) -> None:
        async for event in client.events():
            heard.append(event)  # noqa: PERF401 - as it comes

    async with DualClient(server.url, "alice") as alice, trio.open_nursery() as nursery:
        nursery.start_soon(listen, alice)
        assert (await alice.send_command("take"))["content"] == "Taken."
        session_id = alice.session_id
        assert (await alice.send_command("say 0"))["content"] == "You say: 0"
        game = server.directory / "mygame.py"
        game.write_text(game.read_text().replace("You say: ", "You shout: "))
        said = 0
        with trio.fail_after(30):
            answer = ""
            while not answer.startswith("You shout"):
                said += 1
                answer = (await alice.send_command(f"say {said}"))["content"]
                await trio.sleep(0.05)
        assert (await alice.send_command("look"))["content"] == "It is dark. alice has the stone."
        assert alice.session_id == session_id
        nursery.cancel_scope.cancel()
    contents = [event["content"] for event in heard]
    told = ["alice comes in.", "alice takes the stone.", *(f"alice says: {number}" for number in range(said + 1))]
    assert contents == told
    assert "mygame.py has changed: starting anew" in server.stderr()


async def test_broken_code_waits_to_be_mended(server: Server) -> None:
    game = server.directory / "mygame.py"
    code = game.read_text()
    async with DualClient(server.url, "alice") as alice:
        assert (await alice.send_command("light"))["content"] == "It burns."
        game.write_text(code + "\nthis is no Python\n")
        with trio.fail_after(30):
            while "waiting for a change" not in server.stderr():
                await trio.sleep(0.05)
        assert "invalid syntax" in server.stderr()
        game.write_text(code.replace("A stone lies here.", "A pebble lies here."))
        with trio.fail_after(40):
            reply = await alice.send_command("look")
        assert reply["content"] == "A lamp burns. A pebble lies here."
