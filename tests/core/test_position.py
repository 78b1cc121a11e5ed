"""Positions, epochs and gaps; the rules of gaps are held against a store small enough to be seen through."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.errors import ErrorType, Refusal
from mythos_trio.core.position import (
    MAX_SEQ,
    Epoch,
    Epochs,
    Gap,
    Interval,
    Position,
    Resume,
    lost_after,
    parse_position,
    resume_from,
)


@given(st.integers(0, MAX_SEQ), st.integers(0, MAX_SEQ))
def test_what_is_written_is_read(epoch: int, seq: int) -> None:
    assert parse_position(str(Position(epoch, seq))) == Position(epoch, seq)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "1",
        "1-",
        "-1",
        "1-2-3",
        " 1-2",
        "1-2 ",
        "1-2\n",
        "+1-2",
        "1-+2",
        "1.0-2",
        "٣-٤",
        "a-b",
        f"1-{2**53}",
        f"{2**53}-1",
    ],
)
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse_position(text)
    assert (caught.value.error_type, caught.value.status) == (ErrorType.VALIDATION, 400)


# Where a connection starts.

ONE = Epochs([Epoch(1, 1)])
# The third epoch is of a copy that was restored: it began lower than the second.
THREE = Epochs([Epoch(1, 1), Epoch(2, 100), Epoch(3, 60)])


def test_a_position_of_the_present_is_where_it_says() -> None:
    assert resume_from(Position(1, 7), newest=9, seen=3, epochs=ONE) == Resume(7)
    assert resume_from(Position(1, 9), newest=9, seen=3, epochs=ONE) == Resume(9)
    assert resume_from(Position(1, 0), newest=9, seen=3, epochs=ONE) == Resume(0)


@pytest.mark.parametrize("named", [Position(1, 10), Position(2, 1), Position(9, 9)])
def test_a_position_of_the_future_goes_on_after_seen(named: Position) -> None:
    expected = Resume(3, Gap(named, Position(1, 3), "future"))
    assert resume_from(named, newest=9, seen=3, epochs=ONE) == expected


@pytest.mark.parametrize(
    ("named", "after", "shared"),
    [
        (Position(1, 40), 40, 59),
        (Position(1, 59), 59, 59),
        (Position(1, 80), 59, 59),  # the third epoch gives out 60 and more again
        (Position(1, 5000), 59, 59),
        (Position(2, 120), 59, 59),
        (Position(0, 7), 0, 0),  # older than everything: nothing is shared
    ],
)
def test_a_position_of_an_older_epoch_goes_on_where_both_are_the_same(named: Position, after: int, shared: int) -> None:
    resume = resume_from(named, newest=200, seen=150, epochs=THREE)
    assert resume == Resume(after, Gap(named, Position(3, after), "epoch", shared))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=5), st.integers(0, 6), st.integers(0, 150), st.data())
def test_a_client_never_gets_a_number_twice_across_epochs(
    lengths: list[int], which: int, seq: int, data: st.DataObject
) -> None:
    """A store that loses its end, or is restored from a copy, and goes on: what comes after the position
    is new to the client, or of a number that it was told to forget."""
    epochs, history, newest = [Epoch(1, 1)], [list(range(1, lengths[0] + 1))], lengths[0]
    for number, length in enumerate(lengths[1:], 2):
        kept = data.draw(st.integers(0, newest))
        epochs.append(Epoch(number, kept + 1))
        history.append(list(range(kept + 1, kept + 1 + length)))
        newest = kept + length
    named = Position(min(which + 1, len(epochs)), seq)
    resume = resume_from(named, newest=newest, seen=0, epochs=Epochs(epochs))
    if named.epoch == len(epochs):
        return
    assert resume.gap is not None
    assert resume.gap.shared is not None
    # Up to `shared` nobody has given a number out again since.
    given_again = [s for numbers in history[named.epoch :] for s in numbers]
    assert resume.gap.shared < min(given_again)
    assert resume.after == min(seq, resume.gap.shared)


# What retention has taken.


@define
class SmallStore:
    """One channel, one session that comes and goes, and a retention that takes the oldest."""

    seq: int = 0
    held: list[int] = field(factory=list)
    taken: list[int] = field(factory=list)
    intervals: list[Interval] = field(factory=list)

    @property
    def removed(self) -> int:
        return max(self.taken, default=0)

    def publish(self) -> None:
        self.seq += 1
        self.held.append(self.seq)

    def other(self) -> None:
        """Somebody else's number."""
        self.seq += 1

    def subscribe(self) -> None:
        if not self.intervals or self.intervals[-1].end is not None:
            self.seq += 1
            self.intervals.append(Interval("#c", self.seq))

    def leave(self) -> None:
        if self.intervals and self.intervals[-1].end is None:
            self.seq += 1
            start = self.intervals[-1].start
            newest = max((s for s in self.held if s > start), default=self.removed)
            self.intervals[-1] = Interval("#c", start, self.seq, newest)

    def retain(self) -> None:
        if self.held:
            self.taken.append(self.held.pop(0))

    def truly_lost(self, after: int) -> int:
        return max(
            (s for s in self.taken if s > after and any(interval.covers(s) for interval in self.intervals)),
            default=0,
        )


@given(st.lists(st.sampled_from(["publish", "other", "subscribe", "leave", "retain"]), max_size=60))
def test_a_gap_is_told_if_and_only_if_something_of_the_session_is_gone(steps: Sequence[str]) -> None:
    store = SmallStore()
    for step in steps:
        getattr(store, step)()
    intervals = [(interval, store.removed) for interval in store.intervals]
    for after in range(store.seq + 2):
        assert lost_after(intervals, after) == store.truly_lost(after)


def test_the_players_own_mail_is_an_interval_from_the_beginning() -> None:
    mail = Interval("@ann", 0)
    assert mail.covers(1)
    assert lost_after([(mail, 0)], 0) == 0
    assert lost_after([(mail, 5)], 4) == 5
    assert lost_after([(mail, 5)], 5) == 0
