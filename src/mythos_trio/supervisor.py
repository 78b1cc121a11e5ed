"""``serve --supervise``: a small parent process that owns the port and starts the server anew when it dies.

The listening sockets are the parent's, and the server, its child, is handed them (`mythos_trio.handover`). So the
port is open whatever becomes of the server: who connects meanwhile waits in the kernel's queue, and is not refused.
It imports little, holds no state and reads nothing of the clients': there is next to nothing in it that could fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Final, Self

# What is given to the server on top of DRAIN_TIMEOUT before it is killed.
EXTRA_SECONDS: Final = 5.0
# Who dies again and again is started anew after a pause that doubles, from the first to the last.
FIRST_PAUSE: Final = 0.1
LAST_PAUSE: Final = 10.0
# Who has lived so long died of something else: it is started anew at once.
STEADY_SECONDS: Final = 10.0
# A first start that fails within this time is the operator's to mend.
START_SECONDS: Final = 5.0
# How long a new server may take to stand by: it loads the game and all else but the store.
STANDBY_SECONDS: Final = 60.0

_PASSED_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_RESTART: Final = signal.SIGUSR2
_HEARD: Final = (*_PASSED_ON, _RESTART, signal.SIGCHLD)
_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None) if sys.platform == "linux" else None


def start_child(command: Sequence[str], fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start *command*, which inherits *fds*, in a process group of its own: Ctrl-C reaches it by way of its parent.

    On Linux it is sent SIGTERM when its parent dies, however that happens: it would go on with a port that nobody
    can find the owner of. This process must have one thread only.
    """
    parent = os.getpid()

    def before() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it has died before that
                os._exit(1)

    return subprocess.Popen(command, process_group=0, pass_fds=fds, preexec_fn=before)


def exit_code(code: int) -> int:
    """A child's return code as this process's own: a signal's is 128 more than its number, as in a shell."""
    return code if code >= 0 else 128 - code


