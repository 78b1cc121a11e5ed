"""The default world over crashes: nothing is doubled, lost, or left hanging, and what was seen is what is so."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mythos_trio.core.messages import decode_json
from mythos_trio.game import Command, CommandError
from mythos_trio.world import DefaultGame
from mythos_trio.world.fights import HEALING, ROUND
from mythos_trio.world.places import BEASTS, ROOMS, START, THINGS
from mythos_trio.world.scene import MAX_HITS
from tests.support.play import WebSocketClient, play
from tests.support.play import World as Server
from tests.support.stage import Stage

PLAYERS = ("alice", "bob", "carol")
# Few rooms and few things, so that the players meet.
LINES = (
    *("n", "s", "d", "u", "flee", "look", "score", "i"),
    *(f"{verb} {thing}" for verb in ("take", "drop") for thing in ("poker", "lantern", "coin")),
    *(f"give {thing} to {who}" for thing in ("poker", "lantern", "coin") for who in PLAYERS),
    *(f"fight {who}" for who in (*PLAYERS, "rat")),
)

Read = Callable[[str], Any]


def check(data: Read, timers: set[tuple[str, str]], channels: Callable[[str], list[str]]) -> None:
    """What holds at every moment.

    :param data: the value under a key, None if there is none.
    :param timers: owner and name of all that are set.
    :param channels: what a player subscribes to.
    """
    places = {*ROOMS, *(f"player/{name}" for name in PLAYERS), *(f"beast/{beast}" for beast in BEASTS)}
    for thing in THINGS:
        assert place_of(data, thing) in places
    for name, beast in BEASTS.items():
        hits = data(f"beast/{name}")
        assert hits is None or 0 <= hits <= beast.hits
        assert (hits == 0) == (("world", f"beast/{name}") in timers)
    for name in PLAYERS:
        mine = data(f"player/{name}")
        if mine is None:
            continue
        assert mine.keys() <= {"room", "hits", "foe"}
        assert [channel for channel in channels(name) if channel in ROOMS] == [mine["room"]]
        assert 1 <= mine.get("hits", MAX_HITS) <= MAX_HITS
        owner = f"player/{name}"
        if "foe" in mine:
            assert (owner, "round") in timers
        elif mine["room"] == START and mine.get("hits", MAX_HITS) < MAX_HITS:
            assert timers & {(owner, "heal"), (owner, "round")}


def place_of(data: Read, thing: str) -> str:
    place = data(f"thing/{thing}")
    assert place is None or isinstance(place, str)
    return place or THINGS[thing].start


def told(messages: list[dict[str, Any]]) -> dict[str, str]:
    """Where every thing is, for who knows nothing but what was told."""
    place = {name: thing.start for name, thing in THINGS.items()}

    def fell(owner: str, room: str) -> None:
        for thing, where in place.items():
            if where == owner:
                place[thing] = room

    for message in messages:
        match message:
            case {"type": "take", "thing": thing, "player": name}:
                assert place[thing] == message["room"]
                place[thing] = f"player/{name}"
            case {"type": "drop", "thing": thing, "player": name, "room": room}:
                assert place[thing] == f"player/{name}"
                place[thing] = room
            case {"type": "give", "thing": thing, "player": name, "to": other}:
                assert place[thing] == f"player/{name}"
                place[thing] = f"player/{other}"
            case {"type": "fight", "kind": "fall", "player": name, "room": room}:
                fell(f"player/{name}", room)
            case {"type": "fight", "kind": "win", "foe": beast, "room": room}:
                fell(f"beast/{beast}", room)
    return place


# On the stage: many short histories.

steps = st.one_of(
    st.tuples(st.just("say"), st.sampled_from(PLAYERS), st.sampled_from(LINES)),
    st.tuples(st.just("die in"), st.sampled_from(PLAYERS), st.sampled_from(LINES)),
    st.tuples(st.sampled_from(["lose", "leave", "switch"]), st.sampled_from(PLAYERS), st.just("")),
    st.tuples(st.just("wait"), st.sampled_from([ROUND / 2, ROUND, HEALING, 20.0, 70.0]), st.just("")),
    # What chance would seldom bring about.
    st.tuples(st.just("hunt"), st.sampled_from(PLAYERS), st.just("")),
    st.tuples(st.just("duel"), st.sampled_from(PLAYERS), st.sampled_from(PLAYERS)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=60), st.integers(0, 2**32))
def test_things_are_conserved_and_every_fight_has_its_next_round(history: list[Any], seed: int) -> None:
    trio.run(live, history, seed)


async def live(history: list[Any], seed: int) -> None:
    random.seed(seed)
    stage = Stage(DefaultGame())
    await stage.join(*PLAYERS)
    for what, who, line in history:
        with contextlib.suppress(CommandError):
            await step(stage, what, who, line)
        check(stage.data, set(stage.timers), stage.channels)
    # Left to itself, all of it comes to an end: the hurt heal, the dead come again.
    for name in PLAYERS:
        await back(stage, name)
    await stage.later(3600)
    check(stage.data, set(stage.timers), stage.channels)
    assert stage.timers == {}


async def step(stage: Stage, what: str, who: Any, line: str) -> None:
    match what:
        case "say":
            await back(stage, who)
            await stage.command(who, line)
        case "die in":
            # The server is killed before the commit: nothing has happened, and all timers wait again.
            await back(stage, who)
            before = stage.moment()
            gathering = stage.gathering(who)
            with contextlib.suppress(CommandError):
                await stage.game.on_command(gathering.player, Command("c1", line))
            assert stage.moment() == before
            stage.wind()
        case "lose" if stage.presence(who) == "online":
            await stage.lose(who)
        case "leave" if stage.presence(who) != "offline":
            await stage.leave(who)
        case "switch" if stage.presence(who) == "online":
            await stage.new_session(who)
        case "wait":
            await stage.later(who)
        case "hunt":
            for deed in ("d", "fight rat"):
                await step(stage, "say", who, deed)
        case "duel":
            await step(stage, "say", who, f"fight {line}")
            await step(stage, "say", line, f"fight {who}")


async def back(stage: Stage, name: str) -> None:
    match stage.presence(name):
        case "linkdead":
            await stage.come_back(name)
        case "offline":
            await stage.join(name)


# On a whole server, killed again and again.


class Life:
    """Three players who remember all that they have been told, from server to server."""

    def __init__(self) -> None:
        self.clients: dict[str, WebSocketClient] = {}
        self.heard: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)

    async def connect(self, server: Server) -> None:
        for name in PLAYERS:
            before = self.clients.get(name)
            query = "" if before is None else f"position={before.position}"
            self.clients[name] = await server.websocket(name, query)
            await self.clients[name].until_type("welcome")

    async def listen(self, seconds: float = 0.3) -> None:
        """Hear all that is there to be heard in this time."""
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for client in self.clients.values():
                    nursery.start_soon(client.until_over)
        for name, client in self.clients.items():
            for message in client.numbered:
                known = self.heard[name].setdefault(message["seq"], message)
                assert known == message
            numbers = [message["seq"] for message in client.numbered]
            assert numbers == sorted(set(numbers))

    @property
    def scroll(self) -> list[dict[str, Any]]:
        """What was told to anybody, in the world's order."""
        all_of_it = {seq: message for heard in self.heard.values() for seq, message in heard.items()}
        ids = [message["id"] for message in all_of_it.values()]
        assert len(ids) == len(set(ids))
        return [message for _, message in sorted(all_of_it.items())]

    def close(self) -> None:
        for client in self.clients.values():
            client.close()


