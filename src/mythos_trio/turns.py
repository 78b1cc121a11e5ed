"""Turns of the event loop, shared fairly by those that come or go all at once.

Trio runs all tasks that are ready before it looks at the network and the clock again: that is one turn, and whatever
falls due in it waits for its end. When 2,000 players come back in one moment, or all leave, each of them is a
millisecond or less, but together they would be one turn of seconds. So who has more to do than a few
microseconds takes a place in a turn first (`Turns.take`). As long as there are places that is no wait at all.

A place is not always the same: on a slow machine sixteen players with a hundred messages each to catch up were 65 ms.
So a turn ends, too, when it has taken `SECONDS`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from mythos_trio.bell import Bell

PLACES: Final = 16
# A fifth of what a turn of the event loop may take. It is looked at between two calls, of which each takes 2.5 ms at
# most there.
SECONDS: Final = 0.01


class Turns:
    """*places* in each turn. Those that have begun go first, so that they get through; the others, whether tasks or
    calls, take turns."""

    def __init__(self, places: int = PLACES) -> None:
        self._places = places
        self._left = places
        self._begun: deque[Callable[[], None]] = deque()
        self._new = trio.lowlevel.ParkingLot()
        self._calls: deque[Callable[[], None]] = deque()
        self._last: deque[Callable[[], object]] = deque()
        self._taken = trio.Event()
        self._over = False

    @property
    def waiting(self) -> int:
        return len(self._begun) + len(self._calls) + len(self._new)

    def take_now(self) -> bool:
        """Take a place in this turn, if there is one."""
        if not self._left:
            return False
        self._left -= 1
        self._taken.set()
        return True

    def call(self, call: Callable[[], None]) -> None:
        """There was no place (`take_now`): have *call* called in a later turn, where it can take one. It must not
        raise."""
        self._calls.append(call)

    def wake(self, ring: Callable[[], None]) -> None:
        """Have a task that has begun woken by *ring* when it has a place: now, or in a later turn. It then goes on
        without asking for one (`take`), which would be a second time that it is woken. *ring* must not raise."""
        if self._over or self.take_now():
            ring()
        else:
            self._begun.append(ring)

    def at_end(self, call: Callable[[], object]) -> None:
        """Have *call* called at the end of the turn. It must not raise.

        What is sent one by one, between other things, finds each time that the client's processor has gone to sleep,
        and the kernel has to wake it, which takes longer than to send: 22 µs each for those that come in the same
        moment, and 7 in a row.
        """
        if self._over:
            call()
            return
        self._last.append(call)
        self._taken.set()  # its place may have been that of a turn that is over

    async def take(self, *, begun: bool = False) -> None:
        """Take a place in this turn, or wait for one in a later turn."""
        if self.take_now():
            return
        if begun:
            bell = Bell()
            self.wake(bell.ring)
            await bell.wait()
        else:
            await self._new.park()

    async def run(self) -> None:
        """Give the places of each turn. Runs until it is cancelled, and sleeps while no place is taken."""
        try:
            while True:
                await self._taken.wait()
                self._taken = trio.Event()
                while self._left < self._places or self._last or self.waiting:
                    await trio.lowlevel.checkpoint()
                    until = trio.current_time() + SECONDS
                    if self._end_turn(until):  # what the turn before has left
                        self._give_places(until)
                        self._end_turn(until)
        finally:
            self._over = True  # tasks that end with this one may still have something to say
            self._wake_begun(len(self._begun))
            self._end_turn(math.inf)

    def _give_places(self, until: float) -> None:
        begun = min(self._places, len(self._begun))
        self._left = self._places - begun
        self._wake_begun(begun)
        while self._left and (self._calls or self._new) and trio.current_time() < until:
            if self._calls:
                self._calls.popleft()()
            self._left -= len(self._new.unpark(count=min(self._left, 1)))

    def _wake_begun(self, count: int) -> None:
        for _ in range(count):
            self._begun.popleft()()

    def _end_turn(self, until: float) -> bool:
        """Carry out what is put off to the end of the turn; whether that was done before *until*."""
        last = self._last
        for _ in range(len(last)):
            last.popleft()()
            if last and trio.current_time() >= until:
                self._left = 0  # nobody else has a place until this is done
                return False
        return True
