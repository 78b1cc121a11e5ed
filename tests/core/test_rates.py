"""Token buckets."""

from __future__ import annotations

import pytest

from mythos_trio.core.rates import Buckets


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