class Signals:
    """The signals that have come, in order: none is lost between looking and waiting."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._before = {number: signal.signal(number, _hear) for number in self._numbers}
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def wait(self, seconds: float | None, or_readable: Sequence[int] = ()) -> list[int]:
        """The signals that have come; waits for one, *seconds* at most (None: for ever), or until one of the
        descriptors *or_readable* is."""
        if self._read not in select.select([self._read, *or_readable], [], [], seconds)[0]:
            return []
        return list(os.read(self._read, 4096))


def _hear(_number: int, _frame: FrameType | None) -> None:
    """The number is in the pipe."""


class Successor:
    """A server that is being started while another one runs. With ``--standby FD`` it says on that pipe when it has
    all but the store, and waits for that."""

    def __init__(self, command: Sequence[str], fds: Sequence[int]) -> None:
        self.until = time.monotonic() + STANDBY_SECONDS
        self.pipe, theirs = os.pipe()
        self.process = start_child([*command, "--standby", str(theirs)], [*fds, theirs])
        os.close(theirs)
        self.stands_by = False

    def close(self) -> None:
        os.close(self.pipe)


class Supervisor:
    """Runs *command*, again and again.

    SIGTERM and SIGINT are passed on, and its exit code is then this process's; so is SIGHUP. On SIGUSR2 a second one
    is started, and only when it stands by the first one is drained: if it cannot start, the first one goes on. Exit
    code 0 is the end: somebody has stopped the server itself.

    :param command: is also run with ``--standby FD``, see `Successor`.
    :param fds: the listening sockets, which the command inherits.
    :param drain_seconds: how long it may take to stop.
    :param say: tells a person what happens.
    """

    def __init__(
        self, command: Sequence[str], fds: Sequence[int], *, drain_seconds: float, say: Callable[[str], None]
    ) -> None:
        self._command = command
        self._fds = fds
        self._drain_seconds = drain_seconds
        self._say = say
        self._stopping = False
        self._restarting = False
        self._successor: Successor | None = None

    def run(self) -> int:
        """Until it is stopped; the exit code."""
        with Signals(_HEARD) as signals:
            try:
                return self._run(signals)
            finally:
                self._give_up_successor()

    def _run(self, signals: Signals) -> int:
        pause, starts = 0.0, 0
        while True:
            began = time.monotonic()
            starts += 1
            code = self._live(signals)
            lived = time.monotonic() - began
            if self._is_the_end(code, starts, lived):
                return exit_code(code)
            pause = self._pause(code, pause, lived)
            if self._successor is None:
                self._rest(signals, pause)
            if self._stopping:
                return exit_code(code)

    def _is_the_end(self, code: int, starts: int, lived: float) -> bool:
        if self._stopping:
            return True
        if self._restarting:
            return False
        return code == 0 or (code > 0 and starts == 1 and lived < START_SECONDS)

    def _pause(self, code: int, before: float, lived: float) -> float:
        """How long to wait before the next start, in seconds."""
        if self._restarting:
            self._restarting = False
            return 0.0
        how = f"with exit code {code}" if code >= 0 else f"by signal {-code}"
        if lived >= STEADY_SECONDS or before == 0.0:
            self._say(f"the server ended {how}: starting it anew")
            return 0.0 if lived >= STEADY_SECONDS else FIRST_PAUSE
        pause = min(2 * before, LAST_PAUSE)
        self._say(f"the server ended {how} again: starting it anew in {pause:g} s")
        return pause

    def _live(self, signals: Signals) -> int:
        """One life of the server; its return code."""
        child = self._next()
        until: float | None = None
        while (code := child.poll()) is None:
            for number in self._wait(signals, until):
                if number == _RESTART:
                    self._prepare()
                elif number != signal.SIGCHLD:
                    self._pass_on(child, number)
            if self._look_at_successor():
                child.terminate()
            if until is None and (self._stopping or self._restarting):
                until = time.monotonic() + self._drain_seconds + EXTRA_SECONDS
            elif until is not None and time.monotonic() >= until:
                self._say("the server does not stop: killing it")
                child.kill()
                child.wait()
        return code

    def _pass_on(self, child: subprocess.Popen[bytes], number: int) -> None:
        # A server that drains to be followed by another one has its signal already; a second one would hurry it, and
        # the other one opens its log anyway.
        if not self._restarting or self._stopping:
            child.send_signal(number)
        self._stopping |= number != signal.SIGHUP

    def _next(self) -> subprocess.Popen[bytes]:
        """The server that lives next: the one that was started for that, if there is one."""
        if self._successor is None:
            return start_child(self._command, self._fds)
        successor, self._successor = self._successor, None
        successor.close()
        return successor.process

    def _wait(self, signals: Signals, until: float | None) -> list[int]:
        pipes = []
        if self._successor is not None and not self._successor.stands_by:
            pipes = [self._successor.pipe]
            until = min(self._successor.until, until or self._successor.until)
        return signals.wait(None if until is None else max(0.0, until - time.monotonic()), pipes)

    # The next server, while there is one.

    def _prepare(self) -> None:
        if self._successor is None and not self._stopping:
            self._say("starting a new server")
            self._successor = Successor(self._command, self._fds)

    def _look_at_successor(self) -> bool:
        """Whether it has just come to stand by: then the one before it can go."""
        successor = self._successor
        if successor is None or successor.stands_by:
            return False
        if not select.select([successor.pipe], [], [], 0)[0]:
            if time.monotonic() >= successor.until:
                self._say("the new server does not come to stand by: the old one goes on")
                self._give_up_successor()
            return False
        successor.stands_by = self._restarting = bool(os.read(successor.pipe, 1))
        if not successor.stands_by:
            with contextlib.suppress(subprocess.TimeoutExpired):
                successor.process.wait(EXTRA_SECONDS)
            self._give_up_successor()
            code = exit_code(successor.process.returncode)
            self._say(f"the new server has ended with exit code {code}: the old one goes on")
        return successor.stands_by

    def _give_up_successor(self) -> None:
        """Until it stands by there is nothing that it would have to finish; afterwards it may have begun to serve."""
        if self._successor is None:
            return
        successor, self._successor = self._successor, None
        if successor.stands_by:
            successor.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                successor.process.wait(self._drain_seconds + EXTRA_SECONDS)
        successor.process.kill()
        successor.process.wait()
        successor.close()

    def _rest(self, signals: Signals, seconds: float) -> None:
        """Between two lives: wait, unless it is time to stop, or to start at once."""
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            for number in signals.wait(left):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._stopping = True
                elif number == _RESTART:
                    return
