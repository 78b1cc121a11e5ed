"""Token buckets; how clients come back."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from mythos_trio.core.rates import FIRST_RETURN_MS, LONGEST_SPREAD_MS, RETURNS_A_SECOND, Buckets, cut_off_ms, return_ms


def test_a_burst_and_then_one_at_a_time() -> None:
    buckets = Buckets(4, 2.0)
    assert [buckets.take("ann", 100.0) for _ in range(4)] == [0.0] * 4
    wait = buckets.take("ann", 100.0)
    assert wait == pytest.approx(0.5)
    assert buckets.take("ann", 100.0 + wait) == 0.0
    assert buckets.take("ann", 100.0 + wait) == pytest.approx(0.5)


def test_a_bucket_holds_no_more_than_a_burst() -> None:
    buckets = Buckets(2, 1.0)
    buckets.take("ann", 0.0)
    assert [buckets.take("ann", 1000.0) == 0.0 for _ in range(3)] == [True, True, False]


def test_each_key_has_a_bucket_of_its_own() -> None:
    buckets = Buckets(1, 1.0)
    assert buckets.take("ann", 0.0) == 0.0
    assert buckets.take("bob", 0.0) == 0.0
    assert buckets.take("ann", 0.0) > 0.0


def test_the_key_asked_longest_ago_is_forgotten() -> None:
    buckets = Buckets(1, 1000.0, max_keys=2)
    for key in ("ann", "bob", "ann", "cid"):
        buckets.take(key, 0.0)
    assert buckets.take("ann", 0.0) > 0.0
    assert buckets.take("bob", 0.0) == 0.0


def test_nobody_comes_back_before_there_is_somebody() -> None:
    assert return_ms(0) == FIRST_RETURN_MS


@pytest.mark.parametrize("count", [1, 37, 10_000])
@pytest.mark.parametrize("jitter", [0.0, 0.999])
def test_the_time_in_which_they_come_back_grows_with_their_number(count: int, jitter: float) -> None:
    times = [return_ms(place + jitter) for place in range(count)]
    assert times == sorted(times)
    assert times[-1] < FIRST_RETURN_MS + count * 1000 / RETURNS_A_SECOND


def test_in_no_tenth_of_a_second_come_more_than_its_share() -> None:
    random = Random(1)
    tenths = Counter(return_ms(place + random.random()) // 100 for place in range(5000))
    assert max(tenths.values()) <= RETURNS_A_SECOND / 10 + 1


def test_a_single_browser_that_is_cut_off_does_not_wait_for_others() -> None:
    assert cut_off_ms(0, 1.0) == FIRST_RETURN_MS


def test_many_browsers_that_are_cut_off_come_back_at_different_times_and_soon() -> None:
    random = Random(2)
    times = [cut_off_ms(count, random.random()) for count in range(1000)]
    assert min(times) >= FIRST_RETURN_MS
    assert max(times) <= FIRST_RETURN_MS + 2000
    assert max(Counter(time // 100 for time in times).values()) < 1000 / 5
    assert cut_off_ms(1_000_000, 1.0) == FIRST_RETURN_MS + LONGEST_SPREAD_MS


def test_many_are_taken_together_or_not_at_all() -> None:
    buckets = Buckets(10, 5.0)
    assert buckets.take("ann", 0.0, 7) == 0.0
    assert buckets.take("ann", 0.0, 5) == pytest.approx(1.0)
    assert buckets.take("ann", 0.0, 3) == 0.0
    assert buckets.take("ann", 100.0, 11) > 0.0
