"""A look at the store from another process, to read only: the server may run meanwhile (WAL)."""

from __future__ import annotations

import queue
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from mythos_trio.sqlite.failures import store_errors
from mythos_trio.sqlite.files import check_ours
from mythos_trio.sqlite.reading import ReadingHalf

BUSY_SECONDS: Final = 5.0


class _Look(ReadingHalf):
    """The reading half on one connection, without the process lock."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._busy_seconds = BUSY_SECONDS
        self._readers = queue.LifoQueue()
        self._readers.put(db)


@contextmanager
def look(path: Path) -> Iterator[ReadingHalf]:
    """The reading half of the store at *path*, which is neither made nor changed.

    :raises StoreUnusable: the file is not a store of ours.
    :raises StoreError: it cannot be read.
    """
    with store_errors():
        check_ours(path)
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)) as db:
            db.isolation_level = None
            yield _Look(db)
