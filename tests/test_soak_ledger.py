"""The judge of the soak: each kind of broken promise is seen, and nothing else."""

from __future__ import annotations

import pytest

from tests.soak.game import HALL, HALL_EVERY, HALVES
from tests.soak.ledger import EVERYONE, Account, Ledger, Message, Promise, to_channel, to_player


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def ledger(time: Time) -> Ledger:
    return Ledger(time)


@pytest.fixture
def ann(ledger: Ledger) -> Account:
    return ledger.account("ann-0")


@pytest.fixture
def bob(ledger: Ledger) -> Account:
    return ledger.account("bob-1")


def news(seq: int, id: str) -> Message:
    return {"seq": seq, "id": id, "type": "news", "content": {}}


def told(seq: int, type_: str, **content: object) -> Message:
    return {"seq": seq, "id": f"m{seq}", "type": type_, "content": content}


def broken(ledger: Ledger) -> list[str]:
    ledger.check()
    return ledger.violations


def test_all_has_come(ledger: Ledger, ann: Account, bob: Account) -> None:
    for seq, target in enumerate((to_player("ann-0"), to_channel(HALL), to_channel(HALVES[1]), EVERYONE), 1):
        ledger.promised(Promise(f"p{seq}", seq, target))
    for seq in (1, 2, 4):
        ann.take(news(seq, f"p{seq}"))
    for seq in (2, 3, 4):
        bob.take(news(seq, f"p{seq}"))
    assert not list(ledger.missing())
    assert broken(ledger) == []
    assert (ledger.published, ledger.delivered) == (4, 6)
    # What has been checked is not asked for again.
    assert broken(ledger) == []


@pytest.mark.parametrize("target", [to_player("ann-0"), to_channel(HALL), to_channel(HALVES[0]), EVERYONE])
def test_lost(ledger: Ledger, ann: Account, target: str) -> None:
    ledger.promised(Promise("p1", 1, target))
    assert broken(ledger) == [f"lost: p1 (1, to {target}) has not come to ann-0"]


def test_not_for_everybody(ledger: Ledger, ann: Account) -> None:
    ledger.promised(Promise("p1", 1, to_player("bob-1")))
    ledger.promised(Promise("p2", 2, to_channel(HALVES[1])))
    assert broken(ledger) == []


@pytest.mark.parametrize("second", [news(5, "p5"), news(4, "p4")])
def test_twice_or_out_of_order(ledger: Ledger, ann: Account, second: Message) -> None:
    ann.take(news(5, "p5"))
    ann.take(second)
    assert ledger.violations == [f"ann-0 got {second['id']} ({second['seq']}) after 5: twice, or out of order"]


def test_one_id_under_two_numbers(ledger: Ledger, ann: Account) -> None:
    ann.take(news(1, "p1"))
    ann.take(news(2, "p1"))
    assert ledger.violations == ["ann-0 got p1 as number 2, and it was 1"]


def test_two_ids_under_one_number(ledger: Ledger, ann: Account, bob: Account) -> None:
    ann.take(news(1, "p1"))
    bob.take(news(1, "p2"))
    assert ledger.violations == ["bob-1 got number 1 as p2, and it was p1"]


def test_another_number_than_was_promised(ledger: Ledger, ann: Account) -> None:
    ann.take(news(1, "p1"))
    ledger.promised(Promise("p1", 2, EVERYONE))
    assert ledger.violations == ["a publisher got p1 as number 2, and it was 1"]


def test_what_nobody_was_promised(ledger: Ledger, ann: Account) -> None:
    ann.take(news(1, "p1"))
    assert broken(ledger) == ["ann-0 got p1, which nobody was promised"]


def test_what_was_refused(ledger: Ledger, ann: Account) -> None:
    ledger.given_up.add("p1")
    ann.take(news(1, "p1"))
    assert ledger.violations == ["ann-0 got p1 (1), which had been refused"]


def test_a_gap(ledger: Ledger, ann: Account) -> None:
    ann.take({"type": "gap", "reason": "retention"})
    assert len(ledger.violations) == 1


