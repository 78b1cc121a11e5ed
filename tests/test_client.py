"""The client of both transports, against the real server on virtual time, and against bad ones."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from mythos_trio import client as client_module
from mythos_trio.carriers import BadUrl, Base
from mythos_trio.client import ClientEnded, DualClient
from mythos_trio.seams import SeededRandomness
from tests.support import play as play_module
from tests.support.games import Puppet
from tests.support.memory_net import MemoryStream, MemoryWire
from tests.support.play import World, play

URL = "http://localhost:8000"


class Net:
    """The way to the server, which can be cut; which server is there may change."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world
        self.wires: list[tuple[str, MemoryWire]] = []
        self.refused: set[str] = set()
        """Transports that a proxy between answers itself."""

    async def dial(self, _base: Base) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if self.world is None:
            raise ConnectionRefusedError(111, "Connection refused")
        wire = self.world.wire()
        return _Noting(self, wire)

    def of(self, kind: str) -> MemoryWire:
        """The newest wire of a transport (``ws`` or ``sse``) or of POSTs (``api``)."""
        return next(wire for name, wire in reversed(self.wires) if name == kind)

    def count(self, kind: str) -> int:
        return sum(name == kind for name, _ in self.wires)


class _Noting(MemoryStream):
    """Notes what kind of connection it is by the first bytes."""

    def __init__(self, net: Net, wire: MemoryWire) -> None:
        super().__init__(wire)
        self._net = net
        self._noted = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if not self._noted:
            self._noted = True
            kind = bytes(data).split(b" ")[1].split(b"/")[1].decode()
            if kind in self._net.refused:
                raise trio.BrokenResourceError
            self._net.wires.append((kind, self.wire))
        await super().send_all(data)


def make(net: Net, player: str = "ann", **more: Any) -> DualClient:
    return DualClient(URL, player, dial=net.dial, randomness=SeededRandomness(7), **more)


async def until(test: Callable[[], bool], seconds: float = 120) -> None:
    with trio.fail_after(seconds):
        while not test():
            await trio.sleep(0.05)


class Heard:
    """Everything that a client hands on, as it comes."""

    def __init__(self, client: DualClient, nursery: trio.Nursery) -> None:
        self.events: list[dict[str, Any]] = []
        nursery.start_soon(self._listen, client)

    async def _listen(self, client: DualClient) -> None:
        async for event in client.events():
            self.events.append(event)

    @property
    def lines(self) -> list[Any]:
        return [event["content"] for event in self.events if event["type"] == "line"]


async def line(world: World, content: object, player: str = "ann") -> dict[str, Any]:
    return await world.publish(player_id=player, message={"type": "line", "content": content})


def both(client: DualClient) -> bool:
    return client.health == "healthy"


