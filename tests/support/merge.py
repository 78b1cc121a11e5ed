"""What a client sees: one connection as it came, and the view that merges several.

`Received` is one connection's record, held against the model: `check` walks it once more from where it
has been checked so far. `View` is what an application makes of all its connections, by the contract's
rule: one number and one epoch.
"""

from __future__ import annotations

from typing import Any

from attrs import define, field

from tests.support.model import Fact, History, require


def parse(position: str) -> tuple[int, int]:
    epoch, _, seq = position.partition("-")
    return int(epoch), int(seq)


@define(eq=False)
class View:
    """The application: numbered messages in the order in which it took them, each once."""

    epoch: int = 0
    number: int = 0
    taken: dict[tuple[int, str], dict[str, Any]] = field(factory=dict)
    gaps: list[tuple[int, int, str]] = field(factory=list)
    """(after, position, reason), in numbers."""
    session_id: str = ""
    """Of the newest welcome."""

    @property
    def position(self) -> str:
        return f"{self.epoch}-{self.number}"

    @property
    def started(self) -> bool:
        return self.epoch > 0

    def start(self, position: str) -> None:
        self.epoch, self.number = parse(position)

    def take(self, epoch: int, message: dict[str, Any]) -> None:
        """*epoch*: of the connection. What an older life of the store still had to say is passed over."""
        if epoch < self.epoch or message["seq"] <= self.number:
            return
        self.epoch = epoch
        key = message["seq"], message["id"]
        require(key not in self.taken, "nothing comes twice", message=message)
        self.taken[key] = message
        self.number = message["seq"]

    def told(self, gap: dict[str, Any]) -> None:
        (_, after), (epoch, position) = parse(gap["after"]), parse(gap["position"])
        if epoch > self.epoch and gap["reason"] == "epoch":
            self.number = min(self.number, gap["shared"])
        self.epoch = max(epoch, self.epoch)
        self.gaps.append((after, position, gap["reason"]))
        # Only if it still has the number that was too large: another connection may have told it already.
        if gap["reason"] == "future" and self.number == after:
            self.number = position


