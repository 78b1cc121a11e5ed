from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mythos_trio.core.errors import BINARY, NO_PONG, REMOVED, REPLACED, SLOW, TOO_BIG, Close
from mythos_trio.core.frames import FrameScanner
from mythos_trio.link import ABANDONED, CLOSED, LOST, Link
from mythos_trio.net import open_listeners
from tests.support.memory_net import KERNEL, MemoryStream, MemoryWire, wire_pair

BIG = bytes(range(256)) * 2048  # 512 KiB: more than both kernels hold


class Pair:
    """A link, the client at the other end, and a nursery that finishes writes."""

    def __init__(self, nursery: trio.Nursery, write_timeout: float = 10.0) -> None:
        self.client, self.wire = wire_pair()
        self.stream = MemoryStream(self.client)
        self.nursery = nursery
        self.started = 0
        self.ends: list[Close | None] = []
        self.link = Link(self.wire, write_timeout=write_timeout, start=self.start)
        self.link.on_end = lambda: self.ends.append(self.link.ended)

    def start(self, function: Callable[[], object]) -> None:
        self.started += 1
        self.nursery.start_soon(function)  # type: ignore[arg-type]


@pytest.fixture
async def pair(nursery: trio.Nursery) -> AsyncIterator[Pair]:
    made = Pair(nursery)
    yield made
    made.link.close()
    assert made.wire.closed


async def no_tasks(pair: Pair) -> None:
    """Wait until the link's task, if any, is gone. The nursery is the fixture's own."""
    await trio.testing.wait_all_tasks_blocked()
    assert not pair.nursery.child_tasks


# Sending without waiting.


async def test_try_send_arrives_in_order_and_needs_no_task(pair: Pair) -> None:
    assert pair.link.try_send(b"one ")
    assert pair.link.try_send(b"two")
    assert await pair.stream.receive_some() == b"one two"
    assert pair.link.unsent == 0
    assert pair.link.sent_bytes == 7
    assert pair.started == 0


async def test_what_the_kernel_does_not_take_is_finished_by_the_link(pair: Pair) -> None:
    assert pair.link.try_send(BIG)
    assert pair.link.unsent == len(BIG) - 2 * KERNEL
    assert not pair.link.try_send(b"too early")
    data = b""
    while len(data) < len(BIG):
        data += await pair.stream.receive_some()
    await pair.link.wait_sent()
    assert data == BIG
    assert pair.link.unsent == 0
    assert pair.link.sent_bytes == len(BIG)
    assert pair.link.try_send(b"next")
    assert await pair.stream.receive_some() == b"next"
    assert pair.started == 1
    await no_tasks(pair)


async def test_a_full_kernel_still_takes_one_message(pair: Pair) -> None:
    assert pair.link.try_send(bytes(2 * KERNEL))
    assert pair.link.try_send(b"kept by the link")
    assert pair.link.unsent == 16
    assert not pair.link.try_send(b"refused")
    data = b""
    while len(data) < 2 * KERNEL + 16:
        data += await pair.stream.receive_some()
    assert data.endswith(b"\0kept by the link")


async def test_try_send_after_the_client_has_gone_is_refused_and_ends_the_link(pair: Pair) -> None:
    pair.client.reset()
    assert not pair.link.try_send(b"hello?")
    assert pair.link.ended == LOST
    assert pair.link.ended_by == "client"
    assert pair.ends == [LOST]
    assert not pair.link.try_send(b"again")


async def test_a_nursery_that_is_closed_cannot_finish_a_write(pair: Pair) -> None:
    async with trio.open_nursery() as other:
        pass
    pair.link.start = other.start_soon
    assert not pair.link.try_send(BIG)
    assert pair.link.ended == ABANDONED
    assert pair.wire.was_reset


# The write timeout.


async def test_a_client_that_never_reads_is_reset_after_the_write_timeout(
    pair: Pair, autojump_clock: MockClock
) -> None:
    began = trio.current_time()
    pair.link.try_send(BIG)
    await pair.link.wait_ended()
    assert trio.current_time() - began == pytest.approx(10)
    assert (pair.link.ended, pair.link.ended_by) == (SLOW, "client")
    assert pair.wire.was_reset
    with pytest.raises(trio.BrokenResourceError):
        await pair.link.wait_sent()


async def test_each_chunk_has_the_write_timeout(pair: Pair, autojump_clock: MockClock) -> None:
    """A client that takes 64 KiB in 9 seconds is only slow."""
    pair.link.try_send(BIG)
    data = b""
    while len(data) < len(BIG):
        await trio.sleep(9)
        data += pair.client.recv(KERNEL)
    assert data == BIG
    assert pair.link.ended is None


