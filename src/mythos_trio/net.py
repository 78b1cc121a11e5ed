"""The socket seam: what the server asks of a connection and of a listening socket.

`Wire` and `Listener` are the interfaces; `SocketWire` and `SocketListener` are the real ones, on
stdlib sockets and Trio's low-level waits. Tests run the whole server on in-memory ones under
virtual time, so nothing above this module knows about sockets.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import socket
import struct
import sys
import termios
from typing import Final, Protocol

import trio

_LINUX: Final = sys.platform == "linux"
# What the kernel may hold for one client. Linux doubles it; with the default (autotuned up to 4 MiB)
# a client that never reads would cost 4 MiB before anybody noticed.
SEND_BUFFER: Final = 64 * 1024
# Connects that the kernel keeps for us while we are busy, or being started anew; it cuts this at net.core.somaxconn,
# whose default this is.
BACKLOG: Final = 4096
# States in which a TCP connection has no error: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT,
# LAST_ACK, CLOSING (linux/include/net/tcp_states.h). A reset or timed out one is in CLOSE (7).
_HEALTHY_STATES: Final = frozenset({1, 4, 5, 8, 9, 11})
# Where TCP_INFO has `tcpi_bytes_acked`, 64 bits (linux/include/uapi/linux/tcp.h).
_ACKED: Final = slice(120, 128)
# How long the kernel may go on trying to deliver what it had taken when the socket was closed. Left to itself it
# keeps the bytes of a client that has vanished, or does not read, for a minute and three quarters or more.
FAREWELL_SECONDS: Final = 10.0
# How often another free port is tried if port 0 gave one that is taken on the other address.
_PORT_TRIES: Final = 20


class Wire(Protocol):
    """A connected byte pipe, non-blocking; one per accepted connection."""

    @property
    def peer(self) -> str:
        """The peer's IP address; IPv4-mapped IPv6 is written as IPv4."""
        ...

    @property
    def peer_port(self) -> int: ...

    @property
    def local(self) -> tuple[str, int]:
        """Our own address. ClosedResourceError if it is closed: few ask, and the kernel has to be asked."""
        ...

    def send(self, data: bytes | memoryview, /) -> int:
        """Give bytes to the kernel. BlockingIOError: it takes none now. OSError: broken."""
        ...

    def send_last(self, data: bytes | memoryview, /) -> int:
        """As `send`, and nothing follows but the end (`send_eof`, `close`), which is near: both may go out together."""
        ...

    def recv(self, limit: int, /) -> bytes:
        """What has come, ``b""`` at the end. BlockingIOError: nothing now. OSError: broken."""
        ...

    async def wait_readable(self) -> None:
        """ClosedResourceError if it is closed, or closed meanwhile."""
        ...

    async def wait_writable(self) -> None:
        """ClosedResourceError if it is closed, or closed meanwhile."""
        ...

    def unacknowledged(self) -> int | None:
        """Bytes that the peer's kernel has not acknowledged; None where that cannot be known."""
        ...

    def acknowledged(self) -> int | None:
        """Bytes that the peer's kernel has acknowledged so far, give or take one; None where that cannot be known."""
        ...

    def unread(self) -> int:
        """Bytes that have come and were not read."""
        ...

    def fileno(self) -> int:
        """The descriptor; -1 if it is closed, or is none of the kernel's."""
        ...

    def in_error(self) -> bool:
        """Whether the connection is broken or closed, as far as the kernel knows."""
        ...

    def send_eof(self) -> None:
        """Nothing more will be sent. Idempotent; OSError if it is broken."""
        ...

    def close(self) -> None:
        """Idempotent. What the kernel has taken is still sent."""
        ...

    def reset(self) -> None:
        """Close at once; what the kernel has not sent is dropped. Idempotent."""
        ...


class Listener(Protocol):
    """A listening socket."""

    @property
    def address(self) -> tuple[str, int]: ...

    async def accept(self) -> Wire:
        """OSError as the kernel has it (EMFILE …); ClosedResourceError when it is closed."""
        ...

    def accept_now(self) -> Wire | None:
        """One that waits already; None if none does, or that cannot be told without trouble: `accept` tells."""
        ...

    def close(self) -> None: ...


