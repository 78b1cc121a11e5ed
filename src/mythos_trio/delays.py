"""Times that are of the same length for all who wait, kept by one task: of who is link-dead, of who was accepted and
says nothing, of who waits for the store.

Whose has begun first is the first to be over, so who comes or goes costs an entry in a table, and no task is woken.
(A scope with a deadline costs 12 µs; and with a deadline in each session's own task a mass leaving woke them all.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Delays(Generic[T]):
    """See the module's docstring. *over* is told of who has waited for *seconds*; it must not wait, and not raise."""

    def __init__(self, seconds: float, over: Callable[[T], None]) -> None:
        self._seconds = seconds
        self._over = over
        # When each is over, of `trio.current_time`.
        # (No plain dict: its first key is found past all that were removed before it, each time.)
        self._over_at: OrderedDict[T, float] = OrderedDict()
        self._some = trio.Event()

    def begin(self, waiting: T, now: float | None = None) -> None:
        """It begins now, for a second time too. *now*: of `trio.current_time`, for who has asked already."""
        over_at = self._over_at
        if not over_at:
            self._some.set()
        elif waiting in over_at:
            del over_at[waiting]
        over_at[waiting] = (trio.current_time() if now is None else now) + self._seconds

    def end(self, waiting: T) -> None:
        """What was waited for has come, or nobody waits any more. Idempotent."""
        self._over_at.pop(waiting, None)

    def has(self, waiting: T) -> bool:
        return waiting in self._over_at

    async def run(self) -> None:
        """Tell of each whose time is over, for ever."""
        while True:
            while self._over_at:
                waiting, over_at = next(iter(self._over_at.items()))
                if over_at > trio.current_time():
                    await trio.sleep_until(over_at)
                else:
                    del self._over_at[waiting]
                    self._over(waiting)
            self._some = trio.Event()
            await self._some.wait()
