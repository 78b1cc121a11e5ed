"""Times of one length, for many: on virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from attrs import define, field
from trio.testing import MockClock

from mythos_trio.delays import Delays


@define(eq=False)
class Player:
    over: list[float] = field(factory=list)

    def grace_over(self) -> None:
        self.over.append(trio.current_time() - began)


began = 0.0


@asynccontextmanager
async def running(seconds: float) -> AsyncIterator[Delays[Player]]:
    global began
    began = trio.current_time()
    graces: Delays[Player] = Delays(seconds, Player.grace_over)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graces.run)
        yield graces
        nursery.cancel_scope.cancel()


async def test_each_is_told_at_its_own_time(autojump_clock: MockClock) -> None:
    ann, bob = Player(), Player()
    async with running(60) as graces:
        await trio.sleep(1)
        graces.begin(ann)
        await trio.sleep(30)
        graces.begin(bob)
        await trio.sleep(100)
        assert (ann.over, bob.over) == ([61], [91])
        assert not graces.has(ann)
        graces.begin(ann)
        await trio.sleep(100)
        assert ann.over == [61, 191]


async def test_who_comes_back_in_time_is_not_told(autojump_clock: MockClock) -> None:
    ann, bob = Player(), Player()
    async with running(60) as graces:
        graces.begin(ann)
        graces.begin(bob)
        await trio.sleep(59)
        graces.end(ann)
        graces.end(ann)
        await trio.sleep(5)
        assert (ann.over, bob.over) == ([], [60])


async def test_a_second_beginning_counts(autojump_clock: MockClock) -> None:
    ann, bob = Player(), Player()
    async with running(60) as graces:
        graces.begin(ann)
        await trio.sleep(10)
        graces.begin(bob)
        await trio.sleep(10)
        graces.begin(ann)
        assert graces.has(ann)
        await trio.sleep(100)
        assert (ann.over, bob.over) == ([80], [70])
