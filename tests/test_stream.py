"""One stream, many connections: what each client hears, in scenes on virtual time."""

from __future__ import annotations

import json
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mythos_trio.sqlite import SqliteDatabase
from tests.support.games import Disk, Puppet
from tests.support.play import Client, World, play


async def post(world: World, path: str, body: object, headers: str = "") -> tuple[int, Any]:
    return await world.request("POST", path, body, headers)


async def line(world: World, text: object, player: str = "ann", **message: Any) -> dict[str, Any]:
    """Publish a line to a player."""
    return await world.publish(player_id=player, message={"type": "line", "content": text, **message})


# The first words.


async def test_the_first_word_is_welcome_and_says_where_the_stream_starts(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        welcome = await ann.next()
        session = world.server.hub.sessions["ann"]
        assert welcome == {
            "type": "welcome",
            "player_id": "ann",
            "session_id": session.session_id,
            "connection_id": next(iter(session.connections)),
            "server_id": "test",
            "epoch": 1,
            "position": welcome["position"],
            "resumed": False,
            "heartbeat_seconds": 30.0,
        }
        assert welcome["position"].startswith("1-")


async def test_both_transports_say_the_same(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        first = await ann.next()
        listener = await world.sse("ann")
        second = await listener.next()
        assert {**second, "connection_id": "", "resumed": ""} == {**first, "connection_id": "", "resumed": ""}
        assert listener.retry_ms == 1000
        published = await line(world, "hello", mood="merry")
        told = [await ann.until_type("line"), await listener.until_type("line")]
        assert told[0] == told[1]
        assert told[0] == {
            "seq": published["seq"],
            "id": published["id"],
            "type": "line",
            "content": "hello",
            "timestamp": told[0]["timestamp"],
            "mood": "merry",
        }
        assert told[0]["timestamp"].endswith("Z")
        assert listener.last_id == f"1-{published['seq']}"
        assert published["connections"] == 2


async def test_an_event_stream_is_not_to_be_cached_or_gathered(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.sse("ann")
        assert ann.status == 200
        assert ann.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert ann.headers["cache-control"] == "no-cache, no-transform"
        assert ann.headers["x-accel-buffering"] == "no"
        assert ann.headers["server-id"] == "test"


async def test_numbers_grow_and_are_the_stores(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, bob = await world.websocket("ann"), await world.websocket("bob")
        for number in range(3):
            await line(world, number, "ann")
            await line(world, number, "bob")
        assert [m["content"] for m in await ann.hear() if "seq" in m] == [0, 1, 2]
        await bob.hear()
        seqs = [m["seq"] for pair in zip(ann.numbered, bob.numbered, strict=True) for m in pair]
        assert seqs == sorted(set(seqs))


# Heartbeats.


async def test_heartbeats_come_and_say_how_far_the_stream_was_written(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, listener = await world.websocket("ann"), await world.sse("ann")
        published = await line(world, "hello")
        for client in (ann, listener):
            await client.until_type("line")
            began = trio.current_time()
            beat = await client.until_type("heartbeat")
            assert trio.current_time() - began <= 30
            assert beat == {"type": "heartbeat", "position": f"1-{published['seq']}"}
        assert listener.last_id == f"1-{published['seq']}"


async def test_a_heartbeat_moves_an_idle_client_past_what_is_not_for_it(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.sse("ann")
        await ann.next()
        other = await line(world, "not for ann", "bob")
        beat = await ann.until_type("heartbeat")
        assert beat["position"] == f"1-{other['seq']}"
        assert ann.numbered == []


async def test_ping_is_answered_by_pong_with_its_id(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.say({"type": "ping", "id": "p1"})
        assert await ann.until_type("pong") == {"type": "pong", "id": "p1"}
        await ann.say({"type": "ping"})
        assert await ann.until_type("pong") == {"type": "pong"}


# Coming back.


@pytest.mark.parametrize("back", ["websocket", "sse", "last-event-id"])
@pytest.mark.parametrize("out", ["websocket", "sse"])
async def test_who_names_a_position_gets_all_that_follows_it(
    tmp_path: Path, autojump_clock: MockClock, out: str, back: str
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await (world.websocket("ann") if out == "websocket" else world.sse("ann"))
        await ann.next()
        for number in range(3):
            await line(world, number)
        await ann.until(lambda m: m.get("content") == 1)
        position = ann.position
        ann.close()
        await line(world, 3)
        if back == "websocket":
            again: Any = await world.websocket("ann", f"position={position}")
        elif back == "sse":
            again = await world.sse("ann", f"position={position}")
        else:
            # The header wins: a browser keeps the query of its first connect.
            again = await world.sse("ann", "position=1-0", headers=f"Last-Event-ID: {position}\r\n")
        welcome = await again.next()
        assert (welcome["position"], welcome["resumed"]) == (position, True)
        await line(world, 4)
        await again.until(lambda m: m.get("content") == 4)
        assert again.lines == [2, 3, 4]
        assert again.of("gap") == []


async def test_after_a_crash_a_position_still_means_the_same(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), crash=True) as world:
        ann = await world.websocket("ann")
        await ann.next()
        first = await line(world, "one")
        await line(world, "two")
        await ann.hear()
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        back = await world.sse("ann", f"position=1-{first['seq']}")
        welcome = await back.next()
        assert welcome["resumed"] is True
        assert welcome["session_id"] == ann.received[0]["session_id"]
        await line(world, "three")
        await back.until(lambda m: m.get("content") == "three")
        assert back.lines == ["two", "three"]
        assert back.numbered[0] == ann.numbered[1]
        assert back.numbered[1]["seq"] > ann.numbered[1]["seq"]


async def test_replay_and_live_are_the_same_stream(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Mail, channels with intervals, broadcasts, and others' traffic between them."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, bob = await world.websocket("ann"), await world.websocket("bob")
        start = (await ann.next())["position"]
        for step in (
            "shout inn too-early",
            "join inn",
            "shout inn first",
            "tell bob not-yours",
            "tell ann mine",
            "leave inn",
            "shout inn missed",
            "join inn",
            "shout inn second",
        ):
            await ann.command(step)
            await bob.command("tell bob noise")
        await world.publish(broadcast=True, message={"type": "line", "content": "all"})
        await ann.until(lambda m: m.get("content") == "all")
        assert ann.lines == ["first", "mine", "second", "all"]
        for transport in (world.websocket, world.sse):
            again = await transport("ann", f"position={start}")
            await again.until(lambda m: m.get("content") == "all")
            assert again.numbered == ann.numbered


async def test_a_client_that_names_nothing_starts_after_what_was_seen(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.next()
        await line(world, "seen")
        await ann.until_type("line")
        ann.close()
        await trio.sleep(0.1)
        await line(world, "while away")
        again = await world.websocket("ann")
        await again.until_type("line")
        assert again.lines == ["while away"]


async def test_an_sse_client_behind_a_proxy_sees_again_what_it_did_not_name(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Its kernel's acknowledgements are the proxy's, so only what it says itself counts."""
    forwarded = "X-Forwarded-For: 192.0.2.7\r\n"
    settings: dict[str, Any] = {"trusted_proxies": (ip_network("127.0.0.1"),), "secret_key": "k" * 32}
    async with play(tmp_path / "m.db", game=Puppet(), **settings) as world:
        token = world.server.access.issue("ann", ["publish"])
        ann = await world.sse("ann", f"token={token}", headers=forwarded)
        await ann.next()
        body = {"player_id": "ann", "message": {"type": "line", "content": "one"}}
        status, _ = await post(world, "/api/messages", body, f"Authorization: Bearer {token}\r\n")
        assert status == 202
        await ann.until_type("line")
        await trio.sleep(40)
        ann.close()
        await trio.sleep(1)
        again = await world.sse("ann", f"token={token}", headers=forwarded)
        await again.until_type("line")
        assert again.lines == ["one"]


async def test_an_ack_moves_seen_and_deletes_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        ann.answer_pings = False
        start = (await ann.next())["position"]
        one = await line(world, "one")
        session = world.server.hub.sessions["ann"]
        connection = next(iter(session.connections.values()))
        await ann.until_type("line")
        await ann.say({"type": "ack", "position": f"1-{one['seq']}"})
        await ann.say({"type": "ping"})
        await ann.until_type("pong")
        assert (session.seen, connection.acknowledged) == (one["seq"], one["seq"])
        await ann.say({"type": "ack", "position": start})  # an older one changes nothing
        await ann.say({"type": "ping"})
        await ann.until_type("pong")
        assert session.seen == one["seq"]
        again = await world.websocket("ann", f"position={start}")
        await again.until_type("line")
        assert again.lines == ["one"]


@pytest.mark.parametrize("position", ["1-999999", "2-1", "0-1"])
async def test_what_was_never_sent_cannot_be_acknowledged(
    tmp_path: Path, autojump_clock: MockClock, position: str
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.next()
        before = world.server.hub.sessions["ann"].seen
        await ann.say({"type": "ack", "position": position})
        reply = await ann.until_type("reply")
        assert (reply["ok"], reply["error"]["error_type"]) == (False, "validation_error")
        status, answer = await post(world, "/api/connections/ann/ack", {"position": position})
        assert (status, answer["error_type"]) == (422, "validation_error")
        assert world.server.hub.sessions["ann"].seen == before


async def test_an_sse_client_acknowledges_by_post(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.sse("ann")
        welcome = await ann.next()
        one = await line(world, "one")
        await ann.until_type("line")
        body = {"position": ann.last_id, "connection_id": welcome["connection_id"], "session_id": welcome["session_id"]}
        status, answer = await post(world, "/api/connections/ann/ack", body)
        assert (status, answer) == (200, {"success": True, "position": f"1-{one['seq']}"})
        assert world.server.hub.connections[welcome["connection_id"]].acknowledged == one["seq"]


async def test_a_client_cannot_make_the_server_believe_that_a_mail_to_come_was_seen(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Naming the newest number of the store is honest; what comes after it is still mail."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.next()
        other = await line(world, "noise", "bob")
        ann.close()
        again = await world.websocket("ann", f"position=1-{other['seq']}")
        await again.next()
        again.close()
        await trio.sleep(1)
        await line(world, "mail")
        third = await world.websocket("ann")
        await third.until_type("line")
        assert third.lines == ["mail"]


# Gaps.


async def test_a_position_of_the_future_is_told_and_goes_on_after_seen(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.next()
        one = await line(world, "one")
        await ann.until_type("line")
        ann.close()
        await trio.sleep(0.1)
        await line(world, "two")
        for transport in (world.websocket, world.sse):
            back = await transport("ann", "position=1-4000")
            welcome, gap = await back.next(), await back.next()
            assert (welcome["position"], welcome["resumed"]) == ("1-4000", False)
            expected = {"type": "gap", "after": "1-4000", "position": f"1-{one['seq']}", "reason": "future"}
            assert gap == expected
            await back.until_type("line")
            assert back.lines == ["two"]
            back.wire.cut()  # what it got must not count as seen for the second turn


async def test_a_position_of_an_older_epoch_is_told_with_what_is_shared(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        start = (await ann.next())["position"]
        await line(world, "one")
        await ann.until_type("line")
        position = ann.position
    epoch = SqliteDatabase(tmp_path / "m.db").new_epoch(1_800_000_000.0).number
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        for named in (position, start):
            back = await world.sse("ann", f"position={named}")
            welcome, gap = await back.next(), await back.next()
            assert welcome["epoch"] == epoch
            assert (welcome["position"], welcome["resumed"]) == (named, False)
            assert (gap["reason"], gap["after"]) == ("epoch", named)
            after = min(int(named.split("-")[1]), gap["shared"])
            assert gap["position"] == f"{epoch}-{after}"
            assert back.last_id == gap["position"]
        await line(world, "two")
        await back.until(lambda m: m.get("content") == "two")
        assert back.lines == ["one", "two"]
        assert back.last_id is not None
        assert back.last_id.startswith(f"{epoch}-")


async def test_what_retention_took_from_this_session_is_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), message_retention_count=3, cleanup_interval=10) as world:
        ann, bob = await world.websocket("ann"), await world.websocket("bob")
        start, bobs = (await ann.next())["position"], (await bob.next())["position"]
        ann.close()  # or all of it would be in memory
        bob.close()
        await trio.sleep(1)
        published = [await line(world, number) for number in range(6)]
        await trio.sleep(11)
        back = await world.websocket("ann", f"position={start}")
        welcome, gap = await back.next(), await back.next()
        assert (welcome["position"], welcome["resumed"]) == (start, False)
        after = f"1-{published[3]['seq'] - 1}"
        assert gap == {"type": "gap", "after": start, "position": after, "reason": "retention"}
        await back.hear()
        assert back.lines == [3, 4, 5]
        # Nothing of bob's is gone.
        again = await world.websocket("bob", f"position={bobs}")
        assert (await again.next())["resumed"] is True
        await again.hear()
        assert again.of("gap") == []


async def test_a_gap_is_not_told_to_who_has_had_what_is_gone(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), message_retention_count=3, cleanup_interval=10) as world:
        ann = await world.websocket("ann")
        await ann.next()
        published = [await line(world, number) for number in range(6)]
        await trio.sleep(11)
        back = await world.sse("ann", f"position=1-{published[2]['seq']}")
        assert (await back.next())["resumed"] is True
        await back.hear()
        assert (back.of("gap"), back.lines) == ([], [3, 4, 5])


# Mail, targets, channels.


async def test_mail_waits_for_a_player_who_was_never_there(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        assert (await line(world, "welcome gift"))["connections"] == 0
        ann = await world.websocket("ann")
        await ann.until_type("line")
        assert ann.lines == ["welcome gift"]


async def test_mail_waits_for_a_player_who_is_offline(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), linkdead_grace=5) as world:
        ann = await world.websocket("ann")
        await ann.next()
        ann.close()
        await trio.sleep(10)
        assert "ann" not in world.server.hub.sessions
        await line(world, "mail")
        back = await world.sse("ann")
        assert (await back.next())["session_id"] == ann.received[0]["session_id"]
        await back.until_type("line")
        assert back.lines == ["mail"]


async def test_everyone_who_has_a_session_gets_a_broadcast_also_later(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), linkdead_grace=5) as world:
        ann, bob = await world.websocket("ann"), await world.websocket("bob")
        await bob.next()
        bob.close()
        await trio.sleep(10)
        await world.publish(broadcast=True, message={"type": "line", "content": "hear, hear"})
        late = await world.websocket("eve")
        await late.next()
        back = await world.websocket("bob")
        await ann.until_type("line")
        await back.until_type("line")
        assert await late.hear() == []


async def test_subscriptions_by_an_operator_take_effect_at_their_position(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.sse("ann")
        start = (await ann.next())["position"]

        async def shout(text: str) -> int:
            told = await world.publish(channel="news", message={"type": "line", "content": text})
            return int(told["connections"])

        assert await shout("before") == 0
        status, answer = await post(world, "/api/connections/ann/subscriptions", {"subscribe": ["news"]})
        assert status == 200
        assert await shout("between") == 1
        await ann.until_type("line")
        assert int(answer["position"].split("-")[1]) < ann.numbered[0]["seq"]
        await post(world, "/api/connections/ann/subscriptions", {"unsubscribe": ["news"]})
        assert await shout("after") == 0
        again = await world.websocket("ann", f"position={start}")
        await again.hear()
        assert again.lines == ["between"]


async def test_subscriptions_outlive_offline_and_a_crash(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), linkdead_grace=5, crash=True) as world:
        ann = await world.websocket("ann")
        await ann.command("join inn")
        ann.close()
        await trio.sleep(10)
        await world.publish(channel="inn", message={"type": "line", "content": "while offline"})
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        await world.publish(channel="inn", message={"type": "line", "content": "after the crash"})
        back = await world.websocket("ann")
        await back.hear()
        await world.publish(channel="inn", message={"type": "line", "content": "live"})
        await back.hear()
        assert back.lines == ["while offline", "after the crash", "live"]


# Publishing.


async def test_a_batch_is_stored_whole_and_answered_in_order(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.next()
        batch = [{"player_id": who, "message": {"type": "line", "content": who}} for who in ("ann", "bob", "ann")]
        status, answers = await post(world, "/api/messages", batch)
        assert (status, [a["connections"] for a in answers]) == (202, [1, 0, 1])
        seqs = [a["seq"] for a in answers]
        assert seqs == sorted(set(seqs))
        await ann.hear()
        assert [m["seq"] for m in ann.numbered] == [seqs[0], seqs[2]]


async def test_a_batch_with_one_bad_message_leaves_no_trace(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.next()
        good = {"player_id": "ann", "message": {"type": "line", "content": "good"}}
        taken = {"player_id": "ann", "message": {"type": "line", "content": "other", "id": "taken"}}
        assert (await line(world, "first", id="taken"))["id"] == "taken"
        for bad, expected in (({"player_id": "ann", "message": {"type": "reply", "content": 1}}, 422), (taken, 409)):
            status, answer = await post(world, "/api/messages", [good, bad])
            assert (status, answer["error_type"]) == (expected, "validation_error")
        await ann.hear()
        assert ann.lines == ["first"]


async def test_the_same_message_again_is_the_first_one(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), crash=True) as world:
        ann = await world.websocket("ann")
        await ann.next()
        first = await line(world, "once", id="m1")
        again = await line(world, "once", id="m1")
        assert "duplicate" not in first
        assert again == {**first, "duplicate": True}
        await ann.hear()
        assert ann.lines == ["once"]
        for other in (
            {"player_id": "ann", "message": {"type": "line", "content": "twice", "id": "m1"}},
            {"player_id": "bob", "message": {"type": "line", "content": "once", "id": "m1"}},
        ):
            status, answer = await post(world, "/api/messages", other)
            assert (status, answer["error_type"]) == (409, "validation_error")
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        again = await line(world, "once", id="m1")
        assert (again["seq"], again["duplicate"]) == (first["seq"], True)


async def test_an_idempotency_key_names_the_whole_request(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), crash=True) as world:
        ann = await world.websocket("ann")
        await ann.next()
        batch = [{"player_id": "ann", "message": {"type": "line", "content": n}} for n in (1, 2)]
        status, first = await post(world, "/api/messages", batch, "Idempotency-Key: k1\r\n")
        assert status == 202
        status, again = await post(world, "/api/messages", batch, "Idempotency-Key: k1\r\n")
        assert (status, again) == (202, [{**a, "duplicate": True} for a in first])
        status, answer = await post(world, "/api/messages", batch[:1], "Idempotency-Key: k1\r\n")
        assert (status, answer["error_type"]) == (409, "validation_error")
        status, other = await post(world, "/api/messages", batch, "Idempotency-Key: k2\r\n")
        assert status == 202
        assert other[0]["seq"] > first[1]["seq"]
        await ann.hear()
        assert ann.lines == [1, 2, 1, 2]
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        status, again = await post(world, "/api/messages", batch, "Idempotency-Key: k1\r\n")
        assert (status, [a["seq"] for a in again]) == (202, [a["seq"] for a in first])


BAD = [
    ({}, 422),
    ([], 422),
    ("text", 422),
    ({"player_id": "ann"}, 422),
    ({"message": {"type": "x", "content": 1}}, 422),
    ({"player_id": "ann", "channel": "inn", "message": {"type": "x", "content": 1}}, 422),
    ({"player_id": "a b", "message": {"type": "x", "content": 1}}, 422),
    ({"player_id": "stats", "message": {"type": "x", "content": 1}}, 422),
    ({"channel": "a b", "message": {"type": "x", "content": 1}}, 422),
    ({"broadcast": False, "message": {"type": "x", "content": 1}}, 422),
    ({"player_id": "ann", "message": {"type": "x"}}, 422),
    ({"player_id": "ann", "message": {"content": 1}}, 422),
    ({"player_id": "ann", "message": {"type": "", "content": 1}}, 422),
    ({"player_id": "ann", "message": {"type": "x" * 65, "content": 1}}, 422),
    ({"player_id": "ann", "message": {"type": "x", "content": 1, "seq": 1}}, 422),
    ({"player_id": "ann", "message": {"type": "x", "content": 1, "epoch": 1}}, 422),
    ({"player_id": "ann", "message": {"type": "x", "content": 1, "replaces": 1}}, 422),
    ({"player_id": "ann", "message": {"type": "welcome", "content": 1}}, 422),
    ({"player_id": "ann", "message": {"type": "x", "content": 1, "id": ""}}, 422),
    ({"player_id": "ann", "message": {"type": "x", "content": 1, "id": "x" * 129}}, 422),
    ({"player_id": "ann", "message": {"type": "x", "content": 1, "id": 7}}, 422),
    ({"player_id": "ann", "message": {"type": "x", "content": "y" * 70_000}}, 413),
    (b"{", 400),
    (b"", 400),
    (b"\xff", 400),
    (b"[" * 100 + b"]" * 100, 400),
]


@pytest.mark.parametrize(("body", "expected"), BAD, ids=lambda value: repr(value)[:50])
async def test_what_cannot_be_published_is_refused_and_told_why(
    tmp_path: Path, autojump_clock: MockClock, body: object, expected: int
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        status, answer = await post(world, "/api/messages", body)
        assert status == expected
        assert (answer["error"], answer["error_type"]) == (True, "validation_error")
        assert answer["message"]
        assert answer["timestamp"].endswith("Z")
        assert world.server.storage.messages == 0


async def test_nothing_is_delivered_that_is_not_stored(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk) as world:
        ann = await world.websocket("ann")
        await ann.hear()
        disk.no_writes = True
        status, answer = await post(
            world, "/api/messages", {"player_id": "ann", "message": {"type": "line", "content": "lost"}}
        )
        assert (status, answer["error_type"]) == (503, "persistence_error")
        assert [m for m in await ann.hear() if "seq" in m] == []
        disk.mend()
        await line(world, "kept")
        await ann.until_type("line")
        assert ann.lines == ["kept"]


async def test_while_a_commit_is_slow_nobody_gets_its_message(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk) as world:
        ann = await world.websocket("ann")
        await ann.hear()
        disk.write_seconds = 3
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line, world, "slow")
            assert [m for m in await ann.hear(2) if "seq" in m] == []
            await ann.until_type("line")
        assert ann.lines == ["slow"]


async def test_a_publishers_connection_is_kept_for_the_next_message(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        client = Client(world.wire())
        body = json.dumps({"player_id": "ann", "message": {"type": "line", "content": 1}}).encode()
        head = b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        await client.send_all((head + body) * 3)  # pipelined
        answers = b""
        while answers.count(b"HTTP/1.1 202") < 3:
            data = await client.receive()
            assert data, answers
            answers += data
        client.close()
        ann = await world.websocket("ann")
        await ann.hear()
        assert ann.lines == [1, 1, 1]
