"""Rates: token buckets (contract, section 7), a burst of *count*, refilled over *seconds*; and how clients that were
sent away by a restart come back."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

# A restart takes about this long; who comes back sooner finds nobody, or waits in the kernel's queue, and all of these
# would then be let in at once.
FIRST_RETURN_MS: Final = 1000
# Half of the connections a second that one processor lets in, so that the other half is left for those who play.
RETURNS_A_SECOND: Final = 500
# How much longer than the first an EventSource may wait after a crash.
LONGEST_SPREAD_MS: Final = 4000


def return_ms(place: float) -> int:
    """When a client comes back after a restart, in milliseconds from now (``retry_ms``).

    Each has a place in the queue of those that were sent away: 0, 1, 2, …, plus a random part below 1. So they come
    back evenly, over a time that grows with their number, and not all at once.
    """
    return FIRST_RETURN_MS + int(place * 1000 / RETURNS_A_SECOND)


def cut_off_ms(others: int, jitter: float) -> int:
    """When an EventSource comes back that is cut off without a last word, in milliseconds (``retry:`` of ``welcome``).

    Browsers add no jitter of their own, so after a crash all of them would come back in the same moment. But a single
    one whose cable was pulled must not wait for a thousand others that are well: hence the bound.

    :param others: how many connections there are beside it.
    :param jitter: from 0 to 1, of this connection.
    """
    return FIRST_RETURN_MS + int(jitter * min(others * 1000 / RETURNS_A_SECOND, LONGEST_SPREAD_MS))


# What rounding may cost: a thousandth of one.
_SLACK: Final = 1e-3


class Bucket:
    """What it holds is kept as the moment at which it will be full again: one number, which a refusal leaves alone."""

    __slots__ = ("_each", "_full_at", "_seconds")

    def __init__(self, count: int, seconds: float) -> None:
        self._seconds = seconds
        self._each = seconds / count
        self._full_at = 0.0

    def take(self, now: float, wanted: int = 1) -> float:
        """Take *wanted*; 0 if there were as many, else the seconds after which there will be."""
        full_at = self._full_at
        if full_at < now:
            full_at = now
        full_at += wanted * self._each
        wait = full_at - now - self._seconds
        if wait > _SLACK * self._each:
            return wait
        self._full_at = full_at
        return 0.0


class Buckets:
    """One bucket a key; the keys asked longest ago are forgotten beyond *max_keys*, which can only
    give them a fresh burst."""

    def __init__(self, count: int, seconds: float, *, max_keys: int = 100_000) -> None:
        self._count = count
        self._seconds = seconds
        self._max_keys = max_keys
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def of(self, key: str) -> Bucket:
        """*key*'s bucket, to keep at hand: that spares asking each time."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._count, self._seconds)
            if len(self._buckets) > self._max_keys:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        return bucket

    def take(self, key: str, now: float, wanted: int = 1) -> float:
        """Take *wanted* of *key*'s; 0 if there were as many, else the seconds after which there will be."""
        return self.of(key).take(now, wanted)
