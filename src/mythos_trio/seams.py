"""Where the outside comes in: the wall clock and randomness.

Monotonic time is always `trio.current_time`, which tests replace by a virtual clock. Sockets have
their seam in `mythos_trio.net`, the store's threads in `mythos_trio.storage`.
"""

from __future__ import annotations

import math
import os
import random
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, Protocol

TOKEN_BYTES: Final = 16
FETCHED_BYTES: Final = 256 * TOKEN_BYTES


class Clock(Protocol):
    """The wall clock. It may jump: nothing but what people read depends on it."""

    def now(self) -> float:
        """POSIX seconds."""
        ...


class Randomness(Protocol):
    """Ids and jitter."""

    def token(self) -> str:
        """128 random bits as 32 hexadecimal digits."""
        ...

    def message_id(self) -> str:
        """32 hexadecimal digits, of which the first 12 are the time in milliseconds.

        So ids grow, and the index of stored ids grows at its end: 90,000 messages a second instead of
        45,000 with random ones (SQLite, batches of 100, 200,000 stored). As UUID version 7 (RFC 9562).
        """
        ...

    def uniform(self, low: float, high: float) -> float: ...


class SystemClock:
    def now(self) -> float:
        return time.time()


class SystemRandomness:
    def __init__(self) -> None:
        self._bytes = b""
        self._taken = 0

    def token(self) -> str:
        # The system's own bytes, fetched so many at once: each call of its lets go of the interpreter, which costs
        # more than the bytes when other threads are waiting for it.
        if self._taken == len(self._bytes):
            self._bytes, self._taken = os.urandom(FETCHED_BYTES), 0
        self._taken += TOKEN_BYTES
        return self._bytes[self._taken - TOKEN_BYTES : self._taken].hex()

    def message_id(self) -> str:
        return f"{time.time_ns() // 1_000_000:012x}{random.getrandbits(80):020x}"

    def uniform(self, low: float, high: float) -> float:
        return random.uniform(low, high)


class SeededRandomness:
    """The same ids in every run with the same seed: for simulations."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._count = 0

    def token(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    def message_id(self) -> str:
        self._count += 1
        return f"{self._count:012x}{self._random.getrandbits(80):020x}"

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


# Looked up: to format a number with leading zeros was half of what a time costs.
_MILLIS: Final = [f".{millis:03d}Z" for millis in range(1000)]


def rfc3339(posix: float) -> str:
    """*posix* seconds as RFC 3339, UTC, milliseconds, ``Z``."""
    whole = math.floor(posix)
    millis = round((posix - whole) * 1_000_000) // 1000
    return _second(whole) + _MILLIS[millis] if millis < 1000 else _second(whole + 1) + _MILLIS[0]


@lru_cache(4)
def _second(posix: int) -> str:
    """Each line of the log and each message has the time: its seconds are the same for thousands of them."""
    return datetime.fromtimestamp(posix, UTC).isoformat(timespec="seconds").removesuffix("+00:00")