class PortTaken(Exception):
    """Somebody else listens there."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host} port {port} is in use")
        self.host = host
        self.port = port


def plain_address(address: str) -> str:
    """*address* with IPv4-mapped IPv6 written as IPv4, and without a zone (``fe80::1%eth0``)."""
    if ":" not in address:
        return address
    parsed = ipaddress.IPv6Address(address.partition("%")[0])
    return str(parsed.ipv4_mapped or parsed)


class SocketWire:
    """A connected TCP socket."""

    __slots__ = ("_sock", "_waited", "peer", "peer_port", "recv", "send")

    def __init__(self, sock: socket.socket, peer: tuple[str, int]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._waited = False  # a task has waited for it: the next close tells Trio
        self.peer, self.peer_port = plain_address(peer[0]), peer[1]
        # Bound methods of the socket itself: sending is the hottest line of the server.
        self.send = sock.send
        self.recv = sock.recv

    def send_last(self, data: bytes | memoryview, /) -> int:
        # One packet less, and one time less that the peer is woken: a tenth of what a known player's visit costs, on a
        # virtual machine where waking takes a call of the hypervisor. Linux keeps it for 200 ms at most (tcp(7),
        # TCP_CORK, which MSG_MORE is for one send).
        return self._sock.send(data, socket.MSG_MORE) if _LINUX else self._sock.send(data)

    @property
    def local(self) -> tuple[str, int]:
        if self._closed:
            raise trio.ClosedResourceError
        name = self._sock.getsockname()
        return plain_address(name[0]), name[1]

    async def wait_readable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        self._waited = True
        await trio.lowlevel.wait_readable(self._sock)

    async def wait_writable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        self._waited = True
        await trio.lowlevel.wait_writable(self._sock)

    def unacknowledged(self) -> int | None:
        if self._closed or not _LINUX:
            return None
        return _ioctl_count(self._sock, termios.TIOCOUTQ)  # the same number as SIOCOUTQ

    def acknowledged(self) -> int | None:
        if self._closed or not _LINUX:
            return None
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.stop)
        # An old kernel (before 4.1) tells less.
        return int.from_bytes(info[_ACKED], sys.byteorder) if len(info) == _ACKED.stop else None

    def fileno(self) -> int:
        return self._sock.fileno()

    def unread(self) -> int:
        return 0 if self._closed else _ioctl_count(self._sock, termios.FIONREAD)

    def in_error(self) -> bool:
        if self._closed:
            return True
        if _LINUX:
            # Not SO_ERROR: reading it clears it, and the next recv would see an orderly end.
            return self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] not in _HEALTHY_STATES
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def send_eof(self) -> None:
        if not self._closed:
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        if not self._closed:
            if _LINUX:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(FAREWELL_SECONDS * 1000))
            if self._waited:
                trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def reset(self) -> None:
        if not self._closed:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close()

    @property
    def _closed(self) -> bool:
        return self._sock.fileno() < 0


class SocketListener:
    """A listening TCP socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        name = sock.getsockname()
        self.address: tuple[str, int] = (name[0], name[1])

    def fileno(self) -> int:
        """For who hands it on to another process."""
        return self._sock.fileno()

    async def accept(self) -> SocketWire:
        while True:
            if self._sock.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self._sock)
            try:
                sock, peer = self._sock.accept()
                return SocketWire(sock, peer)
            except (BlockingIOError, ConnectionAbortedError):
                continue  # it left while it waited for us
            except OSError:
                if self._sock.fileno() >= 0:
                    raise
                # Closed between the wait and here: the next turn says so.

    def accept_now(self) -> SocketWire | None:
        try:
            return SocketWire(*self._sock.accept())
        except OSError:
            return None

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            # A start that fails closes it before Trio runs, or after.
            if trio.lowlevel.in_trio_run():
                trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


def open_listeners(host: str, port: int) -> list[SocketListener]:
    """Listen on all addresses of *host*; port 0 picks one that is free on all of them.

    ``localhost`` is 127.0.0.1 and, where it exists, ::1. A name is looked up, blocking: this runs at
    start. Raises `PortTaken`, or OSError (no such address, not permitted, name unknown).
    """
    addresses = _addresses(host)
    for _ in range(_PORT_TRIES):
        try:
            return _listen_all(addresses, port, host)
        except PortTaken:
            if port != 0:
                raise
    raise PortTaken(host, port)


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    if host.lower() == "localhost":
        return [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    found = socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    pairs = [(family, str(address[0])) for family, _, _, _, address in found]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] in (socket.AF_INET, socket.AF_INET6)]


def _listen_all(addresses: list[tuple[socket.AddressFamily, str]], port: int, host: str) -> list[SocketListener]:
    listeners: list[SocketListener] = []
    try:
        for family, address in addresses:
            try:
                listener = SocketListener(_listen(family, address, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise PortTaken(address, port) from error
                if listeners and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue  # no IPv6 here
                raise
            listeners.append(listener)
            port = listener.address[1]
    except BaseException:
        for listener in listeners:
            listener._sock.close()
        raise
    return listeners


def _listen(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    """One listening socket."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # The port is ours again at once after a crash, whatever still lingers in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        set_options(sock)
        if family == socket.AF_INET6:
            # "::" means every address, IPv4 too; another IPv6 address means itself.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def set_options(sock: socket.socket) -> None:
    """What a listening socket's connections inherit from it, when they come."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


_INT: Final = bytes(4)


def _ioctl_count(sock: socket.socket, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(sock, request, _INT), sys.byteorder)
