"""How the server's parts are, judged by measured values: the rules behind ``/health``.

Every rule is handed values and gives a `Finding`. The bounds stand here, once, and are published in
the documentation of ``/health/detailed``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

from attrs import frozen

HIGH_MEMORY_PERCENT: Final = 85.0
FULL_STORE_SHARE: Final = 0.9
FULL_QUEUE_SHARE: Final = 0.8
# A loop that is this late makes a keypress feel late: people notice about 100 ms.
SLOW_LOOP_MS: Final = 250.0
# A percentage alone would cry over terabytes, a number of bytes alone over small volumes.
LOW_DISK_SHARE: Final = 0.05
LOW_DISK_BYTES: Final = 5 << 30
LEAST_DISK_BYTES: Final = 256 << 20
# The checker looks around every second or so; what is far beyond that is stuck.
LATE_CHECKER_SECONDS: Final = 30.0


class Status(StrEnum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


_SEVERITY: Final = {Status.HEALTHY: 0, Status.DEGRADED: 1, Status.UNHEALTHY: 2}


@frozen
class Finding:
    """How something is; *why* is for people, None if it is healthy."""

    status: Status
    why: str | None = None


FINE: Final = Finding(Status.HEALTHY)


def worst(findings: Iterable[Finding]) -> Finding:
    """The first of the most severe findings; `FINE` if there are none."""
    return max(findings, key=lambda finding: _SEVERITY[finding.status], default=FINE)


def database(trouble: str | None, used_bytes: int | None, max_bytes: int) -> Finding:
    """*trouble*: what the store could not do last, None if it can. *used_bytes*: None if not known."""
    if trouble is not None:
        return Finding(Status.UNHEALTHY, trouble)
    if used_bytes is not None and used_bytes >= FULL_STORE_SHARE * max_bytes:
        share = 100 * used_bytes / max_bytes
        return Finding(Status.DEGRADED, f"the store is {share:.0f} % full: raise MAX_STORE_BYTES or lower retention")
    return FINE


def dispatcher(queued: int, capacity: int) -> Finding:
    """*queued* transactions wait to be stored; beyond *capacity* publishing is refused."""
    if queued >= FULL_QUEUE_SHARE * capacity:
        return Finding(Status.DEGRADED, f"{queued} of at most {capacity} changes wait to be stored")
    return FINE


def health_checker(seconds_since_round: float) -> Finding:
    """*seconds_since_round*: since it last looked at all connections."""
    if seconds_since_round > LATE_CHECKER_SECONDS:
        return Finding(Status.DEGRADED, f"it last looked at the connections {seconds_since_round:.0f} s ago")
    return FINE


def memory(percent: float) -> Finding:
    """*percent* of the machine's memory, or of what the container may have, that is in use."""
    if percent > HIGH_MEMORY_PERCENT:
        return Finding(Status.DEGRADED, f"High memory usage: {percent:.0f} %")
    return FINE


def event_loop(lag_ms: float) -> Finding:
    """*lag_ms*: how late the loop woke a task lately."""
    if lag_ms > SLOW_LOOP_MS:
        return Finding(Status.DEGRADED, f"the event loop was {lag_ms:.0f} ms late: something keeps the processor busy")
    return FINE


def disk(free_bytes: int, total_bytes: int) -> Finding:
    """Of the volume that holds the store."""
    share = free_bytes / total_bytes if total_bytes else 0.0
    if free_bytes < LEAST_DISK_BYTES or (share < LOW_DISK_SHARE and free_bytes < LOW_DISK_BYTES):
        return Finding(Status.DEGRADED, f"only {free_bytes >> 20} MiB ({100 * share:.1f} %) are free on the disk")
    return FINE


def leaks(count: int) -> Finding:
    """*count* things of what is over are left: harmless one by one, but it is a bug, and they gather."""
    return Finding(Status.DEGRADED, f"{count} leaks: /monitoring/tasks names them") if count else FINE


def connections(healthy: int, unhealthy: int) -> Status:
    """All connections taken together: one bad client does not make the server bad."""
    if unhealthy == 0:
        return Status.HEALTHY
    return Status.DEGRADED if healthy >= unhealthy else Status.UNHEALTHY


def player(connections: Sequence[bool]) -> Status:
    """*connections*: of each of a player's connections, whether it is healthy.

    One that works is enough to play, so the player is unhealthy only if there is none.
    """
    if not any(connections):
        return Status.UNHEALTHY
    return Status.HEALTHY if all(connections) else Status.DEGRADED


def percentage(part: int, whole: int) -> float:
    """*part* of *whole* in percent; 100 if there is nothing, since then nothing is wrong."""
    return round(100 * part / whole, 2) if whole else 100.0
