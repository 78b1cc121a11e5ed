"""Rounds: who keeps up is written in cohorts, who does not from a cursor of its own; each message once, in order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mythos_trio import logs, rounds
from mythos_trio.connection import Connection
from mythos_trio.core.backlog import CHUNK_BYTES
from mythos_trio.dispatcher import Dispatcher
from tests.support.games import Puppet
from tests.support.play import Client, World, play

SIZE = 3


@pytest.fixture(autouse=True)
def small_cohorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few clients are many."""
    monkeypatch.setattr(rounds, "SIZE", SIZE)
    monkeypatch.setattr(rounds, "AT_ONCE", 2 * SIZE)


async def opened(world: World, player: str, transport: str = "websocket", query: str = "") -> Any:
    client: Any = await (world.websocket if transport == "websocket" else world.sse)(player, query)
    await client.until_type("welcome")
    return client


async def crowd(world: World, count: int) -> list[Any]:
    """Players p0, p1 … on both transports in turn."""
    kinds = itertools.cycle(("websocket", "sse"))
    return [await opened(world, f"p{number}", next(kinds)) for number in range(count)]


def connection_of(world: World, client: Client) -> Connection:
    return world.server.hub.connections[client.received[0]["connection_id"]]


def everybody(content: object) -> dict[str, Any]:
    return {"broadcast": True, "message": {"type": "line", "content": content}}


def player(name: str, content: object) -> dict[str, Any]:
    return {"player_id": name, "message": {"type": "line", "content": content}}


def channel(name: str, content: object) -> dict[str, Any]:
    return {"channel": name, "message": {"type": "line", "content": content}}


async def batch(world: World, *publications: dict[str, Any]) -> None:
    status, answer = await world.request("POST", "/api/messages", list(publications))
    assert status == 202, answer


async def lines(client: Client) -> list[Any]:
    return [m["content"] for m in await client.hear() if m["type"] == "line"]


async def subscribed(world: World, name: str, to: str) -> None:
    status, _ = await world.request("POST", f"/api/connections/{name}/subscriptions", {"subscribe": [to]})
    assert status == 200


