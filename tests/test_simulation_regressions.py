"""Scenes of what the simulation (`tests.simulation`) has found, each told plainly."""

from __future__ import annotations

from pathlib import Path

import trio
from trio.testing import MockClock

from tests.support.games import Puppet
from tests.support.play import SSEClient, play


async def test_who_is_closed_while_catching_up_ends_no_other_connection(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Its task waited for room in the socket; the last words had their second, the link was closed, and what that
    raised escaped into the player's nursery: 1011 for everybody in it."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        other = await world.websocket("ann")
        await other.until_type("welcome")
        slow = await SSEClient(world.listener.connect(capacity=300)).open("/sse/ann?")
        welcome = await slow.until_type("welcome")
        await world.publish(player_id="ann", message={"type": "line", "content": "x" * 3000})
        await world.publish(player_id="ann", message={"type": "line", "content": "y" * 3000})
        assert world.server.hub.connections[welcome["connection_id"]].waiting_for == "the client to read"
        await world.request("DELETE", f"/api/connections/ann/{welcome['connection_id']}")
        await trio.sleep(3)
        await world.publish(player_id="ann", message={"type": "line", "content": "still here"})
        await other.until(lambda message: message.get("content") == "still here")
        assert not other.of("disconnect")
