"""A session's log: its bounds, and cursors that read on from where they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.log import Log
from mythos_trio.core.wire import Message


def message(seq: int, size: int = 10) -> Message:
    return Message(seq, f"m{seq}", "@ann", b"x" * size)


def filled(*seqs: int, floor: int = 0, **bounds: int) -> Log:
    log = Log(floor, **bounds)
    for seq in seqs:
        log.append(message(seq))
    return log


def seqs_after(log: Log, seq: int) -> list[int]:
    index = log.locate(seq)
    assert index is not None
    return [m.seq for m in log.read(index, 1 << 20)] if index < log.head else []


def test_a_cursor_is_found_between_numbers() -> None:
    log = filled(3, 7, 9, floor=2)
    assert seqs_after(log, 2) == [3, 7, 9]
    assert seqs_after(log, 3) == seqs_after(log, 6) == [7, 9]
    assert seqs_after(log, 9) == seqs_after(log, 1000) == []
    assert log.locate(1) is None


def test_an_empty_log_reaches_back_to_its_floor() -> None:
    log = Log(5)
    assert log.locate(5) == log.head == 0
    assert log.locate(4) is None


@pytest.mark.parametrize("bounds", [{"max_messages": 2}, {"max_bytes": 25}])
def test_beyond_a_bound_the_oldest_fall_out(bounds: dict[str, int]) -> None:
    log = filled(3, 7, 9, floor=2, **bounds)
    assert len(log) == 2
    assert log.floor == 3
    assert log.locate(2) is None
    assert seqs_after(log, 3) == [7, 9]


def test_the_newest_stays_however_big_it_is() -> None:
    log = Log(0, max_bytes=5)
    log.append(message(1, 100))
    assert seqs_after(log, 0) == [1]


def test_a_cursor_that_fell_out_is_no_longer_held() -> None:
    log = filled(1, 2, max_messages=2)
    index = log.locate(0)
    assert index is not None
    assert log.holds(index)
    log.append(message(3))
    assert not log.holds(index)
    assert log.holds(index + 1)


def test_a_read_is_bounded_in_bytes_but_never_empty() -> None:
    log = Log(0)
    for seq, size in ((1, 100), (2, 10), (3, 10)):
        log.append(message(seq, size))
    assert [m.seq for m in log.read(0, 50)] == [1]
    assert [m.seq for m in log.read(1, 15)] == [2]
    assert [m.seq for m in log.read(1, 20)] == [2, 3]
    assert [m.seq for m in log.read(2, 1)] == [3]


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), max_size=40),
    st.integers(1, 6),
    st.integers(1, 100),
    st.integers(1, 60),
)
def test_reading_on_from_anywhere_gives_all_that_is_held(
    steps: list[tuple[int, int]], max_messages: int, max_bytes: int, chunk: int
) -> None:
    log, seq, held = Log(0, max_messages=max_messages, max_bytes=max_bytes), 0, []
    for gap, size in steps:
        seq += gap
        log.append(message(seq, size))
        held.append(seq)
    assert 1 <= len(log) <= max_messages or not steps
    for start in range(seq + 2):
        index = log.locate(start)
        if start < log.floor:
            assert index is None
            continue
        assert index is not None
        assert [m.seq for m in log.after(index)] == [s for s in held if s > start]
        read = []
        while index < log.head:
            messages = log.read(index, chunk)
            assert messages
            read += [m.seq for m in messages]
            index += len(messages)
        assert read == [s for s in held if s > start]
