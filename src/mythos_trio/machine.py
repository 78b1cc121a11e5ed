"""What the process and its machine use: memory, processor, files, disk.

Everything here answers at once (it reads ``/proc``, and asks the file system about itself). Reading takes a
file descriptor; as long as none is free the newest figures that could be had are told again, so that a
server without descriptors does not end because it looks after itself.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil
from attrs import frozen

# psutil measures the processor since the last question: asked in quick succession it can only guess.
CPU_SECONDS: Final = 1.0

CGROUP: Final = Path("/sys/fs/cgroup")


@frozen
class Memory:
    """*percent* of *limit_bytes* is in use: of the container's limit if there is one, else of the
    machine's memory."""

    percent: float
    rss_bytes: int
    available_bytes: int
    limit_bytes: int


@frozen
class Disk:
    path: str
    free_bytes: int
    total_bytes: int


class Machine:
    """:param cgroup: where control groups (version 2) are mounted."""

    def __init__(self, cgroup: Path = CGROUP) -> None:
        self._process = psutil.Process()
        self._cgroup = cgroup
        self._cpu_percent = self._process.cpu_percent(None)
        self._cpu_at = time.monotonic()
        self._memory = self._read_memory()
        self._open_files = self._count_files()

    def memory(self) -> Memory:
        with suppress(OSError):
            self._memory = self._read_memory()
        return self._memory

    def _read_memory(self) -> Memory:
        machine = psutil.virtual_memory()
        rss = self._process.memory_info().rss
        limit = container_memory(self._cgroup)
        if limit is None or limit.limit_bytes > machine.total:
            return Memory(machine.percent, rss, machine.available, machine.total)
        return Memory(limit.percent, rss, min(limit.available_bytes, machine.available), limit.limit_bytes)

    def cpu_percent(self) -> float:
        """Of one processor, over the time since the last question, at least `CPU_SECONDS`."""
        now = time.monotonic()
        if now - self._cpu_at >= CPU_SECONDS:
            with suppress(OSError):
                self._cpu_percent = self._process.cpu_percent(None)
                self._cpu_at = now
        return self._cpu_percent

    def open_files(self) -> int:
        """Open file descriptors; on systems that do not tell, 0."""
        with suppress(OSError):
            self._open_files = self._count_files()
        return self._open_files

    def _count_files(self) -> int:
        return self._process.num_fds() if hasattr(self._process, "num_fds") else 0

    def disk(self, path: Path) -> Disk:
        """The volume on which *path* is, or will be."""
        path = path.absolute()
        there = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
        usage = psutil.disk_usage(os.fspath(there))
        return Disk(os.fspath(there), usage.free, usage.total)


def container_memory(cgroup: Path) -> Memory | None:
    """What the control group of this process may use and uses; None if it has no limit.

    Page cache that the kernel can drop at once (``inactive_file``) does not count as used.
    """
    try:
        limit_text = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit_text.isdecimal() or int(limit_text) == 0:
        return None
    limit = int(limit_text)
    used = max(0, used - int(stat.get("inactive_file", 0)))
    return Memory(round(100 * used / limit, 1), 0, max(0, limit - used), limit)
