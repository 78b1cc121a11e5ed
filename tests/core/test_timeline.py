from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.timeline import Timeline


def test_newest_moves_are_exact() -> None:
    line = Timeline(8)
    for number in range(10, 50, 10):
        line.add(number - 10, number, float(number))
    assert line.when(0) is None
    assert line.when(1) == (10, 10)
    assert line.when(10) == (10, 10)
    assert line.when(11) == (20, 20)
    assert line.when(40) == (40, 40)
    assert line.when(41) is None


def test_nothing_is_held_before_a_move() -> None:
    assert Timeline().when(1) is None
    assert len(Timeline()) == 0


def test_holes_are_not_passed() -> None:
    line = Timeline()
    line.add(0, 5, 1.0)
    line.add(9, 12, 2.0)
    assert line.when(5) == (1, 1)
    assert line.when(7) is None
    assert line.when(10) == (2, 2)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), max_size=200), st.integers(4, 20))
def test_the_truth_lies_in_what_is_told(moves: list[tuple[int, int]], most: int) -> None:
    line, truth, mark, now = Timeline(most), dict[int, int](), 0, 0
    for step, seconds in moves:
        now += seconds
        line.add(mark, mark + step, now)
        truth |= dict.fromkeys(range(mark + 1, mark + step + 1), now)
        mark += step
    assert len(line) <= most
    for number, at in truth.items():
        told = line.when(number)
        assert told is not None
        assert told[0] <= at <= told[1]
    newest = list(truth)[-1:]
    assert [line.when(number) for number in newest] == [(now, now) for _ in newest]
