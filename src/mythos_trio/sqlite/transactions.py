"""What a transaction does to the tables."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from enum import Enum
from functools import cache
from itertools import groupby
from typing import Any, Final, cast

from attrs import define, field

from mythos_trio.core import names
from mythos_trio.core.data import PLAYER, Write
from mythos_trio.core.session import Admission, SessionRow, State, Told, admission
from mythos_trio.core.transaction import (
    Admit,
    Answer,
    Append,
    Begin,
    Committed,
    Effect,
    End,
    Outcome,
    PresenceMark,
    Reason,
    Refused,
    Request,
    SetTimer,
    Subscribe,
    TimerChange,
    Transaction,
    Unsubscribe,
)
from mythos_trio.seams import rfc3339
from mythos_trio.sqlite.tables import (
    SESSION_COLUMNS,
    close_interval,
    end_session,
    find_answer,
    newest_session,
    open_interval,
    posix,
    session_row,
)

NOTHING_TO_REMOVE: Final = "the store has reached MAX_STORE_BYTES, and no message is left that could be removed"
INSERT_MESSAGE: Final = (
    "INSERT INTO messages (seq, id, target, body, digest, stored_at) VALUES (?, ?, ?, CAST(? AS TEXT), ?, ?)"
)
_BEGIN: Final = """
    INSERT INTO sessions (player_id, session_id, data, created_at, state, state_since, last_online,
        start, mail_from, seen, told, owed)
    VALUES (?, ?, coalesce((SELECT value FROM data WHERE key = ?), '{}'), ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_MAIL: Final = """
    SELECT EXISTS (SELECT 1 FROM messages WHERE target = :target AND seq > :after)
        OR EXISTS (SELECT 1 FROM targets WHERE target = :target AND removed > :after)"""
# Admissions that are stored in one go: each number has statements of its own, which SQLite keeps ready.
ADMIT_AT_ONCE: Final = 32
_MARK: Final = """
    UPDATE sessions SET
        state_since = CASE WHEN state = :state OR ended_at IS NOT NULL THEN state_since ELSE :now END,
        state = CASE WHEN ended_at IS NULL THEN :state ELSE 'ended' END,
        told = :told, owed = :owed
    WHERE player_id = :player_id AND session_id = :session_id"""


class _Refusing(Exception):
    """Carries the outcome of a transaction that is to leave no trace."""

    def __init__(self, reason: str, message: str, answer: Answer | None = None) -> None:
        super().__init__(message)
        self.outcome = Refused(reason, message, answer)


class _Kind(Enum):
    """Of transactions: several of the first two go together."""

    APPENDS = "nothing but messages"
    ADMITS = "an admission"
    OTHER = "what is done by itself"


def _kind(transaction: Transaction) -> _Kind:
    if transaction.admit is not None:
        return _Kind.ADMITS
    if transaction.answer is not None or transaction.request is not None or transaction.presence:
        return _Kind.OTHER
    if transaction.reads or transaction.writes or transaction.timers or transaction.fired is not None:
        return _Kind.OTHER
    if False in [type(effect) is Append for effect in transaction.effects]:
        return _Kind.OTHER
    return _Kind.APPENDS


def _begun(admit: Admit, number: int, mail_from: int, since: float, now: float) -> SessionRow:
    """The session that begins with *admit*."""
    return SessionRow(
        admit.player_id,
        admit.wanted or admit.new_id,
        start=number,
        mail_from=mail_from,
        seen=mail_from,
        lost=0,
        state=State.ONLINE,
        told=admit.told,
        owed=admit.owed,
        created_at=since,
        last_online=now,
    )


@cache
def _who_is_known(count: int) -> str:
    """Which of *count* players have had a session, or mail."""
    return f"""
        SELECT column1 FROM (VALUES {", ".join(["(?, ?)"] * count)})
        WHERE EXISTS (SELECT 1 FROM sessions WHERE player_id = column1)
            OR EXISTS (SELECT 1 FROM messages WHERE target = column2)
            OR EXISTS (SELECT 1 FROM targets WHERE target = column2 AND removed > 0)"""


@cache
def _begin_first(count: int) -> str:
    """The first sessions of *count* players, as `_BEGIN` has them."""
    return f"""
        INSERT INTO sessions (player_id, session_id, data, created_at, state, state_since, last_online,
            start, mail_from, seen, told, owed)
        SELECT column1, column2, coalesce((SELECT value FROM data WHERE key = column3), '{{}}'), column4,
            '{State.ONLINE}', column4, column4, column5, 0, 0, column6, column7
        FROM (VALUES {", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * count)})"""


def _adds(transaction: Transaction) -> bool:
    """Whether it makes the store larger: ends, leavings and marks may pass when it is full."""
    if transaction.answer is not None or transaction.request is not None or transaction.writes or transaction.timers:
        return True
    return any(isinstance(effect, (Append, Begin, Subscribe)) for effect in transaction.effects)


@define
class Batch:
    """Applies transactions inside one SQL transaction. *next* is the next free number; *stored* are
    (target, bytes) of the new messages, for the counts."""

    db: sqlite3.Connection
    next: int
    now: str
    full: bool
    stored: list[tuple[str, int]] = field(factory=list)

    def apply(self, batch: Sequence[Transaction]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for kind, run in groupby(batch, _kind):
            if kind is _Kind.APPENDS:
                outcomes += self._run(list(run))
            elif kind is _Kind.ADMITS:
                outcomes += self._admit_all([cast(Admit, transaction.admit) for transaction in run])
            else:
                outcomes += [self._one(transaction) for transaction in run]
        return outcomes

    def _run(self, run: Sequence[Transaction]) -> list[Outcome]:
        """Several transactions that only append, in one go; if an id is there already, one by one."""
        if self.full:
            return [self._one(transaction) for transaction in run]
        first = self.next
        appends = cast(list[Append], [effect for transaction in run for effect in transaction.effects])
        now = self.now
        rows = [(seq, a.id, a.target, a.body, a.digest, now) for seq, a in enumerate(appends, first)]
        try:
            self.db.executemany(INSERT_MESSAGE, rows)
        except sqlite3.IntegrityError:
            self.db.execute("DELETE FROM messages WHERE seq >= ?", (first,))
            return [self._one(transaction) for transaction in run]
        self.stored += [(a.target, len(a.body)) for a in appends]
        outcomes: list[Outcome] = []
        for transaction in run:
            start, self.next = self.next, self.next + len(transaction.effects)
            outcomes.append(Committed(tuple(range(start, self.next)), self.next - 1))
        return outcomes

    def _one(self, transaction: Transaction) -> Outcome:
        number, stored = self.next, len(self.stored)
        self.db.execute("SAVEPOINT one")
        try:
            outcome: Outcome = self._apply(transaction)
        except _Refusing as refusal:
            self.db.execute("ROLLBACK TO one")
            self.next = number
            del self.stored[stored:]
            outcome = refusal.outcome
        self.db.execute("RELEASE one")
        return outcome

    def _apply(self, transaction: Transaction) -> Committed:
        if transaction.request is not None:
            seqs = self._find_request(transaction.request, len(transaction.effects))
            if seqs is not None:
                return Committed(seqs, self.next - 1, frozenset(range(len(seqs))))
        if transaction.answer is not None:
            self._check_answer(transaction.answer)
        self._check_data(transaction)
        if transaction.fired is not None:
            self._take_timer(transaction.fired)
        if self.full and _adds(transaction):
            raise _Refusing(Reason.FULL, NOTHING_TO_REMOVE)
        duplicates: set[int] = set()
        done = tuple(self._do(effect, index, duplicates) for index, effect in enumerate(transaction.effects))
        if transaction.answer is not None:
            self._insert_answer(transaction.answer)
        for mark in transaction.presence:
            self._mark(mark)
        for write in transaction.writes:
            self._write(write)
        for change in transaction.timers:
            self._change_timer(change)
        if transaction.request is not None:
            key, digest = transaction.request.key, transaction.request.digest
            self.db.execute("INSERT INTO requests VALUES (?, ?, ?, ?)", (key, digest, json.dumps(done), self.now))
        return Committed(done, self.next - 1, frozenset(duplicates))

    def _do(self, effect: Effect, index: int, duplicates: set[int]) -> int:
        """:returns: the effect's number."""
        if isinstance(effect, Append):
            first = self._find_duplicate(effect)
            if first is not None:
                duplicates.add(index)
                return first
        number, self.next = self.next, self.next + 1
        match effect:
            case Append(target, id_, body, digest):
                self.db.execute(INSERT_MESSAGE, (number, id_, target, body, digest, self.now))
                self.stored.append((target, len(body)))
            case Subscribe(player_id, session_id, channel):
                self._subscribe(player_id, session_id, channel, number)
            case Unsubscribe(player_id, session_id, channel):
                start = open_interval(self.db, player_id, session_id, channel)
                if start is not None:
                    close_interval(self.db, player_id, session_id, channel, start, number)
            case Begin():
                self._begin(effect, number)
            case End(player_id, session_id, reason):
                if not end_session(self.db, player_id, session_id, reason, number, self.now):
                    raise _Refusing(Reason.ENDED, f"{session_id} is not a current session of {player_id}")
        return number

    def _find_duplicate(self, append: Append) -> int | None:
        """The number of the message with the same id, target and content; None if the id is new."""
        row = self.db.execute("SELECT seq, target, digest FROM messages WHERE id = ?", (append.id,)).fetchone()
        if row is None:
            return None
        seq, target, digest = row
        if append.digest is None or target != append.target or digest != append.digest:
            raise _Refusing(Reason.CONFLICT, f"the id {append.id!r} is that of another message")
        return int(seq)

    def _find_request(self, request: Request, effects: int) -> tuple[int, ...] | None:
        """The numbers that the same request got when it was new; None if it is new.

        They are kept with the key, for its messages may be gone before it.
        """
        row = self.db.execute("SELECT digest, seqs FROM requests WHERE key = ?", (request.key,)).fetchone()
        if row is None:
            return None
        seqs = json.loads(row[1])
        if row[0] != request.digest or len(seqs) != effects:
            raise _Refusing(Reason.KEY, f"the Idempotency-Key {request.key!r} is that of another request")
        return tuple(seqs)

    def _check_answer(self, answer: Answer) -> None:
        found = find_answer(self.db, answer.player_id, answer.session_id, answer.command_id)
        if found is not None:
            raise _Refusing(Reason.ANSWERED, f"the command {answer.command_id!r} has its answer", found)

    def _insert_answer(self, answer: Answer) -> None:
        self.db.execute(
            "INSERT INTO answers (player_id, session_id, command_id, digest, body, stored_at)"
            " VALUES (?, ?, ?, ?, CAST(? AS TEXT), ?)",
            (answer.player_id, answer.session_id, answer.command_id, answer.digest, answer.body, self.now),
        )
        self.db.execute("INSERT OR IGNORE INTO answered VALUES (?, ?)", (answer.player_id, answer.session_id))

    # The game's data and timers.

    def _check_data(self, transaction: Transaction) -> None:
        """What it has read is what is stored: else another node, or a commit that failed, came between."""
        versions = [*transaction.reads.items(), *((write.key, write.before) for write in transaction.writes)]
        for key, version in versions:
            row = self.db.execute("SELECT version FROM data WHERE key = ?", (key,)).fetchone()
            if (0 if row is None else row[0]) != version:
                raise _Refusing(Reason.STALE, f"{key} has been changed by another transaction")

    def _write(self, write: Write) -> None:
        self.db.execute(
            "INSERT INTO data VALUES (?, CAST(? AS TEXT), ?)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value, version = excluded.version",
            (write.key, write.body, write.version),
        )
        if write.key.startswith(PLAYER):
            # Operators look for it where the seed has it: in the newest session's row.
            self.db.execute(
                "UPDATE sessions SET data = CAST(? AS TEXT) WHERE player_id = ? AND ended_at IS NULL",
                (b"{}" if write.body is None else write.body, write.key.removeprefix(PLAYER)),
            )

    def _take_timer(self, timer: SetTimer) -> None:
        gone = self.db.execute(
            "DELETE FROM timers WHERE owner = ? AND name = ? AND id = ?", (timer.owner, timer.name, timer.id)
        )
        if gone.rowcount != 1:
            raise _Refusing(Reason.GONE, f"the timer {timer.name!r} of {timer.owner} is not there any more")

    def _change_timer(self, change: TimerChange) -> None:
        self.db.execute("DELETE FROM timers WHERE owner = ? AND name = ?", (change.owner, change.name))
        if isinstance(change, SetTimer):
            self.db.execute(
                "INSERT INTO timers VALUES (?, ?, ?, ?, CAST(? AS TEXT))",
                (change.owner, change.name, change.id, change.seconds, change.value),
            )

    def _mark(self, mark: PresenceMark) -> None:
        self.db.execute(
            _MARK,
            {
                "player_id": mark.player_id,
                "session_id": mark.session_id,
                "state": mark.state,
                "told": mark.told,
                "owed": mark.owed,
                "now": self.now,
            },
        )

    def _subscribe(self, player_id: str, session_id: str, channel: str, number: int) -> None:
        # A transaction is committed whatever becomes of its session: for one that has ended in the
        # meantime there is nothing to subscribe.
        current = self.db.execute(
            "SELECT 1 FROM sessions WHERE player_id = ? AND session_id = ? AND ended_at IS NULL",
            (player_id, session_id),
        ).fetchone()
        if current and open_interval(self.db, player_id, session_id, channel) is None:
            self.db.execute(
                "INSERT INTO subscriptions (player_id, session_id, channel, start) VALUES (?, ?, ?, ?)",
                (player_id, session_id, channel, number),
            )

    def _begin(self, begin: Begin, number: int) -> None:
        pair = (begin.player_id, begin.session_id)
        if self.db.execute("SELECT 1 FROM sessions WHERE player_id = ? AND session_id = ?", pair).fetchone():
            raise _Refusing(Reason.ENDED, f"the session {begin.session_id} has existed; it cannot begin again")
        newest = newest_session(self.db, begin.player_id, "ended_at, created_at")
        if newest is not None and newest[0] is None:
            raise _Refusing(Reason.ENDED, f"{begin.player_id} has another current session")
        before = None if newest is None else newest[1]
        self._insert_session(begin, number, before, Told.ABSENT, "")

    def _insert_session(self, begin: Begin, number: int, before: str | None, told: str, owed: str) -> str:
        """
        :param before: when the player's newest session has begun, if there was one.
        :returns: when this one has.
        """
        # Operators take the newest `created_at` for the current session, also if the clock was set back.
        created_at = self.now
        if before is not None and before >= created_at:
            created_at = rfc3339(posix(before) + 0.0011)
        mark = begin.mail_from
        self.db.execute(
            _BEGIN,
            (
                *(begin.player_id, begin.session_id, PLAYER + begin.player_id, created_at),
                *(State.ONLINE, self.now, self.now, number, mark, mark, told, owed),
            ),
        )
        return created_at

    def _admit_all(self, run: Sequence[Admit]) -> list[Outcome]:
        """In their order; those of players of whom the store knows nothing, nearly all of a rush, in two statements.

        Each statement lets go of the interpreter, and has to get it back from the event loop. With three of them for
        each player the writer took 17 µs for one of sixteen who came at once, now 10.
        """
        outcomes: list[Outcome] = []
        for first in range(0, len(run), ADMIT_AT_ONCE):
            some = run[first : first + ADMIT_AT_ONCE]
            known = self._known(some)
            unknown: list[Admit] = []
            for admit in some:
                if admit.player_id not in known and not admit.mail_from:
                    unknown.append(admit)
                else:
                    outcomes += self._begin_all(unknown)
                    unknown = []
                    outcomes.append(self._admit(admit))
                known.add(admit.player_id)  # from here on
            outcomes += self._begin_all(unknown)
        return outcomes

    def _known(self, run: Sequence[Admit]) -> set[str]:
        """The players of *run* of whom there is more than that they come; all of them if none may begin anything."""
        if self.full:
            return {admit.player_id for admit in run}
        who = [value for admit in run for value in (admit.player_id, names.to_player(admit.player_id))]
        return {player_id for (player_id,) in self.db.execute(_who_is_known(len(run)), who).fetchall()}

    def _begin_all(self, run: Sequence[Admit]) -> list[Outcome]:
        """The first sessions of players without mail."""
        if not run:
            return []
        first, self.next = self.next, self.next + len(run)
        values: list[Any] = []
        outcomes: list[Outcome] = []
        now = posix(self.now)
        for number, admit in enumerate(run, first):
            row = _begun(admit, number, 0, now, now)
            key = PLAYER + row.player_id
            values += (row.player_id, row.session_id, key, self.now, number, admit.told, admit.owed)
            outcomes.append(Committed((), number, session=row, begun=True, mail=False))
        self.db.execute(_begin_first(len(run)), values)
        return outcomes

    def _admit(self, admit: Admit) -> Outcome:
        """Without a savepoint: until it is certain that a session begins nothing is written, and then one row."""
        newest = self._session(newest_session(self.db, admit.player_id, SESSION_COLUMNS))
        current = newest if newest is not None and newest.ended_at is None else None
        named = newest if newest is not None and newest.session_id == admit.wanted else self._find_named(admit)
        ended = named is not None and named.ended_at is not None
        match admission(admit.wanted, None if current is None else current.session_id, ended=ended):
            case Admission.JOIN:
                return Committed((), self.next - 1, session=current)
            case Admission.ENDED:
                return Refused(Reason.ENDED, f"the session {admit.wanted} has ended", session=named)
            case Admission.SWITCH:
                return Refused(Reason.OTHER, f"{admit.player_id} has another current session")
            case _:
                return self._begin_admitted(admit, newest)

    def _find_named(self, admit: Admit) -> SessionRow | None:
        if admit.wanted is None:
            return None
        found = self.db.execute(
            f"SELECT {SESSION_COLUMNS} FROM sessions WHERE player_id = ? AND session_id = ?",
            (admit.player_id, admit.wanted),
        )
        return self._session(found.fetchone())

    def _session(self, row: Sequence[Any] | None) -> SessionRow | None:
        return None if row is None else session_row(self.db, row)

    def _begin_admitted(self, admit: Admit, newest: SessionRow | None) -> Outcome:
        if self.full:
            return Refused(Reason.FULL, NOTHING_TO_REMOVE)
        mark = admit.mail_from if newest is None else max(admit.mail_from, newest.seen)
        begin = Begin(admit.player_id, admit.wanted or admit.new_id, mark)
        number, self.next = self.next, self.next + 1
        before = None if newest is None else rfc3339(newest.created_at)
        since = posix(self._insert_session(begin, number, before, admit.told, admit.owed))
        row = _begun(admit, number, mark, since, posix(self.now))
        return Committed((), number, session=row, begun=True, mail=self._has_mail(row))

    def _has_mail(self, row: SessionRow) -> bool:
        """Whether the session that has just begun has messages, or has lost some. Only its own mail can be older."""
        target = names.to_player(row.player_id)
        found = self.db.execute(_MAIL, {"target": target, "after": row.mail_from}).fetchone()
        return bool(found[0])
