"""One task that waits for the bytes of many connections, and calls who wants them.

Waiting in a task of its own costs a connection two changes of what the kernel watches and a change of tasks, each
time that something comes. Here the kernel is told once: an epoll descriptor can itself be awaited, and says then
which of its sockets can be read. Where there is no epoll, and for wires that are none of the kernel's, a task
for each wire does the same.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Final

import trio
from attrs import define, field

if TYPE_CHECKING:
    from mythos_trio.net import Wire

# Wires that are told in one turn of the event loop; the kernel goes round among those that can be read.
SLICE: Final = 64


@define(eq=False)
class _Watch:
    """A wire that a task waits for."""

    readable: Callable[[], None]
    scope: trio.CancelScope = field(factory=trio.CancelScope)


class Poller:
    """See the module's docstring. What is called must not raise: it would end the server.

    :param turn: entered around the calls of each turn.
    """

    def __init__(self, turn: AbstractContextManager[None, None] | None = None) -> None:
        self._turn = nullcontext() if turn is None else turn
        self._called: dict[int, Callable[[], None]] = {}
        self._tasks: dict[Wire, _Watch] = {}
        self._last: list[Callable[[], object]] = []
        self._nursery: trio.Nursery | None = None
        self._epoll: select.epoll | None = None
        self.now = 0.0
        """`trio.current_time` of this turn, for who is called in it: asking again is a tenth of what it does."""

    def watch(self, wire: Wire, readable: Callable[[], None]) -> None:
        """Call *readable* whenever something can be received, or the wire is broken, until `forget`; instead of who
        was called so far, if somebody was: the kernel then need not be told again.

        It is called again as long as that has not been received.
        """
        number = wire.fileno()
        if self._epoll is not None and number >= 0:
            if number not in self._called:
                self._epoll.register(number, select.EPOLLIN)
            self._called[number] = readable
        elif (watch := self._tasks.get(wire)) is not None:
            watch.readable = readable
        elif self._nursery is not None:
            watch = self._tasks[wire] = _Watch(readable)
            self._nursery.start_soon(self._watch, wire, watch)

    def forget(self, wire: Wire) -> None:
        """Before the wire is closed. Idempotent."""
        watch = self._tasks.pop(wire, None)
        if watch is not None:
            watch.scope.cancel()
        elif self._called.pop(wire.fileno(), None) is not None and self._epoll is not None:
            self._epoll.unregister(wire.fileno())

    def at_end(self, call: Callable[[], object]) -> None:
        """For who is called in a turn: have *call* called at its end. What is sent then goes out in a row, as in
        `turns.Turns.at_end`."""
        self._last.append(call)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until it is cancelled; what is watched then is forgotten."""
        async with trio.open_nursery() as self._nursery:
            try:
                if not hasattr(select, "epoll"):
                    task_status.started()
                    await trio.sleep_forever()
                self._epoll = select.epoll()
                task_status.started()
                await self._poll(self._epoll)
            finally:
                self._nursery = None
                self._close()

    async def _poll(self, epoll: select.epoll) -> None:
        while True:
            await trio.lowlevel.wait_readable(epoll)
            self.now = trio.current_time()
            with self._turn:
                for number, _ in epoll.poll(0, SLICE):
                    # One that was called before it may have ended it.
                    readable = self._called.get(number)
                    if readable is not None:
                        readable()
                if self._last:
                    self._end_turn()

    async def _watch(self, wire: Wire, watch: _Watch) -> None:
        with watch.scope, suppress(trio.ClosedResourceError):
            while not watch.scope.cancel_called:
                await wire.wait_readable()
                if not watch.scope.cancel_called:  # it may have been forgotten since
                    self.now = trio.current_time()
                    with self._turn:
                        watch.readable()
                        self._end_turn()

    def _end_turn(self) -> None:
        calls, self._last = self._last, []
        for call in calls:
            call()

    def _close(self) -> None:
        self._called.clear()
        if self._epoll is not None:
            trio.lowlevel.notify_closing(self._epoll)
            self._epoll.close()
            self._epoll = None
