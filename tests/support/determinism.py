"""The same run again: all chance from a seed, also the order in which Trio runs tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar
from unittest import mock

import trio
from trio.testing import MockClock

from mythos_trio import connection, session, streams
from mythos_trio.core.log import Log

T = TypeVar("T")


@contextmanager
def small_bounds(log: int = 4, chunk: int = 3, write: int = 65536) -> Iterator[None]:
    """Bounds so small that a few messages reach what otherwise takes thousands.

    :param log: messages that a session's log holds.
    :param chunk: messages that are read from the store at once.
    :param write: bytes of a write to a connection that is behind.
    """
    patches = (
        mock.patch.object(session, "Log", partial(Log, max_messages=log)),
        mock.patch.object(connection, "READ_MESSAGES", chunk),
        mock.patch.object(connection, "CHUNK_BYTES", write),
        mock.patch.object(streams, "READ_MESSAGES", chunk),
    )
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def run_seeded(main: Callable[..., Awaitable[T]], *args: object, seed: int) -> T:
    """Run *main* on virtual time. Tasks that can run at the same time run in an order that *seed* says."""
    # As pytest-trio does.
    vars(trio._core._run)["_ALLOW_DETERMINISTIC_SCHEDULING"] = True
    trio._core._run._r.seed(seed)
    return trio.run(main, *args, clock=MockClock(autojump_threshold=0))
