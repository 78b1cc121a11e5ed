"""What the random histories of `tests.test_conflicts` have found, each as the smallest history that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.support.conflicts import (
    Connect,
    Drop,
    Pause,
    Publish,
    Remove,
    Restart,
    Step,
    Stick,
    Subscribe,
    Switch,
    Wait,
    run,
)
from tests.support.play import play


def test_a_grace_time_that_runs_out_during_a_drain_waits_for_the_next_start() -> None:
    """The session tried to run `on_leave`, which a drain does not, again and again without a pause."""
    run(
        [
            (Connect("ann", 0, "ws"), "quiet"),
            (Drop("ann", 0, "ws", "close"), "done"),
            (Wait(1.0), 0),
            (Stick(7.0), "done"),
            (Publish(("bob",)), 20),
            (Restart("drain"), 0),
        ]
    )


def test_a_drain_answers_who_has_asked_before() -> None:
    """The process stopped between the commit and the 202, or in the middle of a client's beginning."""
    late: list[tuple[Step, Pause]] = [(Connect("ann", 0, "ws"), 1), (Publish(("ann",)), 0), (Wait(0.01), 0)]
    for seed in range(10):  # it took half of them
        run([*late, (Restart("drain"), "quiet")], seed)


async def test_a_session_that_goes_offline_during_another_change_is_forgotten(
    tmp_path: Path, autojump_clock: trio.abc.Clock
) -> None:
    """It stayed, over and never gone, and everybody waited for it, without a pause between two looks."""
    slow = 0.0

    async def hook(kind: str) -> None:
        await trio.sleep(slow if kind == "read" else 0)

    async with play(tmp_path / "m.db", hook=hook, linkdead_grace=5) as world:
        first = await world.websocket("ann", "session_id=first")
        await first.until_type("welcome")
        second = await world.websocket("ann", "session_id=second")
        await second.until_type("welcome")
        second.close()
        await trio.sleep(4)
        slow = 3.0
        ended = await world.websocket("ann", "session_id=first")
        assert (await ended.next())["code"] == 4501
        slow = 0.0
        assert "ann" not in world.server.hub.sessions
        back = await world.websocket("ann")
        assert (await back.next())["session_id"] == "second"


def test_a_session_whose_handlers_commit_hangs_stays() -> None:
    """The switch gave up after five seconds, and left a session behind that was over and never gone."""
    run(
        [
            (Connect("ann", 0, "ws"), "quiet"),
            (Stick(7.0), "done"),
            (Drop("ann", 0, "ws", "close"), "done"),
            (Wait(0.5), 0),
            (Remove("ann"), "done"),
            (Wait(4.9), 0),
            (Connect("ann", 1, "ws"), "quiet"),
        ]
    )


def test_a_switch_in_the_middle_of_a_handshake_is_told() -> None:
    """The client got the end of its connection, and not a word."""
    for seed in range(30, 50):  # it took one in seven
        run([(Switch("ann", "new"), 0), (Connect("ann", 0, "ws", "new"), "quiet")], seed)


def test_a_message_that_the_session_before_has_seen_is_no_gap_of_the_next_one() -> None:
    """Retention took the message at which the next session's mail begins, and that was told as a gap."""
    run(
        [
            (Connect("ann", 0, "ws"), "quiet"),
            (Wait(80.0), "quiet"),
            (Remove("ann"), "quiet"),
            (Connect("ann", 1, "ws", position="zero"), "quiet"),
        ]
    )


@pytest.mark.parametrize("pause", [0, 3, 20, "done"])
def test_who_is_replaced_twice_in_a_row_leaves_twice(pause: Pause) -> None:
    """`on_leave` of the first waited with the second session, and was lost when that ended too."""
    connect = Connect("ann", 0, "ws", "new")
    run([(connect, "quiet"), (connect, pause), (connect, pause), (Remove("ann"), "quiet")])


def test_a_presence_that_is_being_paid_is_not_noted_as_owed() -> None:
    """A connection that replaced another one meanwhile noted, behind the commit of `on_join`, that `on_join` was
    still owed: after a crash it was run again."""
    connect = Connect("ann", 0, "sse")
    again = Connect("ann", 0, "sse", replaces=True)
    for seed in range(20):
        run([(connect, "done"), (again, "done"), (Restart("crash"), "quiet")], seed)


def test_a_session_that_stays_has_what_was_subscribed_while_it_was_to_end() -> None:
    """It had been forgotten when the subscription was stored, and then went on without it."""
    run(
        [
            (Connect("ann", 0, "ws"), "quiet"),
            (Stick(7.0), "done"),
            (Subscribe("ann", 0, "c2"), "done"),
            (Connect("ann", 1, "ws", "new"), "quiet"),
        ]
    )
