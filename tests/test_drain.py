"""SIGTERM: the five steps, within DRAIN_TIMEOUT, and what a restart finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mythos_trio.core.rates import FIRST_RETURN_MS, RETURNS_A_SECOND
from mythos_trio.monitor import Stage
from tests.support.games import Disk, Puppet
from tests.support.play import Client, SSEClient, WebSocketClient, World, play


async def entered(world: World, player: str = "ann", query: str = "") -> WebSocketClient:
    client = await world.websocket(player, query)
    await client.until_type("welcome")
    return client


async def listening(world: World, player: str = "ann", query: str = "") -> SSEClient:
    client = await world.sse(player, query)
    await client.until_type("welcome")
    return client


async def stopped(world: World, within: float = 20) -> int:
    """Wait for the server's end; its exit code."""
    with trio.fail_after(within):
        await world.ended.wait()
    return world.server.exit_code


async def test_every_client_is_told_when_to_come_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, stream, bob = await entered(world), await listening(world), await entered(world, "bob")
        began = trio.current_time()
        world.server.stop()
        for client in (ann, stream, bob):
            said = await client.until_over()
            assert said is not None
            assert (said["code"], said["reason"], said["reconnect"]) == (4000, "the server is restarting", True)
            assert said["retry_ms"] >= 500
        assert ann.closed == (4000, "the server is restarting")
        assert stream.retry_ms == stream.of("disconnect")[0]["retry_ms"]  # a browser obeys nothing else
        assert await stopped(world) == 0
        assert trio.current_time() - began < 5


