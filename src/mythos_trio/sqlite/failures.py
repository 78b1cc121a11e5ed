"""What SQLite says when it fails, in the words of `mythos_trio.storage`."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from mythos_trio.storage import StoreError

# The environment's failures (SQLite result codes): no transaction of the batch is to blame.
_ENVIRONMENT: Final = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOTADB,
    }
)


def is_environment(error: sqlite3.Error | OSError) -> bool:
    """Whether the system failed, and not what was asked of it."""
    return isinstance(error, OSError) or result_code(error) in _ENVIRONMENT


def result_code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code; None if it was the Python module that complained."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def store_error(error: sqlite3.Error | OSError) -> StoreError:
    if isinstance(error, OSError):
        return StoreError(f"the database failed: {error}", full=error.errno in (errno.ENOSPC, errno.EDQUOT))
    return StoreError(f"the database failed: {error}", full=result_code(error) == sqlite3.SQLITE_FULL)


@contextmanager
def store_errors() -> Iterator[None]:
    """SQLite's and the system's errors as `StoreError`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise store_error(error) from error
