"""Slow clients, step by step: coalesced, from the store, behind a gap, cut off. And what may be skipped for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mythos_trio.connection import Connection
from mythos_trio.testing.network import MemoryWire
from tests.support.conflicts import TRANSPORTS as WIRES
from tests.support.conflicts import Connect, Drop, Pause, Publish, Step, Subscribe, Wait, run
from tests.support.games import Disk, Puppet
from tests.support.play import Client, World, play

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "sse"])
# A client that is stalled on purpose is not to be given up for being silent.
PATIENT: dict[str, Any] = {"write_timeout": 5000, "pong_timeout": 5000, "connection_timeout": 50_000}
BIG = "x" * 60_000


async def opened(world: World, transport: str, player: str = "ann", query: str = "") -> Any:
    client: Any = await (world.websocket if transport == "websocket" else world.sse)(player, query)
    await client.until_type("welcome")
    return client


def far_end(client: Client) -> MemoryWire:
    return client.wire._other


def connection_of(world: World, client: Client) -> Connection:
    return world.server.hub.connections[client.received[0]["connection_id"]]


def count_writes(client: Client) -> list[int]:
    """From now on the size of each piece that the kernel took of what the server wrote."""
    wire, sizes = far_end(client), list[int]()
    send = wire.send

    def counted(data: bytes | memoryview, /) -> int:
        sizes.append(send(data))
        return sizes[-1]

    wire.send = counted  # type: ignore[method-assign]
    return sizes


async def line(world: World, text: object) -> dict[str, Any]:
    return await world.publish(player_id="ann", message={"type": "line", "content": text})


def bar_of(hits: int, key: str = "hp", **to: Any) -> dict[str, Any]:
    return (to or {"player_id": "ann"}) | {"message": {"type": "bar", "content": hits, "replace_key": key}}


async def bar(world: World, hits: int, key: str = "hp", **to: Any) -> dict[str, Any]:
    return await world.publish(**bar_of(hits, key, **to))


async def block(world: World, client: Client) -> None:
    """Nothing arrives at the client any more, and its kernel is full."""
    far_end(client).stall()
    while not connection_of(world, client).link.unsent:
        await line(world, BIG)


def told(client: Client) -> list[tuple[Any, int]]:
    """What came, but for what `block` has sent: the content, and for how many it stands."""
    return [(m["content"], m.get("replaces", 0)) for m in client.numbered if m["content"] != BIG]


def bars(client: Client) -> list[tuple[Any, int]]:
    return [(m["content"], m.get("replaces", 0)) for m in client.of("bar")]


async def performance(world: World) -> dict[str, Any]:
    _, answer = await world.request("GET", "/monitoring/performance")
    assert isinstance(answer, dict)
    return answer


# Step by step.


@TRANSPORTS
async def test_what_has_gathered_goes_out_in_one_write(
    tmp_path: Path, autojump_clock: MockClock, transport: str
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world, transport)
        await block(world, ann)
        for number in range(30):
            await line(world, number)
        assert connection_of(world, ann).behind == 30
        writes = count_writes(ann)
        far_end(ann).stall(False)
        await ann.hear()
        assert told(ann) == [(number, 0) for number in range(30)]
        assert len(writes) == 2  # the rest of what did not fit, and the thirty
        assert writes[1] > 30 * 100


@TRANSPORTS
async def test_a_client_that_reads_ever_less_goes_down_all_steps_and_nobody_else_waits(
    tmp_path: Path, autojump_clock: MockClock, transport: str
) -> None:
    disk = Disk()
    settings: dict[str, Any] = {"message_retention_count": 20, "cleanup_interval": 1000}
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk, **PATIENT, **settings) as world:
        ann, bob = await opened(world, transport), await opened(world, "sse", "bob")
        connection = connection_of(world, ann)

        async def others_do_not_wait(step: str) -> None:
            before = trio.current_time()
            await world.publish(player_id="bob", message={"type": "line", "content": step})
            await bob.until(lambda m: m.get("content") == step)
            assert trio.current_time() - before < 0.1

        # From memory: the store is not asked.
        await block(world, ann)
        before = disk.reads
        for number in range(5):
            await line(world, number)
        await others_do_not_wait("memory")
        far_end(ann).stall(False)
        await ann.hear()
        assert disk.reads == before
        assert told(ann) == [(number, 0) for number in range(5)]
        assert connection.behind == 0

        # From the store: the log holds 1 MiB.
        await block(world, ann)
        for number in range(5, 35):
            await line(world, f"{number} {BIG}")
        await others_do_not_wait("store")
        before = disk.reads
        far_end(ann).stall(False)
        await ann.hear()
        assert disk.reads > before
        assert [str(content).split()[0] for content, _ in told(ann)] == [str(number) for number in range(35)]
        assert ann.of("gap") == []

        # Behind retention: told, once, where it is missing.
        await block(world, ann)
        lost_or_not = [await line(world, f"{number} {BIG}") for number in range(35, 75)]
        await others_do_not_wait("gap")
        await trio.sleep(1001)
        far_end(ann).stall(False)
        await ann.hear()
        (gap,) = ann.of("gap")
        assert gap["reason"] == "retention"
        place = ann.received.index(gap)
        last_before = max(m["seq"] for m in ann.received[:place] if "seq" in m)
        first_after = next(m["seq"] for m in ann.received[place:] if "seq" in m)
        after, position = (int(gap[name].split("-")[1]) for name in ("after", "position"))
        assert last_before <= after < lost_or_not[-21]["seq"] <= position < first_after
        came = {m["seq"] for m in ann.numbered}
        assert [m["seq"] in came for m in lost_or_not[-20:]] == [True] * 20
        assert all(after < m["seq"] <= position for m in lost_or_not if m["seq"] not in came)
        await line(world, "live again")
        await ann.until(lambda m: m.get("content") == "live again")
        assert connection.behind == 0

        # Not at all: cut off by a reset.
        await block(world, ann)
        blocked = trio.current_time()
        while connection.over is None:
            await trio.sleep(1)
        assert trio.current_time() - blocked == pytest.approx(PATIENT["write_timeout"], abs=5)
        assert connection.over.code == 4008
        assert far_end(ann).was_reset


@TRANSPORTS
@pytest.mark.parametrize(("bytes_a_second", "stays"), [(6700, True), (6400, False)])
async def test_the_kernel_has_the_write_timeout_for_each_64_kib(
    tmp_path: Path, autojump_clock: MockClock, transport: str, bytes_a_second: int, stays: bool
) -> None:
    """65,536 bytes in 10 s: who reads just enough for that is only slow, for as long as it likes."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await opened(world, transport)
        connection = connection_of(world, ann)
        for _ in range(50):
            await line(world, BIG)
        for _ in range(300):
            await trio.sleep(1)
            if connection.over is not None:
                break
            taken = 0
            while taken < bytes_a_second and ann.wire.unread():
                taken += len(ann.wire.recv(bytes_a_second - taken))
        if stays:
            assert connection.over is None
            assert connection.waiting_for == "the client to read"
        else:
            assert connection.over is not None
            assert connection.over.code == 4008


