"""A session's commands: one at a time, in order, each id answered once (contract, section 4)."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Final, Generic, TypeVar

import msgspec
from attrs import define, field

from mythos_trio.core.errors import ErrorType, Refusal

MAX_WAITING: Final = 32
# Who asks for the same answer at the same time: each of at most 33 on every connection.
MAX_ASKERS: Final = 64

Asker = TypeVar("Asker")


@define(eq=False)
class Entry(Generic[Asker]):
    """A command that waits or runs. *askers* are all who want its answer, *said* tells it from others."""

    id: str
    said: bytes
    content: Any
    kind: str = "command"
    askers: list[Asker] = field(factory=list)
    given: bool = True
    """Whether the client gave the id: only then is the answer kept."""


class Remembered(msgspec.Struct, gc=False):
    """*mark*: of the command that got it, its `mark_of`, or its `digest_of` if the answer comes from the store."""

    mark: int | bytes
    body: bytes
    at: float
    position: int
    """Where the reply has its place: 0 if it can go at once."""
    newer: str | None = None
    """The id that was remembered next: so answers are in order without a container that the garbage collector goes
    through, which took 50 ms with half a million of them."""


class Commands(Generic[Asker]):
    """The queue and the answers of one session. *complete*: all answers the session has ever given
    are known here; else the store has to be asked for an id that is not."""

    def __init__(self, *, complete: bool, keep_count: int = 1000, keep_seconds: float = 600.0) -> None:
        self.complete = complete
        self._keep_count = keep_count
        self._keep_seconds = keep_seconds
        self.queue: list[Entry[Asker]] = []
        """Those that wait."""
        self._open: dict[str, Entry[Asker]] = {}
        self._answers: dict[str, Remembered] = {}
        self._oldest: str | None = None
        self._newest: Remembered | None = None
        self._kept_until = 0.0
        """Before that the oldest answer, if it has been looked at, is too new to go."""
        self.running: Entry[Asker] | None = None

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def remembered(self) -> int:
        """How many answers."""
        return len(self._answers)

    def has_answered(self, id: str) -> bool:
        """Whether the answer that *id* got is known here."""
        return id in self._answers

    def answered(self, id: str, said: bytes) -> Remembered | None:
        """The answer that *id* got; a refusal if it was another command."""
        remembered = self._answers.get(id)
        if remembered is not None:
            mark = remembered.mark
            if mark != (mark_of(said) if isinstance(mark, int) else digest_of(said)):
                raise _other_command(id)
        return remembered

    def submit(self, entry: Entry[Asker], asker: Asker) -> bool:
        """Queue *entry*, or join the one with the same id; whether it is new.

        Raises a refusal if the id is another command's, or if too many wait.
        """
        known = self._open.get(entry.id)
        if known is not None:
            if known.said != entry.said:
                raise _other_command(entry.id)
            if len(known.askers) >= MAX_ASKERS:
                raise Refusal(ErrorType.CAPACITY, "this command has been asked too often at once", status=503)
            known.askers.append(asker)
            return False
        if len(self.queue) >= MAX_WAITING:
            raise Refusal(
                ErrorType.CAPACITY,
                f"{MAX_WAITING} commands wait already: wait for a reply before sending the next",
                status=503,
                retry_ms=1000,
            )
        entry.askers.append(asker)
        self._open[entry.id] = entry
        self.queue.append(entry)
        return True

    def begin(self, entry: Entry[Asker], asker: Asker) -> None:
        """*entry* runs at once, since nothing else waits or runs; until `finish`."""
        entry.askers.append(asker)
        self._open[entry.id] = self.running = entry

    def next(self) -> Entry[Asker] | None:
        """Take the next command; it runs until `finish`."""
        if not self.queue:
            return None
        self.running = self.queue.pop(0)
        return self.running

    def finish(self, entry: Entry[Asker], answer: Remembered | None) -> list[Asker]:
        """*entry* is over; who has asked. Its *answer* is remembered unless it is None."""
        self._open.pop(entry.id, None)
        if self.running is entry:
            self.running = None
        if answer is not None and entry.given:
            self.remember(entry.id, answer)
        askers, entry.askers = entry.askers, []
        return askers

    def remember(self, id: str, answer: Remembered) -> None:
        """Keep an answer: the newest 1,000 and those of the last 10 minutes."""
        known = self._answers.get(id)
        self._answers[id] = answer
        if known is not None:
            answer.newer = known.newer
        elif self._newest is None:
            self._oldest = id
        else:
            self._newest.newer = id
        if known is None or known is self._newest:
            self._newest = answer
        if len(self._answers) > self._keep_count and answer.at >= self._kept_until:
            self._drop_old(answer.at)

    def _drop_old(self, now: float) -> None:
        while len(self._answers) > self._keep_count and self._oldest is not None:
            oldest = self._answers[self._oldest]
            self._kept_until = oldest.at + self._keep_seconds
            if now < self._kept_until:
                break
            del self._answers[self._oldest]
            self._oldest = oldest.newer
            # What has been dropped may still be in the store, whose bounds are the same but whose
            # clock is another.
            self.complete = False

    def abandon(self) -> list[Entry[Asker]]:
        """Give up all that waits or runs: who still waits for an answer."""
        entries = list(self._open.values())
        self._open.clear()
        self.queue.clear()
        self.running = None
        return entries

    def give_up_waiting(self) -> list[Entry[Asker]]:
        """Give up what has not been started."""
        entries = list(self.queue)
        self.queue.clear()
        for entry in entries:
            del self._open[entry.id]
        return entries


def digest_of(said: bytes) -> bytes:
    """What the store keeps of a command."""
    return blake2b(said, digest_size=16).digest()


def mark_of(said: bytes) -> int:
    """What is kept in memory of a command, to know it when its id comes again, as nearly none does: Python's own hash,
    of 64 bits with a key of this process. A digest costs 0.8 µs more."""
    return hash(said)


def _other_command(id: str) -> Refusal:
    """An id has come again with other content."""
    return Refusal(
        ErrorType.VALIDATION,
        f"the id {id!r} was used for another command: give each command an id of its own",
        status=409,
        details={"id": id},
    )
