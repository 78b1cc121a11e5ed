"""A session's log in memory: the newest part of its stream, read by all its connections.

A connection is a cursor on the log, not a queue: nothing is stored per receiver. The log is bounded
in messages and bytes; what falls out is still in the store, and a connection that is further behind
than the log reaches reads it there (`Log.floor` says from where on the log is enough).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Final

from mythos_trio.core.wire import Message

MAX_MESSAGES: Final = 1000
MAX_BYTES: Final = 1 << 20
# The entries of all logs that are empty: a deque takes 760 bytes.
_NONE: Final[deque[Message]] = deque()


class Log:
    """All of a session's messages with numbers above *floor*, up to the newest applied one."""

    __slots__ = ("_bytes", "_entries", "_first", "_max_bytes", "_max_messages", "floor", "head", "newest")

    def __init__(self, floor: int, *, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES) -> None:
        self.floor = floor
        self._entries = _NONE
        self._first = 0  # the index of the oldest entry; indices are never used again
        self._bytes = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self.head = 0
        """The index that the next message will have."""
        self.newest: Message | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Of the messages' bodies."""
        return self._bytes

    def append(self, message: Message) -> None:
        """Add the newest message; the oldest fall out where a bound is passed."""
        if self._entries is _NONE:
            self._entries = deque()
        self._entries.append(message)
        self.newest = message
        self.head += 1
        self._bytes += len(message.body)
        while self.head - self._first > self._max_messages or (self._bytes > self._max_bytes and len(self) > 1):
            oldest = self._entries.popleft()
            self._first += 1
            self._bytes -= len(oldest.body)
            self.floor = oldest.seq

    def locate(self, seq: int) -> int | None:
        """The index of the first message after *seq*; None if the log does not reach back so far."""
        if seq < self.floor:
            return None
        index = self.head
        for message in reversed(self._entries):
            if message.seq <= seq:
                break
            index -= 1
        return index

    def holds(self, index: int) -> bool:
        """Whether a cursor at *index* can read on from here."""
        return index >= self._first

    def read(self, index: int, max_bytes: int) -> list[Message]:
        """The messages from *index* on, at most *max_bytes* of bodies, but one at least."""
        size = 0
        messages: list[Message] = []
        if index == self.head - 1:
            return [self._entries[-1]]
        for message in islice(self._entries, index - self._first, None):
            size += len(message.body)
            if messages and size > max_bytes:
                break
            messages.append(message)
        return messages

    def after(self, index: int) -> Iterator[Message]:
        """All messages from *index* on. Nothing may be appended while they are gone through."""
        return islice(self._entries, index - self._first, None)
