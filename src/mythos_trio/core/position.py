"""Positions in the store's order, epochs, and what a named position means (contract, section 4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from attrs import frozen

from mythos_trio.core.errors import ErrorType, Refusal

# JavaScript clients hold a seq in a double.
MAX_SEQ: Final = 2**53 - 1

_POSITION: Final = re.compile(r"([0-9]{1,16})-([0-9]{1,16})", re.ASCII)


@frozen(order=True)
class Position:
    """A place in the store's order: everything up to *seq* lies before it."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"


def parse_position(text: str) -> Position:
    """The position that *text* writes, else a 400 refusal."""
    match = _POSITION.fullmatch(text)
    if match:
        position = Position(int(match[1]), int(match[2]))
        if position.seq <= MAX_SEQ and position.epoch <= MAX_SEQ:
            return position
    raise Refusal(
        ErrorType.VALIDATION,
        f"{text[:40]!r} is not a position: EPOCH-SEQ, two whole numbers",
        status=400,
        details={"field": "position"},
    )


@frozen
class Epoch:
    """A life of the store: *first* is the first number that can belong to it."""

    number: int
    first: int


@frozen
class Epochs:
    """All lives of the store, oldest first; the last one is the present."""

    all: Sequence[Epoch]

    @property
    def present(self) -> int:
        return self.all[-1].number

    def shared_with(self, epoch: int) -> int:
        """The last number that *epoch* and the present surely have in common.

        It is the one before the lowest start of any later epoch: a copy that was restored may have
        begun its epoch lower than the one before it.
        """
        return min(e.first for e in self.all if e.number > epoch) - 1


@frozen
class Resume:
    """Where a connection starts, and the gap to tell first, if any."""

    after: int
    gap: Gap | None = None


@frozen
class Gap:
    """A position that cannot be replayed from. What was lost lies after *after*; the stream goes on
    after *position*."""

    after: Position
    position: Position
    reason: str
    shared: int | None = None


def resume_from(named: Position, *, newest: int, seen: int, epochs: Epochs) -> Resume:
    """What a client that names *named* gets: the contract's ``epoch`` and ``future`` gaps.

    :param newest: the newest number that has been given out.
    :param seen: the session's mark.
    """
    present = epochs.present
    if named.epoch > present or (named.epoch == present and named.seq > newest):
        return Resume(seen, Gap(named, Position(present, seen), "future"))
    if named.epoch < present:
        shared = epochs.shared_with(named.epoch)
        after = min(named.seq, shared)
        return Resume(after, Gap(named, Position(present, after), "epoch", shared))
    return Resume(named.seq)


@frozen
class Interval:
    """Where a session's stream reads a target: numbers above *start*, below *end* if it is closed.

    *last* is a closed interval's newest message that the store held when it was closed, or what
    retention had removed of the channel by then if that is larger.
    """

    target: str
    start: int
    end: int | None = None
    last: int = 0

    def covers(self, seq: int) -> bool:
        return self.start < seq and (self.end is None or seq < self.end)

    def lost(self, removed: int) -> int:
        """The newest number of this interval that retention has surely taken; 0 if none.

        Contract, section 4: x is ``removed``, for a closed interval the smaller of ``removed`` and
        ``last``. It counts if it is above *start*: a player's mail starts above the mark of the session
        before, which is often a message's number, and that message is not of this session.
        """
        x = removed if self.end is None else min(removed, self.last)
        return x if x > self.start else 0


def lost_after(intervals: Sequence[tuple[Interval, int]], after: int) -> int:
    """The newest number that a session has lost after *after*; 0 if it has lost nothing there.

    :param intervals: each with its target's ``removed``, the newest number that retention took.
    """
    lost = max((interval.lost(removed) for interval, removed in intervals), default=0)
    return lost if lost > after else 0
