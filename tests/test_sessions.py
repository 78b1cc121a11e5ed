"""Sessions: their four states, presence, switches, crashes, and what a player's connections may do to each other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from mythos_trio.core.data import player_key
from mythos_trio.core.session import State
from mythos_trio.core.transaction import SetTimer
from mythos_trio.game import Game, Player
from mythos_trio.hub import Hub
from tests.support.games import Disk, Puppet
from tests.support.play import Client, SSEClient, WebSocketClient, World, play


async def entered(world: World, player: str = "ann", query: str = "") -> WebSocketClient:
    """A client that has been welcomed."""
    client = await world.websocket(player, query)
    await client.until_type("welcome")
    return client


async def listening(world: World, player: str = "ann", query: str = "", **more: Any) -> SSEClient:
    client = await world.sse(player, query, **more)
    await client.until_type("welcome")
    return client


def session_id(client: Client) -> str:
    return str(client.received[0]["session_id"])


async def end_of(client: Client) -> Any:
    """The code that the client was told at the end."""
    said = await client.until_over()
    return None if said is None else said["code"]


async def status_of(world: World, player: str = "ann") -> str:
    status, answer = await world.request("GET", f"/api/connections/{player}")
    assert status == 200
    return str(answer["presence"]["status"])


async def post(world: World, path: str, body: object) -> tuple[int, Any]:
    return await world.request("POST", f"/api/connections/ann/{path}", body)


# The four states.


async def test_a_session_goes_online_link_dead_offline_and_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, linkdead_grace=60) as world:
        assert await status_of(world) == "offline"
        ann, stream = await entered(world), await listening(world)
        assert await status_of(world) == "online"
        ann.close()
        await trio.sleep(1)
        assert await status_of(world) == "online"  # one connection is enough
        stream.close()
        await trio.sleep(1)
        assert await status_of(world) == "linkdead"
        back = await entered(world)
        assert session_id(back) == session_id(ann)
        assert await status_of(world) == "online"
        back.close()
        await trio.sleep(59)
        assert await status_of(world) == "linkdead"
        await trio.sleep(3)
        assert await status_of(world) == "offline"
        assert "ann" not in world.server.hub.sessions
        again = await entered(world)
        assert session_id(again) == session_id(ann)
        await again.hear()
        assert game.told == [
            "join ann",
            "linkdead ann",
            "return ann",
            "linkdead ann",
            "leave (linkdead) ann",
            "join ann",
        ]


async def test_coming_back_gives_a_full_grace_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), linkdead_grace=60) as world:
        for _ in range(3):
            ann = await entered(world)
            ann.close()
            await trio.sleep(50)
            assert await status_of(world) == "linkdead"


async def test_a_visit_of_an_instant_gives_a_full_grace_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A connection that is attached and gone before any other task of the session has run."""

    class Instant:
        id = "instant"
        attached = False
        link = SimpleNamespace(on_express=None)

        def leave_cohort(self) -> None: ...

    async with play(tmp_path / "m.db", game=Puppet(), linkdead_grace=60) as world:
        ann = await entered(world)
        ann.close()
        await trio.sleep(50)
        session, connection = world.server.hub.sessions["ann"], cast(Any, Instant())
        session.attach(connection)
        session.detach(connection)
        await trio.sleep(50)
        assert await status_of(world) == "linkdead"
        await trio.sleep(20)
        assert await status_of(world) == "offline"


