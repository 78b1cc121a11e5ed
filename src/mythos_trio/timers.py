"""The game's timers that run now: one owner's, as long as the owner is there.

A timer is a stored row (`mythos_trio.core.transaction.SetTimer`). A session lets its player's timers run while it
lives, the server those of the world. What is due is handed over, and is run as a transaction that removes
the row; until that is committed the timer has not fired. So after a crash, or a rest, it waits its full
time again, and it never fires twice. Time is monotonic: a jump of the system's clock moves nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from mythos_trio.core.transaction import SetTimer

if TYPE_CHECKING:
    from mythos_trio.hub import Hub


class TimerClock:
    """Lets the timers of *owner* run. *ring* takes one that is due and must not wait; *start* starts a task.

    There is a task only while there are timers.
    """

    def __init__(
        self,
        hub: Hub,
        owner: str,
        ring: Callable[[SetTimer], None],
        start: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        self._hub = hub
        self._owner = owner
        self._ring = ring
        self._start = start
        self._due: dict[str, tuple[float, SetTimer]] = {}
        self._change: trio.Event | None = None
        self._running = False

    @property
    def running(self) -> int:
        """How many timers wait for their time."""
        return len(self._due)

    def open(self) -> None:
        """The owner is there: all its timers wait their full time."""
        self._hub.clocks[self._owner] = self
        for name in self._hub.timers.get(self._owner, {}):
            self.changed(name)

    def close(self) -> None:
        """The owner is gone: its timers rest."""
        self._due.clear()
        self._tell_change()
        if self._hub.clocks.get(self._owner) is self:
            del self._hub.clocks[self._owner]

    def changed(self, name: str) -> None:
        """A timer of that name was set, replaced or cancelled, and that is committed."""
        timer = self._hub.timers.get(self._owner, {}).get(name)
        if timer is None:
            self._due.pop(name, None)
        else:
            self._due[name] = (trio.current_time() + timer.seconds, timer)
        self._tell_change()
        self._run_if_needed()

    def again(self, timer: SetTimer, seconds: float) -> None:
        """It was run, but that could not be stored: once more, soon, unless it has been changed."""
        if self._hub.timers.get(self._owner, {}).get(timer.name) == timer and timer.name not in self._due:
            self._due[timer.name] = (trio.current_time() + seconds, timer)
            self._tell_change()
            self._run_if_needed()

    def _tell_change(self) -> None:
        if self._change is not None:
            self._change.set()

    def _run_if_needed(self) -> None:
        if self._due and not self._running and self._hub.clocks.get(self._owner) is self:
            self._running = True
            self._start(self._run)

    async def _run(self) -> None:
        """Hand over what is due, when it is due, until there is nothing left."""
        try:
            while self._due:
                self._change = trio.Event()
                with trio.move_on_at(min(at for at, _ in self._due.values())):
                    await self._change.wait()
                now = trio.current_time()
                for _, name in sorted((at, name) for name, (at, _) in self._due.items() if at <= now):
                    self._ring(self._due.pop(name)[1])
        finally:
            self._running = False