# Commands.


def test_a_command_counts_once(ledger: Ledger, ann: Account) -> None:
    for number in range(1, HALL_EVERY + 1):
        ann.take(told(2 * number, "count", number=number))
        ann.answered(f"c{number}", number)
    ann.take(told(20, "hall", player="ann-0", number=HALL_EVERY))
    ann.answered_again("c2", 2)
    ann.looked({"count": HALL_EVERY})
    assert broken(ledger) == []
    assert ledger.commands == HALL_EVERY


def test_a_command_that_counted_twice(ledger: Ledger, ann: Account) -> None:
    ann.take(told(1, "count", number=1))
    ann.take(told(2, "count", number=2))
    ann.answered("c1", 2)
    ann.looked({"count": 2})
    assert ledger.violations == [
        "ann-0 was answered 2 to c1, the 1. command",
        "ann-0: 1 replies, 2 lines, 2 in the data",
    ]


def test_another_answer_than_before(ledger: Ledger, ann: Account) -> None:
    ann.take(told(1, "count", number=1))
    ann.answered("c1", 1)
    ann.answered_again("c1", 2)
    assert ledger.violations == ["ann-0 was answered 2 to c1, asked again"]


def test_a_line_that_is_missing(ledger: Ledger, ann: Account) -> None:
    ann.answered("c1", 1)
    assert broken(ledger) == ["lost: ann-0 has 1 replies and 0 lines"]


def test_a_line_in_the_hall_that_is_missing(ledger: Ledger, ann: Account, bob: Account) -> None:
    for number in range(1, HALL_EVERY + 1):
        ann.take(told(number, "count", number=number))
        ann.answered(f"c{number}", number)
    ann.take(told(20, "hall", player="ann-0", number=HALL_EVERY))
    assert broken(ledger) == [f"lost: bob-1 has not heard ann-0 say {HALL_EVERY} in the hall"]


@pytest.mark.parametrize("type_", ["count", "tick"])
def test_a_number_left_out(ledger: Ledger, ann: Account, type_: str) -> None:
    ann.take(told(1, type_, number=2))
    assert ledger.violations == [f"ann-0 got {type_} 2 instead of 1"]


# Connections.


def test_each_connection_carries_the_stream(ledger: Ledger, ann: Account) -> None:
    first, second = ann.open_track("websocket", 0), ann.open_track("sse", 2)
    for seq in range(1, 6):
        ann.take(told(seq, "tick", number=seq))
    first.seqs = [1, 2, 3]  # it was cut off there
    first.over = True
    second.seqs = [3, 4, 5]
    assert broken(ledger) == []
    ann.take(told(6, "tick", number=6))
    second.seqs = [6]
    assert broken(ledger) == []


@pytest.mark.parametrize("seqs", [[1, 3], [2, 3], [1, 2, 2, 3], [1, 3, 2], [1, 2, 3, 4]])
def test_a_connection_that_leaves_out_or_repeats(ledger: Ledger, ann: Account, seqs: list[int]) -> None:
    track = ann.open_track("sse", 0)
    for seq in (1, 2, 3):
        ann.take(told(seq, "tick", number=seq))
    track.seqs = seqs
    assert len(broken(ledger)) == 1


# Silence.


def test_how_long_there_was_no_service(ledger: Ledger, ann: Account, bob: Account, time: Time) -> None:
    ledger.begin_wave()
    for time.now, seq in ((1.0, 1), (4.0, 2), (5.0, 3)):
        ledger.promised(Promise(f"p{seq}", seq, EVERYONE))
        ann.take(news(seq, f"p{seq}"))
        if seq != 2:
            bob.take(news(seq, f"p{seq}"))
    assert (ledger.worst_publishing, ann.worst_silence, bob.worst_silence) == (3.0, 3.0, 4.0)
    time.now = 60.0
    ledger.begin_wave()
    assert (ledger.worst_publishing, ann.worst_silence, bob.worst_silence) == (0.0, 0.0, 0.0)
