"""A session's log: its bounds, and cursors that read on from where they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.log import Log, Topic
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


# What is said to many.


def test_a_log_takes_over_what_its_topics_have_said_in_the_order_of_the_numbers() -> None:
    room, everyone, log = Topic(), Topic(), Log(2)
    room.append(message(1))
    log.hear(room)
    log.hear(everyone)
    for seq, topic in ((3, room), (4, everyone), (6, room)):
        topic.append(message(seq))
    log.append(message(7))
    everyone.append(message(8))
    assert seqs_after(log, 2) == [3, 4, 6, 7], "what has been said before it listened is not its own"
    log.pull()
    assert seqs_after(log, 2) == [3, 4, 6, 7, 8]


def test_who_stops_hearing_keeps_what_was_said_until_then() -> None:
    room, log = Topic(), Log(0)
    log.hear(room)
    room.append(message(1))
    log.stop_hearing(room)
    room.append(message(2))
    log.append(message(3))
    assert seqs_after(log, 0) == [1, 3]


def test_what_fell_out_of_a_topic_leaves_no_hole() -> None:
    room, everyone, log = Topic(max_messages=2), Topic(), Log(0)
    log.hear(room)
    log.hear(everyone)
    log.append(message(1))
    everyone.append(message(2))
    for seq in (3, 4, 5):
        room.append(message(seq))
    everyone.append(message(6))
    log.pull()
    assert (log.floor, log.head, log.locate(2)) == (3, 6, None), "all are counted, and none is passed over in silence"
    assert seqs_after(log, 3) == [4, 5, 6]
    assert log.number_before(log.head) == 6
    assert log.number_before(3) == log.floor


@given(
    st.lists(st.sampled_from(["room", "everyone", "own", "pull"]), max_size=60),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_a_log_that_is_pulled_now_and_then_is_the_end_of_the_stream(steps: list[str], held: int, kept: int) -> None:
    topics = {"room": Topic(max_messages=held), "everyone": Topic(max_bytes=held * 10)}
    log, said = Log(0, max_messages=kept), list[int]()
    for topic in topics.values():
        log.hear(topic)
    for seq, step in enumerate(steps, 1):
        if step == "pull":
            log.pull()
        else:
            said.append(seq)
            topics.get(step, log).append(message(seq))
    log.pull()
    assert log.head == len(said)
    assert seqs_after(log, log.floor) == [seq for seq in said if seq > log.floor]
    assert len(log) <= kept
