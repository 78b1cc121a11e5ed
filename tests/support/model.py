"""The reference model of the session-conflict tests: what is true, from the commits alone.

`History` is handed every transaction that the store has committed, with its numbers, and every removal
by retention. From these it says what the stream of each session is. It knows nothing of queues, cursors,
logs or connections, and it looks at no table: so it can be held against both the store and what clients
have seen.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from attrs import define, field, frozen

from mythos_trio.core.transaction import Append, Begin, Committed, End, Subscribe, Transaction, Unsubscribe

# What the game has been told last, by the test game's own messages, and what it may be told next.
PRESENCE = {
    "": {"join"},
    "join": {"linkdead", "leave"},
    "linkdead": {"return", "leave"},
    "return": {"linkdead", "leave"},
    "leave": {"join"},
}


@frozen
class Fact:
    """A message as it was committed. *json*: the object without ``seq``."""

    seq: int
    id: str
    target: str
    json: dict[str, Any]

    @property
    def key(self) -> tuple[str, str] | None:
        """What a newer message has to have, too, to stand for this one; None if none may."""
        said = self.json.get("replace_key")
        return None if said is None else (self.target, said)


@define
class _Interval:
    channel: str
    start: int
    end: int | None = None

    def covers(self, seq: int) -> bool:
        return self.start < seq and (self.end is None or seq < self.end)


@define(eq=False)
class SessionFacts:
    """One session that has ever begun."""

    player: str
    id: str
    start: int
    mail_from: int
    end: int | None = None
    reason: str = ""
    intervals: list[_Interval] = field(factory=list)
    told: list[str] = field(factory=list)
    """What `on_join` and its like have told of this session, in order of their commits."""

    def covers(self, fact: Fact) -> bool:
        """Whether the message is in this session's stream."""
        if self.end is not None and fact.seq > self.end:
            return False
        if fact.target == "*":
            return fact.seq > self.start
        if fact.target == "@" + self.player:
            return fact.seq > self.mail_from
        return any("#" + i.channel == fact.target and i.covers(fact.seq) for i in self.intervals)


class Violation(AssertionError):
    """A rule of the contract is broken."""


def require(condition: object, rule: str, **details: object) -> None:
    """A rule that holds under ``python -O`` too; *details* are for people."""
    if not condition:
        raise Violation(rule + "".join(f"\n    {name} = {value!r}" for name, value in details.items()))


@define(eq=False)
class History:
    """See the module's docstring."""

    messages: dict[int, Fact] = field(factory=dict)
    removed: set[int] = field(factory=set)
    sessions: dict[tuple[str, str], SessionFacts] = field(factory=dict)
    runs: dict[tuple[str, str, str], int] = field(factory=dict)
    """The run whose effects are stored, for each command (player, session, command id)."""
    newest: int = 0

    # What is true.

    def current(self, player: str) -> SessionFacts | None:
        current = [s for s in self.sessions.values() if s.player == player and s.end is None]
        require(len(current) <= 1, "a player has at most one current session", player=player, current=current)
        return current[0] if current else None

    def stream(self, session: SessionFacts) -> list[Fact]:
        """All messages of the session, also those that retention has taken since."""
        return [fact for _, fact in sorted(self.messages.items()) if session.covers(fact)]

    def held(self, id: str) -> Fact | None:
        """The message with this id that has not been removed."""
        found = [f for f in self.messages.values() if f.id == id and f.seq not in self.removed]
        require(len(found) <= 1, "an id is that of one message", found=found)
        return found[0] if found else None

    # What happens.

    def commit(self, transaction: Transaction, outcome: Committed) -> None:
        if (row := outcome.session) is not None and outcome.begun:
            require(row.start > self.newest, "numbers only grow", seq=row.start, newest=self.newest, session=row)
            self.newest = row.start
            self._begin(row.player_id, row.session_id, row.mail_from, row.start)
        elif row is not None:
            current = self.current(row.player_id)
            require(current is not None and current.id == row.session_id, "who joins joins the current", session=row)
        for index, (effect, seq) in enumerate(zip(transaction.effects, outcome.seqs, strict=True)):
            if index in outcome.duplicates:
                require(seq in self.messages, "a duplicate has the first one's number", seq=seq)
                continue
            require(seq > self.newest, "numbers only grow", seq=seq, newest=self.newest, effect=effect)
            self.newest = seq
            match effect:
                case Append():
                    self._append(effect, seq)
                case Subscribe(player, session, channel):
                    self._subscribe(player, session, channel, seq)
                case Unsubscribe(player, session, channel):
                    self._leave(player, session, {channel}, seq)
                case Begin(player, session, mail_from):
                    self._begin(player, session, mail_from, seq)
                case End(player, session, reason):
                    self.end(player, session, reason, seq)

    def _begin(self, player: str, session: str, mail_from: int, seq: int) -> None:
        key = player, session
        require(self.current(player) is None, "a session begins only after the other has ended", begin=key)
        require(key not in self.sessions, "an id that has ended never begins again", begin=key)
        self.sessions[key] = SessionFacts(player, session, seq, mail_from)

    def end(self, player: str, session: str, reason: str, seq: int) -> None:
        facts = self.sessions[player, session]
        require(facts.end is None, "a session ends once", session=facts)
        self._leave(player, session, {i.channel for i in facts.intervals}, seq)
        facts.end, facts.reason = seq, reason
        self.newest = max(self.newest, seq)

    def remove_all_but(self, held: Collection[int]) -> None:
        """Retention has left no more than *held*."""
        self.removed |= self.messages.keys() - set(held)

    def _append(self, effect: Append, seq: int) -> None:
        require(self.held(effect.id) is None, "an id is that of one message", id=effect.id, seq=seq)
        fact = Fact(seq, effect.id, effect.target, json.loads(effect.body))
        self.messages[seq] = fact
        content = fact.json["content"]
        if fact.json["type"] == "told":
            self._tell(self.sessions[effect.target[1:], content["session"]], content["what"])
        elif fact.json["type"] == "did":
            key = effect.target[1:], content["session"], content["command"]
            require(key not in self.runs, "a command's effects exist once", command=key, run=content["run"])
            self.runs[key] = content["run"]

    def _tell(self, session: SessionFacts, what: str) -> None:
        last = session.told[-1] if session.told else ""
        require(what in PRESENCE[last], "presence alternates", session=session.id, told=session.told, next=what)
        session.told.append(what)

    def _subscribe(self, player: str, session: str, channel: str, seq: int) -> None:
        facts = self.sessions.get((player, session))
        if facts is None or facts.end is not None:
            return
        if not any(i.channel == channel and i.end is None for i in facts.intervals):
            facts.intervals.append(_Interval(channel, seq))

    def _leave(self, player: str, session: str, channels: Collection[str], seq: int) -> None:
        facts = self.sessions.get((player, session))
        for interval in facts.intervals if facts else ():
            if interval.channel in channels and interval.end is None:
                interval.end = seq


def seqs(facts: Iterable[Fact]) -> Sequence[int]:
    return [fact.seq for fact in facts]
