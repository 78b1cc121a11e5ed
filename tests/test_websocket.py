"""What clients say over a WebSocket: ordinary frames are taken by us, all else by trio-websocket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock
from wsproto.events import CloseConnection, Ping, Pong, TextMessage
from wsproto.frame_protocol import CloseReason

from mythos_trio.connection import Connection
from mythos_trio.core.requests import ClientRequest
from tests.support.games import Puppet
from tests.support.play import WebSocketClient, play


def ping(number: int) -> str:
    return json.dumps({"type": "ping", "id": f"p{number}"})


def parts(client: WebSocketClient, text: str) -> bytes:
    """*text* as a message of two frames."""
    return client.protocol.send(TextMessage(data=text[:5], message_finished=False)) + client.protocol.send(
        TextMessage(data=text[5:])
    )


async def pong_frame(client: WebSocketClient) -> bytes:
    """The payload of the next pong frame; other events are left out."""
    while not isinstance(event := await client._event(), Pong):
        pass
    return bytes(event.payload)


async def test_ordinary_and_other_frames_in_one_piece(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        send = ann.protocol.send
        large = json.dumps({"type": "ping", "id": "large", "padding": "x" * 20_000})
        data = [send(TextMessage(data=ping(1))), send(TextMessage(data=ping(2))), parts(ann, ping(3))]
        data += [send(TextMessage(data=ping(4))), send(TextMessage(data=large)), parts(ann, ping(5))]
        for byte_count in (1, 3000):
            whole = b"".join(data)
            for at in range(0, len(whole), byte_count):
                await ann.send_all(whole[at : at + byte_count])
            for expected in ("p1", "p2", "p3", "p4", None, "p5"):
                answer = await ann.until(lambda m: m["type"] in ("pong", "reply"))
                assert answer.get("id") == (expected or "large")
                assert answer["type"] == ("pong" if expected else "reply")  # a ping has no padding
        await ann.send_all(send(Ping(payload=b"after")))
        assert await pong_frame(ann) == b"after"


async def test_a_ping_frame_is_answered_and_the_newest_of_those_that_had_to_wait(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.next()
        await ann.send_all(ann.protocol.send(Ping(payload=b"one")))
        assert await pong_frame(ann) == b"one"
        connection = next(iter(world.server.hub.connections.values()))
        for number in range(60):  # more than the sockets hold
            await world.publish(player_id="ann", message={"type": "line", "content": f"{number}" + "x" * 5000})
        assert connection.link.unsent
        for number in range(20):
            await ann.send_all(ann.protocol.send(Ping(payload=b"%d" % number)))
        await trio.sleep(0.1)  # all of them have come
        heard: list[bytes] = []
        while not heard or heard[-1] != b"19":
            heard.append(await pong_frame(ann))
        assert heard == [b"19"]
        assert connection.over is None


@pytest.mark.parametrize("code", [1000, 1001, 4000])
async def test_a_close_frame_is_answered_with_its_code(tmp_path: Path, autojump_clock: MockClock, code: int) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.next()
        await ann.send_all(ann.protocol.send(CloseConnection(code=code, reason="bye")))
        while not isinstance(event := await ann._event(), CloseConnection):
            pass
        assert event.code == code


async def test_a_close_frame_without_a_code(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.next()
        await ann.send_all(b"\x88\x80mask")
        while not isinstance(event := await ann._event(), CloseConnection):
            pass
        assert event.code == CloseReason.NO_STATUS_RCVD


async def test_a_fault_in_hearing_a_frame_ends_its_connection_only(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann, bob = await world.websocket("ann"), await world.websocket("bob")
        hear = world.server.streams.hear

        def fail(connection: Connection, request: ClientRequest) -> bool:
            if connection.player_id == "ann":
                raise ZeroDivisionError("on purpose")
            return hear(connection, request)

        monkeypatch.setattr(world.server.streams, "hear", fail)
        await ann.send_all(ann.protocol.send(TextMessage(data=ping(1))))
        await ann.until_over()
        assert ann.closed is not None
        assert ann.closed[0] == 1011
        await bob.send_all(bob.protocol.send(TextMessage(data=ping(2))))
        assert (await bob.until_type("pong"))["id"] == "p2"


async def test_a_frame_in_two_pieces_and_what_comes_with_the_end(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        whole = ann.protocol.send(TextMessage(data=ping(1)))
        await ann.send_all(whole[:9])
        await trio.sleep(1)
        await ann.send_all(whole[9:])
        assert (await ann.until_type("pong"))["id"] == "p1"
        await ann.send_all(ann.protocol.send(TextMessage(data=ping(2))) + whole[:3])
        ann.wire.send_eof()
        assert (await ann.until(lambda message: message.get("id") == "p2"))["type"] == "pong"


@pytest.mark.parametrize("code", [0, 1005, 5000])
async def test_a_close_frame_that_may_not_be_is_judged_by_trio_websocket(
    tmp_path: Path, autojump_clock: MockClock, code: int
) -> None:
    """Heard without a task, like other frames: it must not escape there, where it would end the server."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        ann = await world.websocket("ann")
        await ann.send_all(b"\x88\x82\0\0\0\0" + code.to_bytes(2, "big"))
        assert (await ann.until_type("closed"))["code"] == 1002
        await world.websocket("bob")