@pytest.fixture
def outlives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client outlives the server: `play` must not count its tasks."""
    monkeypatch.setattr(play_module, "count_tasks", lambda: 0)


# The stream.


async def test_each_message_once_and_in_order_over_two_transports(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world, trio.open_nursery() as nursery:
        net = Net(world)
        async with make(net) as client:
            heard = Heard(client, nursery)
            await until(lambda: both(client))
            for number in range(20):
                await line(world, number)
            await until(lambda: len(heard.lines) >= 20)
            await trio.sleep(1)
            assert heard.lines == list(range(20))
            state = world.server.hub.sessions["ann"]
            assert sorted(c.transport for c in state.connections.values()) == ["sse", "websocket"]
            assert client.session_id == state.session_id


@pytest.mark.parametrize("kind", ["ws", "sse"])
@pytest.mark.parametrize("how", ["close", "reset", "cut"])
async def test_one_cable_is_pulled(tmp_path: Path, autojump_clock: MockClock, kind: str, how: str) -> None:
    """Nothing is lost, nothing twice; the other transport carries on, and the lost one comes back."""
    async with play(tmp_path / "m.db", game=Puppet()) as world, trio.open_nursery() as nursery:
        net = Net(world)
        async with make(net) as client:
            heard = Heard(client, nursery)
            await until(lambda: both(client))
            await line(world, "before")
            getattr(net.of(kind), how)()
            await line(world, "meanwhile")
            await until(lambda: "meanwhile" in heard.lines, 5)
            await until(lambda: both(client) and net.count(kind) == 2)
            await line(world, "after")
            await until(lambda: "after" in heard.lines)
            assert heard.lines == ["before", "meanwhile", "after"]
            # The new one named the old one, so there are still two.
            await until(lambda: len(world.server.hub.sessions["ann"].connections) == 2)


async def test_both_cables_are_pulled(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world, trio.open_nursery() as nursery:
        net = Net(world)
        async with make(net) as client:
            heard = Heard(client, nursery)
            await until(lambda: both(client))
            await line(world, "before")
            net.world = None
            for kind in ("ws", "sse"):
                net.of(kind).reset()
            await until(lambda: client.health == "unhealthy")
            await line(world, "meanwhile")
            await until(lambda: client.transports["sse"].why == "connection refused")
            net.world = world
            await until(lambda: both(client))
            await until(lambda: len(heard.lines) == 2)
            assert heard.lines == ["before", "meanwhile"]


@pytest.mark.usefixtures("outlives")
async def test_the_server_is_killed_and_comes_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    net = Net()
    async with trio.open_nursery() as nursery, make(net) as client:
        heard = Heard(client, nursery)
        for life in range(3):
            async with play(tmp_path / "m.db", game=Puppet(), crash=True) as world:
                await line(world, f"mail {life}")
                net.world = world
                await until(lambda: both(client))
                await line(world, f"line {life}")
                await until(lambda life=life: f"line {life}" in heard.lines)  # type: ignore[misc]
                net.world = None
        assert heard.lines == [f"{what} {life}" for life in range(3) for what in ("mail", "line")]
        assert client.health == "unhealthy"


@pytest.mark.usefixtures("outlives")
async def test_drained_it_comes_back_when_it_was_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    net = Net()
    async with trio.open_nursery() as nursery, make(net) as client:
        heard = Heard(client, nursery)
        async with play(tmp_path / "m.db", game=Puppet()) as world:
            net.world = world
            await until(lambda: both(client))
            await line(world, "before")
        assert "4000" in (client.transports["websocket"].why or "")
        assert client.ended is None
        async with play(tmp_path / "m.db", game=Puppet()) as world:
            net.world = world
            await until(lambda: both(client))
            await line(world, "after")
            await until(lambda: "after" in heard.lines)
            assert heard.lines == ["before", "after"]
            net.world = None


async def test_another_run_goes_on_after_what_was_done_with(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        net = Net(world)
        async with make(net) as client:
            await client.wait_connected()
            for number in range(5):
                await line(world, number)
            events = client.events()
            assert [(await anext(events))["content"] for _ in range(4)] == [0, 1, 2, 3]
            await until(lambda: len(client._queue) == 1)
            position, consumed = client.position, client.consumed
        # Event 3 was handed out, but nobody said that it was done with.
        with trio.fail_after(60):
            async with make(net, position=consumed) as client:
                events = client.events()
                assert [(await anext(events))["content"] for _ in range(2)] == [3, 4]
                assert client.position == position


async def test_what_was_done_with_is_acknowledged(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Also where the server cannot see what arrived: behind a proxy."""
    for refused in ("ws", "sse"):
        async with play(tmp_path / f"{refused}.db", game=Puppet()) as world, trio.open_nursery() as nursery:
            net = Net(world)
            net.refused.add(refused)
            async with make(net) as client:
                await client.wait_connected()
                Heard(client, nursery)
                session = world.server.hub.sessions["ann"]
                for connection in session.connections.values():
                    connection.observable = False
                published = await line(world, "one")
                await until(lambda session=session, seq=published["seq"]: session.seen == seq, 10)  # type: ignore[misc]


