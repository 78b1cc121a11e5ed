"""What the registrar sees to between two sessions of a player."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import trio
from trio.testing import MockClock

from mythos_trio import registrar
from mythos_trio.game import Game, Player
from tests.support.play import World, play


class Leaver(Game):
    """Takes its time to say goodbye, and notes the order of things."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    async def on_join(self, player: Player) -> None:
        self.told.append(("join", player.session_id))

    async def on_leave(self, player: Player, reason: str) -> None:
        await trio.sleep(3)
        self.told.append(("leave", player.session_id))


async def test_on_leave_is_run_though_the_next_session_ends_before_its_turn(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game = Leaver()
    async with play(tmp_path / "m.db", game=game) as world:
        for name in ("one", "two", "three"):
            client = await world.websocket("ann", f"session_id={name}")
            await client.until_type("welcome")
            await trio.sleep(1)
        await trio.sleep(20)
        # The second was replaced before its turn came: what it owed is run all the same, in order.
        assert game.told == [("join", "one"), ("leave", "one"), ("join", "two"), ("leave", "two"), ("join", "three")]
        client.close()


async def test_on_leave_of_a_removed_session_comes_before_the_next_join(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game = Leaver()
    async with play(tmp_path / "m.db", game=game) as world:
        client = await world.websocket("ann", "session_id=one")
        await client.until_type("welcome")
        await trio.sleep(1)
        assert (await world.request("DELETE", "/api/connections/ann"))[0] == 200
        again = await world.websocket("ann", "session_id=two")
        await again.until_type("welcome")
        await trio.sleep(10)
        assert game.told == [("join", "one"), ("leave", "one"), ("join", "two")]
        again.close()
        client.close()


class Bug(Exception):
    pass


async def test_a_crash_ends_the_server_however_many_players_are_coming(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them began one change after the other, in a nursery that was to end: it never did."""

    def begin_living(*arguments: object, **named: object) -> NoReturn:
        raise Bug

    async def come(world: World, player: str) -> None:
        client = await world.websocket(player)
        await client.until_type("welcome")

    async def crash() -> None:
        async with play(tmp_path / "m.db") as world, trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(come, world, f"p{number}")

    monkeypatch.setattr(registrar, "LiveSession", begin_living)
    with pytest.raises(BaseExceptionGroup) as raised:
        await crash()
    assert raised.value.subgroup(Bug) is not None
