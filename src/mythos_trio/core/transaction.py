"""What one change does: effects in the order of the calls, committed together or not at all.

A publication, what a handler did, a session's begin or end and a mark of presence are all
transactions. They pass one queue, are committed by the store in that order, and are then applied to
the memory of the server (`mythos_trio.hub`) in the same order, so that what is live and what is
stored are the same stream.

A number of the store's order is given to every effect that has a place in it (`takes_number`).
"""

from __future__ import annotations

from typing import Final, TypeAlias

from attrs import define, field, frozen

from mythos_trio.core.data import Write
from mythos_trio.core.session import SessionRow

MAX_EFFECTS: Final = 1000
MAX_EFFECT_BYTES: Final = 1 << 20


# Not frozen: there is one for each message, and to set an attribute of a frozen one costs three times as much.
@define
class Append:
    """A message to a target (`names.to_player`, `names.to_channel` or `names.EVERYONE`).

    *body* is the message as a JSON object without ``seq``; it begins with ``{"id":``.
    *digest* is of what the publisher said; None if nobody but the server knows the id, so that it
    need not be looked for. *content_type* is the message's ``type``, for logs.
    """

    target: str
    id: str
    body: bytes
    digest: bytes | None = None


@frozen
class Subscribe:
    player_id: str
    session_id: str
    channel: str


@frozen
class Unsubscribe:
    player_id: str
    session_id: str
    channel: str


@frozen
class Begin:
    """A new session. *mail_from*: it gets the messages to the player with larger numbers."""

    player_id: str
    session_id: str
    mail_from: int


@frozen
class End:
    """The end of a session; its open subscriptions are closed with it."""

    player_id: str
    session_id: str
    reason: str


Effect: TypeAlias = Append | Subscribe | Unsubscribe | Begin | End


@define  # not frozen: made for each connection, and to set a field would take three times as long
class Admit:
    """A connection comes, and none of the player's sessions lives: `core.session.admission` says what happens.

    A transaction by itself, for it is asked and changed in one step: so a connect costs a share of one commit, and
    no reading. It changes something, and takes a number, only if a session begins.

    *wanted* is the session that was named, *new_id* that of one that begins. *mail_from*: as `Begin`, at least; the
    mark of the player's last session counts if it is larger. *told* and *owed*: presence of one that begins.
    """

    player_id: str
    wanted: str | None
    new_id: str
    mail_from: int
    told: str
    owed: str


@frozen
class Answer:
    """A command's answer, kept so that the same id is not run again.

    *body* is the JSON of ``{"ok": …, "content" | "error": …}``; the reply is made from it.
    """

    player_id: str
    session_id: str
    command_id: str
    digest: bytes
    body: bytes


@define  # not frozen: made for each connection, and to set a field would take three times as long
class PresenceMark:
    """What a session's row says after this change: see `mythos_trio.core.session.Presence`."""

    player_id: str
    session_id: str
    state: str
    told: str
    owed: str


@frozen
class Request:
    """An ``Idempotency-Key``: it names the whole request, also a batch."""

    key: str
    digest: bytes


@frozen
class SetTimer:
    """A timer begins, in place of the one of the same owner and name.

    *owner* is ``player/NAME`` or ``world``; *id* tells it from the one that it replaces.
    """

    owner: str
    name: str
    id: str
    seconds: float
    value: bytes


@frozen
class CancelTimer:
    """A timer of that name, if there is one, is no more."""

    owner: str
    name: str


TimerChange: TypeAlias = SetTimer | CancelTimer


@define(eq=False)
class Transaction:
    """One change, all or nothing.

    *reads*: the version of every key of the game's data that it rests on and does not write; *writes*
    carry theirs. The store checks both in the commit. *fired* is the timer that is run: its row is removed
    in the same commit, and if it is no longer there nothing is committed.
    """

    effects: list[Effect] = field(factory=list)
    answer: Answer | None = None
    presence: list[PresenceMark] = field(factory=list)
    request: Request | None = None
    reads: dict[str, int] = field(factory=dict)
    writes: list[Write] = field(factory=list)
    timers: list[TimerChange] = field(factory=list)
    fired: SetTimer | None = None
    admit: Admit | None = None
    # Set by who asked when it has stopped waiting: the writer passes over it if it is still queued.
    abandoned: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers of the order it takes at most."""
        return len(self.effects) + (self.admit is not None)


class Reason:
    """Why the store would not commit a transaction. The transaction has left no trace."""

    CONFLICT: Final = "conflict"
    """Same message id, other content (or other target)."""
    KEY: Final = "key"
    """Same ``Idempotency-Key``, other request."""
    ANSWERED: Final = "answered"
    """The command has its answer already: see `Refused.answer`."""
    ENDED: Final = "ended"
    """The session to begin has existed and ended, or the session to change is not the current."""
    OTHER: Final = "other"
    """The player has another current session than the one to admit to."""
    STALE: Final = "stale"
    """What it has read is not what is stored: run the handler again."""
    GONE: Final = "gone"
    """The timer that it has run is no longer there: it was run, replaced or cancelled."""
    FULL: Final = "full"
    """``MAX_STORE_BYTES`` or the disk: nothing left to remove."""
    FAILED: Final = "failed"
    """The database did not take it: locked, broken, gone."""


@frozen
class Refused:
    """The transaction was not committed; *message* is for people."""

    reason: str
    message: str
    answer: Answer | None = None
    session: SessionRow | None = None
    """Of an `Admit` to a session that has ended."""


@define
class Committed:
    """The transaction is stored.

    *seqs* has one number per effect, in order; for an `Append` whose id and content were there
    already it is the first one's number and the effect's index is in *duplicates*. *last* is the
    newest number of the store after this transaction (where a reply has its place).
    """

    seqs: tuple[int, ...]
    last: int
    duplicates: frozenset[int] = frozenset()
    session: SessionRow | None = None
    """Of an `Admit`: the player's current session."""
    begun: bool = False
    """Of an `Admit`: it has begun with it."""
    mail: bool = True
    """Of an `Admit`: messages wait for the session, or did and are gone. For sure only if it is False."""


Outcome: TypeAlias = Committed | Refused
