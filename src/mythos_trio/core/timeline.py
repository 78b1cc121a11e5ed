"""When a mark passed a number: a bounded record of (number, time).

Marks only grow, so the times of all numbers between two moves are one. The newest moves are exact. When the record
is full two neighbours of the older half become one: a number in it is then known to have been passed in a span of time.
So the whole past is covered, in bounded room (32 bytes a move), the less exactly the older it is.
"""

from __future__ import annotations

from array import array
from typing import Final

_WIDTH: Final = 4  # above, up to, first, last


class Timeline:
    """At most *most* spans of numbers, each with the span of time in which they were passed.

    Numbers are below 2^53, so they are exact as floats. Times are whatever the caller gives; they should not go back.
    """

    __slots__ = ("_most", "_spans")

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._spans: array[float] | None = None  # most marks never move: then there is nothing to hold

    def __len__(self) -> int:
        return 0 if self._spans is None else len(self._spans) // _WIDTH

    def add(self, above: int, upto: int, now: float) -> None:
        """The numbers above *above* up to *upto*, which are larger than those before, were passed *now*."""
        spans = self._spans
        if spans is None:
            spans = self._spans = array("d")
        spans.extend((above, upto, now, now))
        if len(spans) > _WIDTH * self._most:
            self._merge(spans)

    def _merge(self, spans: array[float]) -> None:
        """Make one of each two neighbours of the older half."""
        half = self._most // 2 // 2 * 2
        merged = array("d")
        for at in range(0, half * _WIDTH, 2 * _WIDTH):
            merged.extend((spans[at], spans[at + 5], spans[at + 2], spans[at + 7]))
        self._spans = merged + spans[half * _WIDTH :]

    def when(self, number: int) -> tuple[float, float] | None:
        """The first and the last moment at which *number* may have been passed; None if that is not known."""
        spans = self._spans
        if spans is None:
            return None
        low, high = 0, len(spans) // _WIDTH
        while low < high:
            middle = (low + high) // 2
            if spans[middle * _WIDTH + 1] < number:
                low = middle + 1
            else:
                high = middle
        at = low * _WIDTH
        if at == len(spans) or number <= spans[at]:
            return None
        return spans[at + 2], spans[at + 3]
