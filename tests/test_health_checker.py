"""Who is alive, who is only slow, and who is gone: on wires that can be cut, stalled and mended."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mythos_trio import checker
from mythos_trio.connection import Connection
from mythos_trio.link import Link
from tests.support.games import Disk, Puppet
from tests.support.memory_net import MemoryWire
from tests.support.play import Client, SSEClient, WebSocketClient, World, play
from tests.test_net import eventually

BIG = "x" * 60_000


@pytest.fixture(autouse=True, params=[checker.ASKED_AT_ONCE, 1], ids=["few", "many"])
def asked_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many connections as can all be looked at in each round, and more: those have to be found when they are due."""
    monkeypatch.setattr(checker, "ASKED_AT_ONCE", request.param)


async def entered(world: World, player: str = "ann", query: str = "") -> WebSocketClient:
    client = await world.websocket(player, query)
    await client.until_type("welcome")
    return client


async def listening(world: World, player: str = "ann", query: str = "", **more: Any) -> SSEClient:
    client = await world.sse(player, query, **more)
    await client.until_type("welcome")
    return client


def connection_of(world: World, client: Client) -> Connection:
    return world.server.hub.connections[client.received[0]["connection_id"]]


def far_end(client: Client) -> MemoryWire:
    """The server's end of the client's wire: stall it and nothing arrives at the client."""
    return client.wire._other


def why_waiting(connection: Connection) -> str | None:
    return connection.waiting_for


async def gone(world: World, connection: Connection, within: float) -> float:
    """Wait until the server has given a connection up; how long that took."""
    began = trio.current_time()
    with trio.fail_after(within):
        while connection.id in world.server.hub.connections:
            await trio.sleep(0.05)
    return trio.current_time() - began


async def reading(client: Client, seconds: float) -> None:
    """Read for a while."""
    with trio.move_on_after(seconds):
        while not client.over:
            await client.next()


async def line(world: World, text: str, player: str = "ann", **fields: Any) -> dict[str, Any]:
    return await world.publish(player_id=player, message={"type": "line", "content": text, **fields})


# Signs of life.


@pytest.mark.parametrize("transport", [entered, listening])
async def test_who_is_idle_is_never_timed_out(tmp_path: Path, autojump_clock: MockClock, transport: Any) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), connection_timeout=300) as world:
        ann = await transport(world)
        await reading(ann, 1000)
        assert not ann.over
        await line(world, "still here")
        await ann.until_type("line")
        assert connection_of(world, ann).healthy


@pytest.mark.parametrize("transport", [entered, listening])
@pytest.mark.parametrize("after", [0.1, 7, 31, 100])
async def test_who_vanishes_is_gone_within_the_published_bound(
    tmp_path: Path, autojump_clock: MockClock, transport: Any, after: float
) -> None:
    """HEALTH_CHECK_INTERVAL + PONG_TIMEOUT, whenever the cable is pulled."""
    async with play(tmp_path / "m.db", game=Puppet(), health_check_interval=30, pong_timeout=20) as world:
        ann, bob = await transport(world), await entered(world, "bob")
        connection = connection_of(world, ann)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading, bob, after + 60)
            await reading(ann, after)
            ann.wire.cut()
            assert await gone(world, connection, 60) <= 50
            assert connection.over is not None
            assert connection.over.code == 4012
        assert world.server.hub.presence("ann") == "linkdead"
        assert not bob.over
        assert world.listener.open_wires == [far_end(bob)]