async def test_a_position_can_be_named(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        net = Net(world)
        async with make(net) as client:
            await client.wait_connected()
            first = await line(world, "one")
            await line(world, "two")
        async with make(net, position=f"{first['epoch']}-{first['seq']}") as client:
            assert (await anext(client.events()))["content"] == "two"


async def test_a_gap_is_told_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with (
        play(tmp_path / "m.db", game=Puppet(), message_retention_count=3, cleanup_interval=1) as world,
        trio.open_nursery() as nursery,
    ):
        net = Net(world)
        async with make(net) as client:
            heard = Heard(client, nursery)
            await until(lambda: both(client))
            await line(world, "seen")
            await until(lambda: heard.lines == ["seen"])
            net.world = None
            for kind in ("ws", "sse"):
                net.of(kind).reset()
            await until(lambda: client.health == "unhealthy")
            for number in range(10):
                await line(world, number)
            await trio.sleep(10)
            net.world = world
            await until(lambda: len(heard.lines) == 4)
            await until(lambda: both(client))
            assert heard.lines == ["seen", 7, 8, 9]
            gaps = [event for event in heard.events if event["type"] == "gap"]
            assert [gap["reason"] for gap in gaps] == ["retention"]
            assert heard.events.index(gaps[0]) == 1


async def test_a_silent_connection_is_given_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Heartbeats come every 30 s: after 65 s without anything it is dead, whatever TCP thinks."""
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        net = Net(world)
        async with make(net, transports=("sse",)) as client:
            await until(lambda: both(client))
            net.of("sse").cut()
            began = trio.current_time()
            await until(lambda: client.health == "unhealthy")
            assert trio.current_time() - began <= 66
            assert client.transports["sse"].why == "nothing heard from the server"
            await until(lambda: both(client))


async def test_a_slow_application_stops_the_reading(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_QUEUE", 10)
    async with play(tmp_path / "m.db", game=Puppet()) as world, trio.open_nursery() as nursery:
        net = Net(world)
        async with make(net) as client:
            await until(lambda: both(client))
            for number in range(50):
                await line(world, number)
            await trio.sleep(20)
            # One message of each transport may be on its way when the queue is full.
            assert 10 <= len(client._queue) <= 12
            heard = Heard(client, nursery)
            await until(lambda: len(heard.lines) == 50)
            assert heard.lines == list(range(50))


# Commands.


async def test_a_command_and_its_reply(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world, make(Net(world)) as client:
        reply = await client.send_command("echo hello")
        assert (reply["ok"], reply["content"]) == (True, "hello")
        bad = await client.send_command("refuse")
        assert bad["ok"] is False
        assert bad["error"]["message"]


async def test_by_post_while_the_websocket_is_down(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world:
        net = Net(world)
        net.refused.add("ws")
        async with make(net) as client:
            reply = await client.send_command("line hello")
            assert (reply["ok"], reply["content"]) == (True, "hello")
            assert client.health == "degraded"
            events = client.events()
            assert (await anext(events))["content"] == "hello"
            assert net.count("api") == 1
            # What precedes a reply by POST comes by the other way: it can be waited for.
            begun = trio.current_time()
            await client.wait_consumed(reply["position"])
            assert trio.current_time() - begun <= 1


@pytest.mark.parametrize("what", ["wait x", "line x"])
async def test_a_command_survives_its_connection(tmp_path: Path, autojump_clock: MockClock, what: str) -> None:
    """Under way or answered, when the WebSocket goes: it is run once, and answered."""
    game = Puppet()
    async with play(tmp_path / "m.db", game=game) as world, trio.open_nursery() as nursery:
        net = Net(world)
        async with make(net) as client:
            heard = Heard(client, nursery)
            await until(lambda: both(client))
            replies: list[Any] = []

            async def ask() -> None:
                replies.append(await client.send_command(what, command_id="c1"))

            wire = net.of("ws")
            wire.stall()  # what the server says stays in the kernel
            nursery.start_soon(ask)
            await until(lambda: game.ran == [what])
            wire.reset()
            await trio.sleep(0.2)
            game.gate("x").set()
            await until(lambda: len(replies) == 1)
            assert replies[0]["ok"]
            await until(lambda: heard.lines == ["x"])
            assert game.ran == [what]


@pytest.mark.usefixtures("outlives")
async def test_a_command_waits_for_the_server(tmp_path: Path, autojump_clock: MockClock) -> None:
    net = Net()
    async with trio.open_nursery() as nursery, make(net) as client:
        replies: list[Any] = []

        async def ask() -> None:
            replies.append(await client.send_command("echo late"))

        nursery.start_soon(ask)
        await trio.sleep(20)
        assert replies == []
        async with play(tmp_path / "m.db", game=Puppet(), crash=True) as world:
            net.world = world
            await until(lambda: len(replies) == 1)
            net.world = None
        assert replies[0]["content"] == "late"


@pytest.mark.usefixtures("outlives")
async def test_a_command_survives_kill_9(tmp_path: Path, autojump_clock: MockClock) -> None:
    net = Net()
    replies: list[Any] = []
    async with trio.open_nursery() as nursery, make(net) as client:
        heard = Heard(client, nursery)

        async def ask() -> None:
            replies.append(await client.send_command("wait x", command_id="c1"))

        first = Puppet()
        async with play(tmp_path / "m.db", game=first, crash=True) as world:
            net.world = world
            await until(lambda: both(client))
            nursery.start_soon(ask)
            await until(lambda: first.ran == ["wait x"])
            net.world = None
        second = Puppet()
        second.gate("x").set()
        async with play(tmp_path / "m.db", game=second, crash=True) as world:
            net.world = world
            await until(lambda: len(replies) == 1 and heard.lines == ["x"])
            net.world = None
        assert replies[0]["ok"]


async def test_the_same_id_twice_at_once_is_a_mistake(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with make(Net()) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.send_command, "look")
        nursery.start_soon(lambda: client.send_command("look", command_id="c1"))
        await trio.sleep(1)
        with pytest.raises(ValueError, match="under way"):
            await client.send_command("look", command_id="c1")
        nursery.cancel_scope.cancel()


# The end.


async def ended(client: DualClient) -> ClientEnded:
    with trio.fail_after(60):
        while True:
            try:
                await client.send_command("echo x")
            except ClientEnded as error:
                return error
            await trio.sleep(0.1)


async def test_a_session_that_was_replaced_does_not_come_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        net = Net(world)
        async with make(net) as client:
            await until(lambda: both(client))
            async with make(Net(world), session_id="mine") as other:
                await other.wait_connected()
                error = await ended(client)
                assert error.ended.code == 4501
                assert [event async for event in client.events()] == []
                tried = len(net.wires)
                await trio.sleep(100)
                assert len(net.wires) == tried
                assert both(other)


async def test_removed_by_the_operator(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world, make(Net(world)) as client:
        await until(lambda: both(client))
        assert (await world.request("DELETE", "/api/connections/ann"))[0] == 200
        assert (await ended(client)).ended.code == 4503


async def test_a_bad_token(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), secret_key="k" * 32) as world:
        async with make(Net(world), token="nonsense") as client:
            assert (await ended(client)).ended.code == 4500
        token = world.server.access.issue("ann")
        async with make(Net(world), token=token) as client:
            assert (await client.send_command("echo x"))["ok"]
            await until(lambda: both(client))


async def test_both_turned_down_is_the_end(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A session id that cannot be one: 400 on both, and no hope of better."""
    async with play(tmp_path / "m.db", game=Puppet()) as world, make(Net(world), session_id="a b") as client:
        error = await ended(client)
        assert "400" in error.ended.reason
        with pytest.raises(ClientEnded):
            await client.wait_connected()


async def test_leaving_leaves_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        async with make(Net(world)) as client:
            await until(lambda: both(client))
            await line(world, "one")
            await anext(client.events())
        # `play` looks for what is left over.
        await until(lambda: not world.server.hub.connections)
        assert client.ended is not None


def test_a_bad_url() -> None:
    with pytest.raises(BadUrl):
        DualClient("ftp://x", "ann")


# Bad servers.


class Script:
    """A server that does with each connection as it is told."""

    def __init__(self, nursery: trio.Nursery, play: Callable[[int, trio.abc.Stream], Awaitable[None]]) -> None:
        self._nursery = nursery
        self._play = play
        self.dialled: list[float] = []
        self.heads: list[bytes] = []

    async def dial(self, _base: Base) -> trio.abc.Stream:
        self.dialled.append(trio.current_time())
        ours, theirs = memory_stream_pair()
        self._nursery.start_soon(self._serve, len(self.dialled), theirs)
        return ours

    async def _serve(self, number: int, stream: trio.abc.HalfCloseableStream) -> None:
        async with stream:
            try:
                self.heads.append(bytes(await stream.receive_some()))
                await self._play(number, stream)
            except trio.BrokenResourceError:
                pass  # the client has left


def sse(*messages: object) -> bytes:
    return b"".join(b"data: " + json.dumps(message).encode() + b"\n\n" for message in messages)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
WELCOME = {
    "type": "welcome",
    "player_id": "ann",
    "session_id": "s1",
    "connection_id": "c1",
    "server_id": "x",
    "epoch": 1,
    "position": "1-0",
    "resumed": False,
    "heartbeat_seconds": 30,
}


@asynccontextmanager
async def against(
    nursery: trio.Nursery, play: Callable[[int, trio.abc.Stream], Awaitable[None]], **more: Any
) -> AsyncIterator[tuple[DualClient, Script]]:
    script = Script(nursery, play)
    more = {"transports": ("sse",), **more}
    async with DualClient(URL, "ann", dial=script.dial, randomness=SeededRandomness(3), **more) as client:
        yield client, script


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (OK + sse({"type": "hello"}), "did not send a welcome"),
        (OK + sse({**WELCOME, "position": "x"}), "welcome that cannot be understood"),
        (OK + sse({**WELCOME, "epoch": None}), "welcome that cannot be understood"),
        (OK + sse(WELCOME, {"type": "line", "seq": -1}), "a number that is none"),
        (OK + sse(WELCOME, {"type": "line", "seq": "1"}), "a number that is none"),
        (OK + sse(WELCOME, {"type": "gap", "after": "1"}), "not a gap"),
        (OK + sse(WELCOME, {"type": "heartbeat"}), "cannot be understood"),
        (OK + sse(WELCOME, {"type": "disconnect", "code": 4008, "reason": "slow", "retry_ms": 5000}), "slow (4008)"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n", "refused (502)"),
        (b"", "without an answer"),
    ],
)
async def test_nonsense_is_named_and_tried_again(
    nursery: trio.Nursery, autojump_clock: MockClock, answer: bytes, why: str
) -> None:
    async def talk(_number: int, stream: trio.abc.Stream) -> None:
        await stream.send_all(answer)

    async with against(nursery, talk) as (client, script):
        await until(lambda: len(script.dialled) >= 4)
        assert why in (client.transports["sse"].why or "")
        assert client.ended is None


