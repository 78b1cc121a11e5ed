"""What has happened since the start, counted: the numbers of the monitoring pages.

Plain counters and bounded windows: telling is cheap enough for every message, reading sorts at most
`WINDOW` numbers. Percentiles, averages and maxima are of the newest `WINDOW` samples, rates of the last
`RATE_SECONDS`. Times come in as milliseconds that somebody has measured.

One thread tells (the event loop's), except that errors may be told by any.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import trio
from attrs import define, field

from mythos_trio.seams import rfc3339

WINDOW: Final = 1024
RATE_SECONDS: Final = 60
RECENT_ERRORS: Final = 100
# There are nine error types of ours; whoever else makes some up is counted together.
MAX_NAMES: Final = 64
OTHER: Final = "other"
SHOWN: Final = 200

MINUTE: Final = 60.0
HOUR: Final = 3600.0


def _trio_time() -> float | None:
    """Trio's clock, which tests replace; None in a thread that has none."""
    try:
        return trio.current_time()
    except RuntimeError:
        return None


class Samples:
    """The newest `WINDOW` of a series of milliseconds, and how many there were."""

    def __init__(self) -> None:
        self.count = 0
        self._newest: deque[float] = deque(maxlen=WINDOW)

    def add(self, ms: float) -> None:
        self.count += 1
        self._newest.append(ms)

    def add_all(self, samples: Sequence[float]) -> None:
        self.count += len(samples)
        self._newest.extend(samples)

    def read(self) -> dict[str, float]:
        """``avg_ms``, ``p50_ms``, ``p95_ms``, ``p99_ms``, ``max_ms``; zeros if there was nothing."""
        ordered = sorted(self._newest)
        return {
            "avg_ms": round(sum(ordered) / len(ordered), 3) if ordered else 0.0,
            "p50_ms": percentile(ordered, 50),
            "p95_ms": percentile(ordered, 95),
            "p99_ms": percentile(ordered, 99),
            "max_ms": percentile(ordered, 100),
        }


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest of *ordered* that at least *percent* of them do not exceed (nearest rank)."""
    if not ordered:
        return 0.0
    rank = -(-percent * len(ordered) // 100)  # rounded up
    return round(ordered[max(rank, 1) - 1], 3)


class Rate:
    """How many a second, over the last `RATE_SECONDS`; one slot a second."""

    def __init__(self) -> None:
        self._slots: deque[tuple[int, int]] = deque(maxlen=RATE_SECONDS + 1)

    def add(self, now: float, n: int) -> None:
        second = int(now)
        if self._slots and self._slots[-1][0] == second:
            self._slots[-1] = (second, self._slots[-1][1] + n)
        else:
            self._slots.append((second, n))

    def total(self, now: float) -> int:
        since = int(now) - RATE_SECONDS
        return sum(n for second, n in self._slots if second > since)

    def read(self, now: float) -> float:
        return round(self.total(now) / RATE_SECONDS, 2)


@define
class _Slot:
    """Samples of one span of a trend, added up; *lowest* is the lowest percentage of them."""

    start: float
    samples: int = 0
    healthy: int = 0
    unhealthy: int = 0
    lowest: float = 100.0

    def add(self, healthy: int, unhealthy: int) -> None:
        self.samples += 1
        self.healthy += healthy
        self.unhealthy += unhealthy
        self.lowest = min(self.lowest, share(healthy, unhealthy))


@define
class _Trend:
    """A ring of spans of *span* seconds each."""

    span: float
    slots: deque[_Slot]

    @classmethod
    def of(cls, span: float, count: int) -> _Trend:
        return cls(span, deque(maxlen=count))

    def add(self, now: float, healthy: int, unhealthy: int) -> None:
        start = now // self.span * self.span
        if not self.slots or self.slots[-1].start != start:
            self.slots.append(_Slot(start))
        self.slots[-1].add(healthy, unhealthy)

    def read(self, now: float) -> dict[str, Any]:
        """The whole's average and lowest percentage, and the spans, oldest first."""
        oldest = now - self.span * (self.slots.maxlen or 0)
        slots = [slot for slot in self.slots if slot.start > oldest]
        return {
            "health_percentage": share(sum(s.healthy for s in slots), sum(s.unhealthy for s in slots)),
            "lowest_percentage": min((s.lowest for s in slots), default=100.0),
            "span_seconds": self.span,
            "points": [self._point(slot, now) for slot in slots],
        }

    def _point(self, slot: _Slot, now: float) -> dict[str, float]:
        return {
            "seconds_ago": round(now - slot.start),
            "healthy": round(slot.healthy / slot.samples, 1),
            "unhealthy": round(slot.unhealthy / slot.samples, 1),
            "health_percentage": share(slot.healthy, slot.unhealthy),
            "lowest_percentage": slot.lowest,
        }