async def test_what_a_round_has_written_is_held_without_frames(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A log is of 1,000 messages: with the frames of both transports it took three times as much."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        clients = await crowd(world, 2)
        await batch(world, everybody("x" * 1000), player("p0", "x" * 1000))
        assert [len(await lines(client)) for client in clients] == [2, 1]
        log = world.server.hub.sessions["p0"].log
        assert log is not None
        log.pull()
        held = list(log.after(0))
        assert len(held) == 2
        assert all(m._websocket is None and m._sse is None and not m.players for m in held)
        assert all(1 <= m.receivers <= 2 for m in held)


async def test_everybody_and_somebody_in_one_round(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        clients = await crowd(world, 4 * SIZE)
        await subscribed(world, "p1", "ooc")
        await batch(world, everybody(1), player("p0", 2), channel("ooc", 3), everybody(4))
        assert [await lines(client) for client in clients[:3]] == [[1, 2, 4], [1, 3, 4], [1, 4]]
        assert all(connection_of(world, client).cohort is not None for client in clients), "all keep up again"
        await world.publish(**everybody(5))
        heard = [await lines(client) for client in clients]
        assert heard == [[5]] * 3 + [[1, 4, 5]] * (4 * SIZE - 3)


async def test_more_than_are_written_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        clients = await crowd(world, 4 * SIZE)
        for number in range(4 * SIZE):
            await subscribed(world, f"p{number}", "ooc")
        await batch(world, channel("ooc", 1), channel("ooc", 2))
        await world.publish(**channel("ooc", 3))
        assert [await lines(client) for client in clients] == [[1, 2, 3]] * (4 * SIZE)
        _, stats = await world.request("GET", "/api/connections/p5")
        assert stats["message_delivery_stats"]["delivered"] == 3


async def test_what_rounds_wrote_is_counted_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        await opened(world, "ann")
        second = await opened(world, "ann", "sse")
        await subscribed(world, "ann", "ooc")
        for number in range(5):
            await world.publish(**everybody(number))
            await world.publish(**channel("ooc", number))
            await world.publish(**player("ann", number))
            await world.publish(**player("bob", "nothing of ann's"))
        second.close()
        await trio.sleep(5)
        await world.publish(**everybody("after"))
        _, found = await world.request("GET", "/api/connections/ann")
        assert found["message_delivery_stats"]["delivered"] == 16
        await trio.sleep(120)
        _, found = await world.request("GET", "/api/connections/ann")
        assert found["message_delivery_stats"]["acknowledged"] == 16, "the kernel has told"


async def test_a_client_that_stops_reading_gets_the_rest_of_a_send_and_then_all_else(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=5000, pong_timeout=5000) as world:
        clients = await crowd(world, 2 * SIZE)
        slow = clients[0]
        slow.wire.other.stall()
        for number in range(40):
            await world.publish(**everybody([number, "x" * 10_000]))
        connection = connection_of(world, slow)
        assert (connection.cohort, connection.waiting_for) == (None, "the client to read")
        slow.wire.other.stall(False)
        assert [number for number, _ in await lines(slow)] == list(range(40))
        assert connection.cohort is not None, "it keeps up again"
        await world.publish(**everybody("all"))
        assert await lines(slow) == ["all"]


async def test_a_link_that_breaks_in_a_round_concerns_nobody_else(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        clients = await crowd(world, 2 * SIZE)
        position = clients[0].position
        clients[0].wire.reset()
        await world.publish(**everybody(1))
        assert [await lines(client) for client in clients[1:]] == [[1]] * (2 * SIZE - 1)
        back = await opened(world, "p0", query=f"position={position}")
        assert await lines(back) == [1]


async def test_more_than_a_topic_holds_comes_from_the_store(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=5000, pong_timeout=5000) as world:
        slow, quick = await opened(world, "slow"), await opened(world, "quick")
        slow.wire.other.stall()
        await world.publish(**everybody(["x" * 60_000]))
        await world.publish(**everybody(["x" * 60_000]))
        await world.publish(**everybody(["x" * 60_000]))
        for number in range(0, 3000, 500):
            await batch(world, *(everybody(number + i) for i in range(500)))
            await batch(world, player("slow", f"own {number}"))
        slow.wire.other.stall(False)
        heard = await lines(slow)
        wanted = [[number + i for i in range(500)] + [f"own {number}"] for number in range(0, 3000, 500)]
        assert heard[3:] == [*itertools.chain(*wanted)]
        assert len(await lines(quick)) == 3003
        _, found = await world.request("GET", "/api/connections/quick")
        assert found["message_delivery_stats"]["delivered"] == 3003


KINDS = st.sampled_from(["everybody", "few", "mixed", "leave", "come", "stop", "go", "pass"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(KINDS, st.integers(0, 8)), max_size=25))
def test_whatever_happens_in_between_each_gets_all_of_its_own_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    trio.run(_act, tmp_path_factory.mktemp("rounds"), steps, clock=MockClock(autojump_threshold=0))


async def _act(path: Path, steps: list[tuple[str, int]]) -> None:
    async with play(path / "m.db", game=Puppet(), write_timeout=5000, pong_timeout=5000) as world:
        clients = await crowd(world, 8)
        wanted: list[list[Any]] = [[] for _ in clients]
        heard: list[list[Any]] = [[] for _ in clients]
        number = 0

        def say(publications: list[dict[str, Any]], who: int | None) -> list[dict[str, Any]]:
            nonlocal number
            number += 1
            for index, of in enumerate(wanted):
                if who in (None, index):
                    of.append(number)
            text = [number, "x" * 3000]
            return [*publications, everybody(text) if who is None else player(f"p{who}", text)]

        queue, to_publish = trio.open_memory_channel[list[dict[str, Any]]](len(steps))

        async def publisher() -> None:
            async for publications in to_publish:
                await batch(world, *publications)

        async with trio.open_nursery() as nursery, queue:
            nursery.start_soon(publisher)
            for kind, which in steps:
                who = which % len(clients)
                if kind in ("leave", "come"):
                    # Its place is kept by the store: who comes back names where it was.
                    heard[who] += await lines(clients[who])
                    position = clients[who].position
                    clients[who].close()
                    clients[who] = await opened(world, f"p{who}", query=f"position={position}")
                elif kind in ("stop", "go"):
                    clients[who].wire.other.stall(kind == "stop")
                elif kind == "pass":
                    await trio.sleep(which)
                else:
                    publications = say([], None if kind == "everybody" else who)
                    for _ in range(which if kind == "mixed" else 0):
                        publications = say(publications, None if number % 2 else number % len(clients))
                    queue.send_nowait(publications)
                    await trio.lowlevel.checkpoint()
        for index, client in enumerate(clients):
            client.wire.other.stall(False)
            heard[index] += await lines(client)
        assert [[number for number, _ in of] for of in heard] == wanted


async def test_what_waited_in_the_store_has_a_line_each(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await opened(world, "ann")
        ann.close()
        await trio.sleep(3)
        sent = [await world.publish(**player("ann", 1))]
        await trio.sleep(10)
        sent += [await world.publish(**player("ann", number)) for number in (2, 3)]
        with logs.capture() as lines_:
            back = await opened(world, "ann")
            assert await lines(back) == [1, 2, 3]
        told = [line for line in lines_ if line["event"] == "Message delivered"]
        assert [line["message_id"] for line in told if line["mail"]] == [
            answer["id"] for answer in [*sent[1:], sent[0]]
        ]
        assert [line["level"] for line in told] == ["INFO", "INFO", "WARNING"], "more than a second is slow"
        assert all(line["player_id"] == "ann" and line["receivers"] == 1 for line in told)


async def test_a_round_costs_who_does_not_read_no_more_than_a_chunk(tmp_path: Path, autojump_clock: MockClock) -> None:
    """All of a commit was joined for each, and what the kernel did not take was kept: megabytes for a client."""
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=5000, pong_timeout=5000) as world:
        clients = await crowd(world, SIZE)
        for number, client in enumerate(clients):
            await subscribed(world, f"p{number}", "ooc")
            client.wire.other.stall()
        own = [player(f"p{number}", "own") for number in range(SIZE)]
        await batch(world, *(channel("ooc", "x" * 5000) for _ in range(100)), *own)
        await batch(world, *(everybody("y" * 5000) for _ in range(100)))
        assert max(connection_of(world, client).link.unsent for client in clients) <= 2 * CHUNK_BYTES
        for client in clients:
            client.wire.other.stall(False)
            assert await lines(client) == ["x" * 5000] * 100 + ["own"] + ["y" * 5000] * 100


async def test_who_does_not_read_is_spared_what_is_replaced_in_a_round(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=5000, pong_timeout=5000) as world:
        ann = await opened(world, "ann")
        ann.wire.other.stall()
        text = {"type": "line", "replace_key": "hp"}
        await batch(world, *({"player_id": "ann", "message": {**text, "content": [n, "x" * 5000]}} for n in range(300)))
        ann.wire.other.stall(False)
        heard = await lines(ann)
        assert len(heard) < 30
        assert heard[-1][0] == 299


async def test_a_session_counts_once_though_one_of_its_connections_is_ahead_of_the_round(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        lead, other = await opened(world, "ann"), await opened(world, "ann", "sse")
        apply, ahead = Dispatcher._apply, connection_of(world, other)

        async def apply_and_pause(self: Dispatcher, *more: Any) -> Any:
            applied = await apply(self, *more)
            ahead.offer_heartbeat()
            return applied

        monkeypatch.setattr(Dispatcher, "_apply", apply_and_pause)
        with logs.capture() as found:
            await world.publish(**everybody(1))
            assert [await lines(lead), await lines(other)] == [[1], [1]]
        (line,) = [line for line in found if line["event"] == "Message delivered"]
        assert (line["receivers"], line["players"]) == (1, ["ann"])
