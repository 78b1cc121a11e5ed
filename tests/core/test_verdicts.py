from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core import verdicts
from mythos_trio.core.verdicts import FINE, Finding, Status

GIB = 1 << 30


def test_database_in_trouble_is_unhealthy_and_says_why() -> None:
    assert verdicts.database("locked by another process", 0, GIB) == Finding(
        Status.UNHEALTHY, "locked by another process"
    )


@pytest.mark.parametrize(
    ("used", "status"),
    [
        (None, Status.HEALTHY),
        (0, Status.HEALTHY),
        (899, Status.HEALTHY),
        (900, Status.DEGRADED),
        (2000, Status.DEGRADED),
    ],
)
def test_store_is_degraded_from_nine_tenths_on(used: int | None, status: Status) -> None:
    assert verdicts.database(None, used, 1000).status is status


def test_full_store_names_the_setting() -> None:
    assert "MAX_STORE_BYTES" in str(verdicts.database(None, 950, 1000).why)


@pytest.mark.parametrize(("queued", "status"), [(0, Status.HEALTHY), (79, Status.HEALTHY), (80, Status.DEGRADED)])
def test_queue_nearly_full(queued: int, status: Status) -> None:
    assert verdicts.dispatcher(queued, 100).status is status


@pytest.mark.parametrize(
    ("seconds", "status"),
    [(1.0, Status.HEALTHY), (30.0, Status.HEALTHY), (31.0, Status.DEGRADED)],
)
def test_checker_that_stopped_looking(seconds: float, status: Status) -> None:
    assert verdicts.health_checker(seconds).status is status


@pytest.mark.parametrize(("percent", "status"), [(85.0, Status.HEALTHY), (85.1, Status.DEGRADED)])
def test_memory_is_high_above_85_percent(percent: float, status: Status) -> None:
    assert verdicts.memory(percent).status is status


def test_memory_uses_the_words_of_the_log() -> None:
    assert str(verdicts.memory(99).why).startswith("High memory usage")


@pytest.mark.parametrize(("lag", "status"), [(0.0, Status.HEALTHY), (250.0, Status.HEALTHY), (251.0, Status.DEGRADED)])
def test_late_loop(lag: float, status: Status) -> None:
    assert verdicts.event_loop(lag).status is status


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [
        (100 * GIB, 4000 * GIB, Status.HEALTHY),  # few percent, but many bytes
        (4 * GIB, 100 * GIB, Status.DEGRADED),
        (4 * GIB, 20 * GIB, Status.HEALTHY),
        (200 << 20, GIB, Status.DEGRADED),  # a large share of a small volume
        (0, 0, Status.DEGRADED),
    ],
)
def test_disk(free: int, total: int, status: Status) -> None:
    assert verdicts.disk(free, total).status is status


def test_worst_is_the_most_severe_and_the_first_of_these() -> None:
    degraded, first, second = (
        Finding(Status.DEGRADED, "a"),
        Finding(Status.UNHEALTHY, "b"),
        Finding(Status.UNHEALTHY, "c"),
    )
    assert verdicts.worst([FINE, degraded, first, second]) is first
    assert verdicts.worst([FINE, degraded]) is degraded
    assert verdicts.worst([]) is FINE


@pytest.mark.parametrize(
    ("healthy", "unhealthy", "status"),
    [(0, 0, Status.HEALTHY), (9, 1, Status.DEGRADED), (1, 1, Status.DEGRADED), (1, 2, Status.UNHEALTHY)],
)
def test_connections_together(healthy: int, unhealthy: int, status: Status) -> None:
    assert verdicts.connections(healthy, unhealthy) is status


@pytest.mark.parametrize(
    ("connections", "status"),
    [
        ([], Status.UNHEALTHY),
        ([True], Status.HEALTHY),
        ([True, True], Status.HEALTHY),
        ([True, False], Status.DEGRADED),
        ([False, False], Status.UNHEALTHY),
    ],
)
def test_player(connections: list[bool], status: Status) -> None:
    assert verdicts.player(connections) is status


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_percentage_is_between_0_and_100(part: int, more: int) -> None:
    assert 0 <= verdicts.percentage(part, part + more) <= 100


def test_nothing_at_all_is_all_right() -> None:
    assert verdicts.percentage(0, 0) == 100.0
    assert verdicts.percentage(1, 3) == 33.33
