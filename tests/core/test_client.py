"""The rules of a client: merging two connections, across epochs and gaps; codes; waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.client import (
    LONGEST_DELAY,
    Backoff,
    Merge,
    json_object,
    of_code,
    of_disconnect,
    of_status,
    parse_gap,
)
from mythos_trio.core.position import Gap, Position


def at(epoch: int, seq: int) -> Position:
    return Position(epoch, seq)


# Merging.


def test_the_first_connection_says_where_it_starts() -> None:
    assert Merge().position is None
    merge = Merge()
    assert merge.opened(None, 3, at(3, 40))
    assert merge.position == at(3, 40)
    assert not merge.message(3, 40)
    assert merge.message(3, 41)


def test_each_message_once_whichever_connection_brings_it() -> None:
    merge = Merge(1, 0)
    taken = [seq for seq in (1, 1, 2, 5, 2, 5, 7, 6, 7) if merge.message(1, seq)]
    assert taken == [1, 2, 5, 7]


def test_one_that_names_nothing_must_not_start_beyond_what_was_taken() -> None:
    merge = Merge(1, 10)
    assert merge.opened(None, 1, at(1, 10))
    assert not merge.opened(None, 1, at(1, 11)), "the messages up to 11 could be still on their way on the other"
    assert not merge.opened(None, 2, at(2, 5)), "nobody will say what the epochs share"
    assert merge.opened(at(1, 8), 1, at(1, 8))


def test_a_newer_epoch_lowers_the_number_to_what_is_shared() -> None:
    merge = Merge(1, 50)
    assert merge.opened(at(1, 50), 2, at(1, 50))
    assert merge.gap(Gap(at(1, 50), at(2, 45), "epoch", 45))
    assert merge.position == at(2, 45)
    assert merge.message(2, 46)


def test_the_number_is_not_raised_to_what_is_shared() -> None:
    merge = Merge(1, 30)
    assert merge.gap(Gap(at(1, 30), at(2, 30), "epoch", 45))
    assert merge.position == at(2, 30)


def test_the_second_connection_into_the_epoch_changes_nothing() -> None:
    merge = Merge(1, 50)
    merge.gap(Gap(at(1, 50), at(2, 45), "epoch", 45))
    assert merge.message(2, 46)
    assert not merge.gap(Gap(at(1, 50), at(2, 45), "epoch", 45))
    assert not merge.message(2, 46)
    assert merge.position == at(2, 46)


def test_what_is_left_of_an_older_epoch_is_dropped() -> None:
    merge = Merge(2, 45)
    assert not merge.message(1, 48)
    merge.passed(1, 49)
    assert merge.position == at(2, 45)


def test_what_has_passed_moves_the_number_forward_only() -> None:
    merge = Merge(1, 5)
    merge.passed(1, 9)
    merge.passed(1, 7)
    assert merge.position == at(1, 9)


def test_a_loss_is_told_once_and_only_if_it_is_one() -> None:
    merge = Merge(1, 10)
    gap = Gap(at(1, 10), at(1, 20), "retention")
    assert merge.gap(gap)
    assert not merge.gap(gap), "the other connection tells it too"
    assert merge.message(1, 21)
    assert not merge.gap(Gap(at(1, 12), at(1, 20), "retention")), "the other connection had brought it"
    assert merge.gap(Gap(at(1, 21), at(1, 30), "retention"))


def test_a_server_that_knows_less_starts_us_again() -> None:
    merge = Merge(2, 500)
    gap = Gap(at(2, 500), at(1, 40), "future")
    assert merge.gap(gap)
    assert merge.position == at(1, 40)
    assert merge.message(1, 41)
    assert not merge.gap(gap), "the second connection says it when the first has gone on already"
    assert merge.position == at(1, 41)


@given(st.lists(st.integers(0, 1), max_size=60), st.integers(1, 20))
def test_any_interleaving_of_two_connections_is_the_stream(turns: list[int], length: int) -> None:
    merge = Merge(1, 0)
    streams = [list(range(1, length + 1)) for _ in range(2)]
    brought = [streams[turn].pop(0) for turn in turns + [0] * length if streams[turn]]
    taken = [seq for seq in brought if merge.message(1, seq)]
    assert taken == list(range(1, length + 1))


@given(
    had=st.integers(0, 20),
    shared=st.integers(0, 25),
    extra=st.integers(0, 10),
    starts=st.lists(st.integers(0, 20), min_size=2, max_size=2),
    turns=st.lists(st.integers(0, 1), max_size=60),
)
def test_across_a_power_cut_nothing_of_the_new_epoch_is_missing_or_twice(
    had: int, shared: int, extra: int, starts: list[int], turns: list[int]
) -> None:
    """Two connections come back, each naming what had been taken when it was opened."""
    merge = Merge(1, had)
    end = shared + extra
    named = [min(start, had) for start in starts]
    streams: list[list[Gap | int]] = []
    for name in named:
        after = min(name, shared)
        streams.append([Gap(at(1, name), at(2, after), "epoch", shared), *range(after + 1, end + 1)])
    taken = []
    for turn in turns + [0] * (end + 2) + [1] * (end + 2):
        if not streams[turn]:
            continue
        item = streams[turn].pop(0)
        if isinstance(item, Gap):
            merge.gap(item)
        elif merge.message(2, item):
            taken.append(item)
    assert taken == list(range(min(had, shared) + 1, end + 1))


# What the server says.


def test_parse_gap() -> None:
    message = {"type": "gap", "after": "1-50", "position": "2-45", "reason": "epoch", "shared": 45}
    assert parse_gap(message) == Gap(at(1, 50), at(2, 45), "epoch", 45)
    assert parse_gap({"after": "1-1", "position": "1-5", "reason": "retention"}).shared is None


@pytest.mark.parametrize(
    "message",
    [{}, {"after": "x", "position": "1-1", "reason": "r"}, {"after": 7, "position": "1-1", "reason": "r"}],
)
def test_what_is_no_gap(message: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a gap"):
        parse_gap(message)


@pytest.mark.parametrize(
    ("code", "refused", "over"),
    [
        (None, False, False),
        (1000, False, False),
        (1011, False, False),
        (4000, False, False),
        (4499, False, False),
        (4500, False, True),
        (4501, False, True),
        (4503, False, True),
        (4509, True, False),
        (4999, False, True),
    ],
)
def test_codes(code: int | None, refused: bool, over: bool) -> None:
    outcome = of_code(code, "why")
    assert (outcome.refused, outcome.over) == (refused, over)
    assert "why" in outcome.why


def test_a_disconnect_says_when_to_come_back() -> None:
    outcome = of_disconnect({"type": "disconnect", "code": 4000, "reason": "restarting", "retry_ms": 700})
    assert (outcome.why, outcome.retry_ms, outcome.over) == ("restarting (4000)", 700, False)
    assert of_disconnect({"code": "4000", "retry_ms": None}).code is None


@pytest.mark.parametrize(
    ("status", "headers", "refused", "retry_ms"),
    [
        (204, {}, True, None),
        (400, {}, True, None),
        (401, {}, True, None),
        (403, {}, True, None),
        (404, {}, True, None),
        (408, {}, False, None),
        (429, {"retry-after": "3"}, False, 3000),
        (500, {}, False, None),
        (503, {"retry-after": "x"}, False, None),
    ],
)
def test_statuses(status: int, headers: dict[str, str], refused: bool, retry_ms: int | None) -> None:
    outcome = of_status(status, headers, b'{"message": "because"}')
    assert (outcome.refused, outcome.retry_ms, outcome.over) == (refused, retry_ms, False)
    assert status == 204 or outcome.why == f"because ({status})"


def test_waits_double_up_to_a_bound_and_the_server_wins() -> None:
    backoff = Backoff()
    assert [backoff.next(1.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, LONGEST_DELAY, LONGEST_DELAY]
    assert backoff.next(0.5) == LONGEST_DELAY / 2
    assert backoff.next(1.0, retry_ms=250) == 0.25
    assert backoff.next(1.0, retry_ms=-5) == 0
    assert [backoff.next(1.0) for _ in range(3)] == [0.5, 1, 2]  # it was asked to come back: as if for the first time
    backoff.good()
    assert backoff.next(1.0) == 0.5


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"{"])
def test_json_object_of_what_is_none(body: bytes) -> None:
    assert json_object(body) == {}
