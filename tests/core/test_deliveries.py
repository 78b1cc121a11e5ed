from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.deliveries import Deliveries


def test_counts_what_is_new_to_the_player() -> None:
    deliveries = Deliveries(10)
    deliveries.wrote(12, 1)
    deliveries.wrote(20, 3)
    assert (deliveries.upto, deliveries.delivered, deliveries.acknowledged) == (20, 4, 0)


def test_all_confirmed_is_exact() -> None:
    deliveries = Deliveries(0)
    deliveries.wrote(5, 2)
    deliveries.wrote(9, 1)
    deliveries.confirm(9)
    assert deliveries.acknowledged == 3


def test_confirmation_of_less_than_was_first_written_counts_nothing() -> None:
    deliveries = Deliveries(0)
    deliveries.wrote(5, 2)
    deliveries.confirm(4)
    assert deliveries.acknowledged == 0


def test_steady_confirmations_behind_the_head_are_counted_step_by_step() -> None:
    deliveries = Deliveries(0)
    deliveries.wrote(1, 1)
    seen = []
    for seq in range(2, 8):
        deliveries.wrote(seq, 1)
        deliveries.confirm(seq - 1)
        seen.append(deliveries.acknowledged)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_failures_keep_the_newest_reason() -> None:
    deliveries = Deliveries(0)
    deliveries.fail(1.0, "retention")
    deliveries.fail(2.0, "slow", 4)
    assert (deliveries.failed, deliveries.last_failure) == (5, (2.0, "slow"))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5))))
def test_never_more_acknowledged_than_arrived(steps: list[tuple[bool, int]]) -> None:
    """One message a number: the true count of what has arrived is the confirmed number."""
    deliveries = Deliveries(0)
    written = confirmed = 0
    for write, distance in steps:
        if write:
            written += distance
            if distance:
                deliveries.wrote(written, distance)
        else:
            confirmed = max(confirmed, written - distance)
            deliveries.confirm(confirmed)
        assert deliveries.acknowledged <= max(confirmed, 0)
    deliveries.confirm(written)
    assert deliveries.acknowledged == deliveries.delivered == written
