"""The files of a store: whose they are, who may open them, and what the system knows of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import Final

from mythos_trio.sqlite.schema import APPLICATION_ID
from mythos_trio.storage import StoreUnusable

# How often one who waits for the lock looks.
LOOK_SECONDS: Final = 0.01


def make_directory(directory: Path) -> None:
    """Make *directory* and what is missing above it, private to the user; what exists stays as it is."""
    if not directory.is_dir():
        make_directory(directory.parent)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)


def make_private(path: Path) -> None:
    """Nobody but the user may read or write the database; SQLite gives its other files the same mode."""
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_IMODE(name.stat().st_mode) != 0o600:
                name.chmod(0o600)


def check_ours(path: Path) -> None:
    """
    Look at the file without SQLite, which would change it.

    :raises StoreUnusable: it holds something, and that is not ours.
    """
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return
    if not head:
        return
    if not head.startswith(b"SQLite format 3\0"):
        raise StoreUnusable(f"{path} is not an SQLite database; it has not been touched")
    application_id = int.from_bytes(head[68:72], "big")
    if application_id != APPLICATION_ID and not (application_id == 0 and _is_empty(path)):
        raise StoreUnusable(
            f"{path} is the database of another program (application_id {application_id:#x}); it has not been touched"
        )


def _is_empty(path: Path) -> bool:
    """Whether a database has no tables: somebody's `sqlite3 FILE` that made nothing yet."""
    if Path(f"{path}-wal").exists() or Path(f"{path}-journal").exists():
        return False
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as db:
        return bool(db.execute("SELECT count(*) = 0 FROM sqlite_master").fetchone()[0])


class ProcessLock:
    """Keeps a second process out. The kernel lets go of it however the process ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def take(self, seconds: float = 0.0) -> None:
        """
        :param seconds: how long to wait for another process to let go of it.
        :raises StoreUnusable: another process has it.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + seconds
        try:
            # Not without LOCK_NB: a thread that the kernel lets wait cannot be told to give up.
            while not _locked(fd) and time.monotonic() < until:
                time.sleep(LOOK_SECONDS)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            who = f"process {holder}" if holder else "another process"
            raise StoreUnusable(f"{self._path.with_suffix('')} is in use by {who}") from None
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def let_go(self) -> None:
        # The file stays: removing it would let two others lock two different files.
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
            os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_boot_id() -> str | None:
    """What changes whenever the machine starts; None where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    except OSError:
        return None


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def disk_free(directory: Path) -> int | None:
    """Bytes that this user may still write on the directory's disk; None if it cannot be known."""
    try:
        disk = os.statvfs(directory)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize
