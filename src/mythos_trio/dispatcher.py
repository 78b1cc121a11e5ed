"""The way of every change: queue → one commit → applied in order → delivered.

Two tasks. The *writer* takes all that has gathered and commits it as one (group commit): while one
commit is under way the next one gathers, so commits grow with the load by themselves. The *dispatcher*
takes committed batches, applies them to the hub in the order of their numbers, and writes a round
(`mythos_trio.rounds`). Nothing is
delivered that is not stored, and delivery never waits for a client.

From `submit` on a transaction is the dispatcher's: it is committed and delivered whatever becomes of
who asked. A failed commit is an answer (`Refused`), not a crash.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

import trio
from attrs import define, field, frozen

from mythos_trio import logs
from mythos_trio.core import names
from mythos_trio.core.errors import ErrorType, Refusal
from mythos_trio.core.timeline import Timeline
from mythos_trio.core.transaction import Append, Committed, Outcome, Reason, Refused, Transaction
from mythos_trio.core.wire import Message
from mythos_trio.logs import SLOW_MS
from mythos_trio.rounds import Rounds

if TYPE_CHECKING:
    from mythos_trio.connection import Connection
    from mythos_trio.hub import Hub
    from mythos_trio.seams import Clock
    from mythos_trio.statistics import Statistics
    from mythos_trio.storage import Storage

log = logs.get("delivery")

ROOM_SECONDS: Final = 5.0
MAX_QUEUED: Final = 4096
# Then other tasks run: 64 of them, with what whoever waited for them does next, are some milliseconds.
APPLY_AT_ONCE: Final = 64
MAX_UNSAVED_BYTES: Final = 32 << 20
ROUNDS_KEPT: Final = 4096
DELIVERED: Final = "Message delivered"


@define(eq=False)
class Submission:
    """A transaction on its way. *connections* has one count per effect once it is applied.

    *then* is called when it is: no task has to be woken. It raises nothing.
    """

    transaction: Transaction
    accepted: float
    size: int
    then: Callable[[Submission], None] | None = None
    outcome: Outcome | None = None
    connections: Sequence[int] = ()
    _done: trio.Event | None = None

    async def wait(self) -> Outcome:
        """Until it is committed and applied, or refused. Cancelling the wait changes nothing."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.outcome is None:
            if self._done is None:
                self._done = trio.Event()
            await self._done.wait()
        assert self.outcome is not None  # for the type checker: `settle` sets it before the event
        return self.outcome

    def settle(self, outcome: Outcome) -> None:
        self.outcome = outcome
        if self._done is not None:
            self._done.set()
        then, self.then = self.then, None
        if then is not None:
            then(self)

    @property
    def asked(self) -> int:
        """How many have asked for it."""
        return 1

    def accepted_each(self) -> Iterable[float]:
        """When each of its messages was accepted."""
        return repeat(self.accepted)


@define(eq=False)
class Publications(Submission):
    """Publications of several clients that came one after the other, on their way as one transaction.

    Their ids are the server's own: there is nothing for which one of them could be refused and not the others, so
    they are stored together or not at all. (A transaction, an outcome and a call for each made a publication 12 µs
    dearer, of 80.) *each* has one for each effect: the message's id, when it was accepted, who is told.
    """

    each: list[tuple[str, float, Any]] = field(factory=list)

    @property
    def asked(self) -> int:
        return len(self.each)

    def accepted_each(self) -> Iterable[float]:
        return [accepted for _, accepted, _ in self.each]


@frozen
class Failure:
    """A write to a client that failed: the dispatcher tells the health checker."""

    connection: Connection


