"""Session conflicts by the hundred: random histories of players against the reference model.

Each example is a list of steps that clients, publishers and operators take, most of them while others are
still under way, against a whole server on virtual time (`tests.support.conflicts`). What must hold is
written there and in `tests.support.model` and `tests.support.merge`.

``CONFLICT_EXAMPLES`` in the environment asks for more examples than the usual ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from tests.support.conflicts import (
    CHANNELS,
    COMMANDS,
    PAGES,
    PLAYERS,
    TRANSPORTS,
    Ack,
    Connect,
    Drop,
    Pause,
    Publish,
    Remove,
    Restart,
    Say,
    Step,
    Stick,
    Subscribe,
    Switch,
    Sync,
    Wait,
    run,
)

EXAMPLES = int(os.environ.get("CONFLICT_EXAMPLES", "150"))

players = st.sampled_from(PLAYERS)
pages = st.integers(0, PAGES - 1)
transports = st.sampled_from(TRANSPORTS)
ways: st.SearchStrategy[Literal["ws", "post"]] = st.sampled_from(("ws", "post"))
# The first of each is what a failure is shrunk to.
connects = st.builds(
    Connect,
    players,
    pages,
    transports,
    session=st.sampled_from(("none", "own", "new", "current", "ended", "none")),
    position=st.sampled_from(("own", "none", "old", "zero", "future", "own", "own")),
    replaces=st.booleans(),
    header=st.booleans(),
    narrow=st.booleans(),
)
drops = st.builds(
    Drop, players, pages, transports, how=st.sampled_from(("close", "reset", "cut", "stall", "mend", "mend"))
)
says = st.builds(
    Say,
    players,
    pages,
    st.sampled_from(("act", "act", "act", *COMMANDS)),
    by=ways,
    id=st.sampled_from(("new", "new", "again", "again", "other")),
)
subscribes = st.builds(
    Subscribe, players, pages, st.sampled_from(CHANNELS), on=st.sampled_from((True, True, False)), by=ways
)
publishes = st.builds(
    Publish,
    st.lists(st.sampled_from((*PLAYERS, *CHANNELS, "*")), min_size=1, max_size=6).map(tuple),
    id=st.sampled_from(("none", "new", "again", "other")),
    key=st.sampled_from((None, None, None, 0, 1, 2)),
    lost=st.sampled_from((None, None, None, 0, 2, 5)),
    bar=st.booleans(),
)
waits = st.builds(Wait, st.sampled_from((0.01, 1.0, 4.9, 5.1, 12.0, 12.0, 80.0)))
restarts = st.builds(Restart, st.sampled_from(("drain", "crash", "crash", "power")))

# How often each comes. (`st.one_of` takes a strategy that is named twice for one.)
WEIGHTS: Sequence[tuple[int, st.SearchStrategy[Step]]] = (
    (8, connects),
    (8, publishes),
    (4, drops),
    (8, says),
    (2, subscribes),
    (2, st.builds(Ack, players, pages, by=ways)),
    (1, st.builds(Switch, players, session=st.sampled_from(("none", "new", "current", "ended")))),
    (1, st.builds(Remove, players, st.none() | pages, transports)),
    (3, waits),
    (2, restarts),
    (1, st.just(Sync())),
    (1, st.builds(Stick, st.sampled_from((0.5, 3.0, 7.0)))),
)
steps: st.SearchStrategy[Step] = st.sampled_from(
    [strategy for weight, strategy in WEIGHTS for _ in range(weight)]
).flatmap(lambda strategy: strategy)
pauses: st.SearchStrategy[Pause] = st.sampled_from(("quiet", "done", 0, 0, 1, 3, 8, 20, 50))


@st.composite
def retries(draw: st.DrawFn) -> list[tuple[Step, Pause]]:
    """A command, a loss of the connection or of the server, and the same command again: too rare by chance."""
    player, page, transport = draw(players), draw(pages), draw(transports)
    return [
        (Connect(player, page, transport), draw(pauses)),
        (Say(player, page, "act", by=draw(ways)), draw(pauses)),
        (draw(st.one_of(restarts, drops, waits)), draw(pauses)),
        (Say(player, page, "act", by=draw(ways), id="again"), draw(pauses)),
    ]


# Lists of lists are longer on average, and shrink as well.
histories = st.lists(
    st.lists(st.tuples(steps, pauses), max_size=10) | retries(),
    min_size=1,
    max_size=8,
).map(lambda parts: [pair for part in parts for pair in part])


@pytest.mark.timeout(1800)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
)
@given(history=histories, seed=st.integers(0, 2**16))
def test_any_history_of_connections_keeps_the_promise(history: list[tuple[Step, Pause]], seed: int) -> None:
    note(f"seed {seed}, {len(history)} steps")
    run(history, seed)