def check_server(server: Server, life: Life) -> None:
    """The rules hold, and the data are what was told."""
    hub = server.server.hub

    def data(key: str) -> Any:
        body = hub.data.newest(key).body
        return None if body is None else decode_json(body)

    def channels(name: str) -> list[str]:
        return list(hub.sessions[name].channels)

    check(data, {(owner, name) for owner, timers in hub.timers.items() for name in timers}, channels)
    assert told(life.scroll) == {thing: place_of(data, thing) for thing in THINGS}
    for name in PLAYERS:
        hits = [message["hits"] for _, message in sorted(life.heard[name].items()) if message["type"] == "hits"]
        assert data(f"player/{name}").get("hits", MAX_HITS) == (hits[-1] if hits else MAX_HITS)


moves = st.tuples(st.sampled_from(PLAYERS), st.sampled_from(LINES), st.sampled_from([0.0, 0.0, ROUND, 2 * HEALING]))
duels = st.permutations(PLAYERS).map(lambda p: [(p[0], f"fight {p[1]}", 0.0), (p[1], f"fight {p[0]}", 20.0)])
hunts = st.sampled_from(PLAYERS).map(lambda name: [(name, "d", 0.0), (name, "fight rat", 20.0)])
histories = st.lists(st.one_of(moves.map(lambda move: [move]), duels, hunts), max_size=12).map(
    lambda parts: [move for part in parts for move in part]
)
ends = st.one_of(st.just("stop"), st.just("kill"), st.integers(0, 15))


