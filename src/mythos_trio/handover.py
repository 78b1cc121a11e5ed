"""What a process is handed by whoever started it: listening sockets, and a place to say when it is ready.

systemd does so (``sd_listen_fds(3)``, ``sd_notify(3)``), our own supervisor does, and any parent may. The port is then
the parent's: while the server is away the kernel keeps those who connect waiting, and nobody is refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from typing import Final

from attrs import frozen

from mythos_trio.net import SocketListener, set_options

# SD_LISTEN_FDS_START of sd_listen_fds(3).
FIRST_FD: Final = 3
# More than anybody passes; a number that is no number of sockets is then no long loop.
MAX_SOCKETS: Final = 64

_LISTEN: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class UnusableSocket(Exception):
    """What was handed over is nothing that can be listened on. The text says which, and why."""


def take_over(environ: MutableMapping[str, str], fds: Sequence[int] = ()) -> list[SocketListener]:
    """The listening sockets that this process was given: *fds*, and those of ``LISTEN_FDS``. Perhaps none.

    The variables are taken out of *environ*, so that no child takes them for its own. As with ``sd_listen_fds(3)``
    they count only if ``LISTEN_PID`` is this process.

    :raises UnusableSocket: one is not a listening TCP socket.
    """
    pid, count, names = (environ.pop(name, "") for name in _LISTEN)
    places = [(fd, "") for fd in fds]
    if pid == str(os.getpid()):
        places += _passed(count, names)
    return [_adopt(fd, f"socket {fd}{f' ({name})' if name else ''}") for fd, name in places]


def _passed(count: str, names: str) -> list[tuple[int, str]]:
    if not (count.isascii() and count.isdigit() and int(count) <= MAX_SOCKETS):
        raise UnusableSocket(f"LISTEN_FDS={count!r} is not a number of sockets")
    texts = names.split(":") + [""] * int(count)
    return [(FIRST_FD + place, texts[place]) for place in range(int(count))]


def _adopt(fd: int, what: str) -> SocketListener:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise UnusableSocket(f"{what}, which was handed over, is not a socket")
        os.set_inheritable(fd, False)
    except OSError as error:
        raise UnusableSocket(f"{what}, which should have been handed over, is not open") from error
    sock = socket.socket(fileno=fd)
    wrong = _wrong(sock)
    if wrong is not None:
        sock.detach()  # whatever it is, it is not ours to close
        raise UnusableSocket(f"{what}, which was handed over, {wrong}")
    set_options(sock)
    return SocketListener(sock)


def _wrong(sock: socket.socket) -> str | None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "is not a TCP socket: it is no Internet address that it listens on"
    if sock.type != socket.SOCK_STREAM:
        return "is not a TCP socket: it is not a stream (ListenStream= of the unit)"
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "does not listen: with Accept=yes systemd hands over connections, one a process"
    return None


@frozen
class Notifier:
    """Where the process's parent wants to be told how it does; nowhere if *address* is None."""

    address: str | None = None

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> Notifier:
        """As ``NOTIFY_SOCKET`` says, which is taken out of *environ*: children are not to speak for us."""
        return cls(environ.pop("NOTIFY_SOCKET", "") or None)

    def tell(self, state: str) -> None:
        """Say *state*, such as ``READY=1``. Who does not listen misses it: that is no reason to fail."""
        if self.address is None:
            return
        # "@" stands for the NUL of Linux's abstract names.
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), address)
