"""A bell: one task waits, plain functions ring."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from mythos_trio.bell import Bell


async def test_it_wakes_who_waits_again_and_again() -> None:
    bell, heard = Bell(), 0

    async def wait() -> None:
        nonlocal heard
        while True:
            await bell.wait()
            heard += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        for count in range(3):
            await wait_all_tasks_blocked()
            assert heard == count
            bell.ring()
        await wait_all_tasks_blocked()
        assert heard == 3
        nursery.cancel_scope.cancel()


async def test_what_rings_while_nobody_waits_is_heard_once() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    await bell.wait()
    with trio.move_on_after(0.01) as scope:
        await bell.wait()
    assert scope.cancelled_caught


async def test_who_has_given_up_is_not_woken() -> None:
    bell = Bell()
    with trio.move_on_after(0) as scope:
        await bell.wait()
    assert scope.cancelled_caught
    bell.ring()
    await bell.wait()


async def test_only_one_waits() -> None:
    bell = Bell()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bell.wait)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await bell.wait()
        bell.ring()