# A failure takes its time to be made small.
@pytest.mark.timeout(300)
@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(histories, ends), min_size=1, max_size=4), st.integers(0, 2**32))
def test_a_server_that_is_killed_again_and_again(lives: list[Any], seed: int) -> None:
    async def run() -> None:
        random.seed(seed)
        life = Life()
        with TemporaryDirectory() as directory:
            for history, end in [*lives, ([], "stop")]:
                async with play(Path(directory) / "m.db", crash=end != "stop", rate_limit_requests=1000) as server:
                    await life.connect(server)
                    await life.listen()
                    check_server(server, life)
                    await act_out(life, history)
                    if isinstance(end, int):
                        # All three want something, and the server dies so many steps later.
                        for name, client in life.clients.items():
                            await client.give(random.choice(LINES), f"last-{name}-{len(life.scroll)}")
                        for _ in range(end):
                            await trio.lowlevel.checkpoint()
                    else:
                        await life.listen()
                        check_server(server, life)
                        life.close()

    trio.run(run, clock=MockClock(autojump_threshold=0))


async def act_out(life: Life, history: list[Any]) -> None:
    for name, line, pause in history:
        await life.clients[name].command(line)
        await life.listen(pause)


# Two fights, killed between two ticks and in mid-command.


def lines(life: Life, name: str) -> list[Any]:
    return [message["content"] for _, message in sorted(life.heard[name].items())]


@pytest.mark.parametrize("late", [0.1, ROUND / 2, ROUND - 0.1])
async def test_a_duel_goes_on_after_a_kill_between_two_blows(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, late: float
) -> None:
    monkeypatch.setattr("random.randint", lambda low, high: 1)
    life, path = Life(), tmp_path / "m.db"
    async with play(path, crash=True) as server:
        await life.connect(server)
        alice, bob, _ = life.clients.values()
        await alice.command("fight bob")
        await bob.command("fight alice")
        await alice.until(lambda m: m.get("hits") == MAX_HITS - 2)
        await trio.sleep(late)
    async with play(path) as server:
        await life.connect(server)
        alice, bob, carol = life.clients.values()
        start = trio.current_time()
        await alice.until(lambda m: m["type"] == "hits" and m["hits"] < MAX_HITS - 2)
        # The full time again, not what was left of it.
        assert ROUND - 0.1 < trio.current_time() - start < ROUND + 0.5
        await carol.until(lambda m: "falls" in str(m.get("content")))
        await life.listen()
        check_server(server, life)
        # Every blow once: nobody can have lost more than there was, or had it struck twice.
        blows = [line for line in lines(life, "carol") if " hits " in line]
        fallen = next(line for line in lines(life, "carol") if "falls" in line).split()[0]
        assert blows.count(f"{other(fallen)} hits {fallen}.") == MAX_HITS
        assert blows.count(f"{fallen} hits {other(fallen)}.") in (MAX_HITS - 1, MAX_HITS)
        life.close()


def other(name: str) -> str:
    return "bob" if name == "alice" else "alice"


@pytest.mark.parametrize("steps_later", range(12))
async def test_a_kill_in_mid_command(tmp_path: Path, autojump_clock: MockClock, steps_later: int) -> None:
    life, path = Life(), tmp_path / "m.db"
    async with play(path, crash=True) as server:
        await life.connect(server)
        await life.listen()
        for name, client in life.clients.items():
            await client.give("take poker", f"take-{name}")
        for _ in range(steps_later):
            await trio.lowlevel.checkpoint()
    async with play(path) as server:
        await life.connect(server)
        # They ask again with the same ids: whoever has been answered gets the same answer.
        replies = {name: await client.command("take poker", f"take-{name}") for name, client in life.clients.items()}
        (winner,) = [name for name, reply in replies.items() if reply["ok"]]
        await life.listen()
        check_server(server, life)
        assert (await life.clients[winner].command("i"))["content"] == "You carry a poker."
        assert lines(life, "carol").count(f"{winner} takes a poker.") == 1
        life.close()


async def test_a_fight_pauses_while_the_player_is_link_dead_and_ends_with_the_grace(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", linkdead_grace=30) as server:
        alice, bob = [await server.websocket(name) for name in ("alice", "bob")]
        await alice.command("fight bob")
        await bob.command("fight alice")
        bob.close()
        waits = await alice.until_type("presence")
        assert waits["content"].endswith("the connection is lost. The fight waits.")
        count = len(alice.of("fight"))
        over = await alice.until(lambda m: m.get("presence") == "offline")
        assert over["content"] == "bob has left the world. The fight is over."
        assert len(alice.of("fight")) == count
        assert (await alice.command("score"))["content"].endswith("hit points.")
        alice.close()