def share(good: float, bad: float) -> float:
    """*good* of all as a percentage; 100 if there are none: nothing is wrong."""
    return round(100 * good / (good + bad), 2) if good + bad else 100.0


@define
class _Rates:
    connects: Rate = field(factory=Rate)
    messages: Rate = field(factory=Rate)
    deliveries: Rate = field(factory=Rate)
    failures: Rate = field(factory=Rate)
    commands: Rate = field(factory=Rate)
    errors: Rate = field(factory=Rate)
    warnings: Rate = field(factory=Rate)


class Statistics:
    """Told by whom it happens to, read by `mythos_trio.monitor`.

    :param monotonic: seconds that do not jump, or None if the calling thread cannot know.
    """

    def __init__(self, monotonic: Callable[[], float | None] = _trio_time) -> None:
        self._monotonic = monotonic
        self._time = 0.0
        self._rates = _Rates()
        self._established = {"websocket": Samples(), "sse": Samples()}
        self._latency = Samples()
        self._published = 0
        self._delivered = 0
        self._replaced = 0
        self._failed: Counter[str] = Counter()
        self._sessions = Counter({"created": 0, "replaced": 0, "recovered": 0, "ended": 0})
        self._commands = Samples()
        self._commands_failed = 0
        self._runs = 0
        self._repeated = 0
        self._lag = Samples()
        self._hour = _Trend.of(MINUTE, 60)
        self._day = _Trend.of(HOUR, 24)
        # Errors are logged by the store's and other threads too.
        self._lock = threading.Lock()
        self._errors: Counter[str] = Counter()
        self._warnings = 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_ERRORS)

    def _now(self) -> float:
        now = self._monotonic()
        if now is not None:
            self._time = now
        return self._time

    # Telling.

    def established(self, now: float, transport: str, ms: float) -> None:
        """A connection of *transport* (``websocket``, ``sse``) took *ms* from accept to welcome, which is *now*."""
        self._established[transport].add(ms)
        self._rates.connects.add(now, 1)

    def published(self, n: int) -> None:
        self._published += n
        self._rates.messages.add(self._now(), n)

    def delivered(self, n: int, ms: Sequence[float]) -> None:
        """*n* receivers got messages; *ms* of each message from 202 to the last write, nothing if that says nothing
        (mail)."""
        self._delivered += n
        self._rates.deliveries.add(self._now(), n)
        self._latency.add_all(ms)

    def replaced(self, n: int) -> None:
        """*n* messages were not written to a connection that was behind, but newer ones of their keys."""
        self._replaced += n

    def failed(self, n: int, reason: str) -> None:
        _count(self._failed, reason, n)
        self._rates.failures.add(self._now(), n)

    def session(self, kind: str) -> None:
        """*kind*: ``created``, ``replaced``, ``recovered``, ``ended``."""
        self._sessions[kind] += 1

    def loop_lag(self, ms: float) -> None:
        self._lag.add(ms)

    def command(self, now: float, ms: float, ok: bool) -> None:
        """A handler took *ms* for a command, until *now*."""
        self._commands.add(ms)
        self._commands_failed += not ok
        self._rates.commands.add(now, 1)

    def ran(self) -> None:
        """A handler, of whatever kind, has been begun."""
        self._runs += 1

    def to_be_repeated(self) -> None:
        """It has read what another one has changed meanwhile, and has to be run again."""
        self._repeated += 1

    def health(self, healthy: int, unhealthy: int) -> None:
        """How many connections are well just now; told at even intervals."""
        now = self._now()
        self._hour.add(now, healthy, unhealthy)
        self._day.add(now, healthy, unhealthy)

    def error(self, error_type: str, event: str, player_id: str | None, when: float) -> None:
        """Any thread. *when*: POSIX seconds."""
        entry = {
            "timestamp": rfc3339(when),
            "error_type": str(error_type),
            "event": event[:SHOWN],
            "player_id": player_id,
        }
        with self._lock:
            _count(self._errors, str(error_type), 1)
            self._recent.append(entry)
            self._rates.errors.add(self._now(), 1)

    def logged(self, event: Mapping[str, Any]) -> None:
        """Any thread. A line of the log at WARNING or above (`mythos_trio.logs.on_error`)."""
        if "error_type" in event:
            self.error(event["error_type"], str(event["event"]), event.get("player_id"), event["timestamp"])
            return
        with self._lock:
            self._warnings += 1
            self._rates.warnings.add(self._now(), 1)

    # Reading.

    def establishment(self) -> dict[str, dict[str, float]]:
        return {name: {"count": samples.count, **samples.read()} for name, samples in self._established.items()}

    def delivery(self) -> dict[str, Any]:
        failed = self._failed.total()
        return {
            "total_messages": self._published,
            "delivered": self._delivered,
            "failed": failed,
            "replaced": self._replaced,
            "failed_by_reason": dict(self._failed),
            "delivery_success_rate": share(self._delivered, failed),
            **self._latency.read(),
        }

    def sessions(self) -> dict[str, int]:
        """``created``, ``replaced``, ``recovered``, ``ended``."""
        return dict(self._sessions)

    def commands(self) -> dict[str, float]:
        return {"count": self._commands.count, "failed": self._commands_failed, **self._commands.read()}

    def transactions(self) -> dict[str, int]:
        return {"runs": self._runs, "repeated": self._repeated}

    def lag(self) -> dict[str, float]:
        return self._lag.read()

    def rates(self) -> dict[str, float]:
        """Per second, over the last `RATE_SECONDS`."""
        now = self._now()
        rates = self._rates
        return {
            "window_seconds": RATE_SECONDS,
            "connections_per_second": rates.connects.read(now),
            "messages_per_second": rates.messages.read(now),
            "deliveries_per_second": rates.deliveries.read(now),
            "failures_per_second": rates.failures.read(now),
            "commands_per_second": rates.commands.read(now),
        }

    def health_trends(self) -> dict[str, Any]:
        now = self._now()
        return {"last_hour": self._hour.read(now), "last_24_hours": self._day.read(now)}

    def errors(self) -> dict[str, Any]:
        """``error_breakdown``, ``recent_errors`` (oldest first), ``rates``."""
        with self._lock:
            now = self._now()
            return {
                "error_breakdown": dict(self._errors),
                "warnings": self._warnings,
                "recent_errors": list(self._recent),
                "rates": {
                    "window_seconds": RATE_SECONDS,
                    "errors_per_second": self._rates.errors.read(now),
                    "errors_in_window": self._rates.errors.total(now),
                    "warnings_in_window": self._rates.warnings.total(now),
                },
            }


def _count(counts: Counter[str], name: str, n: int) -> None:
    known = name in counts or len(counts) < MAX_NAMES
    counts[name if known else OTHER] += n