async def test_many_clients_are_told_different_times(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), rate_limit_requests=1000) as world:
        clients = [await entered(world, f"p{number}") for number in range(50)]
        world.server.stop()
        times = []
        for client in clients:
            said = await client.until_over()
            times.append((said or {})["retry_ms"])
        # Evenly: each has a slot of its own, in a time that grows with their number.
        assert sorted((at - FIRST_RETURN_MS) * RETURNS_A_SECOND // 1000 for at in times) == list(range(50))
        assert await stopped(world) == 0


async def test_last_words_have_their_time(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A client whose socket is full when the drain begins still gets all that was on its way, and the farewell."""
    async with play(tmp_path / "m.db", game=Puppet(), max_message_size=1_000_000) as world:
        ann = await entered(world)
        await world.publish(player_id="ann", message={"type": "line", "content": "x" * 500_000})
        (connection,) = world.server.hub.connections.values()
        assert connection.link.unsent
        world.server.stop()
        await trio.sleep(0.5)
        assert (await ann.until_over() or {})["code"] == 4000
        assert len(ann.lines[0]) == 500_000
        assert await stopped(world) == 0


async def test_who_is_being_let_in_is_told_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Its beginning is read from a slow disk, and meanwhile the others are told to go."""
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk, drain_timeout=10) as world:
        ann = await entered(world)
        for number in range(3):
            await ann.command(f"line {number}")
        ann.close()
        await trio.sleep(1)
        disk.read_seconds = 0.8
        late: WebSocketClient | SSEClient

        async def stop_meanwhile() -> None:
            await trio.sleep(0.4)
            world.server.stop()

        for connect in (world.websocket, world.sse):
            async with trio.open_nursery() as nursery:
                if connect == world.websocket:
                    nursery.start_soon(stop_meanwhile)
                late = await connect("ann", "position=1-1")
            said = await late.until_over()
            assert said is not None
            assert (said["code"], said["reconnect"]) == (4000, True)
            assert said["retry_ms"] >= FIRST_RETURN_MS
            assert late.of("welcome") == []
        assert await stopped(world) == 0


async def test_while_it_drains_nothing_new_is_taken(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        await ann.give("sleep 3", "running")
        await ann.give("line waiting", "waiting")
        await trio.sleep(0.5)
        world.server.stop()
        await trio.sleep(0.1)
        assert world.server.monitor is not None
        assert world.server.monitor.stage is Stage.DRAINING
        # What waits, and what comes now.
        await ann.give("line new", "new")
        for id_ in ("waiting", "new"):
            reply = await ann.until(lambda m, i=id_: m.get("id") == i)  # type: ignore[misc]
            assert (reply["ok"], reply["error"]["error_type"]) == (False, "system_error")
        for path, body in (
            ("/api/messages", {"player_id": "ann", "message": {"type": "line", "content": 1}}),
            ("/api/connections/ann/commands", {"content": "line new"}),
        ):
            status, answer = await world.request("POST", path, body)
            assert (status, answer["error_type"]) == (503, "system_error")
        assert (await world.request("GET", "/health/ready"))[0] == 503
        assert (await world.request("GET", "/health"))[0] in (200, 503)
        late = await world.websocket("bob")
        assert late.status == 101
        said = await late.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"]) == (4000, True)
        assert said["retry_ms"] > 0
        stream = await world.sse("bob")
        assert stream.status == 200
        said = await stream.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"]) == (4000, True)
        assert stream.retry_ms == said["retry_ms"]
        # What ran has ended by itself, with its effects and its answer.
        reply = await ann.until(lambda m: m.get("id") == "running")
        assert (reply["ok"], ann.lines) == (True, ["slept"])
        assert (await ann.until_over() or {})["code"] == 4000
        assert await stopped(world) == 0
        assert game.ran == ["sleep 3"]


async def test_a_post_whose_command_waits_is_refused_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    """503, as if it had come now: what asks by status must not take it for an answer."""
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        await ann.give("sleep 3")
        await trio.sleep(0.5)
        answers: list[tuple[int, Any]] = []

        async def ask() -> None:
            answers.append(await world.request("POST", "/api/connections/ann/commands", {"content": "line waits"}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.5)
            world.server.stop()
        ((status, answer),) = answers
        assert (status, answer["error_type"]) == (503, "system_error")
        assert await stopped(world) == 0
        assert game.ran == ["sleep 3"]


async def test_a_refused_post_says_when_to_try_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        await ann.give("sleep 3")
        await trio.sleep(0.5)
        world.server.stop()
        await trio.sleep(0.1)
        client = Client(world.wire())
        await client.send_all(b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        answer = b""
        while data := await client.receive():
            answer += data
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: " in answer.lower()


async def test_a_handler_has_half_of_the_time(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, drain_timeout=10, handler_timeout=100) as world:
        ann = await entered(world)
        await ann.give("wait for-ever", "c1")
        await trio.sleep(0.5)
        began = trio.current_time()
        world.server.stop()
        reply = await ann.until_type("reply")
        assert trio.current_time() - began == pytest.approx(5, abs=0.2)
        assert (reply["ok"], reply["error"]["error_type"]) == (False, "system_error")
        assert (await ann.until_over() or {})["code"] == 4000
        assert await stopped(world) == 0
    async with play(tmp_path / "m.db", game=game) as world:
        game.gate("for-ever").set()
        back = await entered(world)
        assert (await back.command("wait for-ever", "c1"))["ok"] is True  # it had done nothing
        assert back.lines == ["for-ever"]


async def test_what_is_queued_is_stored_delivered_and_answered(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk) as world:
        ann, bob = await entered(world), await entered(world, "bob")
        await ann.hear()
        disk.write_seconds = 2.5  # longer than anybody's patience but that for what is queued
        answers: list[Any] = []
        async with trio.open_nursery() as nursery:

            async def publish() -> None:
                answers.append(await world.publish(player_id="bob", message={"type": "line", "content": "published"}))

            nursery.start_soon(publish)
            await ann.give("line mine", "c1")
            await trio.sleep(0.2)
            world.server.stop()
            reply = await ann.until_type("reply")
            assert (reply["ok"], ann.lines) == (True, ["mine"])
            assert (await bob.until_over() or {})["code"] == 4000
            assert bob.lines == ["published"]
        assert answers[0]["seq"] == bob.numbered[0]["seq"]
        assert await stopped(world) == 0


async def test_a_commit_that_hangs_is_given_up_and_the_exit_code_says_so(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk, drain_timeout=10) as world:
        ann = await entered(world)
        await ann.hear()
        disk.hangs = True
        await ann.give("line lost", "c1")
        await trio.sleep(0.5)
        began = trio.current_time()
        world.server.stop()
        assert (await ann.until_over() or {})["code"] == 4000
        assert await stopped(world) != 0
        assert trio.current_time() - began <= 10.5
        assert ann.lines == []
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        back = await entered(world, query=f"position={ann.position}")
        assert (await back.command("line lost", "c1"))["ok"] is True
        assert back.lines == ["lost"]


async def test_a_store_that_fails_at_the_end_gives_another_exit_code(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk) as world:
        ann = await entered(world)
        await ann.hear()
        disk.no_writes = True
        world.server.stop()
        assert (await ann.until_over() or {})["code"] == 4000
        assert await stopped(world) != 0


async def test_a_second_signal_hurries(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), drain_timeout=100, handler_timeout=1000) as world:
        ann = await entered(world)
        await ann.give("wait for-ever", "c1")
        await trio.sleep(0.5)
        world.server.stop()
        await trio.sleep(1)
        assert not ann.over
        began = trio.current_time()
        world.server.stop()
        assert (await ann.until_over() or {})["code"] == 4000
        assert await stopped(world) == 0
        assert trio.current_time() - began < 4


async def test_a_client_that_takes_no_last_words_does_not_hold_up_the_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, bob = await entered(world), await entered(world, "bob")
        ann.wire.cut()
        bob.wire._other.stall()
        began = trio.current_time()
        world.server.stop()
        assert await stopped(world) == 0
        assert trio.current_time() - began < 5


async def test_a_drain_owes_nobody_anything(tmp_path: Path, autojump_clock: MockClock) -> None:
    """After a restart who was online, or link-dead, is link-dead with a full grace."""
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, linkdead_grace=10) as world:
        await entered(world)
        bob = await entered(world, "bob")
        eve = await entered(world, "eve")
        eve.close()
        await trio.sleep(15)
        bob.close()
        await trio.sleep(5)
        assert world.server.hub.presence("eve") == "offline"
        joined, left = game.told[:3], game.told[3:]
        assert sorted(joined) == ["join ann", "join bob", "join eve"]
        assert left == ["linkdead eve", "leave (linkdead) eve", "linkdead bob"]
        world.server.stop()
        assert await stopped(world) == 0
    game.told.clear()
    async with play(tmp_path / "m.db", game=game, linkdead_grace=30) as world:
        assert world.server.hub.present() == ["ann", "bob"]
        await trio.sleep(29)
        assert world.server.hub.presence("ann") == world.server.hub.presence("bob") == "linkdead"
        assert game.told == []
        await entered(world)
        await trio.sleep(5)
        assert world.server.hub.present() == ["ann"]
        assert game.told == ["leave (linkdead) bob"]


async def test_a_drain_makes_no_new_epoch_and_no_gap(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        await ann.command("line one")
        world.server.stop()
        await ann.until_over()
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        await world.publish(player_id="ann", message={"type": "line", "content": "two"})
        back = await entered(world, query=f"position={ann.position}")
        assert (back.received[0]["epoch"], back.received[0]["resumed"]) == (1, True)
        await back.until_type("line")
        assert (back.lines, back.of("gap")) == (["two"], [])


async def test_a_kill_in_the_middle_of_a_drain_is_an_ordinary_crash(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, crash=True) as world:
        ann = await entered(world)
        await ann.command("line one")
        await ann.give("sleep 3", "c1")
        await trio.sleep(0.5)
        world.server.stop()
        await trio.sleep(1)
    async with play(tmp_path / "m.db", game=game) as world:
        back = await entered(world, query=f"position={ann.position}")
        assert (await back.command("sleep 1", "c1"))["ok"] is True
        assert back.lines == ["slept"]


async def test_what_has_come_on_a_kept_connection_when_the_drain_begins_is_answered(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It was in the kernel: who let the idle connections go did not look."""
    body = json.dumps({"player_id": "ann", "message": {"type": "line", "content": 1}}).encode()
    request = b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        clients = [Client(world.wire()) for _ in range(20)]
        for client in clients:
            await client.send_all(request)
            assert (await client.receive()).startswith(b"HTTP/1.1 202 ")
        await trio.sleep(1)
        for client in clients:
            client.wire.send(request)
        world.server.stop()
        statuses = {(await client.receive())[9:12] for client in clients}
    assert statuses <= {b"202", b"503"}