@TRANSPORTS
async def test_who_reads_slowly_what_the_kernel_has_is_only_slow(
    tmp_path: Path, autojump_clock: MockClock, transport: str
) -> None:
    """Nothing waits with us, but our ping is behind 120 kB: at 2.25 kB a second it is read after 53 seconds."""
    async with play(tmp_path / "m.db", game=Puppet(), health_check_interval=10, pong_timeout=40) as world:
        ann = await opened(world, transport)
        connection = connection_of(world, ann)
        for _ in range(2):
            await line(world, BIG)
        assert connection.waiting_for is None
        data = b""
        while data.count(BIG.encode()) < 2:
            await trio.sleep(1)
            assert connection.over is None
            if ann.wire.unread():
                data += ann.wire.recv(2250)
        # And who stops reading is gone in time, as ever.
        # (On an event stream its kernel's acknowledgements are all that can be seen.)
        if transport == "websocket":
            began = trio.current_time()
            while connection.over is None:
                await trio.sleep(1)
            assert trio.current_time() - began <= 52


# What may be skipped.


@TRANSPORTS
async def test_a_health_bar_is_not_replayed_forty_times_to_who_is_behind(
    tmp_path: Path, autojump_clock: MockClock, transport: str
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world, transport)
        await block(world, ann)
        for number in range(40):
            await bar(world, number)
            if number % 10 == 0:
                await line(world, f"at {number}")
        far_end(ann).stall(False)
        await ann.hear()
        assert told(ann) == [("at 0", 0), ("at 10", 0), ("at 20", 0), ("at 30", 0), (39, 39)]
        await bar(world, 40)
        await ann.until(lambda m: m.get("content") == 40)
        assert bars(ann)[-1] == (40, 0)  # it keeps up again
        # It is counted.
        status, answer = await world.request("GET", "/api/connections/ann")
        assert status == 200
        assert answer["connections"][transport]["connections"][0]["replaced"] == 39
        stats = answer["message_delivery_stats"]
        assert (stats["replaced"], stats["sent"]) == (39, stats["delivered"] + 39)
        assert stats["delivered"] == len(ann.numbered)
        assert (await performance(world))["message_delivery"]["replaced"] == 39
        # And known, number by number.
        skipped = connection_of(world, ann).replaced
        last = next(m["seq"] for m in ann.of("bar") if m["content"] == 39)
        assert [skipped.by(m["seq"]) for m in ann.numbered] == [None] * len(ann.numbered)
        assert skipped.by(last - 1) == last


