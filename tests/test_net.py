"""The real sockets, and the network in memory held against them."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mythos_trio import net
from mythos_trio.net import PortTaken, SocketListener, SocketWire, Wire, open_listeners, plain_address
from tests.support import cables
from tests.support.memory_net import KERNEL, MemoryListener, MemoryStream, MemoryWire, wire_pair

LINUX = sys.platform == "linux"


async def open_real_pair() -> tuple[SocketWire, SocketWire]:
    """A client's and the server's end over loopback."""
    (listener,) = open_listeners("127.0.0.1", 0)
    client = socket.create_connection(listener.address)
    server = await listener.accept()
    listener.close()
    return SocketWire(client, listener.address), server


@pytest.fixture
async def real_pair() -> AsyncIterator[tuple[SocketWire, SocketWire]]:
    pair = await open_real_pair()
    yield pair
    for end in pair:
        end.close()


def fill(wire: Wire) -> int:
    """Send until the kernel takes no more; how much it took."""
    sent = 0
    try:
        while True:
            sent += wire.send(bytes(65536))
    except BlockingIOError:
        return sent


async def eventually(condition: Callable[[], bool]) -> None:
    """Loopback is fast, but the kernel needs a moment."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.001)


async def read(wire: Wire, limit: int = 65536) -> bytes:
    await wire.wait_readable()
    return wire.recv(limit)


# Addresses.


@pytest.mark.parametrize(
    ("address", "plain"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("fe80::1%eth0", "fe80::1"),
        ("2001:DB8::1", "2001:db8::1"),
    ],
)
def test_addresses_are_plain(address: str, plain: str) -> None:
    assert plain_address(address) == plain


# Real listeners.


async def test_localhost_is_both_loopbacks_on_one_port() -> None:
    listeners = open_listeners("localhost", 0)
    hosts = [listener.address[0] for listener in listeners]
    assert hosts in (["127.0.0.1", "::1"], ["127.0.0.1"])
    assert len({listener.address[1] for listener in listeners}) == 1
    for listener in listeners:
        client = socket.create_connection(listener.address)
        wire = await listener.accept()
        assert wire.peer == listener.address[0]
        assert wire.peer_port == client.getsockname()[1]
        assert wire.local == listener.address
        wire.close()
        client.close()
        listener.close()


async def test_a_taken_port_is_said() -> None:
    (listener,) = open_listeners("127.0.0.1", 0)
    port = listener.address[1]
    with pytest.raises(PortTaken) as caught:
        open_listeners("127.0.0.1", port)
    assert (caught.value.host, caught.value.port) == ("127.0.0.1", port)
    listener.close()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
async def test_a_port_taken_on_the_second_address_gives_the_first_back() -> None:
    try:
        (six,) = open_listeners("::1", 0)
    except OSError:
        pytest.skip("no ::1")
    port = six.address[1]
    with pytest.raises(PortTaken) as caught:
        open_listeners("localhost", port)
    assert caught.value.host == "::1"
    (four,) = open_listeners("127.0.0.1", port)
    four.close()
    six.close()


async def test_the_port_is_free_again_at_once() -> None:
    (listener,) = open_listeners("127.0.0.1", 0)
    client = socket.create_connection(listener.address)
    server = await listener.accept()
    listener.close()
    server.close()  # the server closes first, so TIME_WAIT is on its side
    client.close()
    open_listeners("127.0.0.1", listener.address[1])[0].close()


async def test_an_address_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(OSError, match=r"assign requested address|not available"):
        open_listeners("192.0.2.1", 0)  # RFC 5737: documentation


async def test_a_closed_listener_wakes_who_accepts() -> None:
    (listener,) = open_listeners("127.0.0.1", 0)

    async def accept() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        listener.close()
    listener.close()
    await accept()


@pytest.mark.skipif(not LINUX, reason="Linux doubles what is asked")
async def test_the_send_buffer_is_small_and_inherited() -> None:
    (listener,) = open_listeners("127.0.0.1", 0)
    client = socket.create_connection(listener.address)
    server = await listener.accept()
    assert server._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 65536
    assert server._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert server._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    server.close()
    client.close()
    listener.close()


def test_listeners_are_listeners() -> None:
    """Checked by mypy: both kinds fit the seam."""
    from mythos_trio.net import Listener

    kinds: list[type[Listener]] = [SocketListener, MemoryListener]
    wires: list[type[Wire]] = [SocketWire, MemoryWire]
    assert kinds
    assert wires


