"""Verdicts on who is alive."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.health import Liveness, Verdict


def verdict(liveness: Liveness, now: float) -> Verdict:
    return liveness.verdict(now, interval=30, pong_timeout=20)


def test_it_is_asked_when_the_last_question_is_old() -> None:
    liveness = Liveness(heard_at=0, probed_at=0)
    assert verdict(liveness, 29.9) is Verdict.FINE
    assert verdict(liveness, 30) is Verdict.PROBE


def test_who_answers_is_asked_again_and_who_does_not_is_gone() -> None:
    liveness = Liveness(heard_at=0, probed_at=0)
    liveness.probed(30)
    assert verdict(liveness, 49.9) is Verdict.FINE
    assert verdict(liveness, 50) is Verdict.GONE
    liveness.heard(49.95)
    assert verdict(liveness, 50) is Verdict.FINE
    assert verdict(liveness, 60) is Verdict.PROBE


def test_a_word_between_questions_does_not_put_the_next_one_off() -> None:
    """Else who speaks once and vanishes would be found out later than the bound says."""
    liveness = Liveness(heard_at=0, probed_at=0)
    liveness.heard(29)
    assert verdict(liveness, 30) is Verdict.PROBE


@given(
    st.floats(1, 100),
    st.floats(1, 100),
    st.floats(0.05, 1),
    st.lists(st.floats(0, 50), max_size=20),
    st.floats(0, 200),
)
def test_who_vanishes_is_gone_within_the_bound(
    interval: float, pong_timeout: float, tick: float, words: list[float], vanishes: float
) -> None:
    """Whatever it said before, and whenever it vanishes; a round of the checker comes every *tick*."""
    liveness = Liveness(heard_at=0, probed_at=0)
    spoken = sorted(at for at in words if at <= vanishes)
    rounds = 0
    while True:
        rounds += 1
        now = rounds * tick
        while spoken and spoken[0] <= now:
            liveness.heard(spoken.pop(0))
        if now <= vanishes and liveness.waiting:
            liveness.heard(now)  # as long as it is there it answers at once
        found = liveness.verdict(now, interval=interval, pong_timeout=pong_timeout)
        if found is Verdict.GONE:
            break
        if found is Verdict.PROBE:
            liveness.probed(now)
    assert vanishes < now <= vanishes + interval + pong_timeout + 2 * tick + 1e-6