@TRANSPORTS
@pytest.mark.parametrize("from_log", [False, True])
async def test_nor_to_who_comes_back(tmp_path: Path, autojump_clock: MockClock, transport: str, from_log: bool) -> None:
    """What it missed comes from the store, or from the log if another connection keeps one."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await opened(world, transport)
        await bar(world, -1)
        await ann.until_type("bar")
        other = await opened(world, "sse") if from_log else None
        ann.close()
        for number in range(40):
            await bar(world, number)
        await line(world, "end")
        back = await opened(world, transport, query=f"position={ann.position}")
        await back.hear()
        assert told(back) == [(39, 39), ("end", 0)]
        if other is not None:
            await other.hear()
            assert [content for content, n in bars(other) if n == 0][-40:] == list(range(40))
            assert (await performance(world))["message_delivery"]["replaced"] == 39
            _, answer = await world.request("GET", "/api/connections/ann")
            assert answer["message_delivery_stats"]["replaced"] == 0  # the player has had them all


@TRANSPORTS
async def test_who_keeps_up_gets_every_one(tmp_path: Path, autojump_clock: MockClock, transport: str) -> None:
    """Also where several come in one round of writing: keeping up is not being slow."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await opened(world, transport)
        status, _ = await world.request("POST", "/api/messages", [bar_of(number) for number in range(5)])
        assert status == 202
        await bar(world, 5)
        await ann.hear()
        assert bars(ann) == [(number, 0) for number in range(6)]
        assert (await performance(world))["message_delivery"]["replaced"] == 0


async def test_the_bar_of_a_channel_is_not_the_players_own(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world, "websocket")
        await ann.command("join inn")
        await block(world, ann)
        for hits in (1, 2):
            await bar(world, hits)
            await bar(world, 10 * hits, channel="inn")
            await bar(world, 100 * hits, broadcast=True)
            await bar(world, 1000 * hits, key="mana")
        far_end(ann).stall(False)
        await ann.hear()
        assert bars(ann) == [(2, 1), (20, 1), (200, 1), (2000, 1)]


@TRANSPORTS
async def test_of_what_does_not_fit_in_one_write_nothing_is_skipped_for_a_later_one(
    tmp_path: Path, autojump_clock: MockClock, transport: str
) -> None:
    """Between two writes a position may be named, and what replaces a message must then have come."""
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world, transport)
        await block(world, ann)
        for number in range(6):
            await bar(world, number)
            await line(world, f"{number}{'y' * 25_000}")
        far_end(ann).stall(False)
        await ann.hear()
        assert len(ann.of("line")) >= 6
        came = bars(ann)
        assert 1 < len(came) < 6
        assert sum(1 + n for _, n in came) == 6
        assert came[-1][0] == 5


