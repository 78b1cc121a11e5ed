"""The games of the bench, and the gauge that they bring along: how long a turn of the event loop took.

The server's own gauge (``loop_lag_ms``) is a clock's. On a machine that has other things to do it also shows
how long the process had to wait for a processor. This one asks for the thread's processor time: what the server's own
work kept the loop for. It costs a call for each turn, which counts as the server's.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any, Final

import trio

from mythos_trio.game import Command, Game, Player
from tests.bench.bench_transactions import Counters

TURNS: Final = "turns.json"
TELL_SECONDS: Final = 0.1


class Turns(trio.abc.Instrument):
    """The longest turn of the loop, from one wait for the network to the next: what a due task has to wait for.

    To sleep takes no processor time. (A second hook, for the end of the wait, made a command by itself 3 % dearer.)
    """

    def __init__(self) -> None:
        self.longest_ns = 0
        self.longest_collection_ns = 0
        """Of the garbage collector's, wherever in a turn they were."""
        self._began = self._collecting = time.thread_time_ns()

    def before_io_wait(self, timeout: float) -> None:
        now = time.thread_time_ns()
        took, self._began = now - self._began, now
        if took > self.longest_ns:
            self.longest_ns = took

    def collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collecting = time.thread_time_ns()
        else:
            self.longest_collection_ns = max(self.longest_collection_ns, time.thread_time_ns() - self._collecting)


class Gauged(Game):
    """Keeps ``turns.json`` in the working directory up to date. What the start takes does not count."""

    async def background(self) -> None:
        turns = Turns()
        trio.lowlevel.add_instrument(turns)
        gc.callbacks.append(turns.collected)
        told: dict[str, float] = {}
        while True:
            now = {"turn_ms": turns.longest_ns / 1e6, "collection_ms": turns.longest_collection_ns / 1e6}
            if now != told:
                await trio.to_thread.run_sync(tell, told := now)
            await trio.sleep(TELL_SECONDS)


def tell(longest: dict[str, float]) -> None:
    """In one step, so that who reads it finds a whole file."""
    fresh = Path(f"{TURNS}.new")
    fresh.write_text(json.dumps(longest))
    fresh.replace(TURNS)


class Bench(Gauged):
    """A command has no effects, and its reply is what it said; everybody may enter every room."""

    async def on_command(self, player: Player, command: Command) -> Any:
        return command.content

    async def on_subscribe(self, player: Player, channel: str) -> bool:
        return True


class Counting(Gauged, Counters):
    """Each command adds one to a number in the data."""
