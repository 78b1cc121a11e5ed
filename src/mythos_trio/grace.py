"""The grace times of all players who are link-dead, kept by one task.

They are all of the same length, so whose has begun first is the first to be over: who comes or goes costs an entry
in a table, and no task is woken. (With a deadline in each session's own task a mass leaving woke them all.)
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import trio


class Graced(Protocol):
    def grace_over(self) -> None:
        """Called when the grace time is over; must not wait."""
        ...


class Graces:
    """See the module's docstring. *seconds*: LINKDEAD_GRACE."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # When each is over, of `trio.current_time`.
        self._over_at: OrderedDict[Graced, float] = OrderedDict()
        self._some = trio.Event()

    def begin(self, session: Graced) -> None:
        """It begins now, for a second time too."""
        self._over_at[session] = trio.current_time() + self._seconds
        self._over_at.move_to_end(session)
        self._some.set()

    def end(self, session: Graced) -> None:
        """Somebody has come, or the session is over."""
        self._over_at.pop(session, None)

    def has(self, session: Graced) -> bool:
        return session in self._over_at

    async def run(self) -> None:
        """Tell each whose time is over, for ever."""
        while True:
            while self._over_at:
                session, over_at = next(iter(self._over_at.items()))
                if over_at > trio.current_time():
                    await trio.sleep_until(over_at)
                else:
                    del self._over_at[session]
                    session.grace_over()
            self._some = trio.Event()
            await self._some.wait()