@define(eq=False)
class Received:
    """One connection's messages, as they came. *named*: the position that the client named."""

    label: str
    history: History
    view: View
    named: str | None
    items: list[dict[str, Any]] = field(factory=list)
    session_id: str = ""
    connection_id: str = ""
    start: int = 0
    """Everything of the session above it follows."""
    last: int = 0
    """Everything up to it has come."""
    _checked: int = 0
    _gone: dict[int, set[int]] = field(factory=dict)
    """For the gap at this index of *items*: what retention had taken when it was told."""
    _excused: set[int] = field(factory=set)
    _owing: dict[tuple[str, str], list[Fact]] = field(factory=dict)
    """By key: what was skipped since the last message of that key, which a newer one has to say."""

    @property
    def welcomed(self) -> bool:
        return bool(self.items) and self.items[0]["type"] == "welcome"

    def add(self, message: dict[str, Any]) -> None:
        """The next message has come."""
        self.items.append(message)
        kind = message["type"]
        if kind == "welcome":
            self.session_id, self.connection_id = message["session_id"], message["connection_id"]
            self.view.session_id = self.session_id
            if self.named is None:
                self.view.start(message["position"])
        elif kind == "gap":
            self._gone[len(self.items) - 1] = set(self.history.removed)
            self.view.told(message)
        elif "seq" in message:
            self.view.take(self.epoch, message)

    @property
    def epoch(self) -> int:
        return int(self.items[0]["epoch"])

    # Held against the model.

    def check(self, player: str, *, all_of_it: bool) -> None:
        """:param all_of_it: nothing is under way any more: everything must have come."""
        if not self.welcomed:
            return
        session = self.history.sessions.get((player, self.session_id))
        require(session is not None, "a session is stored before its welcome", connection=self.label)
        assert session is not None  # for the type checker: required above
        stream = self.history.stream(session)
        while self._checked < len(self.items):
            self._checked += 1
            self._check_item(self._checked - 1, stream)
        if all_of_it:
            self._pass_to(max(self.history.newest, self.last), stream, "quiet")
        self._check_view(stream)

    def _check_item(self, index: int, stream: list[Fact]) -> None:
        item = self.items[index]
        kind = item["type"]
        if kind == "welcome":
            require(index == 0, "one welcome, first", connection=self.label)
            self._check_welcome(item)
        elif kind == "gap":
            self._check_gap(index, stream)
        elif "seq" in item:
            self._check_message(item, stream)
        elif kind in ("heartbeat", "reply") and "position" in item:
            epoch, seq = parse(item["position"])
            require(epoch == self.epoch, "positions have the present epoch", item=item)
            self._pass_to(seq, stream, item)

    def _check_welcome(self, item: dict[str, Any]) -> None:
        following = self.items[1] if len(self.items) > 1 else {}
        if self.named is not None:
            require(item["position"] == self.named, "the welcome has the named position", item=item)
        if following.get("type") == "gap":
            require(not item["resumed"], "a gap means: not resumed", item=item)
        self.start = self.last = parse(item["position"])[1]

    def _check_message(self, item: dict[str, Any], stream: list[Fact]) -> None:
        seq = item["seq"]
        require(seq > self.last, "numbers strictly increase", connection=self.label, last=self.last, message=item)
        fact = next((fact for fact in stream if fact.seq == seq), None)
        require(fact is not None, "only the session's own stream comes", connection=self.label, message=item)
        assert fact is not None  # for the type checker: required above
        rest = {name: value for name, value in item.items() if name not in ("seq", "replaces")}
        require(rest == fact.json, "a message is what was stored", message=item, stored=fact)
        self._skip_to(seq - 1, stream, item)
        self._check_replaces(item, fact)
        self.last = seq

    def _check_replaces(self, item: dict[str, Any], fact: Fact) -> None:
        """It stands for what was skipped of its key: no more, no less. Retention may have taken some meanwhile."""
        skipped = [] if fact.key is None else self._owing.pop(fact.key, [])
        surely = [one for one in skipped if one.seq not in self._excused]
        n = item.get("replaces", 0)
        require("replaces" not in item or n > 0, "who stands for none does not say so", message=item)
        require(len(surely) <= n <= len(skipped), "replaces is what was skipped", message=item, skipped=skipped)

    def _skip_to(self, seq: int, stream: list[Fact], by: object) -> None:
        """As `_pass_to`, but what a newer message may stand for may be still owed."""
        for fact in stream:
            if self.last < fact.seq <= seq and fact.key is not None:
                self._owing.setdefault(fact.key, []).append(fact)
        self._require_none_lost([f for f in stream if self.last < f.seq <= seq and f.key is None], by)
        self.last = max(self.last, seq)

    def _check_gap(self, index: int, stream: list[Fact]) -> None:
        item = self.items[index]
        (_, after), (epoch, position) = parse(item["after"]), parse(item["position"])
        require(epoch == self.epoch, "positions have the present epoch", item=item)
        if item["reason"] == "retention":
            lost = {fact.seq for fact in stream if fact.seq > after} & self._gone[index]
            require(
                lost,
                "a gap is told only where something is missing",
                connection=self.label,
                gap=item,
                stream=[fact.seq for fact in stream],
                removed=sorted(self._gone[index]),
            )
            require(position >= after >= self.last, "a gap leads on", gap=item, last=self.last)
            self._excused |= lost
            self._pass_to(position, stream, item)
        else:
            # What lies between is not lost but comes again (epoch), or was never there (future).
            require(index == 1, "a gap of epoch or future stands right after the welcome", gap=item)
            self.start = self.last = position

    def _pass_to(self, seq: int, stream: list[Fact], by: object) -> None:
        """Everything up to *seq* has come, or a newer message that stands for it has, or it is told to be lost."""
        owing = [fact for facts in self._owing.values() for fact in facts]
        self._require_none_lost(owing + [fact for fact in stream if self.last < fact.seq <= seq], by)
        self._owing.clear()
        self.last = max(self.last, seq)

    def _require_none_lost(self, missing: list[Fact], by: object) -> None:
        lost = [fact for fact in missing if fact.seq not in self._excused]
        require(
            not lost,
            "nothing is lost silently",
            connection=self.label,
            named=self.named,
            start=self.start,
            last=self.last,
            by=by,
            missing=[(f.seq, f.target, f.json["type"], f.json["content"]) for f in lost],
            removed=[f.seq for f in lost if f.seq in self.history.removed],
        )

    def _check_view(self, stream: list[Fact]) -> None:
        """What came on this connection is in the merged view, or was left out for being old."""
        view = self.view
        if view.session_id != self.session_id:
            return  # what the former session had on the wire comes too late for a view of the next one
        for fact in stream:
            if self.start < fact.seq <= self.last and (fact.seq, fact.id) not in view.taken:
                told = fact.seq in self._excused or any(
                    after < fact.seq or reason == "future" for after, _, reason in view.gaps
                )
                # On whichever connection was first it may have been skipped.
                replaced = fact.key is not None and any(fact.key == f.key and fact.seq < f.seq for f in stream)
                require(
                    told or replaced,
                    "the merged view is the stream",
                    connection=self.label,
                    seq=fact.seq,
                    view=view.position,
                )