# Wires: what holds for both kinds.


@pytest.fixture(params=["real", "memory"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Wire, Wire]]:
    made: tuple[Wire, Wire] = await open_real_pair() if request.param == "real" else wire_pair()
    yield made
    for end in made:
        end.close()


async def test_bytes_go_both_ways(pair: tuple[Wire, Wire]) -> None:
    client, server = pair
    assert client.send(b"ping") == 4
    assert await read(server, 2) == b"pi"
    assert await read(server) == b"ng"
    assert server.send(memoryview(b"pong")) == 4
    assert await read(client) == b"pong"


async def test_receiving_in_vain_blocks(pair: tuple[Wire, Wire]) -> None:
    _client, server = pair
    with pytest.raises(BlockingIOError):
        server.recv(10)


async def test_a_full_kernel_blocks_until_it_is_read(pair: tuple[Wire, Wire]) -> None:
    client, server = pair
    sent = fill(server)
    assert sent >= KERNEL
    received = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.wait_writable)
        while received < sent:
            received += len(await read(client))
    assert server.send(b"more") == 4


async def test_the_end_comes_after_the_bytes(pair: tuple[Wire, Wire]) -> None:
    client, server = pair
    client.send(b"last")
    client.send_eof()
    client.send_eof()
    assert await read(server) == b"last"
    assert await read(server) == b""
    assert server.send(b"still") == 5
    assert await read(client) == b"still"


async def test_unread_and_unacknowledged_are_counted(pair: tuple[Wire, Wire]) -> None:
    client, server = pair
    client.send(b"12345")
    await eventually(lambda: server.unread() == 5)
    if LINUX:
        await eventually(lambda: client.unacknowledged() == 0)
    assert not client.in_error()


async def test_a_reset_is_an_error_at_the_other_end(pair: tuple[Wire, Wire]) -> None:
    client, server = pair
    client.reset()
    client.reset()
    await eventually(server.in_error)
    with pytest.raises(ConnectionResetError):
        await read(server)
    with pytest.raises(OSError, match=r"reset|broken|pipe|Broken"):
        server.send(b"x")


async def test_sending_to_a_closed_peer_breaks_the_connection(pair: tuple[Wire, Wire]) -> None:
    client, server = pair
    client.close()
    assert await read(server) == b""
    server.send(b"anybody there?")
    await eventually(server.in_error)
    with pytest.raises(OSError, match=r"reset|broken|pipe|Broken"):
        server.send(b"x")


async def test_closing_with_bytes_unread_resets(pair: tuple[Wire, Wire]) -> None:
    client, server = pair
    client.send(b"nobody reads this")
    await eventually(lambda: server.unread() > 0)
    server.close()
    await eventually(client.in_error)


