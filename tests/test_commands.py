"""Commands: one at a time, in order, each id answered once; what a handler does is done with its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from wsproto.events import BytesMessage

from mythos_trio import session
from mythos_trio.sse import MAX_CHATTER
from tests.support.games import Disk, Puppet
from tests.support.play import Client, WebSocketClient, World, play


async def by_post(world: World, content: object, id_: str | None = None, player: str = "ann") -> tuple[int, Any]:
    body = {"content": content} | ({} if id_ is None else {"id": id_})
    return await world.request("POST", f"/api/connections/{player}/commands", body)


async def entered(world: World, player: str = "ann") -> WebSocketClient:
    """A client that has been welcomed."""
    client = await world.websocket(player)
    await client.next()
    return client


def seqs_before(client: WebSocketClient, reply: dict[str, Any]) -> list[int]:
    """The numbers of the messages that came before *reply*."""
    return [m["seq"] for m in client.received[: client.received.index(reply)] if "seq" in m]


# The reply.


async def test_a_reply_comes_behind_the_messages_of_its_command(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        reply = await ann.command("line hello", "c1")
        last = ann.numbered[-1]
        assert reply == {
            "type": "reply",
            "id": "c1",
            "ok": True,
            "content": "hello",
            "position": f"1-{last['seq']}",
        }
        assert seqs_before(ann, reply) == [last["seq"]]


async def test_a_reply_without_effects_says_what_was_written(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        await ann.command("line hello")
        reply = await ann.command("echo hi")
        assert (reply["ok"], reply["content"]) == (True, "hi")
        assert reply["position"] == f"1-{ann.numbered[-1]['seq']}"


async def test_only_who_asked_gets_the_reply(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, other, stream = await entered(world), await entered(world), await world.sse("ann")
        await ann.command("line hello", "c1")
        for client in (other, stream):
            assert [m["type"] for m in await client.hear() if m["type"] != "welcome"] == ["line"]


async def test_any_json_can_be_a_command(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        contents: tuple[Any, ...] = (None, 7, 1.5, True, [], {"a": [1, {"b": "ü"}]}, "ünïcode \u2028 \U0001f409")
        for content in contents:
            assert (await ann.command(content))["content"] == {"heard": content}


async def test_a_plain_line_is_a_command(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        for text in ("echo hello", "7", "null"):
            await ann.say(text)
            reply = await ann.until_type("reply")
            assert reply["ok"] is True
            assert reply["id"]
        assert world.server.context.game.ran == ["echo hello", "7", "null"]  # type: ignore[attr-defined]


# One at a time, in order.


async def test_commands_run_one_at_a_time_in_order_of_arrival(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann, other = await entered(world), await entered(world)
        await ann.give("wait first", "c1")
        await trio.sleep(0.1)
        await other.give("line second", "c2")
        await trio.sleep(0.1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(by_post, world, "line third", "c3")
            await trio.sleep(0.1)
            await ann.give("line fourth", "c4")
            await trio.sleep(0.1)
            assert game.ran == ["wait first"]
            game.gate("first").set()
        await ann.until(lambda m: m.get("id") == "c4")
        assert ann.lines == ["first", "second", "third", "fourth"]


async def test_a_player_who_thinks_long_does_not_hold_up_another(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, bob = await entered(world), await entered(world, "bob")
        await ann.give("sleep 5")
        began = trio.current_time()
        assert (await bob.command("line quick"))["ok"] is True
        assert trio.current_time() - began < 1


async def test_reading_does_not_wait_for_a_handler(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        await ann.give("sleep 5")
        began = trio.current_time()
        await ann.say({"type": "ping"})
        await ann.until_type("pong")
        assert trio.current_time() - began < 1


# The same id.


async def test_the_same_id_while_it_runs_gets_the_one_answer(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann, other = await entered(world), await entered(world)
        answers: list[Any] = []
        async with trio.open_nursery() as nursery:

            async def post() -> None:
                answers.append(await by_post(world, "wait go", "c1"))

            await ann.give("wait go", "c1")
            await other.give("wait go", "c1")
            await ann.give("wait go", "c1")
            nursery.start_soon(post)
            await trio.sleep(1)
            game.gate("go").set()
        replies = [m for m in await ann.hear() if m["type"] == "reply"] + [await other.until_type("reply")]
        assert len(replies) == 3
        assert replies[0] == replies[1] == replies[2]
        assert answers == [(200, replies[0])]
        assert (game.ran, ann.lines) == (["wait go"], ["go"])


async def test_the_same_id_while_it_waits_gets_the_one_answer(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        await ann.give("wait go", "c1")
        for _ in range(2):
            await ann.give("line second", "c2")
        await trio.sleep(1)
        game.gate("go").set()
        replies = [m for m in await ann.hear() if m["type"] == "reply"]
        assert [r["id"] for r in replies] == ["c1", "c2", "c2"]
        assert replies[1] == replies[2]
        assert game.ran == ["wait go", "line second"]


@pytest.mark.parametrize("command", ["line hello", "echo hello"])
async def test_the_same_id_later_gets_the_stored_answer(
    tmp_path: Path, autojump_clock: MockClock, command: str
) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        first = await ann.command(command, "c1")
        ann.close()
        await trio.sleep(5)
        again = await entered(world)
        assert (await again.command(command, "c1")) | {"position": ""} == first | {"position": ""}
        status, answer = await by_post(world, command, "c1")
        assert (status, answer | {"position": ""}) == (200, first | {"position": ""})
        assert game.ran == [command]


async def test_an_answer_outlives_a_crash_with_its_effects(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, crash=True) as world:
        ann = await entered(world)
        start = ann.position
        first = await ann.command("line hello", "c1")
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await world.websocket("ann", f"position={start}")
        again = await ann.command("line hello", "c1")
        assert (again["ok"], again["content"]) == (True, first["content"])
        assert seqs_before(ann, again) == [int(first["position"].split("-")[1])]
        other = await ann.command("line other", "c1")
        assert (other["ok"], other["error"]["error_type"]) == (False, "validation_error")
        assert (game.ran, ann.lines) == (["line hello"], ["hello"])


async def test_a_crash_before_the_commit_leaves_nothing_and_the_same_id_runs(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game, disk = Puppet(), Disk()
    async with play(tmp_path / "m.db", game=game, hook=disk, crash=True) as world:
        ann = await entered(world)
        await ann.hear()
        disk.hangs = True
        await ann.give("line hello", "c1")
        assert [m["type"] for m in await ann.hear(3)] == []
        assert game.ran == ["line hello"]
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        assert (await ann.command("line hello", "c1"))["ok"] is True
        assert (game.ran, ann.lines) == (["line hello"] * 2, ["hello"])


async def test_a_command_without_effects_is_not_stored(tmp_path: Path, autojump_clock: MockClock) -> None:
    game, disk = Puppet(), Disk()
    async with play(tmp_path / "m.db", game=game, hook=disk, crash=True) as world:
        ann = await entered(world)
        await ann.hear()
        disk.hangs = True
        assert (await ann.command("echo hello", "c1"))["ok"] is True  # it waits for no disk
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        await ann.command("echo hello", "c1")
        assert game.ran == ["echo hello"] * 2


@pytest.mark.parametrize("when", ["while it runs", "while it waits", "later"])
async def test_an_id_that_comes_with_other_content_is_refused(
    tmp_path: Path, autojump_clock: MockClock, when: str
) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        if when == "while it waits":
            await ann.give("wait go")
        await ann.give("wait go", "c1")
        if when == "later":
            game.gate("go").set()
            await ann.until_type("reply")
        await ann.give("line other", "c1")
        reply = await ann.until_type("reply")
        assert (reply["id"], reply["ok"], reply["error"]["error_type"]) == ("c1", False, "validation_error")
        status, answer = await by_post(world, "line other", "c1")
        assert (status, answer["error_type"]) == (409, "validation_error")
        game.gate("go").set()
        await ann.hear()
        assert "other" not in ann.lines


async def test_the_same_id_in_the_next_session_is_another_command(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        await ann.command("line one", "c1")
        other = await world.websocket("ann", "session_id=second")
        assert (await other.command("line two", "c1"))["content"] == "two"
        assert game.ran == ["line one", "line two"]


async def test_answers_are_kept_in_memory_within_a_bound(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The newest 1,000 and those of the last ten minutes: what is older, and had no effects, runs again."""
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, rate_limit_requests=100_000) as world:
        ann = await entered(world)
        await ann.command("line stored", "effects")
        await ann.command("echo first", "first")
        with trio.move_on_after(601):
            await ann.hear(3600)
        for number in range(1001):
            await ann.command("echo x", f"n{number}")
        ran = len(game.ran)
        await ann.command("echo x", "n1")
        await ann.command("line stored", "effects")
        assert len(game.ran) == ran
        assert ann.lines == ["stored"]
        await ann.command("echo first", "first")
        assert len(game.ran) == ran + 1


