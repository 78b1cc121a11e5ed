"""When what is in SQLite's log (WAL) goes to its place in the database.

SQLite by itself does that in the commit that fills the log, and calls `fsync` for all of it there: 30 to 200 ms in
which nobody else's commit goes on. Here a thread beside the writer does it, in small steps while commits go on
(`run`). What that cannot do is begin the log anew, since there is always a commit that it has not seen; so when the log
has grown long, and all but the last few commits are in their place, the writer does the rest of it between two commits
(`finish`: 2 ms), and the next commit begins the log from its start.

If nobody calls `run`, or it does not keep up, SQLite still does all of it, at `BACKSTOP_PAGES`.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import suppress
from typing import Final

from mythos_trio.storage import StoreError

# Changed rows: some 2,000 pages, which take 7 ms, half of it in `fsync`.
STEP_ROWS: Final = 1000
# 48 MB: pages that many commits touch are written back once, and the log begins anew seldom.
LONG_PAGES: Final = 12288
BACKSTOP_PAGES: Final = 16384

_STEP: Final = "PRAGMA wal_checkpoint(PASSIVE)"


class Checkpoints:
    """Of one open database. `run` is called in a thread of its own, everything else in the writer's.

    :param keeper: a connection for it alone.
    """

    def __init__(self, keeper: sqlite3.Connection) -> None:
        keeper.execute("PRAGMA schema_version").fetchone()  # it opens all its files now
        self._keeper: sqlite3.Connection | None = keeper
        # Held while the connection is used: `close` may come from another thread.
        self._using = threading.Lock()
        self._changed = 0
        self._done = 0
        self._long = False

    def committed(self, db: sqlite3.Connection) -> None:
        """The writer has committed: what it has changed counts."""
        self._changed = db.total_changes

    def run(self) -> None:
        """One step, if enough has been changed since the last one."""
        changed = self._changed
        if changed - self._done < STEP_ROWS:
            return
        with self._using:
            if self._keeper is None:
                raise StoreError("the database is not open")
            self._done = changed
            _, pages, _ = self._keeper.execute(_STEP).fetchone()
            if pages >= LONG_PAGES:
                # What was committed in the meantime: the less is left, the sooner `finish` is through.
                self._keeper.execute(_STEP).fetchone()
                self._long = True

    def finish(self, db: sqlite3.Connection) -> None:
        """In the writer, between two commits: if the log is long, do what `run` has left."""
        if self._long:
            self._long = False
            # A commit does not fail for it: what is wrong will show in the commit itself, and the backstop stays.
            with suppress(sqlite3.Error):
                db.execute(_STEP).fetchone()

    def close(self, seconds: float) -> None:
        """Close the connection; one that is still used after *seconds* is left to its thread."""
        if self._using.acquire(timeout=seconds):
            try:
                keeper, self._keeper = self._keeper, None
                if keeper is not None:
                    with suppress(sqlite3.Error):
                        keeper.close()
            finally:
                self._using.release()