async def test_close_wakes_who_waits_and_is_idempotent(pair: tuple[Wire, Wire]) -> None:
    _client, server = pair

    async def wait(function: Callable[[], object]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await function()  # type: ignore[misc]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, server.wait_readable)
        await trio.testing.wait_all_tasks_blocked()
        server.close()
    server.close()
    await wait(server.wait_readable)
    await wait(server.wait_writable)
    assert server.in_error()
    assert server.unread() == 0
    assert server.unacknowledged() is None
    with pytest.raises(OSError, match=r"closed|descriptor"):
        server.send(b"x")
    server.send_eof()


@pytest.mark.skipif(not LINUX, reason="SIOCOUTQ")
async def test_a_peer_that_does_not_read_leaves_bytes_unacknowledged(real_pair: tuple[SocketWire, SocketWire]) -> None:
    _client, server = real_pair
    fill(server)
    count = server.unacknowledged()
    assert count is not None
    assert count > 0


# The network in memory: time and cables.


async def test_a_cut_cable_tells_nobody(autojump_clock: MockClock) -> None:
    client, server = wire_pair()
    client.cut()
    client.send(b"lost?")
    client.close()
    with trio.move_on_after(1000) as scope:
        await server.wait_readable()
    assert scope.cancelled_caught
    assert not server.in_error()
    server.send(b"hello")
    assert server.unacknowledged() == 5
    client.mend()
    assert server.in_error()  # the data reached an end that is closed


async def test_delay_moves_arrival_and_acknowledgement(autojump_clock: MockClock) -> None:
    client, server = wire_pair()
    server.delay(3)
    began = trio.current_time()
    server.send(b"slow")
    server.send_eof()
    assert server.unacknowledged() == 4
    assert await read(client) == b"slow"
    assert trio.current_time() - began == 3
    assert server.unacknowledged() == 0
    assert await read(client) == b""


async def test_stall_holds_one_direction(autojump_clock: MockClock) -> None:
    client, server = wire_pair()
    server.stall()
    server.send(b"held")
    client.send(b"free")
    assert await read(server) == b"free"
    assert client.unread() == 0
    server.stall(False)
    assert await read(client) == b"held"


async def test_a_listener_that_is_closed_when_somebody_comes() -> None:
    """The one who accepts has been woken, and somebody else closes the listener before it runs."""
    (listener,) = open_listeners("127.0.0.1", 0)

    class Closing(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task.name == "accepting":
                listener.close()

    async def accept() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept, name="accepting")
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(Closing())
        # In one step: Trio's own way waits, and by then the listener is gone.
        socket.create_connection(listener.address).close()


async def test_crumbled_bytes_go_and_come_in_pieces(autojump_clock: MockClock) -> None:
    client, server = wire_pair()
    sizes = iter((2, 1, 5, 3, 100))
    client.crumble(lambda: next(sizes))
    assert client.send(b"abcdef") == 2
    assert server.recv(100) == b"a"
    assert client.send(b"cdefgh") == 5
    assert server.recv(100) == b"bcd"
    assert server.recv(2) == b"ef"
    client.crumble(None)
    assert client.send(b"whole") == 5
    assert server.recv(100) == b"gwhole"


async def test_what_is_forgotten_is_half_open_until_something_is_sent(autojump_clock: MockClock) -> None:
    client, server = wire_pair()
    client.send(b"the last that was heard of it")
    client.forget()
    assert not server.in_error()
    with trio.move_on_after(1000) as scope:
        await read(server)
        await read(server)
    assert scope.cancelled_caught
    server.send(b"are you there?")
    assert server.in_error()
    with pytest.raises(OSError, match="broken"):
        server.recv(100)


async def test_behind_a_cut_cable_a_reset_takes_nothing_from_the_other_kernel(autojump_clock: MockClock) -> None:
    """Else the other end would think that its bytes have arrived."""
    client, server = wire_pair()
    arrived = client.record()
    assert arrived is client.record()
    server.send(b"this came, ")
    client.cut()
    server.send(b"this did not")
    client.reset()
    assert not server.in_error()
    assert server.unacknowledged() == 12
    assert bytes(arrived) == b"this came, "
    client.mend()
    assert server.in_error()


async def test_the_listener_in_memory() -> None:
    listener = MemoryListener()
    listener.fail(errno.EMFILE)
    client = MemoryStream(listener.connect("10.0.0.1"))
    assert listener.waiting == 1
    with pytest.raises(OSError, match="EMFILE"):
        await listener.accept()
    server = await listener.accept()
    assert server.peer == "10.0.0.1"
    assert listener.open_wires == [server]
    server.send(b"abcEND")
    assert await client.receive_until(b"END") == b"abcEND"
    server.close()
    assert listener.open_wires == []
    with pytest.raises(EOFError):
        await client.receive_until(b"END")
    listener.close()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()
    with pytest.raises(ConnectionRefusedError):
        listener.connect()


@pytest.mark.skipif(not LINUX, reason="reads /proc and filters packets")
async def test_the_kernel_does_not_keep_for_long_what_a_vanished_client_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(net, "FAREWELL_SECONDS", 0.3)
    (listener,) = open_listeners("127.0.0.1", 0)
    with socket.create_connection(listener.address) as client:
        server = await listener.accept()
        listener.close()
        cables.cut(client)
        assert server.send(b"farewell") == 8
        ports = f":{server.local[1]:04X} ", f":{server.peer_port:04X} "
        server.close()

        def kept() -> bool:
            lines = Path("/proc/net/tcp").read_text().splitlines()
            return any(ports[0] in line[:22] and ports[1] in line[:36] for line in lines)

        assert kept()
        await eventually(lambda: not kept())


async def test_the_last_words_come_with_the_end_and_also_without() -> None:
    """Linux keeps them back for what follows: not for long, if nothing does."""
    client, server = await open_real_pair()
    server.send_last(b"bye")
    got: list[bytes] = []

    def take() -> bool:
        with suppress(BlockingIOError):
            got.append(client.recv(100))
        return got[-1:] == [b""] or got == [b"bye"]

    await eventually(take)
    assert got == [b"bye"]
    server.send_last(b"really")
    server.close()
    await eventually(take)
    assert got == [b"bye", b"really", b""]
    client.close()