class Dispatcher:
    """See the module's docstring. *failures* is the channel that the health checker reads."""

    def __init__(
        self,
        hub: Hub,
        storage: Storage,
        statistics: Statistics,
        clock: Clock,
        *,
        batch_size: int,
        failures: trio.MemorySendChannel[Failure],
    ) -> None:
        self._hub = hub
        self._storage = storage
        self._statistics = statistics
        self._clock = clock
        self._batch_size = batch_size
        self._group_size = min(batch_size, APPLY_AT_ONCE)
        self._failures = failures
        # No channel: who puts something in has made sure that there is room, and one task takes it out.
        self._queue: deque[Submission] = deque()
        self._gathered = trio.Event()
        self._committed, self._to_deliver = trio.open_memory_channel[tuple[list[Submission], list[Outcome]]](1)
        self._unsaved_bytes = 0
        self._unsaved = 0
        self._room = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self._writer = Rounds(hub, self._tell_failure)
        self.rounds = Timeline(ROUNDS_KEPT)
        """When the numbers of each round were written (POSIX time) to all that were not behind."""
        self._rounds_upto = hub.newest

    # Asking.

    @property
    def queued(self) -> int:
        """Transactions that are not applied yet."""
        return self._unsaved

    @property
    def capacity(self) -> int:
        return MAX_QUEUED

    async def submit(self, transaction: Transaction) -> Submission:
        """Queue *transaction*; waits for room, `ROOM_SECONDS` at most, then refuses (503)."""
        await self.wait_room()
        return self.submit_nowait(transaction)

    async def wait_room(self) -> None:
        """Until something can be queued, `ROOM_SECONDS` at most. Does not wait if there is room."""
        if not self.has_room:
            with trio.move_on_after(ROOM_SECONDS):
                while not self.has_room:
                    await self._room.wait()

    def submit_nowait(self, transaction: Transaction, then: Callable[[Submission], None] | None = None) -> Submission:
        """Queue *transaction*, or refuse it at once if too much is unsaved. *then* as in `Submission`."""
        if not self.has_room:
            raise Refusal(
                ErrorType.CAPACITY,
                "too much waits to be stored: try again",
                status=503,
                retry_ms=int(ROOM_SECONDS * 1000),
            )
        size = sum([len(effect.body) for effect in transaction.effects if type(effect) is Append])
        submission = Submission(transaction, trio.current_time(), size, then)
        self._enqueue(submission)
        self._unsaved += 1
        self._unsaved_bytes += size
        return submission

    def publish(self, message: Append, asker: Any, then: Callable[[Any], None]) -> None:
        """Queue a message of which the server has made up the id. Who calls has seen that there is room (`has_room`).

        *then* is called once for all that were queued one after the other (`Publications`): *asker* is among theirs.
        """
        last = self._queue[-1] if self._queue else None
        if type(last) is not Publications or len(last.each) == self._group_size or last.then != then:
            last = Publications(Transaction(), trio.current_time(), 0, then)
            self._enqueue(last)
        size = len(message.body)
        last.transaction.effects.append(message)
        last.each.append((message.id, trio.current_time(), asker))
        last.size += size
        self._unsaved += 1
        self._unsaved_bytes += size

    def _enqueue(self, submission: Submission) -> None:
        self._queue.append(submission)
        self._gathered.set()
        if self._idle.is_set():
            self._idle = trio.Event()

    @property
    def has_room(self) -> bool:
        """Whether something can be queued at once."""
        return self._unsaved < MAX_QUEUED and self._unsaved_bytes < MAX_UNSAVED_BYTES

    async def commit(self, transaction: Transaction) -> Submission:
        """Queue *transaction* and wait until it is applied; raises a refusal if it was not stored."""
        submission = await self.submit(transaction)
        raise_if_refused(await submission.wait())
        return submission

    async def wait_idle(self) -> None:
        """Until everything queued is committed, applied and written once."""
        await self._idle.wait()

    # The two tasks.

    async def write_forever(self) -> None:
        """The writer: commit all that has gathered, again and again."""
        several = False
        while True:
            if not self._queue:
                await self._gathered.wait()
            if several:
                # There is traffic: what this turn of the loop still brings goes with it. A commit costs 100 µs,
                # whatever is in it; at half of the greatest rate of POSTs it had 5, and took half of the processor.
                await trio.lowlevel.checkpoint()
            batch = self._take_batch()
            several = len(batch) > 1 or batch[0].asked > 1
            outcomes = await self._storage.commit([submission.transaction for submission in batch])
            try:
                self._committed.send_nowait((batch, outcomes))  # without a turn of the loop, of which a POST has five
            except trio.WouldBlock:
                await self._committed.send((batch, outcomes))

    def _take_batch(self) -> list[Submission]:
        """What has gathered: one transaction at least, then as many as have `batch_size` effects."""
        batch: list[Submission] = []
        effects = 0
        while self._queue and (not batch or effects + len(self._queue[0].transaction.effects) <= self._batch_size):
            batch.append(self._queue.popleft())
            effects += len(batch[-1].transaction.effects)
        if not self._queue:
            self._gathered = trio.Event()
        return batch

    async def dispatch_forever(self) -> None:
        """The dispatcher: apply what is committed, write a round."""
        while True:
            batch, outcomes = await self._to_deliver.receive()
            deliveries = await self._apply(batch, outcomes)
            await self.write_round()
            self._account(deliveries)
            for message, _ in deliveries:
                message.settle()
            self._leave_queue(batch)

    async def _apply(self, batch: list[Submission], outcomes: list[Outcome]) -> list[tuple[Message, float]]:
        """In slices: who is settled goes on in the next turn of the loop, and thousands may have come in one moment.

        :returns: the new messages, and when they were accepted, for the lines that say that they were delivered.
        """
        deliveries: list[tuple[Message, float]] = []
        count = 0
        for submission, outcome in zip(batch, outcomes, strict=True):
            if count >= APPLY_AT_ONCE:
                await trio.lowlevel.checkpoint()
                count = 0
            count += submission.asked
            if isinstance(outcome, Committed):
                messages, submission.connections = self._hub.apply(submission.transaction, outcome)
                deliveries += zip(messages, submission.accepted_each(), strict=False)
            else:
                self._hub.data.failed(submission.transaction.writes)
            submission.settle(outcome)
        return deliveries

    def _leave_queue(self, batch: list[Submission]) -> None:
        self._unsaved -= sum([submission.asked for submission in batch])
        self._unsaved_bytes -= sum(submission.size for submission in batch)
        if self._room.statistics().tasks_waiting and self.has_room:
            self._room.set()
            self._room = trio.Event()
        if self._unsaved == 0:
            self._idle.set()

    async def write_round(self) -> None:
        """Write to everybody what is new (`mythos_trio.rounds`)."""
        newest = self._hub.newest
        if newest > self._rounds_upto:
            self.rounds.add(self._rounds_upto, newest, self._clock.now())
            self._rounds_upto = newest
        await self._writer.write()

    def _tell_failure(self, connection: Connection) -> None:
        # If the channel is full: the checker looks at every connection at each of its rounds anyway.
        with contextlib.suppress(trio.WouldBlock):
            self._failures.send_nowait(Failure(connection))

    def _account(self, deliveries: list[tuple[Message, float]]) -> None:
        """Count and log what a round has delivered, all in one go."""
        if not deliveries:
            return
        now = trio.current_time()
        self._statistics.published(len(deliveries))
        delivered = [(message, (now - accepted) * 1000) for message, accepted in deliveries if message.receivers]
        self._statistics.delivered(sum([m.receivers for m, _ in delivered]), [ms for _, ms in delivered])
        if log.is_enabled_for(logging.DEBUG):
            for message, ms in delivered:
                log_delivered(message, ms)
            return
        log.info_each(DELIVERED, [delivered_fields(message, ms) for message, ms in delivered if ms <= SLOW_MS])
        for message, ms in delivered:
            if ms > SLOW_MS:
                log_delivered(message, ms)


