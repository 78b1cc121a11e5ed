"""Sockets that come from the process's parent, and what the parent is told."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mythos_trio import handover, net
from mythos_trio.handover import Notifier, UnusableSocket, take_over
from mythos_trio.net import SocketListener


class Parent:
    """Holds the sockets that it hands over."""

    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self._stack = stack
        self._monkeypatch = monkeypatch

    def hand_over(self, *socks: socket.socket, names: str = "") -> dict[str, str]:
        """The environment; *socks* stand one after another, from the first descriptor on."""
        fds = [os.dup(sock.fileno()) for sock in socks]
        first = 800
        for place, fd in enumerate(fds):
            os.dup2(fd, first + place)
            os.close(fd)
            self._stack.callback(_close, first + place)
        self._monkeypatch.setattr(handover, "FIRST_FD", first)
        return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(socks)), "LISTEN_FDNAMES": names}

    def listening(self) -> socket.socket:
        return self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def taken(self, environ: dict[str, str]) -> list[SocketListener]:
        listeners = take_over(environ)
        for listener in listeners:
            self._stack.callback(listener.close)
        return listeners


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # who took it over has closed it
        os.close(fd)


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Parent]:
    with ExitStack() as stack:
        yield Parent(stack, monkeypatch)


def test_sockets_are_taken_over_in_their_order(parent: Parent) -> None:
    socks = [parent.listening(), parent.listening()]
    environ = parent.hand_over(*socks) | {"HOME": "/root"}
    listeners = parent.taken(environ)
    assert [listener.address for listener in listeners] == [sock.getsockname() for sock in socks]
    assert environ == {"HOME": "/root"}  # a child would take them for its own


def test_a_socket_that_was_taken_over_is_as_our_own(parent: Parent) -> None:
    (listener,) = parent.taken(parent.hand_over(parent.listening()))
    (own,) = net.open_listeners("127.0.0.1", 0)
    try:
        for level, option in (
            (socket.SOL_SOCKET, socket.SO_SNDBUF),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        ):
            assert listener._sock.getsockopt(level, option) == own._sock.getsockopt(level, option)
        assert not os.get_inheritable(listener.fileno())
        assert listener._sock.gettimeout() == 0
    finally:
        own.close()


async def test_it_accepts(parent: Parent) -> None:
    (listener,) = parent.taken(parent.hand_over(parent.listening()))
    with socket.create_connection(listener.address):
        wire = await listener.accept()
        wire.close()
    listener.close()


def test_by_number(parent: Parent) -> None:
    fd = os.dup(parent.listening().fileno())
    (listener,) = take_over({}, [fd])
    assert listener.fileno() == fd
    listener.close()


@pytest.mark.parametrize("pid", ["", "1", "x"])
def test_what_is_meant_for_another_process_is_left_alone(parent: Parent, pid: str) -> None:
    environ = parent.hand_over(parent.listening()) | {"LISTEN_PID": pid}
    assert take_over(environ) == []
    assert environ == {}


def test_nothing_was_handed_over(parent: Parent) -> None:
    assert take_over({}) == []
    assert take_over(parent.hand_over()) == []


@pytest.mark.parametrize("count", ["", "two", "-1", "²", "100000"])
def test_no_number_of_sockets(count: str) -> None:
    with pytest.raises(UnusableSocket, match="LISTEN_FDS"):
        take_over({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})


def test_a_descriptor_that_is_not_open() -> None:
    with pytest.raises(UnusableSocket, match="socket 799, which should have been handed over, is not open"):
        take_over({}, [799])


def test_a_descriptor_that_is_no_socket(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        with pytest.raises(UnusableSocket, match="is not a socket"):
            take_over({}, [file.fileno()])
        file.write("it is still open")


@pytest.mark.parametrize(
    ("family", "kind", "why"),
    [
        (socket.AF_UNIX, socket.SOCK_STREAM, "is not a TCP socket"),
        (socket.AF_INET, socket.SOCK_DGRAM, "is not a TCP socket"),
        (socket.AF_INET, socket.SOCK_STREAM, "does not listen"),
    ],
)
def test_a_socket_that_cannot_be_listened_on(
    parent: Parent, family: socket.AddressFamily, kind: socket.SocketKind, why: str
) -> None:
    with socket.socket(family, kind) as sock:
        with pytest.raises(UnusableSocket, match=rf"socket 800 \(mythos.socket\), which was handed over, {why}"):
            take_over(parent.hand_over(sock, names="mythos.socket"))
        assert os.fstat(800)  # it is its owner's to close


# What the parent is told.


@pytest.mark.parametrize(
    "abstract", [False, pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux"))]
)
def test_the_parent_is_told(tmp_path: Path, abstract: bool) -> None:
    name = f"@mythos-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if abstract else name)
        environ = {"NOTIFY_SOCKET": name}
        notifier = Notifier.of(environ)
        assert environ == {}
        notifier.tell("READY=1")
        sock.settimeout(5)
        assert sock.recv(100) == b"READY=1"


def test_a_parent_that_does_not_listen_is_no_failure(tmp_path: Path) -> None:
    Notifier.of({}).tell("READY=1")
    Notifier(str(tmp_path / "nobody")).tell("READY=1")
