"""When what is in SQLite's log (WAL) goes to its place in the database.

SQLite by itself does that in the commit that fills the log, and calls `fsync` for all of it there: 30 to 200 ms in
which nobody else's commit goes on. Here a thread beside the writer does it, in small steps while commits go on
(`run`). What that cannot do is begin the log anew, since there is always a commit that it has not seen; so when the log
has grown long, and all but the last few commits are in their place and on the disk, the writer does the rest of it
between two commits (`finish`), and the next commit begins the log from its start. SQLite has the database itself
written to the disk only then, for all that the steps have put there: 5 to 10 ms in the writer, so the thread does it
before, and leaves 1.5.

If nobody calls `run`, or it does not keep up, SQLite still does all of it, at `BACKSTOP_PAGES`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from mythos_trio.storage import StoreError

# Changed rows: a step takes some 3 ms of processor time, in a thread of low priority (`storage.ThreadRunner`). With 200
# rows a publication cost 7 % more: each step calls `fdatasync` for the log, and pages that many rows touch, such as
# those of the index by target, were written back again and again.
STEP_ROWS: Final = 1000
# 48 MB: pages that many commits touch are written back once, and the log begins anew seldom.
LONG_PAGES: Final = 12288
BACKSTOP_PAGES: Final = 16384

_STEP: Final = "PRAGMA wal_checkpoint(PASSIVE)"
_sync: Final = getattr(os, "fdatasync", os.fsync)


class Checkpoints:
    """Of one open database. `run` is called in a thread of its own, everything else in the writer's.

    :param keeper: a connection for it alone.
    :param path: of the database's file. It is held open: whoever closes a file lets go of all the process's locks on it
        (POSIX), so it is closed when no connection is open any more (`close_file`).
    """

    def __init__(self, keeper: sqlite3.Connection, path: Path) -> None:
        keeper.execute("PRAGMA schema_version").fetchone()  # it opens all its files now
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._keeper: sqlite3.Connection | None = keeper
        # Held while the connection is used: `close` may come from another thread.
        self._using = threading.Lock()
        self._changed = 0
        self._done = 0
        self._long = False

    def committed(self, db: sqlite3.Connection) -> None:
        """The writer has committed: what it has changed counts."""
        self._changed = db.total_changes

    @property
    def due(self) -> bool:
        """Whether enough has been changed for a step. Any thread."""
        return self._changed - self._done >= STEP_ROWS

    def run(self) -> None:
        """One step, if enough has been changed since the last one."""
        changed = self._changed
        if not self.due:
            return
        with self._using:
            if self._keeper is None:
                raise StoreError("the database is not open")
            self._done = changed
            _, pages, _ = self._keeper.execute(_STEP).fetchone()
            if pages >= LONG_PAGES:
                # And what was committed in the meantime: the less is left, the sooner `finish` is through.
                _sync(self._file)
                self._keeper.execute(_STEP).fetchone()
                _sync(self._file)
                self._long = True

    def finish(self, db: sqlite3.Connection) -> None:
        """In the writer, between two commits: if the log is long, do what `run` has left."""
        if self._long:
            self._long = False
            # A commit does not fail for it: what is wrong will show in the commit itself, and the backstop stays.
            with suppress(sqlite3.Error):
                busy, _, _ = db.execute(_STEP).fetchone()
                # A step is under way beside: then nothing has been done, and the log would go on growing.
                self._long = bool(busy)

    def close(self, seconds: float) -> bool:
        """Close the connection; one that is still used after *seconds* is left to its thread: then False."""
        if not self._using.acquire(timeout=seconds):
            return False
        try:
            keeper, self._keeper = self._keeper, None
            if keeper is not None:
                with suppress(sqlite3.Error):
                    keeper.close()
        finally:
            self._using.release()
        return True

    def close_file(self) -> None:
        """After all connections, once."""
        os.close(self._file)
