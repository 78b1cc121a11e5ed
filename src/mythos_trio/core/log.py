"""What of the streams is held in memory: a log for each session, filled from topics that all sessions share.

A connection is a cursor on its session's log, not a queue: nothing is stored per receiver. The log is bounded
in messages and bytes; what falls out is still in the store, and a connection that is further behind
than the log reaches reads it there (`Log.floor` says from where on the log is enough).

What is said to a channel, or to everybody, is held once, in a `Topic`. The logs take it over only when somebody
looks into them (`Log.pull`), and nobody does while all connections keep up: so a message to thousands is not
handed to thousands of logs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from operator import attrgetter
from typing import Final

from mythos_trio.core.wire import Message

MAX_MESSAGES: Final = 1000
MAX_BYTES: Final = 1 << 20
# The entries of all logs that are empty: a deque takes 760 bytes.
_NONE: Final[deque[Message]] = deque()
_BY_NUMBER: Final = attrgetter("seq")


class Topic:
    """The newest messages to one target that many sessions hear: at most *max_messages*, *max_bytes* of bodies."""

    __slots__ = ("_bytes", "_held", "_max_bytes", "_max_messages", "floor", "total")

    def __init__(self, *, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES) -> None:
        self.floor = 0
        """The newest number that has fallen out."""
        self.total = 0
        """How many there have been, with those that have fallen out."""
        self._held: deque[Message] = deque()
        self._bytes = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes

    def append(self, message: Message) -> None:
        self._held.append(message)
        self.total += 1
        self._bytes += len(message.body)
        while len(self._held) > self._max_messages or (self._bytes > self._max_bytes and len(self._held) > 1):
            oldest = self._held.popleft()
            self._bytes -= len(oldest.body)
            self.floor = oldest.seq

    def last(self, count: int) -> list[Message]:
        """The newest *count* messages, in order; fewer if the others have fallen out."""
        return list(islice(self._held, max(0, len(self._held) - count), None))


class Log:
    """All of a session's messages with numbers above *floor*, up to the newest applied one.

    What its topics (`hear`) have said since is in it after `pull`.
    """

    __slots__ = ("_bytes", "_entries", "_first", "_heard", "_max_bytes", "_max_messages", "floor", "head")

    def __init__(self, floor: int, *, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES) -> None:
        self.floor = floor
        self._entries = _NONE
        self._first = 0  # the index of the oldest entry; indices are never used again
        self._bytes = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        # Each topic's `total` when it was pulled last.
        self._heard: dict[Topic, int] = {}
        self.head = 0
        """The index that the next message will have."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Of the messages' bodies."""
        return self._bytes

    @property
    def total(self) -> int:
        """How many messages there have been since the log began, with those that `pull` would take over."""
        total = self.head
        for topic, known in self._heard.items():
            total += topic.total - known
        return total

    # Topics.

    def hear(self, topic: Topic) -> None:
        """From now on what is said on *topic* belongs to the log."""
        self.pull()
        self._heard[topic] = topic.total

    def stop_hearing(self, topic: Topic) -> None:
        """What has been said on *topic* so far stays in the log."""
        self.pull()
        self._heard.pop(topic, None)

    def pull(self) -> None:
        """Take over what the topics have said since the last time."""
        heard = self._heard
        for topic, known in heard.items():
            if topic.total != known:
                break
        else:
            return  # as nearly always
        news = [(topic, topic.total - known) for topic, known in heard.items() if topic.total != known]
        for topic, _ in news:
            heard[topic] = topic.total
        fresh = [message for topic, count in news for message in topic.last(count)]
        if len(news) > 1:
            fresh.sort(key=_BY_NUMBER)
        missed = sum(count for _, count in news) - len(fresh)
        if missed:
            self._leap(missed, max(topic.floor for topic, count in news if len(topic.last(count)) < count))
        for message in fresh:
            self._add(message)

    def _leap(self, missed: int, floor: int) -> None:
        """*missed* messages, the newest of which is *floor*, have fallen out of a topic before they were pulled:
        all that is older than they are has to go too, since a log has no holes."""
        self.head += missed
        self._first = self.head
        self._entries = _NONE
        self._bytes = 0
        self.floor = floor

    # Messages.

    def append(self, message: Message) -> None:
        """Add the newest message, behind all that the topics have said."""
        self.pull()
        self._add(message)

    def _add(self, message: Message) -> None:
        """The oldest fall out where a bound is passed."""
        if message.seq <= self.floor:
            # Of another topic than the one that has leapt over it.
            self.head += 1
            self._first += 1
            return
        if self._entries is _NONE:
            self._entries = deque()
        self._entries.append(message)
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

    def number_before(self, index: int) -> int:
        """The number of the message before *index*, or, if that has fallen out, the floor."""
        return self._entries[index - 1 - self._first].seq if index > self._first else self.floor

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
