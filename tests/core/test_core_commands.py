"""The queue and the answers of one session."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from mythos_trio.core.commands import (
    MAX_ASKERS,
    MAX_WAITING,
    Commands,
    Entry,
    Remembered,
    digest_of,
    mark_of,
)
from mythos_trio.core.errors import ErrorType, Refusal


def entry(id_: str, said: bytes = b"d", *, given: bool = True) -> Entry[str]:
    return Entry(id_, said, "content", "command", given=given)


def answer(at: float = 0.0, said: bytes = b"d", mark: Callable[[bytes], int | bytes] = mark_of) -> Remembered:
    return Remembered(mark(said), b"{}", at, 0)


def commands(**more: Any) -> Commands[str]:
    return Commands(complete=True, **more)


def test_they_come_out_in_order_one_at_a_time() -> None:
    queue = commands()
    assert queue.submit(entry("a"), "ann")
    assert queue.submit(entry("b"), "bob")
    first = queue.next()
    assert first is queue.running
    assert (first and first.id, queue.waiting) == ("a", 1)
    assert first is not None
    assert queue.finish(first, answer()) == ["ann"]
    assert queue.running is None
    second = queue.next()
    assert second is not None
    assert second.id == "b"
    assert queue.next() is None


def test_the_same_id_while_it_waits_or_runs_joins_it() -> None:
    queue = commands()
    queue.submit(entry("a"), "ann")
    assert not queue.submit(entry("a"), "bob")
    running = queue.next()
    assert running is not None
    assert not queue.submit(entry("a"), "eve")
    assert queue.waiting == 0
    assert queue.finish(running, answer()) == ["ann", "bob", "eve"]


def test_the_same_id_with_other_content_is_refused_in_every_state() -> None:
    queue = commands()
    queue.submit(entry("a"), "ann")
    for _ in range(2):
        with pytest.raises(Refusal) as caught:
            queue.submit(entry("a", b"other"), "bob")
        assert (caught.value.error_type, caught.value.status) == (ErrorType.VALIDATION, 409)
        queue.next()
    running = queue.running
    assert running is not None
    queue.finish(running, answer())
    with pytest.raises(Refusal):
        queue.answered("a", b"other")
    assert queue.answered("a", b"d") is not None


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize("mark", [mark_of, digest_of])  # remembered here, and found in the store
def test_a_command_is_known_again_by_its_mark(size: int, mark: Callable[[bytes], int | bytes]) -> None:
    queue, said = commands(), b"x" * size
    queue.remember("a", answer(said=said, mark=mark))
    assert queue.answered("a", said) is not None
    with pytest.raises(Refusal):
        queue.answered("a", said[:-1] + b"y")


def test_one_that_is_run_at_once_is_open_until_it_is_finished() -> None:
    queue = commands()
    first = entry("a")
    queue.begin(first, "ann")
    assert queue.running is first
    assert not queue.submit(entry("a"), "bob")
    assert queue.finish(first, answer()) == ["ann", "bob"]
    assert queue.answered("a", b"d") == answer()


def test_32_wait_beside_the_one_that_runs() -> None:
    queue = commands()
    queue.submit(entry("running"), "ann")
    queue.next()
    for number in range(MAX_WAITING):
        queue.submit(entry(str(number)), "ann")
    with pytest.raises(Refusal) as caught:
        queue.submit(entry("one more"), "ann")
    assert caught.value.error_type is ErrorType.CAPACITY
    queue.next()
    assert queue.submit(entry("one more"), "ann")


def test_askers_of_one_command_are_bounded() -> None:
    queue = commands()
    for _ in range(MAX_ASKERS):
        queue.submit(entry("a"), "ann")
    with pytest.raises(Refusal) as caught:
        queue.submit(entry("a"), "ann")
    assert caught.value.error_type is ErrorType.CAPACITY


def test_what_was_not_carried_out_is_not_remembered() -> None:
    queue = commands()
    queue.submit(entry("a"), "ann")
    running = queue.next()
    assert running is not None
    queue.finish(running, None)
    assert queue.answered("a", b"d") is None
    assert queue.submit(entry("a", b"other"), "ann")


def test_a_command_without_an_id_of_its_own_is_not_remembered() -> None:
    queue = commands()
    queue.submit(entry("made-up", given=False), "ann")
    running = queue.next()
    assert running is not None
    queue.finish(running, answer())
    assert queue.answered("made-up", b"d") is None


def test_the_newest_and_the_recent_answers_are_kept() -> None:
    queue = commands(keep_count=3, keep_seconds=10)
    for number in range(6):
        queue.remember(str(number), answer(at=number))
    assert all(queue.answered(str(number), b"d") for number in range(6))  # all are recent
    before = queue.complete
    queue.remember("late", answer(at=12.5))
    assert [number for number in range(6) if queue.answered(str(number), b"d")] == [3, 4, 5]
    assert (before, queue.complete) == (True, False)  # who asks for an older one has to ask the store
    queue.remember("later", answer(at=100))
    assert [bool(queue.answered(id_, b"d")) for id_ in ("4", "5", "late", "later")] == [False, True, True, True]


def test_an_answer_that_is_remembered_again_keeps_its_place() -> None:
    queue = commands(keep_count=2, keep_seconds=1)
    for at, id_ in enumerate(("a", "a", "b", "a", "b", "b")):
        queue.remember(id_, answer(at=at / 10))
    queue.remember("c", answer(at=10))
    assert [bool(queue.answered(id_, b"d")) for id_ in "abc"] == [False, True, True]
    queue.remember("d", answer(at=20))
    assert [bool(queue.answered(id_, b"d")) for id_ in "abcd"] == [False, False, True, True]


def test_the_garbage_collector_goes_through_no_answers() -> None:
    queue = commands()
    for number in range(100):
        queue.remember(str(number), answer(at=number))
    assert not gc.is_tracked(queue._answers)
    assert not gc.is_tracked(answer())


def test_giving_up_what_waits_leaves_what_runs() -> None:
    queue = commands()
    for id_ in "abc":
        queue.submit(entry(id_), id_)
    running = queue.next()
    assert [e.id for e in queue.give_up_waiting()] == ["b", "c"]
    assert queue.waiting == 0
    assert queue.submit(entry("b"), "again")
    assert running is not None
    assert queue.finish(running, answer()) == ["a"]


def test_giving_up_everything() -> None:
    queue = commands()
    for id_ in "abc":
        queue.submit(entry(id_), id_)
    queue.next()
    assert [e.id for e in queue.abandon()] == ["a", "b", "c"]
    assert (queue.running, queue.waiting, queue.next()) == (None, 0, None)


def test_what_was_given_up_can_end_late_without_touching_what_runs_now() -> None:
    queue = commands()
    queue.submit(entry("a"), "ann")
    given_up = queue.next()
    assert given_up is not None
    queue.abandon()
    queue.submit(entry("b"), "bob")
    running = queue.next()
    queue.finish(given_up, None)
    assert queue.running is running