async def test_waits_grow_and_retry_ms_wins(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def talk(number: int, stream: trio.abc.Stream) -> None:
        if number == 5:
            await stream.send_all(OK + sse({"type": "disconnect", "code": 4009, "retry_ms": 7000}))

    async with against(nursery, talk) as (_client, script):
        await until(lambda: len(script.dialled) >= 7)
        waits = [b - a for a, b in zip(script.dialled, script.dialled[1:], strict=False)]
        for wait, full in zip(waits[:4], (0.5, 1, 2, 4), strict=True):
            assert full / 2 <= wait <= full + 0.1
        assert waits[4] == pytest.approx(7, abs=0.1)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 101 Switching Protocols\r\nUpgra"])
async def test_a_handshake_that_is_broken_off_is_tried_again_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock, answer: bytes
) -> None:
    """The server was killed in its midst."""

    async def talk(_number: int, stream: trio.abc.Stream) -> None:
        if answer:
            await stream.send_all(answer)

    async with against(nursery, talk, transports=("websocket",)) as (client, script):
        await until(lambda: len(script.dialled) == 2)
        assert script.dialled[1] - script.dialled[0] <= 0.5 + 0.1
        assert client.transports["websocket"].why == "the server broke off the handshake"


async def test_a_server_that_says_nothing_is_given_up(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def talk(_number: int, _stream: trio.abc.Stream) -> None:
        await trio.sleep(1000)

    async with against(nursery, talk) as (client, script):
        await until(lambda: len(script.dialled) == 2)
        assert client.transports["sse"].why == "no welcome within 10 s"
        assert script.dialled[1] - script.dialled[0] >= 10
        nursery.cancel_scope.cancel()


async def test_what_is_named_when_it_comes_back(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def talk(number: int, stream: trio.abc.Stream) -> None:
        await stream.send_all(OK + sse({**WELCOME, "connection_id": f"c{number}"}, {"type": "line", "seq": number}))

    async with against(nursery, talk, token="t0k3n") as (_client, script):
        await until(lambda: len(script.heads) >= 3)
        assert script.heads[0].startswith(b"GET /sse/ann HTTP/1.1\r\nHost: localhost:8000\r\n")
        assert b"Authorization: Bearer t0k3n\r\n" in script.heads[0]
        assert b"GET /sse/ann?session_id=s1&position=1-2&replaces=c2 " in script.heads[2]


async def test_an_epoch_that_shares_less(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The power went: what we had beyond `shared` is not the store's any more."""

    async def talk(number: int, stream: trio.abc.Stream) -> None:
        if number == 1:
            await stream.send_all(OK + sse(WELCOME, *({"type": "line", "seq": n, "content": n} for n in (1, 2, 3))))
            return
        gap = {"type": "gap", "after": "1-3", "position": "2-1", "reason": "epoch", "shared": 1}
        fresh = [{"type": "line", "seq": n, "content": f"new {n}"} for n in (2, 3)]
        await stream.send_all(OK + sse({**WELCOME, "epoch": 2, "position": "1-3"}, gap, *fresh))
        await trio.sleep(1000)

    async with against(nursery, talk) as (client, _script):
        events = client.events()
        found = [await anext(events) for _ in range(6)]
        assert [event.get("content", event["type"]) for event in found] == [1, 2, 3, "gap", "new 2", "new 3"]
        assert client.position == "2-3"
        nursery.cancel_scope.cancel()


async def test_the_second_transport_names_what_the_first_found_out(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def talk(_number: int, stream: trio.abc.Stream) -> None:
        await trio.sleep(1)
        await stream.send_all(OK + sse({**WELCOME, "position": "1-5"}))
        await trio.sleep(1000)

    script = Script(nursery, talk)
    async with DualClient(URL, "ann", dial=script.dial, transports=("sse", "websocket")):
        await until(lambda: len(script.heads) == 2)
        assert script.heads[0].startswith(b"GET /sse/ann HTTP")
        assert b"GET /ws/ann?session_id=s1&position=1-5 " in script.heads[1]
        nursery.cancel_scope.cancel()


async def test_one_that_could_miss_messages_is_opened_again(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """Both had to start without a position, and the second starts beyond what the first has brought."""

    async def talk(number: int, stream: trio.abc.Stream) -> None:
        if number == 1:
            await trio.sleep(5)
            await stream.send_all(OK + sse({**WELCOME, "position": "1-5"}))
            await trio.sleep(1000)
        elif number == 2:
            await trio.sleep(4)
            await stream.send_all(OK + sse({**WELCOME, "connection_id": "c2", "position": "1-9"}))
        else:
            await stream.send_all(OK + sse({**WELCOME, "connection_id": "c3", "position": "1-5"}))
            await trio.sleep(1000)

    script = Script(nursery, talk)
    client = DualClient(URL, "ann", dial=script.dial, transports=("sse",))
    client.transports["again"] = client_module.TransportState("sse")
    async with client:
        await until(lambda: len(script.heads) == 3)
        assert b"position" not in script.heads[1]
        assert b"position=1-5&replaces=c2" in script.heads[2]
        await until(lambda: both(client))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answers", "ok", "posts"),
    [
        ([(200, {"type": "reply", "id": "c1", "ok": True, "content": "x"})], True, 1),
        ([(409, {"error_type": "session_error"}), (200, {"type": "reply", "id": "c1", "ok": True})], True, 2),
        ([(503, {}), (429, {}), (200, {"type": "reply", "id": "c1", "ok": True})], True, 3),
        ([(503, {"type": "reply", "id": "c1", "ok": False, "error": {}})], False, 1),
        ([(422, {"error_type": "validation_error", "message": "no"})], False, 1),
        ([(403, {"error_type": "authentication_error", "message": "no"})], False, 1),
    ],
)
async def test_answers_to_a_posted_command(
    nursery: trio.Nursery, autojump_clock: MockClock, answers: list[tuple[int, object]], ok: bool, posts: int
) -> None:
    left = list(answers)

    async def talk(_number: int, stream: trio.abc.Stream) -> None:
        if script.heads[-1].startswith(b"GET"):
            await stream.send_all(OK + sse(WELCOME))
            await trio.sleep(1000)
            return
        status, body = left.pop(0)
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\nRetry-After: 1\r\n\r\n"
        await stream.send_all(head.encode() + data)

    async with against(nursery, talk) as (client, script):
        reply = await client.send_command("look", command_id="c1")
        assert reply["ok"] is ok
        assert reply["id"] == "c1"
        sent = [head for head in script.heads if head.startswith(b"POST")]
        assert len(sent) == posts
        assert all(head.startswith(b"POST /api/connections/ann/commands ") for head in sent)
        nursery.cancel_scope.cancel()
