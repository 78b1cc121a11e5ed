"""``serve --reload``: a small parent process that starts the server anew when code changes.

It looks at the files' times once a second: no watcher library, and the same on every file system. The
server is a child in a process group of its own, so that Ctrl-C reaches it once, by way of the parent.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, TypeAlias

from mythos_trio.supervisor import EXTRA_SECONDS, exit_code, start_child

POLL_SECONDS: Final = 1.0
MAX_FILES: Final = 5000
_NOT_OURS: Final = frozenset({"node_modules", "venv", "env", "site-packages"})
_PASSED_ON: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Times: TypeAlias = Mapping[Path, tuple[int, int]]


def code_of(game_spec: str) -> list[Path]:
    """Where the code of ``module:name`` is: the package's directory, or the module's own.

    Nothing of it is imported. An unknown module is watched for in the working directory.
    """
    top = game_spec.partition(":")[0].partition(".")[0]
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    spec = importlib.util.find_spec(top) if top else None
    if spec is None or spec.origin is None:
        return [Path.cwd()]
    return [Path(spec.origin).parent]


def times_of(places: Sequence[Path]) -> Times:
    """Time and size of every Python file, and of ``.env``."""
    found: dict[Path, tuple[int, int]] = {}
    for path in _files(places):
        try:
            status = path.stat()
        except OSError:  # it is being replaced just now: the next look finds it
            continue
        found[path] = (status.st_mtime_ns, status.st_size)
        if len(found) >= MAX_FILES:
            break
    return found


def _files(places: Sequence[Path]) -> Iterator[Path]:
    yield Path(".env")
    for place in places:
        for directory, below, names in os.walk(place):
            below[:] = sorted(name for name in below if not name.startswith((".", "__")) and name not in _NOT_OURS)
            yield from (Path(directory, name) for name in sorted(names) if name.endswith(".py"))


class Reloader:
    """Runs *command* until it ends by itself or a signal ends it.

    :param fds: the listening sockets, which *command* inherits: nobody is refused while it is started anew.
    :param say: tells a person what happens.
    """

    def __init__(
        self,
        command: Sequence[str],
        places: Sequence[Path],
        fds: Sequence[int] = (),
        *,
        drain_seconds: float,
        say: Callable[[str], None],
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._command = command
        self._places = places
        self._fds = fds
        self._drain_seconds = drain_seconds
        self._say = say
        self._poll_seconds = poll_seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """The exit code of the last child."""
        before = {number: signal.signal(number, self._pass_on) for number in _PASSED_ON}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._stop()

    def _run(self) -> int:
        times = times_of(self._places)
        starts = 0
        while True:
            starts += 1
            child = self._start()
            code = self._wait_for_change(child, times)
            if code is not None and (self._stopping or starts == 1 or code == 0):
                return exit_code(code)
            if code is not None:
                self._say(f"the server ended with exit code {code}; waiting for a change")
                self._wait_for_change(None, times)
            if self._stopping:
                return 128 + signal.SIGTERM if code is None else max(code, 0)
            times = times_of(self._places)
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        self._child = start_child(self._command, self._fds)
        return self._child

    def _wait_for_change(self, child: subprocess.Popen[bytes] | None, times: Times) -> int | None:
        """The child's exit code, or None if a file has changed (or, without a child, it is time to stop)."""
        while child is not None or not self._stopping:
            if child is None:
                time.sleep(self._poll_seconds)
            else:
                try:
                    return child.wait(self._poll_seconds)
                except subprocess.TimeoutExpired:
                    pass
            changed = _changed(times, times_of(self._places))
            if changed is not None and not self._stopping:
                self._say(f"{changed} has changed: starting anew")
                return None
        return None

    def _stop(self) -> None:
        """Let the child drain, and see to it that it is gone."""
        child, self._child = self._child, None
        if child is None or child.poll() is not None:
            return
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(self._drain_seconds + EXTRA_SECONDS)
        except subprocess.TimeoutExpired:
            self._say("the server does not stop: killing it")
            child.kill()
            child.wait()

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            self._stopping = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def _changed(before: Times, now: Times) -> Path | None:
    return next((path for path in {**before, **now} if before.get(path) != now.get(path)), None)
