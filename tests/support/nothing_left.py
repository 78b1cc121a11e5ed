"""The check at the end of every test: nothing is left of what it has opened.

A plugin of pytest's, loaded by ``tests/conftest.py``: descriptors (files, stores, sockets), threads and child
processes of the test process, and accepted sockets in memory. Tasks need no check here: a run of Trio ends with its
last one.
"""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from attrs import frozen

from mythos_trio.testing.network import open_wires

WAIT_SECONDS = 3.0
# Trio keeps a thread for 10 s after its work, for the next; while it works it has another name.
IDLE_THREAD = "Trio thread "

shared_ports: set[int] = set()
"""Ports of server processes that several tests share: connections to them are kept."""


@frozen
class Held:
    """What this process holds. Each thing is itself, not a number that may be given again."""

    descriptors: frozenset[str]
    threads: frozenset[threading.Thread]
    children: frozenset[psutil.Process]
    wires: frozenset[object]

    def more_than(self, before: Held) -> list[str]:
        left = [f"descriptor: {name}" for name in sorted(self.descriptors - before.descriptors)]
        left += [f"thread: {thread.name}" for thread in self.threads - before.threads]
        left += [f"child process: {process}" for process in self.children - before.children]
        return left + [f"accepted socket in memory: {wire}" for wire in self.wires - before.wires]


def look() -> Held:
    return Held(
        frozenset(_descriptors()),
        frozenset(thread for thread in threading.enumerate() if not thread.name.startswith(IDLE_THREAD)),
        frozenset(psutil.Process().children()),
        frozenset(open_wires()),
    )


def _descriptors() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile: that of this very listing
            target = os.readlink(f"/proc/self/fd/{name}")
            if not _is_shared(int(name), target):
                yield f"{name} {target}"


def _is_shared(number: int, target: str) -> bool:
    """Whether it is a connection to a server that lives longer than this test."""
    if not shared_ports or not target.startswith("socket:"):
        return False
    try:
        with socket.socket(fileno=os.dup(number)) as copy:
            return copy.getpeername()[1] in shared_ports
    except (OSError, IndexError):
        return False


def left_since(before: Held) -> list[str]:
    """What is there now and was not *before*; what is on its way out has `WAIT_SECONDS`."""
    deadline = time.monotonic() + WAIT_SECONDS
    while left := look().more_than(before):
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.02)
    return left


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Set up before all of a test's own fixtures, so it looks after they are gone."""
    before = look()
    yield
    left = left_since(before)
    assert not left, f"left behind: {left}"
