"""The health checker: pings, judges, and asks for a connection's end; cleans up; keeps gauges.

It shares a memory channel with the dispatcher, which tells it of writes that failed. Its rounds come
once a second, or more often if the intervals are short, and are taken in slices.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from mythos_trio import logs
from mythos_trio.core.errors import BAD_TOKEN, NO_PONG, ErrorType
from mythos_trio.core.health import HEARTBEAT_SECONDS, Verdict
from mythos_trio.core.verdicts import HIGH_MEMORY_PERCENT
from mythos_trio.dispatcher import Failure
from mythos_trio.machine import Machine
from mythos_trio.storage import Bounds, StoreError

if TYPE_CHECKING:
    from mythos_trio.connection import Connection
    from mythos_trio.handlers import Context
    from mythos_trio.registrar import Registrar

log = logs.get("connection")
memory_log = logs.get("memory")
database_log = logs.get("database")

# Connections that are looked at in one turn of the loop, some 0.2 ms, and how often that is. A round over 1,000 without
# pauses was 12 ms in which a POST took five times as long: more than one in a hundred did.
SLICE: Final = 16
SLICE_SECONDS: Final = 0.004
# Those at which there was nothing to look at take far less. With a pause after each 16 of them, too, 4,000 idle
# connections were 250 turns of the loop a second.
PASSED_AT_ONCE: Final = 500
# Connections of which the kernel is asked, in one round, what the peers have acknowledged: some 12 µs each, and as much
# for the marks that move. With all of 20,000 each second that was a quarter of a processor. The others are looked at
# where something is due.
ASKED_AT_ONCE: Final = 2000
NOTE_SECONDS: Final = 0.5
# The writer takes 7 µs for each, and commits have to wait for it.
NOTES_AT_ONCE: Final = 50
# Between two steps: at the greatest rate some 300 rows, so steps stay small.
CHECKPOINT_SECONDS: Final = 0.02
PROBE_SECONDS: Final = 5.0
MEMORY_SECONDS: Final = 10.0
LAG_SECONDS: Final = 0.1
EXPIRE_AT_ONCE: Final = 200


class Checker:
    """Its loops are tasks of the server; each runs until it is cancelled."""

    def __init__(
        self,
        context: Context,
        registrar: Registrar,
        failures: trio.MemoryReceiveChannel[Failure],
        look: Callable[[], Awaitable[object]],
    ) -> None:
        """:param look: finds leaks, and tells them."""
        self._context = context
        self._registrar = registrar
        self._failures = failures
        self._look = look
        self.last_round = trio.current_time()
        """`trio.current_time` of the newest round."""
        self._asked = 0
        """Whose turn it is to have the kernel asked: a place among all connections."""
        self._told_unhealthy: dict[str, tuple[str, ...]] = {}
        self._memory_was_high = False
        self._noting = trio.Lock()

    @property
    def tick_seconds(self) -> float:
        settings = self._context.settings
        return min(1.0, settings.health_check_interval / 4, settings.pong_timeout / 4)

    def loops(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            self.check_forever,
            self.hear_failures,
            self.note_forever,
            self.checkpoint_forever,
            self.clean_forever,
            self.probe_store_forever,
            self.watch_memory,
            self.watch_lag,
        ]

    # Connections.

    async def check_forever(self) -> None:
        while True:
            await trio.sleep(self.tick_seconds)
            await self.check_all()
            self.last_round = trio.current_time()

    async def check_all(self) -> None:
        """One round over all connections, in slices that are over within half of a tick. `ASKED_AT_ONCE` of them are
        looked at whether something is due or not: a few thousand each time, many by turns."""
        unhealthy: dict[str, dict[str, str]] = {}
        ids = list(self._context.hub.connections)
        turn = self._asked if self._asked < len(ids) else 0
        ids = ids[turn:] + ids[:turn]
        self._asked = turn + ASKED_AT_ONCE
        size = max(SLICE, math.ceil(len(ids) * SLICE_SECONDS * 2 / self.tick_seconds))
        due = trio.current_time()
        first = 0
        while first < len(ids):
            first += self._check_slice(ids[first : first + PASSED_AT_ONCE], ASKED_AT_ONCE - first, size, unhealthy)
            due += SLICE_SECONDS
            await trio.sleep_until(due)
        self._tell_unhealthy(unhealthy)

    def _check_slice(self, ids: Sequence[str], asked: int, size: int, unhealthy: dict[str, dict[str, str]]) -> int:
        """
        :param asked: so many, the first ones, are looked at even if nothing is due, unless all is known of them.
        :param size: so many are looked at, at most.
        :param unhealthy: gets who is: player, connection, why.
        :returns: how many of *ids* have been gone through.
        """
        now = trio.current_time()
        for place, id in enumerate(ids):
            connection = self._context.hub.connections.get(id)
            if connection is None or connection.over is not None:
                continue
            # One that keeps up, and owes no answer, is healthy.
            keeps_up = connection.cohort is not None and not connection.liveness.waiting
            if keeps_up and now < connection.due and (place >= asked or connection.session.has_seen_all):
                continue
            if not size:
                return place
            size -= 1
            self._check(connection)
            why = connection.why
            if why is not None:
                unhealthy.setdefault(connection.player_id, {})[id] = why
        return len(ids)

    def _check(self, connection: Connection) -> None:
        settings = self._context.settings
        now = trio.current_time()
        connection.heard_bytes()
        connection.look_at_kernel()
        if connection.expires_at is not None and self._context.clock.now() >= connection.expires_at:
            connection.end(BAD_TOKEN)
            return
        # A round late is a second: the ping goes out that much earlier, so that the bound holds.
        interval = max(self.tick_seconds, settings.health_check_interval - self.tick_seconds)
        verdict = connection.liveness.verdict(now, interval=interval, pong_timeout=settings.pong_timeout)
        silent = now - max(connection.liveness.heard_at, connection.opened) >= settings.connection_timeout
        if verdict is Verdict.GONE or silent:
            connection.end(NO_PONG)
        elif verdict is Verdict.PROBE:
            connection.probe()
        if connection.over is None and now - connection.heartbeat_at >= min(HEARTBEAT_SECONDS, interval):
            connection.offer_heartbeat()
        connection.due = self._due(connection, now, interval)

    def _due(self, connection: Connection, now: float, interval: float) -> float:
        """When a connection has to be looked at again, if it keeps up until then."""
        liveness = connection.liveness
        due = min(
            liveness.probed_at + interval,
            connection.heartbeat_at + min(HEARTBEAT_SECONDS, interval),
            max(liveness.heard_at, connection.opened) + self._context.settings.connection_timeout,
        )
        if connection.expires_at is not None:
            due = min(due, now + connection.expires_at - self._context.clock.now())
        return due

    def _tell_unhealthy(self, unhealthy: dict[str, dict[str, str]]) -> None:
        """A WARNING when it begins or changes, not at each round."""
        told: dict[str, tuple[str, ...]] = {}
        for player_id, reasons in unhealthy.items():
            ids = told[player_id] = tuple(sorted(reasons))
            if self._told_unhealthy.get(player_id) != ids:
                log.warning(
                    f"Unhealthy connections for player {player_id}",
                    player_id=player_id,
                    connection_ids=list(ids),
                    why=list(reasons.values()),
                )
        self._told_unhealthy = told

    async def hear_failures(self) -> None:
        """A write has failed: the connection's own task may be waiting for a client that is gone."""
        async for failure in self._failures:
            connection = failure.connection
            if connection.over is None and connection.link.ended is not None:
                connection.end(connection.link.ended, by=connection.link.ended_by)

    async def _pause(self, seconds: float) -> bool:
        """Wait; False if the server is stopping: a drain needs the writer for what is queued, and writes the last
        marks itself."""
        await trio.sleep(seconds)
        return not self._context.draining

    # What is written behind, and what goes.

    async def note_forever(self) -> None:
        while await self._pause(NOTE_SECONDS):
            await self.note()

    async def note(self) -> bool:
        """Write marks and rows of connections behind; False if the store would not.

        In slices, between which commits come to their turn. One at a time: a drain may ask while the loop above is at
        it, and both would write the same, and forget it twice.
        """
        async with self._noting:
            return await self._note()

    async def _note(self) -> bool:
        hub = self._context.hub
        # What comes while this is written is not waited for: there would never be an end.
        for _ in range(0, hub.waiting_notes, NOTES_AT_ONCE):
            notes = hub.notes(NOTES_AT_ONCE)
            if notes is None:
                return True
            try:
                await hub.storage.note(notes)
            except StoreError:
                return False  # health tells; they are kept and tried again
            hub.noted(notes)
        return True

    async def checkpoint_forever(self) -> None:
        """Have the store do what it puts off: often, so that it never gathers to a pause."""
        storage = self._context.hub.storage
        while await self._pause(CHECKPOINT_SECONDS):
            await storage.wait_checkpoint_due()
            with contextlib.suppress(StoreError):  # the probe of the store tells
                await storage.checkpoint()

    async def clean_forever(self) -> None:
        while await self._pause(self._context.settings.cleanup_interval):
            await self.clean()
            await self._look()

    async def clean(self) -> None:
        """Expired sessions and messages go; connections that should not be there are counted."""
        context = self._context
        settings = context.settings
        bounds = Bounds(
            message_seconds=settings.message_retention,
            message_count=settings.message_retention_count,
            session_seconds=settings.session_retention,
            store_bytes=settings.max_store_bytes,
        )
        counts: dict[str, int] = {}
        try:
            expired = await self._expire(bounds)
            while True:
                cleaned = await context.hub.storage.clean(bounds)
                for name in ("messages", "sessions", "answers", "subscriptions", "requests", "expired_mail"):
                    counts[name] = counts.get(name, 0) + getattr(cleaned, name)
                if not cleaned.more or context.draining:
                    break
        except StoreError as error:
            database_log.warning("Clean-up postponed", error_type=ErrorType.PERSISTENCE.value, reason=str(error))
            return
        if counts.get("expired_mail"):
            self._tell_expired_mail(counts["expired_mail"])
        dead = [c for c in list(context.hub.connections.values()) if c.over is not None]
        for connection in dead:
            connection.session.detach(connection)
        log.info(f"Cleaned up {len(dead)} old connections", expired_sessions=expired, **counts)

    async def _expire(self, bounds: Bounds) -> int:
        """Sessions that have been offline for longer than messages are kept end, one by one."""
        count = 0
        while True:
            rows = await self._context.hub.storage.expired_sessions(bounds, EXPIRE_AT_ONCE)
            done = 0
            for player_id, session_id in rows:
                done += await self._registrar.expire(player_id, session_id)
            count += done
            if len(rows) < EXPIRE_AT_ONCE or not done:
                return count

    def _tell_expired_mail(self, count: int) -> None:
        self._context.statistics.failed(count, "expired")
        log.warning(
            "Message delivery failed",
            error_type=ErrorType.DELIVERY.value,
            delivery_error="mail expired",
            reason="nobody came for it within MESSAGE_RETENTION",
            count=count,
        )

    # Gauges.

    async def probe_store_forever(self) -> None:
        """A tiny write now and then, so that trouble is seen, and seen to be over, without traffic."""
        while await self._pause(PROBE_SECONDS):
            try:
                await self._context.hub.storage.probe()
            except StoreError as error:
                database_log.error(
                    "Database connection failed",
                    error_type=ErrorType.PERSISTENCE.value,
                    driver="sqlite3",
                    reason=str(error),
                )

    async def watch_memory(self) -> None:
        machine = Machine()
        while True:
            memory = machine.memory()
            high = memory.percent > HIGH_MEMORY_PERCENT
            if high and not self._memory_was_high:
                memory_log.warning("High memory usage", percent=memory.percent, rss=memory.rss_bytes)
            self._memory_was_high = high
            await trio.sleep(MEMORY_SECONDS)

    async def watch_lag(self) -> None:
        """How late the event loop runs a task that is due."""
        while True:
            due = trio.current_time() + LAG_SECONDS
            await trio.sleep_until(due)
            self._context.statistics.loop_lag((trio.current_time() - due) * 1000)
