"""A session's life, cell by cell, and what presence it owes to the game."""

from __future__ import annotations

import pytest

from mythos_trio.core.session import (
    TRANSITIONS,
    Happening,
    IllegalTransition,
    Owed,
    Presence,
    State,
    Told,
    after,
    parse_presence,
)

ONLINE, LINKDEAD, OFFLINE, ENDED = State.ONLINE, State.LINKDEAD, State.OFFLINE, State.ENDED

# One row for each happening: what follows in each state, None where it has no place.
LIFE = {
    Happening.ATTACH: (ONLINE, ONLINE, ONLINE, None),
    Happening.LAST_DETACH: (LINKDEAD, None, None, None),
    Happening.GRACE_OVER: (None, OFFLINE, None, None),
    Happening.END: (ENDED, ENDED, ENDED, None),
    Happening.RESTART: (LINKDEAD, LINKDEAD, OFFLINE, ENDED),
}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("happening", list(Happening))
def test_every_cell_of_the_table(state: State, happening: Happening) -> None:
    then = LIFE[happening][list(State).index(state)]
    if then is None:
        with pytest.raises(IllegalTransition, match=rf"{happening.name} while {state}"):
            after(state, happening)
    else:
        assert after(state, happening) is then


def test_nothing_leads_out_of_the_end() -> None:
    assert set(TRANSITIONS[ENDED].values()) == {ENDED}


JOIN, LOST, RETURN, LEAVE = Owed.JOIN, Owed.LINKDEAD, Owed.RETURN, Owed.LEAVE


def test_a_visit_is_owed_and_paid_in_order() -> None:
    presence = Presence().arrived()
    assert presence.owed == (JOIN,)
    presence = presence.started().paid()
    assert presence == Presence(Told.PRESENT)
    presence = presence.lost().left()
    assert presence.owed == (LOST, LEAVE)
    assert presence.paid().paid() == Presence(Told.ABSENT)


def test_who_is_present_does_not_arrive_again() -> None:
    assert Presence(Told.PRESENT).arrived() == Presence(Told.PRESENT)
    assert Presence(Told.LINKDEAD).lost() == Presence(Told.LINKDEAD)
    assert Presence(Told.ABSENT).left() == Presence(Told.ABSENT)


def test_a_linkdead_that_nobody_was_told_of_cancels_out() -> None:
    assert Presence(Told.PRESENT).lost().arrived() == Presence(Told.PRESENT)


def test_a_linkdead_that_is_being_told_is_followed_by_a_return() -> None:
    assert Presence(Told.PRESENT).lost().started().arrived().owed == (LOST, RETURN)
    assert Presence(Told.LINKDEAD).arrived().owed == (RETURN,)


def test_a_commit_that_failed_leaves_it_owed() -> None:
    presence = Presence().arrived()
    assert presence.started().not_paid() == presence


def test_what_is_owed_stays_short_while_nothing_can_be_paid() -> None:
    presence = Presence(Told.PRESENT).lost().started()
    for _ in range(100):
        presence = presence.left().arrived().lost()
    assert len(presence.owed) <= 4
    assert presence.left().owed == (LOST, LEAVE)


@pytest.mark.parametrize("presence", [Presence(), Presence(Told.LINKDEAD, (RETURN, LOST, LEAVE))])
def test_the_row_holds_what_is_owed(presence: Presence) -> None:
    assert parse_presence(presence.told.value, presence.owed_text) == presence


def test_what_the_game_does_not_hear_is_paid_in_its_turn() -> None:
    joined = Presence().arrived()
    assert joined.without({Owed.JOIN}) == Presence(Told.PRESENT)
    assert joined.without({Owed.LEAVE}) == joined
    assert joined.started().without({Owed.JOIN}) == joined.started()  # it is being run
    away = joined.lost().left()
    assert away.without({Owed.LINKDEAD, Owed.LEAVE}) == away  # on_join comes first
    assert away.without({Owed.JOIN, Owed.LINKDEAD}) == Presence(Told.LINKDEAD, (Owed.LEAVE,))
