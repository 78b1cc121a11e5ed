"""A server as a process would run it, but in this task's time, on a network in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import trio

from mythos_trio.config import Settings
from mythos_trio.game import Game
from mythos_trio.seams import SeededRandomness
from mythos_trio.server import Server
from mythos_trio.sqlite import SqliteDatabase
from mythos_trio.storage import InlineRunner, Runner
from mythos_trio.testing.network import MemoryListener

# How often each store has been opened: a server that starts again must not make the same ids again.
_lives: Counter[Path] = Counter()


def _next_life(path: Path) -> int:
    if path not in _lives and path.exists():
        _lives[path] = path.stat().st_mtime_ns  # by another process; who knows how often
    _lives[path] += 1
    return _lives[path] - 1


class VirtualClock:
    """The wall clock of a run on virtual time. It may be set, as an operator does, or a time server: `jump`."""

    def __init__(self) -> None:
        self._set_by = 0.0

    def now(self) -> float:
        return 1_700_000_000.0 + trio.current_time() % 1e6 + self._set_by

    def jump(self, seconds: float) -> None:
        """Set it *seconds* forward, or back if they are negative. Virtual time goes on as before."""
        self._set_by += seconds


class Process:
    """One life of a server. Whatever its end, afterwards the store is free for the next.

    :param runner: a slow or broken disk: a `mythos_trio.storage.InlineRunner` with a hook.
    :param database: of the same *path*; by default one with the default durability.
    :param clock: the wall clock of the machine, which outlives a process.
    :param settings: fields of `mythos_trio.config.Settings`.
    """

    def __init__(
        self,
        path: Path,
        game: Game,
        *,
        seed: int = 0,
        runner: Runner | None = None,
        database: SqliteDatabase | None = None,
        clock: VirtualClock | None = None,
        **settings: Any,
    ) -> None:
        self.life = _next_life(path)
        """How many there were before on this store."""
        self.database = database or SqliteDatabase(path)
        self.server = Server(
            Settings(**{"port": 0, "server_id": "test", **settings}),
            game=game,
            database=self.database,
            runner=runner or InlineRunner(),
            clock=clock or VirtualClock(),
            randomness=SeededRandomness(1000 * seed + self.life),
        )
        self.listener = MemoryListener()
        self.ended = trio.Event()
        self._scope = trio.CancelScope()

    async def run(  # noqa: ASYNC128 - `serve` calls it
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """From the start to the end of the process; started when the server is ready."""
        try:
            with self._scope:
                await self.server.serve([self.listener], task_status=task_status)
        finally:
            self.listener.close()
            self.database.abandon()
            self.ended.set()

    async def kill(self) -> None:
        """As ``kill -9``: it takes no further step. The kernel closes what it had open; nobody says a last word."""
        self.strike()
        await self.ended.wait()

    def strike(self) -> None:
        """`kill` without the wait for the end: also a task of the process itself can do it."""
        for wire in self.listener.open_wires:
            wire.close()
        self._scope.cancel()

    async def stop(self) -> None:
        """As SIGTERM: it drains, and closes its store in order."""
        self.server.stop()
        await self.ended.wait()
