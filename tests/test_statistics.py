"""Counters, windows and rates, against a clock of our own."""

from __future__ import annotations

import threading

import pytest
import trio
from trio.testing import MockClock

from mythos_trio import logs
from mythos_trio.core.errors import ErrorType
from mythos_trio.statistics import MAX_NAMES, RECENT_ERRORS, WINDOW, Rate, Samples, Statistics, percentile, share

NOW = 1_800_000_000.0


class Time:
    now: float | None = 1000.0

    def __call__(self) -> float | None:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def statistics(time: Time) -> Statistics:
    return Statistics(time)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, 0),
        ([7], 50, 7),
        ([7], 99, 7),
        ([1, 2, 3, 4], 50, 2),
        ([1, 2, 3, 4], 75, 3),
        ([1, 2, 3, 4], 76, 4),
        (list(range(1, 101)), 95, 95),
        (list(range(1, 101)), 99, 99),
        (list(range(1, 101)), 100, 100),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], percent: int, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_samples_forget_the_oldest_but_not_their_number() -> None:
    samples = Samples()
    samples.add(1_000_000)
    for _ in range(WINDOW):
        samples.add(2)
    assert samples.count == WINDOW + 1
    assert samples.read() == {"avg_ms": 2, "p50_ms": 2, "p95_ms": 2, "p99_ms": 2, "max_ms": 2}


def test_a_rate_is_of_the_last_minute() -> None:
    rate = Rate()
    for second in range(200):
        rate.add(second, 3)
        rate.add(second + 0.5, 3)
    assert rate.total(199.9) == 60 * 6
    assert rate.read(199.9) == 6
    assert rate.total(230) == 29 * 6
    assert rate.read(500) == 0


def test_establishment(statistics: Statistics) -> None:
    for ms in (10, 20, 30):
        statistics.established(1000.0, "websocket", ms)
    assert statistics.establishment()["websocket"] == {
        "count": 3,
        "avg_ms": 20,
        "p50_ms": 20,
        "p95_ms": 30,
        "p99_ms": 30,
        "max_ms": 30,
    }
    assert statistics.establishment()["sse"]["count"] == 0


def test_delivery(statistics: Statistics) -> None:
    assert statistics.delivery()["delivery_success_rate"] == 100
    statistics.published(2)
    statistics.delivered(7, [4.0])
    statistics.delivered(1, ())
    statistics.failed(1, "cut")
    statistics.failed(1, "retention")
    found = statistics.delivery()
    assert (found["total_messages"], found["delivered"], found["failed"]) == (2, 8, 2)
    assert found["failed_by_reason"] == {"cut": 1, "retention": 1}
    assert found["delivery_success_rate"] == 80
    assert (found["avg_ms"], found["max_ms"]) == (4, 4), "mail says nothing about latency"


def test_sessions_and_commands(statistics: Statistics) -> None:
    for kind in ("created", "created", "replaced", "ended"):
        statistics.session(kind)
    assert statistics.sessions() == {"created": 2, "replaced": 1, "recovered": 0, "ended": 1}
    statistics.command(1000.0, 5, True)
    statistics.command(1000.0, 7, False)
    commands = statistics.commands()
    assert (commands["count"], commands["failed"], commands["avg_ms"]) == (2, 1, 6)


def test_rates(statistics: Statistics, time: Time) -> None:
    statistics.published(120)
    statistics.delivered(600, [1])
    statistics.established(1000.0, "sse", 1)
    statistics.command(1000.0, 1, True)
    statistics.failed(6, "cut")
    assert statistics.rates() == {
        "window_seconds": 60,
        "connections_per_second": 0.02,
        "messages_per_second": 2,
        "deliveries_per_second": 10,
        "failures_per_second": 0.1,
        "commands_per_second": 0.02,
    }
    time.now = 1061.0
    assert set(statistics.rates().values()) == {60, 0}


def test_health_trends(statistics: Statistics, time: Time) -> None:
    empty = statistics.health_trends()
    assert (empty["last_hour"]["points"], empty["last_24_hours"]["health_percentage"]) == ([], 100)
    for second in range(0, 7200, 10):
        time.now = float(second)
        statistics.health(9, 1 if second < 7140 else 11)
    time.now = 7199.0
    trends = statistics.health_trends()
    hour, day = trends["last_hour"], trends["last_24_hours"]
    assert len(hour["points"]) == 60
    assert [point["seconds_ago"] for point in hour["points"][-2:]] == [119, 59]
    assert hour["points"][0] == {
        "seconds_ago": 3599,
        "healthy": 9,
        "unhealthy": 1,
        "health_percentage": 90,
        "lowest_percentage": 90,
    }
    assert hour["points"][-1]["health_percentage"] == hour["lowest_percentage"] == 45
    assert len(day["points"]) == 2
    assert day["points"][1]["health_percentage"] == 88.52, "100 * 3240 / 3660"
    time.now = 7199.0 + 3600
    assert statistics.health_trends()["last_hour"]["points"] == [], "what is old is not shown as the last hour"
    assert len(statistics.health_trends()["last_24_hours"]["points"]) == 2


def test_errors(statistics: Statistics, time: Time) -> None:
    statistics.error(ErrorType.DELIVERY, "Message delivery failed", "alice", NOW)
    statistics.error("rate_limit_error", "x" * 1000, None, NOW)
    found = statistics.errors()
    assert found["error_breakdown"] == {"delivery_error": 1, "rate_limit_error": 1}
    assert found["recent_errors"][0] == {
        "timestamp": "2027-01-15T08:00:00.000Z",
        "error_type": "delivery_error",
        "event": "Message delivery failed",
        "player_id": "alice",
    }
    assert len(found["recent_errors"][1]["event"]) == 200
    assert found["rates"]["errors_in_window"] == 2
    time.now = 2000.0
    assert statistics.errors()["rates"]["errors_in_window"] == 0


def test_errors_are_bounded(statistics: Statistics) -> None:
    for n in range(1000):
        statistics.error(f"made-up-{n}", str(n), None, NOW)
        statistics.failed(1, f"why-{n}")
    found = statistics.errors()
    assert len(found["error_breakdown"]) == MAX_NAMES + 1
    assert sum(found["error_breakdown"].values()) == 1000
    assert len(found["recent_errors"]) == RECENT_ERRORS
    assert found["recent_errors"][-1]["event"] == "999"
    assert sum(statistics.delivery()["failed_by_reason"].values()) == 1000


def test_lines_of_the_log_are_counted(statistics: Statistics) -> None:
    end = logs.on_error(statistics.logged)
    try:
        with logs.capture():
            logs.get("session").error("Unexpected error in a session", player_id="alice")
            logs.get("memory").warning("High memory usage", percent=91)
            logs.get("server").info("fine")
    finally:
        end()
    found = statistics.errors()
    assert found["error_breakdown"] == {"session_error": 1}
    assert found["recent_errors"][0]["player_id"] == "alice"
    assert (found["warnings"], found["rates"]["warnings_in_window"]) == (1, 1)


async def test_time_is_trios_and_threads_have_the_last_known(autojump_clock: MockClock) -> None:
    statistics = Statistics()
    statistics.published(60)
    await trio.sleep(59)
    assert statistics.rates()["messages_per_second"] == 1
    thread = threading.Thread(target=statistics.error, args=("system_error", "in a thread", None, NOW))
    thread.start()
    thread.join()
    assert statistics.errors()["rates"]["errors_in_window"] == 1
    await trio.sleep(2)
    assert statistics.rates()["messages_per_second"] == 0


def test_share() -> None:
    assert (share(0, 0), share(1, 2), share(0, 1)) == (100, 33.33, 0)