async def test_a_client_that_answers_no_ping_is_told_4012(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        ann.answer_pings = False
        said = await ann.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"]) == (4012, True)
        assert trio.current_time() <= 52


async def test_any_byte_is_a_sign_of_life(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        ann.answer_pings = False
        for _ in range(20):
            await reading(ann, 10)
            await ann.say({"type": "ping"})
        assert not ann.over


async def test_who_has_left_without_a_word_is_noticed_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        for leave in ("close", "reset"):
            for transport in (entered, listening):
                client: Any = await transport(world)
                connection = connection_of(world, client)
                getattr(client.wire, leave)()
                assert await gone(world, connection, 5) < 1


async def test_a_half_open_connection_is_found_by_the_next_message(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The client's machine has started again: it answers with a reset."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        await ann.hear()
        connection = connection_of(world, ann)
        ann.wire.cut()
        ann.wire.reset()
        ann.wire.mend()
        await line(world, "anybody there?")
        assert await gone(world, connection, 60) < 2


async def test_an_sse_client_behind_a_proxy_lives_as_long_as_the_proxy_takes_its_bytes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    settings: dict[str, Any] = {"secret_key": "k" * 32, "trusted_proxies": (ip_network("127.0.0.1"),)}
    async with play(tmp_path / "m.db", game=Puppet(), **settings) as world:
        token = world.server.access.issue("ann")
        ann = await listening(world, query=f"token={token}", headers="X-Forwarded-For: 192.0.2.1\r\n")
        await reading(ann, 600)
        assert not ann.over
        connection = connection_of(world, ann)
        far_end(ann).stall()
        assert await gone(world, connection, 60) <= 50


async def test_a_post_of_its_client_keeps_an_event_stream_alive(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await listening(world)
        connection = connection_of(world, ann)
        far_end(ann).stall()  # its bytes are on a slow way, but its POSTs come
        for _ in range(12):
            await trio.sleep(10)
            body = {"content": "echo x", "connection_id": connection.id}
            status, _ = await world.request("POST", "/api/connections/ann/commands", body)
            assert status == 200
        assert connection.over is None
        assert await gone(world, connection, 60) <= 50


async def test_connection_timeout_is_the_outer_bound(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings: dict[str, Any] = {"connection_timeout": 40, "health_check_interval": 30, "pong_timeout": 600}
    async with play(tmp_path / "m.db", game=Puppet(), **settings) as world:
        ann = await entered(world)
        connection = connection_of(world, ann)
        ann.wire.cut()
        assert 39 <= await gone(world, connection, 60) <= 42


# What was seen.


async def test_a_pong_moves_seen_to_what_was_written_before_its_ping(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings: dict[str, Any] = {"secret_key": "k" * 32, "trusted_proxies": (ip_network("127.0.0.1"),)}
    async with play(tmp_path / "m.db", game=Puppet(), **settings) as world:
        token = world.server.access.issue("ann", ["publish"])
        headers = [(b"X-Forwarded-For", b"192.0.2.1"), (b"Authorization", f"Bearer {token}".encode())]
        ann = await world.websocket("ann", headers=headers)
        await ann.next()
        session = world.server.hub.sessions["ann"]

        async def publish(text: str) -> int:
            body = {"player_id": "ann", "message": {"type": "line", "content": text}}
            path = f"/api/messages?token={token}"
            return int((await world.request("POST", path, body))[1]["seq"])

        one = await publish("one")
        assert session.seen < one  # a proxy stands between: the kernel's word does not count
        await reading(ann, 35)
        assert session.seen == one
        ann.answer_pings = False
        two = await publish("two")
        await reading(ann, 10)
        assert session.seen == one
        assert two > one


async def test_what_never_arrived_was_not_seen(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        for transport in (entered, listening):
            ann: Any = await transport(world, query="")
            await ann.hear(2)  # a round of the checker has marked what it has
            session = world.server.hub.sessions["ann"]
            connection = connection_of(world, ann)
            before = session.seen
            ann.wire.cut()
            await line(world, "lost on the way")
            await gone(world, connection, 60)
            assert session.seen == before
            back = await entered(world)
            await back.until_type("line")
            assert back.lines[-1] == "lost on the way"
            await back.hear()
            back.close()
            await trio.sleep(1)


async def test_bytes_in_a_reset_connection_do_not_count_as_seen(tmp_path: Path, autojump_clock: MockClock) -> None:
    """After a reset the kernel says that nothing is unacknowledged: it has thrown all away."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await listening(world)
        await ann.hear(2)  # a round of the checker has marked what it has
        session = world.server.hub.sessions["ann"]
        before = session.seen
        far_end(ann).stall()
        await line(world, "thrown away")
        ann.wire.reset()
        await trio.sleep(60)
        assert session.connections == {}
        assert session.seen == before


# Slow clients.


async def test_who_never_reads_is_cut_off_and_nobody_else_waits(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=10) as world:
        ann, stream, bob = await entered(world), await listening(world), await entered(world, "bob")
        connections = [connection_of(world, client) for client in (ann, stream)]
        for number in range(8):
            await line(world, f"{number}" + BIG)
            before = trio.current_time()
            await line(world, str(number), "bob")
            await bob.until(lambda m, n=number: m.get("content") == str(n))  # type: ignore[misc]
            assert trio.current_time() - before < 0.1
        for connection in connections:
            assert await gone(world, connection, 60) <= 12
            assert connection.over is not None
            assert connection.over.code == 4008
        # It can come back for all of it.
        back = await entered(world, query="position=1-0")
        await reading(back, 5)
        assert len(back.lines) == 8


async def test_who_reads_slowly_is_only_slow(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=10) as world:
        ann = await listening(world)
        for number in range(20):
            await line(world, f"{number} {BIG}")
        received = b""
        while received.count(b"\n\n") < 20:
            await trio.sleep(4)
            received += await ann.receive()
        assert not far_end(ann).closed
        seqs = [int(text.split(b",")[0]) for text in received.split(b'{"seq":')[1:]]
        assert seqs == sorted(set(seqs))
        assert len(seqs) == 20


async def test_who_is_behind_catches_up_from_memory(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=100) as world:
        ann = await entered(world)
        connection = connection_of(world, ann)
        far_end(ann).stall()
        for number in range(10):
            await line(world, f"{number} {BIG}")
        assert connection.behind > 0
        assert connection.waiting_for == "the client to read"
        far_end(ann).stall(False)
        await reading(ann, 5)
        assert [text.split()[0] for text in ann.lines] == [str(n) for n in range(10)]
        assert connection.behind == 0
        assert why_waiting(connection) is None


async def test_who_is_far_behind_catches_up_from_the_store(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The log in memory holds 1 MiB; forty messages of 60 kB are more."""
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=1000, pong_timeout=1000) as world:
        ann, other = await entered(world), await entered(world)
        far_end(ann).stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading, other, 20)
            for number in range(40):
                await line(world, f"{number} {BIG}")
        log = world.server.hub.sessions["ann"].log
        assert log is not None
        assert len(log) < 20
        far_end(ann).stall(False)
        await reading(ann, 20)
        assert [text.split()[0] for text in ann.lines] == [str(n) for n in range(40)]
        assert ann.numbered == other.numbered
        await line(world, "and live again")
        await ann.until(lambda m: m.get("content") == "and live again")


async def test_where_retention_has_passed_a_slow_client_it_is_told_a_gap(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    settings: dict[str, Any] = {"write_timeout": 1000, "pong_timeout": 1000, "connection_timeout": 5000}
    more: dict[str, Any] = {"message_retention_count": 10, "cleanup_interval": 10}
    async with play(tmp_path / "m.db", game=Puppet(), **settings, **more) as world:
        ann, other = await entered(world), await entered(world)
        far_end(ann).stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading, other, 30)
            for number in range(40):
                await line(world, f"{number} {BIG}")
            await trio.sleep(20)
        far_end(ann).stall(False)
        await reading(ann, 20)
        told = [int(text.split()[0]) for text in ann.lines]
        gaps = ann.of("gap")
        assert [gap["reason"] for gap in gaps] == ["retention"]
        place = ann.received.index(gaps[0])
        seen_before = [m["seq"] for m in ann.received[:place] if "seq" in m]
        seen_after = [m["seq"] for m in ann.received[place:] if "seq" in m]
        assert int(gaps[0]["after"].split("-")[1]) >= seen_before[-1]
        assert int(gaps[0]["position"].split("-")[1]) < seen_after[0]
        assert told == sorted(told)
        assert told[-10:] == list(range(30, 40))
        # Nothing is missing but what the gap says.
        lost = [m["seq"] for m in other.numbered if m["seq"] not in {*seen_before, *seen_after}]
        after, position = (int(gaps[0][name].split("-")[1]) for name in ("after", "position"))
        assert all(after < seq <= position for seq in lost)
        assert not [m for m in other.numbered if after < m["seq"] <= position and m["seq"] not in lost]


async def test_a_reply_waits_for_its_place_behind_a_slow_stream(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=1000, pong_timeout=1000) as world:
        ann = await entered(world)
        far_end(ann).stall()
        for number in range(5):
            await line(world, f"{number} {BIG}")
        await ann.give("line mine", "c1")
        await trio.sleep(1)
        await line(world, "later")
        far_end(ann).stall(False)
        reply = await ann.until_type("reply")
        before = [m["content"].split()[0] for m in ann.received[: ann.received.index(reply)] if "seq" in m]
        assert before[:6] == ["0", "1", "2", "3", "4", "mine"]
        await reading(ann, 2)
        assert ann.lines[-1] == "later"


async def test_heartbeats_do_not_pile_up_for_who_is_slow(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings: dict[str, Any] = {"write_timeout": 5000, "pong_timeout": 5000, "connection_timeout": 50_000}
    async with play(tmp_path / "m.db", game=Puppet(), **settings) as world:
        ann = await entered(world)
        far_end(ann).stall()
        for number in range(4):
            await line(world, f"{number} {BIG}")
        await trio.sleep(1000)
        far_end(ann).stall(False)
        await reading(ann, 5)
        assert len(ann.of("heartbeat")) <= 2


async def test_marks_and_connections_are_written_behind(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Within a second; after a crash a client that names nothing starts after the stored mark."""
    async with play(tmp_path / "m.db", game=Puppet(), crash=True) as world:
        ann = await entered(world)
        await line(world, "seen")
        await ann.until_type("line")
        await ann.say({"type": "ack", "position": ann.position})
        await reading(ann, 1)
        await line(world, "not seen")
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        back = await entered(world)
        await reading(back, 2)
        assert back.lines == ["not seen"]


@pytest.mark.parametrize("transport", [entered, listening])
async def test_a_full_connection_that_is_ended_ends_no_other(
    tmp_path: Path, autojump_clock: MockClock, transport: Any
) -> None:
    """Its own task waits for the client to read, and is told that nobody does any more. That is no crash of
    the session."""
    async with play(tmp_path / "m.db", game=Puppet(), write_timeout=100) as world:
        deaf, ann = await transport(world), await entered(world)
        full = connection_of(world, deaf)
        far_end(deaf).stall()
        for number in range(10):
            await line(world, f"{number} {BIG}")
        assert full.link.unsent
        status, _ = await world.request("DELETE", f"/api/connections/ann/{full.id}")
        assert status == 200
        await reading(ann, 3)  # its last words have a second to go out; then it is closed
        await line(world, "still here")
        await ann.until(lambda message: message.get("content") == "still here")


async def test_a_drain_that_notes_while_notes_are_under_way_forgets_none(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk) as world:
        ann, bob = await entered(world), await entered(world, "bob")
        await trio.sleep(2)
        assert (await world.server.storage.figures())["connections"] == 2
        disk.write_seconds = 0.05
        async with trio.open_nursery() as nursery:
            ann.close()
            await trio.sleep(0.01)
            nursery.start_soon(world.server.checker.note)
            nursery.start_soon(world.server.checker.note)
            await trio.sleep(0.01)
            bob.close()
        disk.write_seconds = 0
        await trio.sleep(2)
        assert (await world.server.storage.figures())["connections"] == 0


async def test_of_many_the_kernel_is_asked_by_turns(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        clients = [await listening(world, f"p{number}") for number in range(6)]
        connections = [connection_of(world, client) for client in clients]
        receipt = await world.publish(broadcast=True, message={"type": "line", "content": "to all"})
        for client in clients:
            await client.until_type("line")
        await trio.sleep(len(clients) + 1)
        assert [connection.session.seen for connection in connections] == [receipt["seq"]] * len(clients)


async def test_nobody_asks_the_kernel_of_who_has_seen_all(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was done each second, also for players to whom nobody spoke."""
    asked: list[Link] = []
    real = Link.unacknowledged

    def unacknowledged(link: Link) -> int | None:
        asked.append(link)
        return real(link)

    monkeypatch.setattr(Link, "unacknowledged", unacknowledged)
    async with play(tmp_path / "m.db", game=Puppet()) as world:

        async def check(times: int) -> None:
            for _ in range(times):
                await world.server.checker.check_all()

        ann, bob = [await listening(world, name) for name in ("ann", "bob")]
        of_ann, of_bob = [connection_of(world, client) for client in (ann, bob)]
        await check(2)
        asked.clear()
        receipt = await world.publish(player_id="ann", message={"type": "line", "content": "to ann"})
        await ann.until_type("line")
        await check(4)
        assert of_ann.session.seen == receipt["seq"]
        assert of_bob.link not in asked
        assert 1 <= asked.count(of_ann.link) <= 3, "once, or again if it was too early"
        bob.close()
        await eventually(lambda: not of_bob.session.connections)
        bob = await listening(world, "bob")
        again = connection_of(world, bob)
        receipt = await world.publish(player_id="bob", message={"type": "line", "content": "to bob"})
        await bob.until_type("line")
        await check(4)
        assert again.session.seen == receipt["seq"]


async def test_a_round_over_many_has_few_turns_if_there_is_nothing_to_look_at(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "SLICE", 1)
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        clients = [await listening(world, f"p{number}") for number in range(6)]
        for client in clients:
            connection_of(world, client).due = trio.current_time() + 60
        began = trio.current_time()
        await world.server.checker.check_all()
        assert trio.current_time() - began == pytest.approx(checker.SLICE_SECONDS)
        for client in clients:
            connection_of(world, client).due = 0
        began = trio.current_time()
        await world.server.checker.check_all()
        assert trio.current_time() - began >= 6 * checker.SLICE_SECONDS - 1e-9
