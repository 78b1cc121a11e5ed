"""What was promised, what has come, and whether the two agree. Nothing here waits or talks to anybody.

Every message has one number and one id in the whole store; so a player whose numbers strictly increase, and
whose every (number, id) is the one that all others know, has had nothing twice and nothing out of order.
What is missing is found by comparing with what was answered 202.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

from attrs import define, field, frozen

from tests.soak.game import HALL, HALL_EVERY, half_of

Message: TypeAlias = dict[str, Any]

EVERYONE: Final = "everyone"
NEWS: Final = "news"
"""The type of what publishers send; the game's own are ``count``, ``hall`` and ``tick``."""
MAX_SHOWN: Final = 20


def to_player(player: str) -> str:
    return f"player {player}"


def to_channel(channel: str) -> str:
    return f"channel {channel}"


@frozen
class Promise:
    """A publisher was told 202."""

    id: str
    seq: int
    target: str


@define(eq=False)
class Track:
    """One connection as it was seen from outside: it has to carry all of the stream behind *start*."""

    transport: str
    start: int
    seqs: list[int] = field(factory=list)
    over: bool = False

    @property
    def last(self) -> int:
        return self.seqs[-1] if self.seqs else self.start


class Ledger:
    """All that is known, of everybody. *violations* is empty, or a promise was broken.

    :param clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.violations: list[str] = []
        self.accounts: dict[str, Account] = {}
        self.published = 0
        self.given_up: set[str] = set()
        """Ids of messages that were refused, and not asked for again: they must never be seen."""
        self._promises: list[Promise] = []
        """Those since the last `check`."""
        self._by_id: dict[str, int] = {}
        self._by_seq: dict[int, str] = {}
        self._answered_at = clock()
        self.worst_publishing = 0.0

    def violation(self, text: str) -> None:
        self.violations.append(text)

    def account(self, player: str) -> Account:
        account = Account(self, player)
        self.accounts[player] = account
        return account

    @property
    def delivered(self) -> int:
        return sum(account.taken for account in self.accounts.values())

    @property
    def commands(self) -> int:
        return sum(len(account.commands) for account in self.accounts.values())

    # What publishers are told.

    def promised(self, promise: Promise) -> None:
        self.saw(promise.seq, promise.id, "a publisher")
        self._promises.append(promise)
        self.published += 1
        now = self.clock()
        self.worst_publishing = max(self.worst_publishing, now - self._answered_at)
        self._answered_at = now

    def saw(self, seq: int, id: str, who: str) -> None:
        """*who* was told that the message *id* has the number *seq*."""
        if id in self.given_up:
            self.violation(f"{who} got {id} ({seq}), which had been refused")
        if self._by_id.setdefault(id, seq) != seq:
            self.violation(f"{who} got {id} as number {seq}, and it was {self._by_id[id]}")
        if self._by_seq.setdefault(seq, id) != id:
            self.violation(f"{who} got number {seq} as {id}, and it was {self._by_seq[seq]}")

    # How long nothing came.

    def begin_wave(self) -> None:
        now = self._answered_at = self.clock()
        self.worst_publishing = 0.0
        for account in self.accounts.values():
            account.heard_at, account.worst_silence = now, 0.0

    # Whether it agrees. Only when nothing is under way.

    def missing(self) -> Iterator[str]:
        """What has been promised and has not come (yet)."""
        for account in self.accounts.values():
            yield from account.missing(self._promises)

    def check(self) -> None:
        """Note what is missing, and what has come without a promise; begin anew."""
        for text in self.missing():
            self.violation(f"lost: {text}")
        known = {promise.id for promise in self._promises}
        for account in self.accounts.values():
            for id in account.news.keys() - known:
                self.violation(f"{account.player} got {id}, which nobody was promised")
            account.check_tracks()
            account.news.clear()
        self._promises.clear()

    def account_of_violations(self) -> str:
        lines = self.violations[:MAX_SHOWN]
        left = len(self.violations) - len(lines)
        return "\n".join([*lines, f"… and {left} more"] if left else lines)


class Account:
    """What one player has had: each message once, as the client handed it on."""

    def __init__(self, ledger: Ledger, player: str) -> None:
        self.player = player
        self.taken = 0
        self.seqs: list[int] = []
        self.news: dict[str, int] = {}
        """Messages of publishers since the last check: ids and numbers."""
        self.commands: list[str] = []
        """The ids of the commands that were carried out: the n-th counted to n."""
        self.counted = 0
        self.ticks = 0
        self.hall: dict[str, int] = {}
        """The newest count of each player that was heard in the hall."""
        self.heard_at = ledger.clock()
        self.worst_silence = 0.0
        """Seconds in which nothing came, the longest of this wave."""
        self._ledger = ledger
        self._targets = frozenset({EVERYONE, to_player(player), to_channel(HALL), to_channel(half_of(player))})
        self._tracks: list[Track] = []

    def take(self, message: Message) -> None:
        """The client has handed this to the application."""
        if "seq" not in message:
            self._ledger.violation(f"{self.player} was told {message}")
            return
        seq, id = message["seq"], message["id"]
        now = self._ledger.clock()
        self.worst_silence = max(self.worst_silence, now - self.heard_at)
        self.heard_at = now
        self.taken += 1
        self._ledger.saw(seq, id, self.player)
        if self.seqs and seq <= self.seqs[-1]:
            self._ledger.violation(f"{self.player} got {id} ({seq}) after {self.seqs[-1]}: twice, or out of order")
        self.seqs.append(seq)
        self._read(message)

    def _read(self, message: Message) -> None:
        content = message["content"]
        match message["type"]:
            case "news":
                self.news[message["id"]] = message["seq"]
            case "count":
                self._in_turn("count", self.counted + 1, content["number"])
                self.counted = content["number"]
            case "tick":
                self._in_turn("tick", self.ticks + 1, content["number"])
                self.ticks = content["number"]
            case "hall":
                who = content["player"]
                self._in_turn(f"count of {who} in the hall", self.hall.get(who, 0) + HALL_EVERY, content["number"])
                self.hall[who] = content["number"]
            case other:
                self._ledger.violation(f"{self.player} got a message of type {other!r}")

    def _in_turn(self, what: str, expected: int, number: int) -> None:
        if number != expected:
            self._ledger.violation(f"{self.player} got {what} {number} instead of {expected}")

    def answered(self, id: str, content: object) -> None:
        """A command was answered for the first time."""
        self.commands.append(id)
        if content != len(self.commands):
            self._ledger.violation(f"{self.player} was answered {content} to {id}, the {len(self.commands)}. command")

    def answered_again(self, id: str, content: object) -> None:
        """An old command was asked again, under its id."""
        if content != self.commands.index(id) + 1:
            self._ledger.violation(f"{self.player} was answered {content} to {id}, asked again")

    def missing(self, promises: list[Promise]) -> Iterator[str]:
        for promise in promises:
            if promise.target in self._targets and promise.id not in self.news:
                yield f"{promise.id} ({promise.seq}, to {promise.target}) has not come to {self.player}"
        if self.counted < len(self.commands):
            yield f"{self.player} has {len(self.commands)} replies and {self.counted} lines"
        for other in self._ledger.accounts.values():
            said = len(other.commands) // HALL_EVERY * HALL_EVERY
            if self.hall.get(other.player, 0) < said:
                yield f"{self.player} has not heard {other.player} say {said} in the hall"

    def looked(self, data: Message) -> None:
        """What the game's data say, when nothing is under way (the timer goes on)."""
        if data["count"] != len(self.commands) or self.counted != len(self.commands):
            self._ledger.violation(
                f"{self.player}: {len(self.commands)} replies, {self.counted} lines, {data['count']} in the data"
            )

    def refuse(self, text: str) -> None:
        """The client has seen what should not be."""
        self._ledger.violation(text)

    # Connections.

    def open_track(self, transport: str, start: int) -> Track:
        track = Track(transport, start)
        self._tracks.append(track)
        return track

    def check_tracks(self) -> None:
        for track in self._tracks:
            carried = self.seqs[bisect_right(self.seqs, track.start) : bisect_right(self.seqs, track.last)]
            if carried != track.seqs:
                odd = sorted({*carried} ^ {*track.seqs})
                self._ledger.violation(
                    f"a {track.transport} connection of {self.player} did not carry the stream after {track.start}: "
                    f"{f'{odd[:5]} too many or too few' if odd else 'twice, or out of order'}"
                )
            # What it will carry from here on is compared next time.
            track.start, track.seqs = track.last, []
        self._tracks = [track for track in self._tracks if not track.over]