async def test_reading_a_little_of_a_chunk_is_not_enough(pair: Pair, autojump_clock: MockClock) -> None:
    pair.link.try_send(BIG)
    for _ in range(9):
        await trio.sleep(1)
        pair.client.recv(1000)
    await trio.sleep(1.1)
    assert pair.link.ended == SLOW


async def test_a_cut_cable_is_noticed_by_the_write_timeout(pair: Pair, autojump_clock: MockClock) -> None:
    pair.client.cut()
    assert pair.link.try_send(b"into the void")
    assert pair.link.unacknowledged() == 13
    assert pair.link.try_send(bytes(KERNEL))
    with pytest.raises(trio.BrokenResourceError):
        await pair.link.send_all(b"more")
    assert pair.link.ended == SLOW


# Sending with waiting.


async def test_send_all_returns_when_the_kernel_has_all(pair: Pair, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.link.send_all, BIG)
        data = b""
        while len(data) < len(BIG):
            data += await pair.stream.receive_some(5000)
    assert data == BIG


async def test_send_all_is_atomic_when_its_caller_is_cancelled(pair: Pair, autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as scope:
        await pair.link.send_all(BIG)
    assert scope.cancelled_caught
    data = b""
    while len(data) < len(BIG):
        data += await pair.stream.receive_some()
    await pair.link.wait_sent()
    assert data == BIG
    assert pair.link.try_send(b".")


async def test_send_all_that_has_not_begun_is_taken_back(pair: Pair, autojump_clock: MockClock) -> None:
    pair.link.try_send(BIG)
    await trio.testing.wait_all_tasks_blocked()
    before = pair.link.unsent
    with trio.move_on_after(1):
        await pair.link.send_all(b"never said")
    assert pair.link.unsent == before
    pair.link.last_words(b"end", REMOVED)
    data = b""
    while not data.endswith(b"end"):
        data += await pair.stream.receive_some()
    assert data == BIG + b"end"


async def test_send_all_callers_are_served_in_order(pair: Pair, autojump_clock: MockClock) -> None:
    async def say(number: int) -> None:
        await trio.sleep(number)
        await pair.link.send_all(b"<%d>" % number * 30000)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(say, number)
        await trio.sleep(6)
        data = b""
        while len(data) < 5 * 90000:
            data += await pair.stream.receive_some()
    assert data == b"".join(b"<%d>" % number * 30000 for number in range(5))


async def test_send_all_always_lets_others_run(pair: Pair) -> None:
    ran = 0

    async def other() -> None:
        nonlocal ran
        while True:
            ran += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(10):
            await pair.link.send_all(b"x")
        nursery.cancel_scope.cancel()
    assert ran >= 9


async def test_send_all_fails_as_broken_when_the_network_did_it(pair: Pair) -> None:
    pair.client.reset()
    with pytest.raises(trio.BrokenResourceError):
        await pair.link.send_all(b"x")
    with pytest.raises(trio.BrokenResourceError):
        await pair.link.receive_some()


async def test_send_all_after_our_own_close_is_closed(pair: Pair) -> None:
    await pair.link.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await pair.link.send_all(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await pair.link.receive_some()
    assert pair.link.ended == CLOSED


async def test_who_waits_to_send_is_woken_by_the_end(pair: Pair, autojump_clock: MockClock) -> None:
    async def expect_broken(function: Callable[[], object]) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await function()  # type: ignore[misc]

    pair.link.try_send(BIG)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_broken, pair.link.wait_sent)
        nursery.start_soon(expect_broken, pair.link.wait_sent)
        nursery.start_soon(expect_broken, lambda: pair.link.send_all(b"x"))
        nursery.start_soon(expect_broken, pair.link.receive_some)
        nursery.start_soon(pair.link.wait_ended)
        await trio.sleep(1)
        pair.link.reset(NO_PONG, by="network")
    assert (pair.link.ended, pair.link.ended_by) == (NO_PONG, "network")
    await no_tasks(pair)


# Handing a link over.


async def test_a_cancelled_owner_breaks_a_half_sent_message(pair: Pair, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as owner:
        pair.link.start = owner.start_soon
        pair.link.try_send(BIG)
        await trio.sleep(1)
        owner.cancel_scope.cancel()
    assert pair.link.ended == ABANDONED
    assert pair.wire.closed


async def test_the_next_owner_finishes_what_the_last_began(pair: Pair, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as owner:
        pair.link.start = owner.start_soon
        pair.link.try_send(BIG)
        await trio.sleep(1)
        pair.link.start = pair.start
        owner.cancel_scope.cancel()
    data = b""
    while len(data) < len(BIG):
        data += await pair.stream.receive_some()
    assert data == BIG
    assert pair.link.ended is None


# Ending.


async def test_the_first_cause_wins_and_is_told_once(pair: Pair) -> None:
    pair.link.last_words(b"bye", REPLACED)
    pair.link.last_words(b"no, bye", REMOVED, by="operator")
    pair.link.reset(NO_PONG, by="network")
    pair.link.close(by="client")
    assert (pair.link.ended, pair.link.ended_by) == (REPLACED, "server")
    assert pair.ends == [REPLACED]


async def test_nothing_follows_the_last_words(pair: Pair) -> None:
    pair.link.last_words(b"bye", REMOVED, by="operator")
    assert not pair.link.try_send(b"and another thing")
    with pytest.raises(trio.BrokenResourceError):
        await pair.link.send_all(b"and another thing")
    await pair.client.wait_readable()
    assert pair.client.recv(100) == b"bye"
    assert pair.link.ended_by == "operator"
    await pair.link.wait_ended()


async def test_the_peer_can_answer_the_last_words(pair: Pair) -> None:
    pair.link.last_words(b"bye", REMOVED)
    pair.client.send(b"bye bye")
    assert await pair.link.receive_some() == b"bye bye"


async def test_last_words_come_after_what_is_unsent(pair: Pair, autojump_clock: MockClock) -> None:
    pair.link.try_send(BIG)
    pair.link.last_words(b"bye", REMOVED)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.link.linger)
        assert await pair.stream.receive_all() == BIG + b"bye"
        await pair.stream.aclose()
    assert pair.wire.closed
    assert not pair.wire.was_reset
    await no_tasks(pair)


async def test_linger_waits_a_second_for_a_peer_that_stays(pair: Pair, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    pair.link.last_words(b"bye", REMOVED)
    await pair.link.linger()
    assert trio.current_time() - began == pytest.approx(1)
    assert pair.wire.closed
    assert await pair.stream.receive_all() == b"bye"


async def test_linger_does_not_read_for_ever(pair: Pair, autojump_clock: MockClock) -> None:
    async def flood() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await pair.stream.send_all(bytes(10_000_000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        await pair.link.linger()
    assert pair.link.received_bytes <= 3 * KERNEL


async def test_linger_lets_the_peer_read_the_answer_while_it_still_sends(pair: Pair) -> None:
    """Closing with bytes unread would reset the connection and take the answer with it."""
    pair.client.send(b"a body that nobody wants")
    pair.link.try_send(b"413")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.link.linger)
        assert await pair.stream.receive_all() == b"413"
        await pair.stream.aclose()


async def test_a_cancelled_linger_closes_too(pair: Pair, autojump_clock: MockClock) -> None:
    with trio.move_on_after(0.5):
        await pair.link.linger()
    assert pair.wire.closed


async def test_send_eof_ends_one_direction(pair: Pair) -> None:
    await pair.link.send_all(b"all")
    await pair.link.send_eof()
    await pair.link.send_eof()
    assert not pair.link.try_send(b"more")
    with pytest.raises(trio.ClosedResourceError):
        await pair.link.send_all(b"more")
    assert await pair.stream.receive_all() == b"all"
    pair.client.send(b"still here")
    assert await pair.link.receive_some() == b"still here"


# Receiving.


async def test_receiving_counts_and_ends_with_empty_bytes(pair: Pair, autojump_clock: MockClock) -> None:
    await trio.sleep(5)
    pair.client.send(b"hello")
    assert pair.link.unread() == 5
    assert await pair.link.receive_some(2) == b"he"
    assert await pair.link.receive_some() == b"llo"
    assert pair.link.received_bytes == 5
    assert pair.link.last_received == trio.current_time()
    pair.client.send_eof()
    assert await pair.link.receive_some() == b""
    assert await pair.link.receive_some() == b""
    assert pair.link.ended is None
    assert pair.link.try_send(b"a half-closed client can read")


async def test_a_cancelled_receive_loses_nothing(pair: Pair, autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as scope:
        await pair.link.receive_some()
    assert scope.cancelled_caught
    pair.client.send(b"late")
    assert await pair.link.receive_some() == b"late"


async def test_one_receiver_at_a_time(pair: Pair) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.link.receive_some)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await pair.link.receive_some()
        pair.client.send(b"x")


async def test_bytes_pushed_back_come_first(pair: Pair) -> None:
    pair.client.send(b"third")
    pair.link.push_back(b"second")
    pair.link.push_back(b"first")
    assert pair.link.unread() == 16
    assert await pair.link.receive_some(3) == b"fir"
    assert await pair.link.receive_some() == b"st"
    assert await pair.link.receive_some() == b"second"
    assert await pair.link.receive_some() == b"third"
    assert pair.link.received_bytes == 5


async def test_a_reader_that_waits_is_woken_by_our_close(pair: Pair) -> None:
    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await pair.link.receive_some()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        pair.link.close()


# What the scanner sees.


def frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes([(0x80 if fin else 0) | opcode]) + length + bytes(4) + payload


async def test_pongs_are_told_and_passed_on(pair: Pair) -> None:
    pongs: list[bytes] = []
    pair.link.scanner, pair.link.on_pong = FrameScanner(100), pongs.append
    data = frame(0xA, b"42") + frame(1, b"text")
    pair.client.send(data)
    assert await pair.link.receive_some() == data
    assert pongs == [b"42"]


@pytest.mark.parametrize(
    ("bad", "close"), [(frame(1, bytes(101)), TOO_BIG), (frame(2, b"x"), BINARY)], ids=["big", "binary"]
)
async def test_nothing_is_handed_over_from_a_violation_on(pair: Pair, bad: bytes, close: Close) -> None:
    told: list[Close] = []
    pair.link.scanner, pair.link.on_violation = FrameScanner(100), told.append
    pair.client.send(frame(1, b"fine") + bad + frame(1, b"more"))
    assert await pair.link.receive_some() == frame(1, b"fine")
    assert told == [close]
    pair.client.send(frame(1, b"even more"))
    pair.client.send(frame(8, b""))
    assert await pair.link.receive_some() == b""


async def test_a_violation_whose_header_comes_in_pieces(pair: Pair) -> None:
    told: list[Close] = []
    pair.link.scanner, pair.link.on_violation = FrameScanner(100), told.append
    bad = frame(1, bytes(200))
    pair.client.send(bad[:3])
    assert await pair.link.receive_some() == bad[:3]
    pair.client.send(bad[3:])
    pair.client.send_eof()
    assert await pair.link.receive_some() == b""
    assert told == [TOO_BIG]


async def test_pushed_back_bytes_are_scanned_too(pair: Pair) -> None:
    pongs: list[bytes] = []
    head = b"GET / HTTP/1.1\r\n\r\n"
    pair.link.scanner, pair.link.on_pong = FrameScanner(100, skip=len(head)), pongs.append
    pair.link.push_back(head + frame(0xA, b"early"))
    assert await pair.link.receive_some(1000) == head + frame(0xA, b"early")
    assert pongs == [b"early"]


async def test_frames_are_counted_as_they_come(pair: Pair) -> None:
    counts: list[int] = []
    pair.link.scanner, pair.link.on_frames = FrameScanner(100), counts.append
    for data in (frame(9, b"?") * 3, frame(0, b"", fin=False)[:4], frame(0, b"", fin=False)[4:]):
        pair.client.send(data)
        await pair.link.receive_some()
    assert counts == [3, 1]


async def test_what_comes_after_the_last_words_is_not_looked_at(pair: Pair) -> None:
    counts: list[int] = []
    pair.link.scanner, pair.link.on_frames = FrameScanner(100), counts.append
    pair.link.last_words(b"\x88\x00", CLOSED)
    pair.client.send(frame(1, bytes(200)))
    pair.client.send_eof()
    await pair.link.linger()
    assert (counts, pair.link.violation) == ([], None)


async def test_a_close_frame_going_out_ends_try_send(pair: Pair) -> None:
    await pair.link.send_all(b"\x88 in an answer over HTTP means nothing")
    assert pair.link.try_send(b"yes")
    pair.link.scanner = FrameScanner(100)
    await pair.link.send_all(b"\x88\x02\x03\xe8")
    assert not pair.link.try_send(b"no")
    assert pair.link.ended is None


# What Hypercorn asks.


async def test_the_socket_has_its_addresses(nursery: trio.Nursery) -> None:
    _, wire = wire_pair(client=("::1", 1234), server=("::1", 8000))
    link = Link(wire, write_timeout=1, start=nursery.start_soon)
    assert link.socket.getpeername() == ("::1", 1234)
    assert link.socket.getsockname() == ("::1", 8000)
    assert link.socket.family.name == "AF_INET6"
    assert isinstance(wire, MemoryWire)
    link.close()


def drain(client: socket.socket) -> None:
    while client.recv(65536):
        pass


async def test_on_a_real_socket_a_client_that_never_reads_is_reset(nursery: trio.Nursery) -> None:
    (listener,) = open_listeners("127.0.0.1", 0)
    client = socket.create_connection(listener.address)
    link = Link(await listener.accept(), write_timeout=0.1, start=nursery.start_soon)
    listener.close()
    sent = 0
    while link.try_send(bytes(100_000)):
        sent += 100_000
    assert link.unsent
    with trio.fail_after(5):
        await link.wait_ended()
    assert link.ended == SLOW
    client.settimeout(5)
    with pytest.raises(ConnectionResetError):
        drain(client)
    client.close()
    assert sent < 8 * 1024 * 1024
