"""The game's data: what handlers see, and which transaction may join the queue (contract, section 12).

Theory
------
Data are JSON values under keys. Every value has a version, a number that is never given twice. A handler
runs on what is newest when it asks: what the last finished handler left, stored or not. It notes the version
of every key that it read (`reads`) and gathers what it wrote.

When it returns, one step without an ``await`` decides (`Data.is_current`): if all that it has read is still the
newest, it may join: its writes become the newest (`Data.join`) and its transaction goes to the end of the
writer's queue. If not, another handler has come between; it is dropped and run again. So the order of the
queue is an order in which the handlers might have run one after another, and each has seen exactly what the
ones before it left: the history is serialisable.

Values that are not stored yet are *pending*. The store checks the versions again in the commit: if the
transaction that made a pending value fails, everything that has read it fails too, because the version
it has read is not the stored one (`Reason.STALE`). `Data.failed` then takes the pending values back, so
that what runs next sees the truth.

A write is a read as well: who writes a key without looking at it has still to come after the one whose value
it replaces. Nothing may leave the server before the commit of what it rests on; `Data.rests_on` says what
a handler without effects has to wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Generic, TypeVar

from attrs import frozen

from mythos_trio.core.errors import Refusal, invalid
from mythos_trio.core.names import channel

MAX_VALUE_BYTES: Final = 65536
MAX_PLAYER_BYTES: Final = 16384
# All values together: they are held in memory.
MAX_TOTAL_BYTES: Final = 256 << 20
# The first run and five more.
MAX_RUNS: Final = 6

PLAYER: Final = "player/"

Ticket = TypeVar("Ticket")


@frozen
class Value:
    """A key's value: JSON, or None if there is none. A key that never was has version 0."""

    body: bytes | None
    version: int


ABSENT: Final = Value(None, 0)


@frozen
class Write:
    """What a transaction makes of a key: *before* is the version that it has read."""

    key: str
    body: bytes | None
    before: int
    version: int


@frozen
class _Pending(Generic[Ticket]):
    value: Value
    ticket: Ticket


# Instead of a version: different ones have been read. It is never that of a value.
TORN: Final = -1


class Data(Generic[Ticket]):
    """The newest values. A *ticket* is whatever tells one transaction from another."""

    def __init__(self) -> None:
        self._stored: dict[str, Value] = {}
        self._pending: dict[str, list[_Pending[Ticket]]] = {}
        self._version = 0
        self.bytes = 0

    def load(self, values: Mapping[str, Value]) -> None:
        """What the store holds, at a start."""
        self._stored = dict(values)
        self._version = max((value.version for value in values.values()), default=0)
        self.bytes = sum(len(value.body or b"") for value in values.values())

    def newest(self, key: str) -> Value:
        """What the last finished handler left."""
        pending = self._pending.get(key)
        return pending[-1].value if pending else self._stored.get(key, ABSENT)

    def committed(self, key: str) -> Value:
        """What the store holds."""
        return self._stored.get(key, ABSENT)

    def committed_keys(self) -> list[str]:
        """All keys that have a stored value, in alphabetical order."""
        return sorted(key for key, value in self._stored.items() if value.body is not None)

    def changed(self, reads: Mapping[str, int]) -> list[str]:
        """The keys of which something else than what was read is the newest, in alphabetical order."""
        return sorted(key for key, version in reads.items() if self.newest(key).version != version)

    def is_current(self, reads: Mapping[str, int]) -> bool:
        """Whether all that was read is still the newest."""
        return all(self.newest(key).version == version for key, version in reads.items())

    def join(self, bodies: Mapping[str, bytes | None], ticket: Ticket) -> list[Write]:
        """A finished handler's writes become the newest values; what its transaction is to store."""
        writes = []
        for key, body in bodies.items():
            self._version += 1
            writes.append(Write(key, body, self.newest(key).version, self._version))
            self._pending.setdefault(key, []).append(_Pending(Value(body, self._version), ticket))
        return writes

    def rests_on(self, reads: Mapping[str, int]) -> list[Ticket]:
        """The transactions whose commit has to be waited for by who has read these versions."""
        return [
            pending.ticket
            for key, version in reads.items()
            for pending in self._pending.get(key, ())
            if pending.value.version == version
        ]

    def stored(self, writes: Iterable[Write]) -> None:
        """A transaction is committed: its values are no longer pending."""
        for write in writes:
            before = self._stored.get(write.key, ABSENT)
            self.bytes += len(write.body or b"") - len(before.body or b"")
            # A deleted key keeps its version: who has read that it is gone must find it so in the commit.
            self._stored[write.key] = Value(write.body, write.version)
            pending = self._pending.get(write.key, ())
            self._keep(write.key, [entry for entry in pending if entry.value.version > write.version])

    def failed(self, writes: Iterable[Write]) -> None:
        """A transaction is not committed: its values, and those that were put on top of them, are taken back.

        What was taken back before, with the value below it, is not there any more; what stands there now has been
        made from what is stored, and stays.
        """
        for write in writes:
            pending = self._pending.get(write.key, [])
            if any(entry.value.version == write.version for entry in pending):
                self._keep(write.key, [entry for entry in pending if entry.value.version < write.version])

    def _keep(self, key: str, entries: list[_Pending[Ticket]]) -> None:
        if entries:
            self._pending[key] = entries
        else:
            self._pending.pop(key, None)

    def waiting(self) -> list[tuple[str, Ticket]]:
        """The keys whose values are not stored yet, each with the transaction that it waits for."""
        return [(key, entry.ticket) for key, entries in self._pending.items() for entry in entries]

    @property
    def pending(self) -> int:
        return sum(len(entries) for entries in self._pending.values())


def check_key(value: object) -> str:
    """*value* if it can be a key: as a channel's name; ``player/`` is for players."""
    try:
        return channel(value)
    except Refusal:
        raise invalid("a key has 1-128 of A-Z a-z 0-9 _ . : / -", field="key") from None


def player_key(player_id: str) -> str:
    """Where a player's data stands."""
    return PLAYER + player_id


def max_bytes(key: str) -> int:
    """The bound of the value under *key*."""
    return MAX_PLAYER_BYTES if key.startswith(PLAYER) else MAX_VALUE_BYTES
