"""Turns of the event loop: how many of those that come or go at once share one."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mythos_trio.bell import Bell
from mythos_trio.core.errors import REMOVED
from mythos_trio.link import LOST
from mythos_trio.turns import PLACES, SECONDS, Turns
from tests.support.games import Puppet
from tests.support.play import play


class Gauge(trio.abc.Instrument):
    """Counts what is done in each turn."""

    def __init__(self) -> None:
        self.turn = 0
        self.done: Counter[int] = Counter()
        self.order: list[str] = []

    def before_io_wait(self, timeout: float) -> None:
        self.turn += 1

    def do(self, what: str) -> None:
        self.done[self.turn] += 1
        self.order.append(what)


@asynccontextmanager
async def running(places: int) -> AsyncIterator[tuple[Turns, Gauge, trio.Nursery]]:
    turns, gauge = Turns(places), Gauge()
    trio.lowlevel.add_instrument(gauge)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        yield turns, gauge, nursery
        await trio.testing.wait_all_tasks_blocked()
        assert turns.waiting == 0
        nursery.cancel_scope.cancel()
    trio.lowlevel.remove_instrument(gauge)


async def test_no_turn_has_more_than_there_are_places(autojump_clock: MockClock) -> None:
    async with running(4) as (turns, gauge, nursery):

        async def come(name: str) -> None:
            await turns.take()
            gauge.do(name)

        for round_ in range(3):
            for n in range(50):
                nursery.start_soon(come, f"{round_}-{n}")
            await trio.sleep(1)
    assert gauge.done.total() == 150
    assert max(gauge.done.values()) <= 4


async def test_who_has_begun_goes_first(autojump_clock: MockClock) -> None:
    async with running(2) as (turns, gauge, nursery):

        async def come(name: str) -> None:
            await turns.take()
            gauge.do(f"begins {name}")
            await turns.take(begun=True)
            gauge.do(f"ends {name}")

        for n in range(20):
            nursery.start_soon(come, str(n))
    began = ended = most = 0
    for what in gauge.order:
        began += what.startswith("begins")
        ended += what.startswith("ends")
        most = max(most, began - ended)
    assert began == ended == 20
    assert most <= 4


async def test_who_is_woken_with_a_place_goes_first_and_asks_for_none(autojump_clock: MockClock) -> None:
    async with running(2) as (turns, gauge, nursery):

        async def live(name: str, bell: Bell) -> None:
            await bell.wait()
            gauge.do(f"leaves {name}")

        async def come(name: str) -> None:
            await turns.take()
            gauge.do(f"comes {name}")

        bells = [Bell() for _ in range(9)]
        for number, bell in enumerate(bells):
            nursery.start_soon(live, str(number), bell)
            nursery.start_soon(come, str(number))
        await trio.lowlevel.checkpoint()
        for bell in bells:
            turns.wake(bell.ring)
        assert turns.waiting
    assert len(gauge.order) == 18
    assert max(gauge.done.values()) <= 4  # in the first turn some have come already
    before = [what for what in gauge.order[: gauge.order.index("leaves 8")] if what.startswith("comes")]
    assert len(before) <= 4, "those that leave go first"


async def test_when_nobody_gives_places_any_more_all_are_woken() -> None:
    turns, rung = Turns(1), list[int]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        for number in range(4):
            turns.wake(partial(rung.append, number))
        assert rung == [0]
        nursery.cancel_scope.cancel()
    assert rung == [0, 1, 2, 3]
    turns.wake(partial(rung.append, 4))
    assert rung[-1] == 4


async def test_who_gives_up_waiting_holds_nobody_up(autojump_clock: MockClock) -> None:
    async with running(1) as (turns, gauge, nursery):
        scopes = [trio.CancelScope() for _ in range(10)]

        async def come(scope: trio.CancelScope) -> None:
            with scope:
                await turns.take()
                gauge.do("came")

        for scope in scopes:
            nursery.start_soon(come, scope)
        await trio.lowlevel.checkpoint()
        for scope in scopes[::2]:
            scope.cancel()
    assert 5 <= len(gauge.order) <= 6


async def test_many_come_back_and_leave_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    count = 5 * PLACES
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        for _ in range(2):
            clients = [await world.websocket(f"p{n}", "") for n in range(count)]
            for client in clients:
                await client.until_type("welcome")
            await world.publish(broadcast=True, message={"type": "line", "content": "hello"})
            for client in clients:
                await client.until_type("line")
            for client in clients:
                client.close()
            await trio.sleep(2)
            assert not world.server.hub.connections
            await world.publish(broadcast=True, message={"type": "line", "content": "missed"})


@pytest.mark.parametrize("how", ["ended", "reset", "left"])
async def test_who_is_over_asks_for_one_place(
    how: str, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two for each, half as many leave in a turn as could."""
    asked: list[object] = []
    wake = Turns.wake

    def counted(turns: Turns, ring: Callable[[], None]) -> None:
        asked.append(ring)
        wake(turns, ring)

    monkeypatch.setattr(Turns, "wake", counted)
    async with play(tmp_path / "m.db") as world:
        streams = [
            await world.sse("ann"),
            await world.sse("bob"),
            await world.websocket("ann"),
            await world.websocket("cid"),
        ]
        hub = world.server.hub
        for connection in list(hub.connections.values()):
            if how == "ended":
                connection.end(REMOVED)
            elif how == "reset":
                connection.link.reset(LOST, by="network")
        for stream in streams if how == "left" else ():
            stream.close()
        await trio.testing.wait_all_tasks_blocked()
        assert not hub.connections
        assert len(asked) == 4


