"""What a connection that is behind is written next, and which messages are skipped on it.

A message with a ``replace_key`` (a health bar) says: of two such messages only the newer one matters. It
is the one way in which a message may be skipped, and the rule is narrow:

* only on a connection that is behind: its socket was full, or it has come back for what it missed;
* only if a newer message with the same target and the same ``replace_key`` is in the *same write*.
  That one then says how many it stands for (``"replaces": n``).

Because both are in one write there is no moment at which the old message has been passed and the new one
is still to come: every position that is named between two writes (by a heartbeat, a reply, a ping) is
true, and a reply never overtakes what its command has changed. If the link breaks within the write, the
client names the last message that has come, and all after it comes again: the newer one, or one newer still.

The keys of two targets are two keys: a monster's ``hp`` in a room and a player's own have nothing to
do with each other.

A write is bounded by the bytes that are *kept*, so a long backlog of one health bar is one message. The
work is bounded by what is at hand: a session's log, or a chunk from the store.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

from attrs import define, frozen

from mythos_trio.core.wire import Message

# Of bodies, in one write to a connection: a client that does not read holds up no more than this.
CHUNK_BYTES: Final = 65536
# 8 KiB for a connection that is behind again and again, nothing for all others.
KEPT: Final = 512


@frozen
class Skipped:
    """The message *seq* was not written: the message *by* stands in for it."""

    seq: int
    by: int


@frozen
class Batch:
    """What goes out in one write: *messages*, in order, of the next *count* messages of the stream."""

    messages: Sequence[Message]
    count: int
    skipped: Sequence[Skipped] = ()

    def replaces(self) -> dict[int, int]:
        """How many others each message stands in for, by number; those that stand for none are absent."""
        counts: dict[int, int] = {}
        for skipped in self.skipped:
            counts[skipped.by] = counts.get(skipped.by, 0) + 1
        return counts


def next_batch(messages: Iterable[Message], max_bytes: int) -> Batch:
    """The next write of a connection that is behind.

    :param messages: what comes next, in order: at least one.
    :param max_bytes: of the bodies that are kept. The first message is taken whatever its size.
    """
    kept: dict[int, Message] = {}
    newest: dict[tuple[str, str], int] = {}
    replaced: list[tuple[int, tuple[str, str]]] = []
    size = count = 0
    for message in messages:
        key = message.key
        older = None if key is None else newest.get(key)
        size += len(message.body) - (0 if older is None else len(kept[older].body))
        if count and size > max_bytes:
            break
        if key is not None:
            if older is not None:
                del kept[older]
                replaced.append((older, key))
            newest[key] = message.seq
        kept[message.seq] = message
        count += 1
    skipped = tuple(Skipped(seq, newest[key]) for seq, key in sorted(replaced))
    return Batch(list(kept.values()), count, skipped)


@define
class Replaced:
    """What was skipped on one connection: all of it counted, the newest `KEPT` known by number."""

    count: int = 0
    forgotten: int = 0
    """It cannot be said any more which messages up to this number were skipped."""
    # Nearly always nothing is skipped.
    _seqs: array[int] | None = None
    _by: array[int] | None = None

    def note(self, skipped: Sequence[Skipped]) -> None:
        """*skipped*: newer than all before, in order."""
        self.count += len(skipped)
        if self._seqs is None or self._by is None:
            self._seqs, self._by = array("q"), array("q")
        self._seqs.extend(one.seq for one in skipped)
        self._by.extend(one.by for one in skipped)
        extra = len(self._seqs) - KEPT
        if extra > 0:
            self.forgotten = self._seqs[extra - 1]
            del self._seqs[:extra]
            del self._by[:extra]

    def by(self, seq: int) -> int | None:
        """The number of the message that stood in for *seq*; None if it was not skipped, as far as is known."""
        if self._seqs is None or self._by is None:
            return None
        index = bisect_left(self._seqs, seq)
        return self._by[index] if index < len(self._seqs) and self._seqs[index] == seq else None