def delivered_fields(message: Message, ms: float) -> dict[str, object]:
    fields: dict[str, object] = {
        "message_id": message.id,
        "seq": message.seq,
        "delivery_time_ms": round(ms, 3),
        "receivers": message.receivers,
    }
    fields |= names.target_fields(message.target)
    if "player_id" not in fields:
        fields["players"] = message.players
    return fields


def log_delivered(message: Message, ms: float) -> None:
    """ "Message delivered": the first connection of a receiver has got it."""
    level: Callable[..., object] = log.warning if ms > SLOW_MS else log.info
    level(DELIVERED, **delivered_fields(message, ms))
    if log.is_enabled_for(logging.DEBUG):
        _debug_message(message, ms)


def log_mail(messages: Sequence[Message], now: float) -> None:
    """ "Message delivered", later: *messages* were read from the store, where they had waited since `accepted_at`.

    In one go: when a thousand players come back with a hundred messages each, lines one by one are half of the cost.
    """
    rows = [
        {**delivered_fields(message, max(0.0, now - message.accepted_at) * 1000), "mail": True} for message in messages
    ]
    log.info_each(DELIVERED, [row for row in rows if not _is_slow(row)])
    log.warning_each(DELIVERED, [row for row in rows if _is_slow(row)])
    if log.is_enabled_for(logging.DEBUG):
        for message in messages:
            _debug_message(message, max(0.0, now - message.accepted_at) * 1000)


def _is_slow(row: Mapping[str, Any]) -> bool:
    return bool(row["delivery_time_ms"] > SLOW_MS)


def _debug_message(message: Message, ms: float) -> None:
    """The only place that shows what is in a message; and a line for each of the receivers that are known."""
    log.debug("Message content", message_id=message.id, seq=message.seq, content=message.body.decode())
    for player_id in message.players:
        log.debug(
            "Message delivered to a receiver",
            message_id=message.id,
            seq=message.seq,
            player_id=player_id,
            delivery_time_ms=round(ms, 3),
        )


def raise_if_refused(outcome: Outcome) -> Committed:
    """*outcome* if it is stored, else the refusal that its reason means over HTTP and in replies."""
    if isinstance(outcome, Committed):
        return outcome
    raise refusal_of(outcome)


def refusal_of(refused: Refused) -> Refusal:
    match refused.reason:
        case Reason.CONFLICT | Reason.KEY:
            return Refusal(ErrorType.VALIDATION, refused.message, status=409)
        case Reason.ENDED:
            return Refusal(ErrorType.SESSION, refused.message, status=409)
        case Reason.FULL:
            return Refusal(ErrorType.CAPACITY, refused.message, status=503, retry_ms=5000)
        case _:
            return Refusal(ErrorType.PERSISTENCE, refused.message, status=503, retry_ms=2000)
