"""One task that waits for many connections: over real sockets, and over those in memory."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mythos_trio.net import SocketWire, Wire
from mythos_trio.poller import Poller
from tests.support.games import Puppet
from tests.support.memory_net import wire_pair
from tests.support.play import Client, play
from tests.test_net import eventually, open_real_pair

Pair = tuple[Wire, Wire]


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    poller = Poller()
    async with trio.open_nursery() as nursery:
        await nursery.start(poller.run)
        yield poller
        nursery.cancel_scope.cancel()


@pytest.fixture(params=["real", "memory"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    ends: Pair = await open_real_pair() if request.param == "real" else wire_pair()
    yield ends
    for end in ends:
        end.close()


def reader(wire: Wire, into: list[bytes], limit: int = 65536) -> Callable[[], None]:
    return lambda: into.append(wire.recv(limit))


async def test_it_tells_of_what_comes_and_of_the_end(poller: Poller, pair: Pair) -> None:
    client, server = pair
    got: list[bytes] = []
    poller.watch(server, reader(server, got))
    await trio.testing.wait_all_tasks_blocked()
    assert got == []
    for data in (b"one", b"two"):
        client.send(data)
        await eventually(lambda data=data: got[-1:] == [data])  # type: ignore[misc]
    client.send_eof()
    await eventually(lambda: got[-1:] == [b""])
    poller.forget(server)


async def test_it_tells_as_long_as_something_is_there(poller: Poller, pair: Pair) -> None:
    client, server = pair
    got: list[bytes] = []
    client.send(b"abc")
    poller.watch(server, reader(server, got, limit=1))
    await eventually(lambda: got == [b"a", b"b", b"c"])
    poller.forget(server)


async def test_what_is_forgotten_is_not_told_and_may_be_watched_again(poller: Poller, pair: Pair) -> None:
    client, server = pair
    got: list[bytes] = []
    poller.watch(server, reader(server, got))
    poller.forget(server)
    poller.forget(server)
    client.send(b"one")
    await trio.sleep(0.01)
    assert got == []
    poller.watch(server, reader(server, got))
    await eventually(lambda: got == [b"one"])
    poller.forget(server)


async def test_a_reset_is_told(poller: Poller, pair: Pair) -> None:
    client, server = pair
    errors: list[OSError] = []

    def look() -> None:
        try:
            server.recv(1)
        except OSError as error:
            errors.append(error)
            poller.forget(server)

    poller.watch(server, look)
    client.reset()
    await eventually(lambda: len(errors) == 1)


async def test_one_that_is_called_may_end_another(poller: Poller) -> None:
    first, second = await open_real_pair(), await open_real_pair()
    told: list[SocketWire] = []

    def tell(mine: SocketWire, others: SocketWire) -> None:
        told.append(mine)
        mine.recv(100)
        poller.forget(others)
        others.close()

    poller.watch(first[1], lambda: tell(first[1], second[1]))
    poller.watch(second[1], lambda: tell(second[1], first[1]))
    first[0].send(b"x")
    second[0].send(b"x")
    await eventually(lambda: bool(told))
    await trio.sleep(0.01)
    assert len(told) == 1
    poller.forget(told[0])
    for wire in (*first, *second):
        wire.close()


async def test_after_its_end_it_does_nothing(pair: Pair) -> None:
    poller = Poller()
    async with trio.open_nursery() as nursery:
        await nursery.start(poller.run)
        poller.watch(pair[1], lambda: None)
        nursery.cancel_scope.cancel()
    poller.watch(pair[1], lambda: None)
    poller.forget(pair[1])


async def test_a_kernel_that_watches_no_more_costs_one_connection(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fs.epoll.max_user_watches is reached, or its memory."""

    def refuse(self: Poller, *more: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    body = b'{"player_id":"ann","message":{"type":"line","content":1}}'
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        client = Client(world.wire())
        monkeypatch.setattr(Poller, "watch", refuse)
        await client.send_all(
            b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert (await client.receive()).startswith(b"HTTP/1.1 202 ")
        assert await client.receive() == b""
        assert (await world.request("GET", "/health"))[0] == 200