# Too many.


async def test_32_wait_and_the_next_is_refused_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        await ann.give("wait go", "running")
        for number in range(32):
            await ann.give(f"line {number}", f"c{number}")
        await ann.give("line too many", "c32")
        reply = await ann.until_type("reply")
        assert (reply["id"], reply["ok"], reply["error"]["error_type"]) == ("c32", False, "capacity_error")
        status, answer = await by_post(world, "line too many", "c33")
        assert (status, answer["error_type"]) == (503, "capacity_error")
        game.gate("go").set()
        await ann.until(lambda m: m.get("id") == "c31")
        assert ann.lines == ["go", *map(str, range(32))]
        # What was refused was not remembered: the same id runs.
        assert (await ann.command("line too many", "c32"))["ok"] is True


async def test_replies_that_nobody_reads_stop_the_reading_of_commands(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Nothing grows without bound, no reply is lost, and bytes that wait in the kernel are life."""
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, write_timeout=300, rate_limit_requests=10_000) as world:
        ann = await entered(world)
        connection = next(iter(world.server.hub.connections.values()))
        ann.wire._other.stall()  # nothing arrives at ann any more
        big = "x" * 60_000
        for _ in range(4):
            await world.publish(player_id="ann", message={"type": "line", "content": big})
        for number in range(100):
            await ann.give(f"echo {number}", f"c{number}")
        await trio.sleep(120)
        # 33 wait for their place; as many more were taken before their handlers had ended.
        assert 33 <= connection.waiting_replies == len(game.ran) <= 66
        assert connection.over is None
        ann.wire._other.stall(False)
        await ann.until(lambda m: m.get("id") == "c99")
        assert [m["id"] for m in ann.of("reply")] == [f"c{n}" for n in range(100)]
        assert ann.lines == [big] * 4


async def test_too_many_commands_are_refused_and_then_the_connection_ends(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, rate_limit_requests=10, rate_limit_window=10) as world:
        ann = await entered(world)
        for number in range(10):
            assert (await ann.command(f"echo {number}"))["ok"] is True
        refused = await ann.command("echo more", "c1")
        assert (refused["ok"], refused["error"]["error_type"]) == (False, "rate_limit_error")
        status, answer = await by_post(world, "echo more")
        assert (status, answer["error_type"]) == (429, "rate_limit_error")
        await trio.sleep(1.01)
        assert (await ann.command("echo later", "c1"))["ok"] is True  # the refusal was not remembered
        for _ in range(12):
            await ann.give("echo flood")
        said = await ann.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"], said["retry_ms"] > 0) == (4029, True, True)
        assert ann.closed == (4029, said["reason"])
        assert len(game.ran) == 11


@pytest.mark.parametrize("frames", [b"\x89\x80\0\0\0\0" * 600, b"\x01\x80\0\0\0\0" + b"\0\x80\0\0\0\0" * 600])
async def test_too_many_frames_of_any_kind_end_the_connection(
    tmp_path: Path, autojump_clock: MockClock, frames: bytes
) -> None:
    """Pings, and fragments of a message that does not grow."""
    async with play(tmp_path / "m.db", game=Puppet(), rate_limit_requests=10, rate_limit_window=10) as world:
        ann = await entered(world)
        await ann.send_all(frames)
        await trio.sleep(10)  # the bucket is full again
        assert (await world.request("GET", "/api/connections/stats"))[1]["total_connections"] == 1
        await ann.send_all(frames[-600 * 6 :] * 2)
        said = await ann.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"], said["retry_ms"] > 0) == (4029, True, True)


async def test_who_talks_for_ever_on_an_event_stream_is_sent_away(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.sse("ann")
        await ann.send_all(bytes(MAX_CHATTER))
        await trio.sleep(1)
        assert (await world.request("GET", "/api/connections/stats"))[1]["total_connections"] == 1
        await ann.send_all(b"x")
        said = await ann.until_over()
        assert said is not None
        assert said["code"] == 1009


async def test_retry_after_is_told_over_http(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), rate_limit_requests=1, rate_limit_window=30) as world:
        ann = await entered(world)
        await ann.command("echo 1")
        client = await raw(world, b'{"content": 1}')
        assert client.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nretry-after: 30\r\n" in client.lower() or b"\r\nretry-after: 31\r\n" in client.lower()


async def raw(world: World, body: bytes) -> bytes:
    client = Client(world.wire())
    head = (
        b"POST /api/connections/ann/commands HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    await client.send_all(head + body)
    answer = b""
    while data := await client.receive():
        answer += data
    client.close()
    return answer


# Handlers that fail.


@pytest.mark.parametrize(
    ("command", "error_type"),
    [
        ("raise", "system_error"),
        ("refuse", "validation_error"),
        ("nonsense", "system_error"),
        ("lines 1001", "system_error"),
    ],
)
async def test_a_handler_that_fails_has_done_nothing_and_is_remembered(
    tmp_path: Path, autojump_clock: MockClock, command: str, error_type: str
) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        reply = await ann.command(command, "c1")
        assert (reply["ok"], reply["error"]["error_type"]) == (False, error_type)
        assert (await ann.command(command, "c1"))["error"] == reply["error"]
        assert game.ran == [command]
        assert (await ann.command("line fine"))["ok"] is True
        assert ann.lines == ["fine"]
        assert ann.closed is None


async def test_a_thousand_effects_are_fine(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        reply = await ann.command("lines 1000", "c1")
        assert reply["ok"] is True
        assert ann.lines == list(range(1000))
        assert seqs_before(ann, reply)[-1] == int(reply["position"].split("-")[1])


async def test_a_handler_that_hangs_is_cut_off(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game, handler_timeout=10) as world:
        ann = await entered(world)
        began = trio.current_time()
        await ann.give("wait for-ever", "c1")
        await ann.give("line next", "c2")
        reply = await ann.until_type("reply")
        assert trio.current_time() - began == pytest.approx(10, abs=0.1)
        assert (reply["id"], reply["error"]["error_type"]) == ("c1", "system_error")
        assert (await ann.until_type("reply"))["id"] == "c2"
        game.gate("for-ever").set()
        assert (await ann.command("wait for-ever", "c1"))["error"] == reply["error"]  # it is remembered
        assert ann.lines == ["next"]


async def test_what_a_commit_refuses_has_not_happened_and_runs_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    game, disk = Puppet(), Disk()
    async with play(tmp_path / "m.db", game=game, hook=disk) as world:
        ann = await entered(world)
        await ann.hear()
        disk.no_writes = True
        reply = await ann.command("line lost", "c1")
        assert (reply["ok"], reply["error"]["error_type"]) == (False, "persistence_error")
        status, answer = await by_post(world, "line lost", "c2")
        assert (status, answer["error"]["error_type"]) == (503, "persistence_error")
        disk.mend()
        assert (await ann.command("line lost", "c1"))["ok"] is True
        assert ann.lines == ["lost"]


async def test_a_command_outlives_its_connection(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        await ann.give("wait go", "c1")
        await trio.sleep(0.1)
        ann.close()
        await trio.sleep(1)
        game.gate("go").set()
        await trio.sleep(1)
        again = await entered(world)
        reply = await again.command("wait go", "c1")
        assert (reply["ok"], again.lines, game.ran) == (True, ["go"], ["wait go"])


async def test_what_a_switched_session_left_unanswered_is_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        await entered(world)
        answers: list[Any] = []
        async with trio.open_nursery() as nursery:

            async def post() -> None:
                answers.append(await by_post(world, "wait for-ever", "c1"))

            nursery.start_soon(post)
            await trio.sleep(1)
            other = await world.websocket("ann", "session_id=second")
            await other.next()
        status, answer = answers[0]
        assert answer["error"]["error_type"] == "session_error"
        assert status in (200, 409)


async def test_a_handler_begins_a_new_session_after_its_reply(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        assert (await ann.command("switch", "c1"))["ok"] is True
        said = await ann.until_over()
        assert (said or {})["code"] == 4501
        assert ann.lines == ["switching"]
        again = await world.websocket("ann")
        assert (await again.next())["session_id"] != ann.received[0]["session_id"]


async def test_a_handler_ends_the_connections_after_its_reply(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, stream = await entered(world), await world.sse("ann")
        assert (await ann.command("kick", "c1"))["ok"] is True
        for client in (ann, stream):
            said = await client.until_over()
            assert said == {"type": "disconnect", "code": 4503, "reason": "you were kicked", "reconnect": False}
            assert client.lines == ["kicked"]


# Subscribing.


async def test_a_client_subscribes_where_the_game_lets_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)

        async def shout(text: str, channel: str = "inn") -> None:
            await world.publish(channel=channel, message={"type": "line", "content": text})

        await ann.say({"type": "subscribe", "id": "s1", "channel": "inn"})
        reply = await ann.until_type("reply")
        assert (reply["id"], reply["ok"], reply["content"]) == ("s1", True, {"channel": "inn", "subscribed": True})
        await shout("heard")
        await ann.say({"type": "unsubscribe", "id": "s2", "channel": "inn"})
        assert (await ann.until_type("reply"))["content"] == {"channel": "inn", "subscribed": False}
        await shout("unheard")
        await ann.say({"type": "subscribe", "id": "s3", "channel": "secret"})
        refused = await ann.until_type("reply")
        assert (refused["ok"], refused["error"]["error_type"]) == (False, "validation_error")
        await shout("unheard", "secret")
        await ann.hear()
        assert ann.lines == ["heard"]
        # They are commands: the same id is not done twice, and is not another command's.
        await ann.say({"type": "unsubscribe", "id": "s1", "channel": "inn"})
        assert (await ann.until_type("reply"))["error"]["error_type"] == "validation_error"


async def test_unless_a_game_says_otherwise_clients_do_not_subscribe(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db") as world:
        ann = await entered(world)
        await ann.say({"type": "subscribe", "id": "s1", "channel": "inn"})
        reply = await ann.until(lambda m: m.get("id") == "s1")
        assert reply["ok"] is False


# What cannot be understood.

MALFORMED = [
    ("{", None),
    ("{]", None),
    ("[]", None),
    ('"text"', None),
    ("", None),
    ("   ", None),
    ("two\nlines", None),
    ("\x00", None),
    ("[" * 70 + "]" * 70, None),
    ("[" * 5000, None),
    ("{}", None),
    ('{"type": 7}', None),
    ('{"type": "nonsense", "id": "i"}', "i"),
    ('{"type": "reply", "id": "i"}', "i"),
    ('{"type": "command", "id": "i"}', "i"),
    ('{"type": "command", "id": "i", "content": 1, "more": 1}', "i"),
    ('{"type": "command", "id": 7, "content": 1}', None),
    ('{"type": "command", "id": "", "content": 1}', None),
    (json.dumps({"type": "command", "id": "x" * 129, "content": 1}), None),
    ('{"type": "command", "id": "a\\nb", "content": 1}', "a\nb"),
    ('{"type": "command", "id": "i", "content": NaN}', None),
    ('{"type": "command", "id": "i", "content": "\\ud800"}', None),
    ('{"type": "ack", "id": "i"}', "i"),
    ('{"type": "ack", "id": "i", "position": 7}', "i"),
    ('{"type": "ack", "id": "i", "position": "7"}', "i"),
    ('{"type": "ack", "id": "i", "position": "1-2-3"}', "i"),
    ('{"type": "subscribe", "id": "i"}', "i"),
    ('{"type": "subscribe", "id": "i", "channel": "a b"}', "i"),
    ('{"type": "subscribe", "id": "i", "channel": 7}', "i"),
    ('{"type": "auth", "id": "i"}', "i"),
]


@pytest.mark.parametrize(("text", "id_"), MALFORMED, ids=lambda value: repr(value)[:40])
async def test_a_frame_that_cannot_be_understood_is_told_why(
    tmp_path: Path, autojump_clock: MockClock, text: str, id_: str | None
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await entered(world)
        await ann.say(text)
        reply = await ann.until_type("reply")
        assert (reply["id"], reply["ok"], reply["error"]["error_type"]) == (id_, False, "validation_error")
        assert reply["error"]["message"]
        assert (await ann.command("echo still here"))["ok"] is True


POSTED = [
    (b"{", 400),
    (b"[]", 422),
    ({}, 422),
    ({"content": 1, "type": "ack"}, 422),
    ({"content": 1, "more": 1}, 422),
    ({"content": 1, "id": 7}, 422),
    ({"content": 1, "session_id": "a b"}, 400),
    ({"content": 1, "session_id": "another"}, 409),
    ({"content": 1, "connection_id": "another"}, 409),
]


@pytest.mark.parametrize(("body", "expected"), POSTED, ids=lambda value: repr(value)[:40])
async def test_a_posted_command_that_cannot_be_understood_is_told_why(
    tmp_path: Path, autojump_clock: MockClock, body: object, expected: int
) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        await entered(world)
        status, answer = await world.request("POST", "/api/connections/ann/commands", body)
        assert status == expected
        assert answer["error"] is True
        assert answer["error_type"] in ("validation_error", "session_error", "connection_error")
        assert game.ran == []


async def test_who_is_not_connected_is_told_to_connect_first(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), linkdead_grace=5) as world:
        for _ in range(2):
            status, answer = await by_post(world, "echo hi")
            assert (status, answer["error_type"]) == (409, "session_error")
            assert "connect first" in answer["message"]
            ann = await entered(world)
            ann.close()
            await trio.sleep(1)
            assert (await by_post(world, "echo hi"))[0] == 200  # link-dead is enough
            await trio.sleep(10)


async def test_binary_too_big_and_bad_text_end_the_connection(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), max_message_size=4096) as world:
        ann = await entered(world)
        await ann.send_all(ann.protocol.send(BytesMessage(data=b"x")))
        said = await ann.until_over()
        assert (said or {})["code"] == 1003
        bob = await entered(world, "bob")
        await bob.say(json.dumps({"type": "command", "content": "x" * 5000}))
        said = await bob.until_over()
        assert (said or {})["code"] == 1009
        eve = await entered(world, "eve")
        await eve.send_all(b"\x81\x82\x00\x00\x00\x00\xff\xff")  # RFC 6455, section 5.6: text is UTF-8
        said = await eve.until_over()
        assert (said or {})["code"] == 1007
        dan = await entered(world, "dan")
        await dan.send_all(b"\x83\x80\x00\x00\x00\x00")  # opcode 3 is reserved
        said = await dan.until_over()
        assert (said or {})["code"] == 1002


# Who runs them.


def workers(world: World) -> int:
    """Tasks that run handlers, or wait for more to run."""
    names = [
        task.name
        for session in world.server.hub.sessions.values()
        if session.nursery is not None
        for task in session.nursery.child_tasks
    ]
    return sum(name.startswith("handlers of ") for name in names)


async def test_who_has_run_a_command_waits_for_the_next_if_not_too_many_do(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_RESTING", 2)
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        clients = [await entered(world, name) for name in ("ann", "bob", "eve")]
        for turn in range(3):
            for client in clients:
                assert (await client.command(f"echo {turn}"))["ok"]
        await trio.sleep(1)
        assert workers(world) == world.server.context.resting == 2
        assert not any(live.running_handler for live in world.server.hub.sessions.values())
        await world.server.registrar.end("ann")
        await trio.sleep(1)
        assert workers(world) == world.server.context.resting == 1


async def test_a_handler_is_cut_off_to_the_moment_whenever_it_begins(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), handler_timeout=10.0) as world:
        ann = await entered(world)
        for pause in (0.0, 3.0, 9.5, 25.0):
            await trio.sleep(pause)
            began = trio.current_time()
            assert not (await ann.command("sleep 60"))["ok"]
            assert trio.current_time() - began == pytest.approx(10.0)
