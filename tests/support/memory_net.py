"""The network in memory, which is part of the testing kit for games."""

from __future__ import annotations

from mythos_trio.testing.network import KERNEL, MemoryListener, MemoryStream, MemoryWire, wire_pair

__all__ = ["KERNEL", "MemoryListener", "MemoryStream", "MemoryWire", "wire_pair"]
