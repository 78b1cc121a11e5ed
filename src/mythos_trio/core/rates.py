"""Rates: token buckets (contract, section 7), a burst of *count*, refilled over *seconds*; and how clients that were
sent away by a restart come back."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from attrs import define

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


@define
class Bucket:
    left: float
    at: float

    def take(self, now: float, count: int, seconds: float, wanted: int = 1) -> float:
        """Take *wanted*; 0 if there were as many, else the seconds after which there will be."""
        left = self.left + (now - self.at) * count / seconds
        if left > count:
            left = count
        self.at = now
        if left >= wanted:
            self.left = left - wanted
            return 0.0
        self.left = left
        return (wanted - left) * seconds / count


class Buckets:
    """One bucket a key; the keys asked longest ago are forgotten beyond *max_keys*, which can only
    give them a fresh burst."""

    def __init__(self, count: int, seconds: float, *, max_keys: int = 100_000) -> None:
        self._count = count
        self._seconds = seconds
        self._max_keys = max_keys
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, key: str, now: float, wanted: int = 1) -> float:
        """Take *wanted* of *key*'s; 0 if there were as many, else the seconds after which there will be."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._count, now)
            if len(self._buckets) > self._max_keys:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        return bucket.take(now, self._count, self._seconds, wanted)
