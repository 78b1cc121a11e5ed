"""Whatever comes between: what is stored is what the handlers would have left one after another.

Each example is a few scripts of players whose commands are small programs, a disk that fails, and crashes at any
await of a handler and before and after any commit, against a whole server on virtual time. What must hold is
written in `tests.support.serial`. ``SERIALISABLE_EXAMPLES`` asks for more examples than the usual ones,
``SWORD_TRIES`` for more tries at the sword.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mythos_trio.game import Command, CommandError, Game, Player
from tests.support.play import WebSocketClient, play
from tests.support.serial import run

EXAMPLES = int(os.environ.get("SERIALISABLE_EXAMPLES", "120"))
# Each has its share of the examples: with coverage, on a slow machine, all of them took more than the minute that a
# test may take.
PARTS = 3
TRIES = int(os.environ.get("SWORD_TRIES", "1000"))


@pytest.mark.parametrize("part", range(PARTS))
@settings(
    max_examples=EXAMPLES // PARTS,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(
    players=st.integers(2, 4),
    length=st.integers(3, 30),
    crashes=st.lists(st.integers(1, 150), max_size=3),
    failing=st.sampled_from((0.0, 0.1, 0.3)),
    seed=st.integers(0, 2**32),
)
def test_the_store_is_what_one_after_another_would_have_left(
    part: int, players: int, length: int, crashes: list[int], failing: float, seed: int
) -> None:
    note(f"again: run({players}, {length}, {crashes}, {failing}, {seed})")
    run(players, length, crashes, failing, seed)


class Rock(Game):
    """A sword that is put back after every fight for it."""

    async def on_command(self, player: Player, command: Command) -> Any:
        data = player.world.data
        if command.text == "put back":
            assert data.pop("sword") == player.id
            return None
        number = data.get("number", 0)
        holder = data.get("sword")
        await trio.lowlevel.checkpoint()
        if holder is not None:
            raise CommandError(f"{holder} has it.")
        data["sword"] = player.id
        data["number"] = number + 1
        return number + 1


@pytest.mark.timeout(60 + TRIES / 50)
async def test_two_players_one_sword(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Of two who take it at once one has it, and the other one is told who; again and again."""
    won = dict.fromkeys(("ann", "bob"), 0)

    async with play(tmp_path / "m.db", game=Rock(), rate_limit_requests=10**9) as world:
        clients = {player: await world.websocket(player) for player in won}

        async def reply(client: WebSocketClient) -> dict[str, Any]:
            message = await client.until_type("reply")
            client.received.clear()
            return message

        for number in range(1, TRIES + 1):
            for client in clients.values():
                await client.give("take")
            replies = {player: await reply(client) for player, client in clients.items()}
            (winner,) = (player for player, message in replies.items() if message["ok"])
            (loser,) = (player for player in won if player != winner)
            assert replies[winner]["content"] == number
            assert replies[loser]["error"]["message"] == f"{winner} has it."
            won[winner] += 1
            await clients[winner].give("put back")
            assert (await reply(clients[winner]))["ok"]
        for client in clients.values():
            client.close()
    assert sum(won.values()) == TRIES