async def test_a_call_waits_for_a_turn_without_a_task() -> None:
    async with running(2) as (turns, gauge, nursery):

        def come(name: str) -> None:
            if turns.take_now():
                gauge.do(name)
            else:
                turns.call(lambda: come(name))

        for name in "abcde":
            come(name)
        assert (gauge.order, turns.waiting) == (["a", "b"], 3)
        while turns.waiting:
            await trio.lowlevel.checkpoint()
        assert "".join(gauge.order) == "abcde"
        assert max(gauge.done.values()) == 2
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("places", [1, 3])
async def test_what_is_said_last_is_said_though_nobody_comes_any_more(places: int) -> None:
    """Also by those who had to wait for their place: they run when that turn is nearly over."""
    said: list[int] = []
    async with running(places) as (turns, _, nursery):

        async def leave(number: int) -> None:
            await turns.take(begun=True)
            turns.at_end(lambda: said.append(number))

        async with trio.open_nursery() as leaving:
            for number in range(10):
                leaving.start_soon(leave, number)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(said) == list(range(10))
        turns.at_end(lambda: said.append(10))
        await trio.testing.wait_all_tasks_blocked()
        assert said[-1] == 10
        turns.at_end(lambda: said.append(11))
        nursery.cancel_scope.cancel()
    assert said[-1] == 11


async def test_calls_and_tasks_take_turns() -> None:
    async with running(2) as (turns, gauge, nursery):

        async def come(name: str) -> None:
            await turns.take()
            gauge.do(name)

        def call(name: str) -> None:
            if turns.take_now():
                gauge.do(name)
            else:
                turns.call(lambda: call(name))

        call("x")
        call("y")
        for number in range(3):
            nursery.start_soon(come, f"task {number}")
        await trio.testing.wait_all_tasks_blocked(0)
        for number in range(6):
            call(f"call {number}")
        while turns.waiting:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert len(gauge.order) == 11
        assert gauge.order.index("task 2") < gauge.order.index("call 5")
        nursery.cancel_scope.cancel()


async def test_a_turn_ends_when_it_has_taken_its_time(mock_clock: MockClock) -> None:
    """Sixteen players who came back with a hundred messages each were a turn of 65 ms."""
    done: dict[str, list[int]] = {"at the end": [], "with a place": []}
    async with running(4) as (turns, gauge, _):

        def work(what: str) -> None:
            mock_clock.jump(SECONDS * 0.6)
            done[what].append(gauge.turn)

        for _ in range(7):
            turns.at_end(lambda: work("at the end"))
        while turns.take_now():
            pass
        for _ in range(7):
            turns.call(lambda: work("with a place"))
        await trio.testing.wait_all_tasks_blocked()
    assert [len(each) for each in done.values()] == [7, 7]
    assert max(Counter(done["at the end"] + done["with a place"]).values()) == 2
    assert max(done["at the end"]) <= min(done["with a place"]), "nobody gets a place before it is done"