async def test_a_link_dead_that_nobody_was_told_of_cancels_out(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        await ann.give("wait go")  # the player's handlers are busy
        await trio.sleep(0.5)
        ann.close()
        await trio.sleep(1)
        assert await status_of(world) == "linkdead"
        back = await entered(world)
        game.gate("go").set()
        await back.hear()
        assert game.told == ["join ann"]


async def test_a_presence_handler_that_raises_is_paid_and_nobody_is_touched(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game = Puppet()
    game.presence_raises = game.presence_line = True
    async with play(tmp_path / "m.db", game=game, linkdead_grace=5) as world:
        ann = await entered(world)
        assert (await ann.command("line fine"))["ok"] is True
        ann.close()
        await trio.sleep(10)
        assert game.told == ["join ann", "linkdead ann", "leave (linkdead) ann"]
        again = await entered(world)
        await again.hear()
        assert [m["type"] for m in ann.numbered + again.numbered] == ["line"]  # its effects were dropped


async def test_a_presence_handler_that_hangs_is_cut_off(tmp_path: Path, autojump_clock: MockClock) -> None:
    class Slow(Puppet):
        async def on_join(self, player: Player) -> None:
            await trio.sleep_forever()

    async with play(tmp_path / "m.db", game=Slow(), handler_timeout=3) as world:
        ann = await entered(world)
        began = trio.current_time()
        assert (await ann.command("line fine"))["ok"] is True
        assert trio.current_time() - began == pytest.approx(3, abs=0.2)


async def test_what_is_owed_is_run_after_a_crash_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    game, disk = Puppet(), Disk()
    game.presence_line = True
    async with play(tmp_path / "m.db", game=game, crash=True, hook=disk) as world:
        bob = await entered(world, "bob")
        await bob.hear()
        start = bob.position
        ann = await entered(world)
        await ann.hear()
        disk.hangs = True
        ann.close()
        await trio.sleep(3)
        # It was run, but never committed: nobody has heard of it.
        assert game.told[-1] == "linkdead ann"
        assert [m["content"] for m in await bob.hear() if "seq" in m] == ["join ann"]
    game.told.clear()
    async with play(tmp_path / "m.db", game=game) as world:
        bob = await entered(world, "bob", f"position={start}")
        back = await entered(world)
        await back.hear()
        await bob.hear()
        # The link-dead was lost with the server, and ann is back: there is nothing to be told.
        assert (game.told, bob.lines) == ([], ["join ann"])


async def test_a_join_that_was_not_committed_is_run_after_a_crash(tmp_path: Path, autojump_clock: MockClock) -> None:
    game, disk = Puppet(), Disk()
    game.presence_line = True
    async with play(tmp_path / "m.db", game=game, crash=True, hook=disk) as world:
        await trio.sleep(1)
        began = disk.writes

        async def hang_after_begin(kind: str) -> None:
            disk.hangs = disk.writes > began
            await Disk.__call__(disk, kind)

        world.server.storage._runner.hook = hang_after_begin  # type: ignore[attr-defined]
        ann = await entered(world)
        assert [m["type"] for m in await ann.hear(2)] == []
        assert game.told == ["join ann"]
    async with play(tmp_path / "m.db", game=game) as world:
        await trio.sleep(1)
        assert game.told == ["join ann"] * 2
        back = await entered(world, query=f"position={ann.position}")
        await back.hear()
        assert back.lines == ["join ann"]


async def test_while_the_store_refuses_a_session_does_not_go_offline(tmp_path: Path, autojump_clock: MockClock) -> None:
    game, disk = Puppet(), Disk()
    async with play(tmp_path / "m.db", game=game, hook=disk, linkdead_grace=5) as world:
        ann = await entered(world)
        await ann.hear()
        disk.no_writes = True
        ann.close()
        await trio.sleep(60)
        assert world.server.hub.presence("ann") == "linkdead"
        back = await entered(world)  # joining needs no write
        assert session_id(back) == session_id(ann)
        back.close()
        disk.mend()
        await trio.sleep(60)
        assert world.server.hub.presence("ann") == "offline"
        assert await status_of(world) == "offline"


# Switching.


async def test_a_new_id_switches_and_everybody_is_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann, stream = await entered(world), await listening(world)
        await ann.command("join inn")
        new = await world.websocket("ann", "session_id=second")
        welcome, changed = await new.next(), await new.next()
        assert (welcome["session_id"], welcome["resumed"]) == ("second", False)
        assert changed == {
            "type": "session_changed",
            "session_id": "second",
            "previous_session_id": session_id(ann),
        }
        for client in (ann, stream):
            said = await client.until_over()
            assert said == {"type": "disconnect", "code": 4501, "reason": "session replaced", "reconnect": False}
        assert ann.closed == (4501, "session replaced")
        await new.hear()
        assert game.told == ["join ann", "leave (switched) ann", "join ann"]
        # Subscriptions do not pass on.
        told = await world.publish(channel="inn", message={"type": "line", "content": "x"})
        assert told["connections"] == 0


async def test_mail_outlives_a_switch(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        for text in ("one", "two"):
            await world.publish(player_id="ann", message={"type": "line", "content": text})
        await ann.until(lambda m: m.get("content") == "two")
        position = f"1-{ann.numbered[0]['seq']}"
        ann.close()
        await trio.sleep(1)
        await world.publish(player_id="ann", message={"type": "line", "content": "three"})
        new = await entered(world, query="session_id=second")
        await new.hear()
        assert new.lines == ["three"]
        # Who names a position of before gets no more than the new session's stream.
        again = await entered(world, query=f"session_id=second&position={position}")
        await again.hear()
        assert again.lines == ["three"]


@pytest.mark.parametrize("crash", [False, True])
async def test_an_id_that_has_ended_never_begins_again(tmp_path: Path, autojump_clock: MockClock, crash: bool) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), crash=crash) as world:
        await entered(world, query="session_id=first")
        await entered(world, query="session_id=second")
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        back = await world.websocket("ann", "session_id=first")
        assert back.status == 101
        assert await end_of(back) == 4501
        assert back.of("welcome") == []
        stream = await world.sse("ann", "session_id=first")
        assert stream.status == 204
        named = {"session_id": "first", "content": "x", "position": "1-1"}
        status, answer = await post(world, "session", {"session_id": "first"})
        assert (status, answer["error_type"]) == (409, "session_error")
        await entered(world, query="session_id=second")
        for path, keys in (("commands", ("session_id", "content")), ("ack", ("session_id", "position"))):
            status, answer = await post(world, path, {key: named[key] for key in keys})
            assert (status, answer["error_type"]) == (409, "session_error")
        status, answer = await post(world, "subscriptions", {"session_id": "first", "subscribe": ["inn"]})
        assert (status, answer["error_type"]) == (409, "session_error")
        # The same words of another player are another session.
        await entered(world, "bob", "session_id=first")


@pytest.mark.parametrize("nothing", ["", "null", "undefined"])
async def test_who_has_no_session_yet_joins_the_current_one(
    tmp_path: Path, autojump_clock: MockClock, nothing: str
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        assert session_id(await listening(world, query=f"session_id={nothing}")) == session_id(ann)


async def test_if_the_store_refuses_a_switch_the_old_session_stays(tmp_path: Path, autojump_clock: MockClock) -> None:
    game, disk = Puppet(), Disk()
    async with play(tmp_path / "m.db", game=game, hook=disk) as world:
        ann = await entered(world)
        await ann.hear()
        disk.no_writes = True
        new = await world.websocket("ann", "session_id=second")
        said = await new.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"]) == (4009, True)
        assert await end_of(ann) == 4501
        disk.mend()
        back = await entered(world)
        assert session_id(back) == session_id(ann)
        await entered(world, query="session_id=second")  # and later it goes


async def test_if_a_switch_takes_too_long_the_old_session_stays(tmp_path: Path, autojump_clock: MockClock) -> None:
    game, disk = Puppet(), Disk()
    async with play(tmp_path / "m.db", game=game, hook=disk) as world:
        ann = await entered(world)
        await ann.hear()
        disk.write_seconds = 8
        began = trio.current_time()
        new = await world.websocket("ann", "session_id=second")
        assert await end_of(new) == 4009
        assert trio.current_time() - began == pytest.approx(5, abs=0.5)
        disk.mend()
        await trio.sleep(10)
        back = await entered(world)
        assert session_id(back) == session_id(ann)


async def test_a_session_that_does_not_end_is_a_leak_and_there_are_still_not_two(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    class Stubborn(Puppet):
        async def do_shield(self, player: Player, text: str) -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(20)

    async with play(tmp_path / "m.db", game=Stubborn(), handler_timeout=100) as world:
        ann = await entered(world)
        await ann.give("shield")
        await trio.sleep(0.5)
        new = await world.websocket("ann", "session_id=second")
        assert await end_of(new) == 4009
        assert [leak.kind for leak in await world.server.ledger.look()] == ["session"]
        again = await world.websocket("ann", "session_id=second")
        assert await end_of(again) == 4009
        await trio.sleep(20)
        assert await world.server.ledger.look() == []
        assert await status_of(world) in ("linkdead", "offline")
        last = await entered(world, query="session_id=second")
        assert session_id(last) == "second"


async def test_a_newcomer_who_leaves_in_the_middle_leaves_no_half_of_a_switch(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk) as world:
        ann = await entered(world)
        await ann.hear()
        disk.write_seconds = 2
        client = Client(world.wire())
        await client.send_all(b"GET /sse/ann?session_id=second HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await trio.sleep(0.5)
        client.wire.reset()
        await trio.sleep(30)
        disk.mend()
        status, answer = await world.request("GET", "/api/connections/ann/session")
        assert (status, answer["session_id"], answer["active_connections"]) == (200, "second", 0)
        assert world.server.hub.presence("ann") in ("linkdead", "offline")


# Operators.


async def test_post_session_begins_a_new_one(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann, stream = await entered(world), await listening(world)
        status, answer = await post(world, "session", {"session_id": "second"})
        assert (status, answer | {"timestamp": ""}) == (
            200,
            {
                "success": True,
                "player_id": "ann",
                "session_id": "second",
                "previous_session_id": session_id(ann),
                "previous_connections_disconnected": 2,
                "timestamp": "",
            },
        )
        assert (await end_of(ann), await end_of(stream)) == (4501, 4501)
        await trio.sleep(1)
        assert game.told == ["join ann", "leave (switched) ann"]
        assert session_id(await entered(world)) == "second"
        status, answer = await post(world, "session", {"session_id": "second"})
        assert (status, answer["previous_connections_disconnected"]) == (200, 0)


async def test_delete_ends_the_session_and_browsers_stay_away(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann, stream = await entered(world), await listening(world)
        status, answer = await world.request("DELETE", "/api/connections/ann")
        assert (status, answer) == (200, answer | {"success": True, "connections_closed": 2})
        for client in (ann, stream):
            said = await client.until_over()
            assert (said or {})["code"] == 4503
            assert (said or {})["reconnect"] is False
        await trio.sleep(1)
        assert game.told == ["join ann", "leave (removed) ann"]
        assert (await world.request("DELETE", "/api/connections/ann"))[0] == 404
        # The browser's own reconnect, with the old session's id and without.
        assert (await world.sse("ann", headers=f"Last-Event-ID: {stream.last_id}\r\n")).status == 204
        assert (await world.sse("ann", f"session_id={session_id(ann)}")).status == 204
        back = await world.websocket("ann", f"session_id={session_id(ann)}")
        assert await end_of(back) == 4503
        await trio.sleep(61)
        new = await listening(world, headers=f"Last-Event-ID: {stream.last_id}\r\n")
        assert session_id(new) != session_id(ann)


async def test_an_operator_ends_one_connection(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, stream = await entered(world), await listening(world)
        connection = ann.received[0]["connection_id"]
        status, _ = await world.request("DELETE", f"/api/connections/ann/{connection}")
        assert status == 200
        assert await end_of(ann) == 4503
        assert (await world.request("DELETE", f"/api/connections/ann/{connection}"))[0] == 404
        other = stream.received[0]["connection_id"]
        assert (await world.request("DELETE", f"/api/connections/bob/{other}"))[0] == 404
        await world.publish(player_id="ann", message={"type": "line", "content": "still here"})
        await stream.until_type("line")


async def test_a_session_offline_for_too_long_expires(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings: dict[str, Any] = {"linkdead_grace": 5, "message_retention": 300, "cleanup_interval": 10}
    async with play(tmp_path / "m.db", game=Puppet(), **settings) as world:
        ann = await entered(world)
        ann.close()
        await trio.sleep(200)
        back = await entered(world)
        assert session_id(back) == session_id(ann)
        back.close()
        await trio.sleep(400)
        new = await entered(world)
        assert session_id(new) != session_id(ann)
        ended = await world.websocket("ann", f"session_id={session_id(ann)}")
        assert await end_of(ended) == 4501


# Crashes.


async def crash(world: World, player: str = "ann") -> None:
    """A bug in one of the session's tasks."""

    async def bug() -> None:
        raise ZeroDivisionError("on purpose")

    nursery = world.server.hub.sessions[player].nursery
    assert nursery is not None
    nursery.start_soon(bug)


async def test_a_bug_in_a_sessions_task_ends_its_connections_and_nothing_else(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann, stream, bob = await entered(world), await listening(world), await entered(world, "bob")
        await ann.command("join inn")
        await ann.give("wait go", "c1")
        await trio.sleep(0.5)
        await crash(world)
        for client in (ann, stream):
            said = await client.until_over()
            assert (said or {})["code"] == 1011
            assert (said or {})["reconnect"] is True
        assert (await bob.command("echo fine"))["ok"] is True
        back = await entered(world)
        assert session_id(back) == session_id(ann)
        game.gate("go").set()
        assert (await back.command("wait go", "c1"))["ok"] is True  # it had not been answered
        told = await world.publish(channel="inn", message={"type": "line", "content": "still subscribed"})
        assert told["connections"] == 1
        await back.until(lambda m: m.get("content") == "still subscribed")
        assert back.lines == ["go", "still subscribed"]
        assert bob.closed is None
        assert [what for what in game.told if "ann" in what] == ["join ann", "linkdead ann", "return ann"]


async def test_three_crashes_in_a_minute_are_answered_by_growing_pauses(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        for _ in range(3):
            ann = await entered(world)
            await crash(world)
            assert await end_of(ann) == 1011
        ann = await world.websocket("ann")
        said = await ann.until_over()
        assert said is not None
        assert (said["code"], said["retry_ms"]) == (4009, 2000)
        await entered(world, "bob")
        await trio.sleep(61)
        await entered(world)


async def test_a_crash_loop_makes_the_pauses_grow(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        await entered(world)
        retries = []
        for _ in range(5):
            await crash(world)
            await trio.sleep(0.1)
            ann = await world.websocket("ann")
            said = await ann.next()
            if said["type"] == "disconnect":
                retries.append(said["retry_ms"])
        assert retries == sorted(set(retries))
        assert len(retries) == 3


# Several connections of one player.


async def test_a_client_that_comes_back_ends_the_connection_it_replaces(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, max_connections_per_player=1) as world:
        ann = await entered(world)
        for transport in (entered, listening, entered):
            connection = ann.received[0]["connection_id"]
            new: Any = await transport(world, query=f"replaces={connection}")
            said = await ann.until_over()
            assert said is None or said["code"] == 1000
            assert list(world.server.hub.connections) == [new.received[0]["connection_id"]]
            ann = new
        assert game.told == ["join ann"]


async def test_nobody_replaces_another_players_connection(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        await entered(world, "bob", f"replaces={ann.received[0]['connection_id']}")
        assert (await ann.command("echo fine"))["ok"] is True


async def test_at_the_limit_the_silent_are_asked_and_the_dead_are_ended(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), max_connections_per_player=2) as world:
        ann, dead = await entered(world), await entered(world)
        await ann.hear(6)
        dead.wire.cut()
        newcomer = await world.websocket("ann")
        said = await newcomer.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"], said["retry_ms"]) == (4009, True, 2000)
        await ann.hear(2)  # it answers the ping
        again = await world.websocket("ann")
        first = await again.next()
        while first["type"] == "disconnect" and trio.current_time() < 60:
            assert first["code"] == 4009
            await ann.hear(2)
            again = await world.websocket("ann")
            first = await again.next()
        assert first["type"] == "welcome"
        assert (await ann.command("echo fine"))["ok"] is True
        assert dead.received[0]["connection_id"] not in world.server.hub.connections


async def test_when_all_have_just_proved_alive_a_newcomer_is_turned_away(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), max_connections_per_player=2) as world:
        ann, other = await entered(world), await entered(world)
        newcomer = await world.websocket("ann")
        said = await newcomer.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"]) == (4509, False)
        assert (await world.sse("ann")).status == 204
        for client in (ann, other):
            assert (await client.command("echo fine"))["ok"] is True
        assert world.server.hub.sessions["ann"].state is State.ONLINE


async def test_a_refused_connection_does_not_keep_a_session_online(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), max_connections_per_player=1, linkdead_grace=5) as world:
        ann = await entered(world)
        refused = await world.websocket("ann")
        await refused.until_over()
        ann.close()
        await trio.sleep(10)
        assert await status_of(world) == "offline"


async def test_many_come_at_once_and_share_one_session(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), max_connections_per_player=50) as world:
        clients: list[WebSocketClient] = []

        async def come() -> None:
            clients.append(await entered(world))

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(come)
        assert len({session_id(client) for client in clients}) == 1
        told = await world.publish(player_id="ann", message={"type": "line", "content": "all"})
        assert told["connections"] == 50
        for client in clients:
            await client.until_type("line")


async def test_a_crash_while_presence_is_being_committed_does_not_tell_it_twice(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game, disk = Puppet(), Disk()
    game.presence_line = True
    async with play(tmp_path / "m.db", game=game, hook=disk) as world:
        disk.write_seconds = 2
        ann = await entered(world)
        await trio.sleep(1)
        assert game.told == ["join ann"]
        await crash(world)
        back = await entered(world, query=f"position={ann.position}")
        await back.hear(10)
        assert back.lines.count("join ann") == 1
        assert game.told.count("join ann") == 1


async def test_a_crash_on_arrival_is_not_seen_by_who_arrives(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        for transport in (entered, listening):
            await entered(world)
            await crash(world)
            client: Any = await transport(world)
            assert client.of("welcome")


class SlowToLeave(Puppet):
    """Says good-bye at length."""

    async def on_leave(self, player: Player, reason: str) -> None:
        await trio.sleep(3)
        await super().on_leave(player, reason)
        player.world.send(player.id, "line", f"left {player.session_id}")


async def test_every_leave_is_told_once_and_in_order_however_fast_sessions_follow_each_other(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game = SlowToLeave()
    async with play(tmp_path / "m.db", game=game) as world:
        for name in ("first", "second", "third"):
            ann = await entered(world, query=f"session_id={name}")
            await trio.sleep(1)
        await ann.hear(10)
        visit = ["join ann", "leave (switched) ann"]
        assert game.told == [*visit, *visit, "join ann"]
        assert ann.lines == ["left first", "left second"]


async def test_who_comes_back_while_the_leave_is_told_is_joined_after_it(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game = SlowToLeave()
    async with play(tmp_path / "m.db", game=game) as world:
        await entered(world)
        await world.request("DELETE", "/api/connections/ann")
        back = await entered(world)
        assert (await back.command("line hi"))["ok"] is True
        assert game.told == ["join ann", "leave (removed) ann", "join ann"]


class SlowReturn(Game):
    """Takes its time to greet who is back."""

    def __init__(self) -> None:
        self.lost = trio.Event()
        self.returning = trio.Event()

    async def on_linkdead(self, player: Player) -> None:
        player.send("line", "lost")
        self.lost.set()

    async def on_return(self, player: Player) -> None:
        self.returning.set()
        await trio.sleep(5)
        player.send("line", "back")


async def test_who_is_back_while_linkdead_is_being_stored_was_lost_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What the arrival owes is written behind the commit that pays: it must not say that this is still owed."""
    game, disk = SlowReturn(), Disk()
    async with play(tmp_path / "m.db", game=game, hook=disk, crash=True) as world:
        ann = await entered(world)
        await trio.sleep(1)
        disk.write_seconds = 2
        ann.close()
        await game.lost.wait()
        await trio.sleep(1)  # the commit that pays is under way
        await entered(world)
        assert not game.returning.is_set()
        await game.returning.wait()
        await trio.sleep(4)
    async with play(tmp_path / "m.db", game=SlowReturn()) as world:
        back = await entered(world, query="position=1-0")
        await back.hear(10)
        assert back.lines == ["lost", "back"]


async def test_who_comes_to_a_quiet_session_is_not_kept_waiting_by_the_store(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Nothing is read for a new player without mail, or for one who comes again when nothing was said."""
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk) as world:
        for player, resumed in (("ann", False), ("bob", False), ("ann", True)):
            client = await world.websocket(player)
            assert (await client.until_type("welcome"))["resumed"] is resumed
            await client.hear()
            client.close()
            await trio.sleep(1)
        assert disk.reads == 0


async def test_what_was_said_meanwhile_is_read(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        ann.close()
        await trio.sleep(5)
        for target in ({"player_id": "ann"}, {"broadcast": True}):
            await world.publish(**target, message={"type": "line", "content": "meanwhile"})
            again = await world.websocket("ann")
            assert (await again.until_type("welcome"))["resumed"]
            await again.hear()
            assert [line["content"] for line in again.of("line")] == ["meanwhile"]
            again.close()
            await trio.sleep(5)


async def test_mail_waits_for_a_new_player(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        await world.publish(player_id="ann", message={"type": "line", "content": "welcome, ann"})
        ann = await world.websocket("ann")
        await ann.hear()
        assert [line["content"] for line in ann.of("line")] == ["welcome, ann"]
        ann.close()


@pytest.mark.parametrize("trouble", ["refused", "hanging"])
async def test_a_session_that_exists_is_joined_though_the_store_cannot_be_written(
    tmp_path: Path, autojump_clock: MockClock, trouble: str
) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk, linkdead_grace=10) as world:
        ann = await entered(world)
        ann.close()
        await trio.sleep(30)
        assert await status_of(world) == "offline"
        if trouble == "refused":
            disk.no_writes = True
        else:
            disk.hangs = True
            with trio.move_on_after(3):
                await world.publish(player_id="bob", message={"type": "line", "content": "never stored"})
        again = await world.websocket("ann")
        with trio.fail_after(3):
            assert (await again.until_type("welcome"))["player_id"] == "ann"
        disk.no_writes = False
        disk.mend()
        again.close()


class _Timers(trio.abc.Instrument):
    """Sets a timer of each session that ends, between any two steps of its tasks, as the dispatcher may."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.set = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        for session in list(self.hub.sessions.values()):
            if session.nursery is not None and session.nursery.cancel_scope.cancel_called:
                self.set += 1
                timer = SetTimer(player_key(session.player_id), "day", f"{self.set}", 5.0, b"1")
                self.hub._change_timer(timer)


async def test_a_timer_of_a_session_that_is_ending_ends_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Its nursery was closed, and its task had not gone on yet: the dispatcher ended, and the server with it."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        await entered(world)
        timers = _Timers(world.server.hub)
        trio.lowlevel.add_instrument(timers)
        await world.server.registrar.end("ann")
        trio.lowlevel.remove_instrument(timers)  # it is gone, if it has raised
        assert timers.set


async def test_a_rush_of_newcomers_finds_their_sessions_though_no_grace_is_given(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """They are admitted in one commit, and more than have a place in a turn: nobody's session ends before its turn."""
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, linkdead_grace=0, max_total_connections=200) as world:
        clients: list[WebSocketClient] = []

        async def come(number: int) -> None:
            clients.append(await world.websocket(f"p{number}"))

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(come, number)
        assert [client.status for client in clients] == [101] * 60
        assert world.server.hub.storage.commits <= 60 + 3
        assert all(session.online for session in world.server.hub.sessions.values())
        assert len(world.server.hub.sessions) == 60
        for client in clients:
            client.close()