async def test_a_reply_does_not_overtake_what_its_command_has_changed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world, "websocket")
        await block(world, ann)
        await bar(world, 1)
        await ann.give("line mine", "c1")
        await trio.sleep(1)
        await bar(world, 2)
        far_end(ann).stall(False)
        reply = await ann.until_type("reply")
        position = int(reply["position"].split("-")[1])
        assert [(content, n) for content, n in told(ann)] == [("mine", 0), (2, 1)]
        mine, newer = ann.numbered[-2:]
        assert mine["seq"] <= position <= newer["seq"]


async def test_a_reply_keeps_its_place_in_what_is_read_from_the_store(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world, "websocket")
        await block(world, ann)
        for number in range(5):
            await line(world, f"{number} {BIG}")
        await ann.give("line mine", "c1")
        await trio.sleep(1)
        for number in range(30):  # more than the log holds
            await line(world, f"{number} {BIG}")
        far_end(ann).stall(False)
        reply = await ann.until_type("reply")
        before = [str(m["content"]).split()[0] for m in ann.numbered if m["content"] != BIG]
        assert before[:6] == ["0", "1", "2", "3", "4", "mine"]
        assert ann.received[-1] is reply
        assert len(before) < 30  # it did not wait for the head either


async def test_a_client_that_leaves_in_the_middle_of_a_write_gets_the_bar_when_it_is_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It has been sent what came after the old bar, but not what replaces it."""
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world, "sse")
        await block(world, ann)
        await bar(world, 1)
        await line(world, "y" * 40_000)
        await line(world, "z" * 20_000)
        await bar(world, 2)
        far_end(ann).stall(False)
        await ann.until(lambda m: str(m.get("content")).startswith("y"))
        assert bars(ann) == []
        ann.wire.reset()
        back = await opened(world, "sse", query=f"position={ann.position}")
        await back.hear()
        assert [str(content)[:1] for content, _ in told(back)] == ["z", "2"]
        assert bars(back) == [(2, 0)]  # on this connection nothing was skipped


# Any history: what each connection was sent is held against what was stored (`tests.support.merge`): all without
# a key once and in order, each `replaces` the number of those that were skipped for it, and the view of each key.

pages = st.integers(0, 1)
wires = st.sampled_from(WIRES)
pauses: st.SearchStrategy[Pause] = st.sampled_from(("done", "done", 0, 3, 20, "quiet"))
# The first of each is what a failure is shrunk to.
publishes = st.builds(
    Publish,
    st.lists(st.sampled_from(("ann", "c1", "*")), min_size=1, max_size=6).map(tuple),
    bar=st.sampled_from((True, True, False)),
)
slips = st.builds(
    Drop, st.just("ann"), pages, wires, how=st.sampled_from(("mend", "stall", "stall", "sip", "sip", "sip", "reset"))
)
returns = st.builds(
    Connect,
    st.just("ann"),
    pages,
    wires,
    position=st.sampled_from(("own", "old", "zero", "none")),
    narrow=st.booleans(),
)
kinds: list[st.SearchStrategy[Step]] = [*[publishes] * 6, *[slips] * 4, *[returns] * 2, st.just(Wait(8.0))]
steps: st.SearchStrategy[Step] = st.sampled_from(kinds).flatmap(lambda kind: kind)


@pytest.mark.timeout(1800)
@settings(max_examples=60, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(
    wires,
    st.lists(st.tuples(steps, pauses), min_size=4, max_size=25),
    st.sampled_from((4, 12)),
    st.sampled_from((3, 8)),
    st.sampled_from((65536, 400)),
    st.integers(0, 2**16),
)
def test_any_history_of_a_slow_client_keeps_the_promise(
    first: Any, history: list[tuple[Step, Pause]], log: int, chunk: int, write: int, seed: int
) -> None:
    begin: list[tuple[Step, Pause]] = [
        (Connect("ann", 0, first, narrow=True), "quiet"),
        (Subscribe("ann", 0, "c1", by="post"), "done"),
        (Drop("ann", 0, first, "stall"), "done"),
    ]
    run(begin + history, seed, log=log, chunk=chunk, write=write)
