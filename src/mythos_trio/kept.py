"""A kept connection: what it asks next, and how that is answered without a task.

Who publishes sends the same head again and again, but for the length of the body, and the body in one piece with it.
Such a request is known by its bytes (`http1.Repeated`), and its answer is given by whoever settles it: a call when the
bytes come, and a call when they are stored. A task and two deadlines for each of them cost as much as all the rest.
Everything else wakes the connection's own task, which reads it, checks it and answers it in the ordinary way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import trio

from mythos_trio.http1 import MAX_HEAD, Head, Repeated

if TYPE_CHECKING:
    from mythos_trio.access import Visitor
    from mythos_trio.ledger import Tended
    from mythos_trio.poller import Poller
    from mythos_trio.seams import Clock

# How long a connection may be idle between two requests; the same as nginx's keepalive_timeout.
IDLE_SECONDS: Final = 75.0
# How long a request that was taken may stay without an answer. The task looks that often: no request moves a deadline.
ANSWER_SECONDS: Final = 30.0


class Asker(Protocol):
    """Who waits for an answer."""

    def answer(self, data: bytes, keep: bool, /) -> None:
        """The whole answer; whether the connection can carry another request."""
        ...

    def crashed(self, error: Exception, /) -> None:
        """There is none: *error* has escaped."""
        ...


class Server(Protocol):
    """Who serves what a kept connection asks: the front door, for its handlers."""

    def take(self, head: Head, visitor: Visitor, body: bytes, asker: Asker, /) -> bool:
        """Serve a request that is here whole, without waiting: *asker* is told the answer, now or later. False: it
        cannot be done that way, and nothing has been done."""
        ...

    def too_late(self, head: Head, /) -> bytes:
        """What a request is answered that was taken `ANSWER_SECONDS` ago. The connection ends with it."""
        ...

    def idles(self, kept: Kept, /) -> None:
        """It waits for a request."""
        ...

    def is_asked(self, kept: Kept, /) -> None:
        """It was idle, and has a request that is being served."""
        ...

    def is_answered(self, kept: Kept, /) -> None:
        """That request is over, however it ended."""
        ...

    def wakes(self, kept: Kept, /) -> None:
        """It waits no longer: its task goes on."""
        ...


class Kept:
    """A connection between the requests that its task serves."""

    __slots__ = (
        "_asked",
        "_begun",
        "_clock",
        "_held",
        "_over",
        "_poller",
        "_repeated",
        "_server",
        "_visitor",
        "_woken",
        "error",
        "since",
        "tended",
    )

    def __init__(self, tended: Tended, server: Server, poller: Poller, clock: Clock) -> None:
        self.tended = tended
        self.error: Exception | None = None
        """What has escaped while a request was served that was taken here."""
        self.since = 0.0
        """Since when it has been asked, or idle, which it is from the last request on (`trio.current_time`)."""
        self._server = server
        self._poller = poller
        self._clock = clock
        self._repeated: Repeated | None = None
        self._visitor: Visitor | None = None
        self._woken = trio.Event()
        self._begun = b""
        self._asked = False
        self._held = False
        self._over = False

    @property
    def head(self) -> Head | None:
        """The head that is known, with the length of another body."""
        return None if self._repeated is None else self._repeated.head

    def learn(self, head: Head, visitor: Visitor) -> None:
        """A request with *head* has been served for *visitor*: the next one may well have the same head.

        A token that was not good may become so: that is looked at each time.
        """
        self._repeated = Repeated.of(head) if visitor.token_error is None else None
        self._visitor = visitor

    async def wait(self) -> bytes:
        """What begins a request that needs the task. Nothing: the connection is over. The client has gone, it was
        idle for too long, it was let go, or something went wrong (`error`)."""
        link = self.tended.link
        self._woken, self._begun = trio.Event(), b""
        self.since = trio.current_time()
        self._server.idles(self)
        try:
            link.watch(self._poller, self._on_readable)
            self._receive(self.since)  # nobody else tells of what was received already, and pushed back
            while not self._woken.is_set():
                await self._wait_until_due()
        finally:
            link.unwatch()
            self._server.wakes(self)
            if self._asked:  # too late, or cancelled
                self._over = True
                self._leave_request()
        return self._begun

    def let_go(self) -> None:
        """End an idle connection: it makes room, or the server drains. What it asks in this moment is answered."""
        self._receive(trio.current_time())
        if not self._asked and not self._woken.is_set():
            self._wake(b"")

    # As `Asker`.

    def answer(self, data: bytes, keep: bool) -> None:
        if self._over:
            return
        self._leave_request()
        self.tended.link.try_send(data)
        if not keep or self.tended.link.ended is not None:
            self._wake(b"")
            return
        self._server.idles(self)
        if self._held:
            self._held = False
            self.tended.link.watch(self._poller, self._on_readable)
            if self.tended.link.closed:
                self._wake(b"")

    def crashed(self, error: Exception) -> None:
        if self._over:
            return
        if self._asked:
            self._leave_request()
        self.error = error
        self._wake(b"")

    # Within.

    def _leave_request(self) -> None:
        self._asked = False
        self._server.is_answered(self)

    def _wake(self, begun: bytes) -> None:
        """The task goes on, with *begun*."""
        self.tended.link.unwatch()
        self._begun = begun
        self._woken.set()
        self._server.wakes(self)

    def _on_readable(self) -> None:
        if self._woken.is_set():
            return
        if self._asked:
            # It sends on, or leaves, before it has its answer: one thing after the other.
            self._held = True
            self.tended.link.unwatch()
            return
        self._receive(self._poller.now)

    def _receive(self, now: float) -> None:
        data = self.tended.link.receive_now(MAX_HEAD, now)
        if data is None:
            return
        try:
            taken = self._take(data)
        except Exception as error:
            self.crashed(error)
            return
        if not taken:
            self._wake(data)

    def _take(self, data: bytes) -> bool:
        """Have *data* served, if it is a request that is known; whether that has been done."""
        repeated, visitor = self._repeated, self._visitor
        if repeated is None or visitor is None or self.tended.link.unsent:
            return False
        body = repeated.body(data)
        if body is None or (visitor.expires_at is not None and self._clock.now() >= visitor.expires_at):
            return False
        self._asked = True
        self.since = self.tended.link.last_received
        self._server.is_asked(self)
        if self._server.take(repeated.head, visitor, body, self):
            return True
        self._leave_request()
        return False

    async def _wait_until_due(self) -> None:
        now = trio.current_time()
        with trio.move_on_at(min(self._due(), now + ANSWER_SECONDS)):
            await self._woken.wait()
        if not self._woken.is_set() and trio.current_time() >= self._due():
            self._end_late()

    def _due(self) -> float:
        """When it has been idle, or without an answer, for too long."""
        return self.since + (ANSWER_SECONDS if self._asked else IDLE_SECONDS)

    def _end_late(self) -> None:
        head = self.head
        if self._asked and head is not None:
            self.tended.link.try_send(self._server.too_late(head))
        self._wake(b"")
