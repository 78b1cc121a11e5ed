"""A session's life as a table, who may enter it, and what presence it owes to the game (contract, section 5)."""

from __future__ import annotations

from collections.abc import Container
from enum import Enum, StrEnum
from functools import lru_cache
from typing import Final

from attrs import define, evolve, frozen


class State(StrEnum):
    ONLINE = "online"
    LINKDEAD = "linkdead"
    OFFLINE = "offline"
    ENDED = "ended"


class Happening(StrEnum):
    ATTACH = "a connection has joined"
    LAST_DETACH = "the last connection is gone"
    GRACE_OVER = "link-dead for the whole grace time"
    END = "switched, removed or expired"
    RESTART = "the server has started again"


TRANSITIONS: Final[dict[State, dict[Happening, State]]] = {
    State.ONLINE: {
        Happening.ATTACH: State.ONLINE,
        Happening.LAST_DETACH: State.LINKDEAD,
        Happening.END: State.ENDED,
        Happening.RESTART: State.LINKDEAD,
    },
    State.LINKDEAD: {
        Happening.ATTACH: State.ONLINE,
        Happening.GRACE_OVER: State.OFFLINE,
        Happening.END: State.ENDED,
        Happening.RESTART: State.LINKDEAD,
    },
    State.OFFLINE: {
        Happening.ATTACH: State.ONLINE,
        Happening.END: State.ENDED,
        Happening.RESTART: State.OFFLINE,
    },
    State.ENDED: {Happening.RESTART: State.ENDED},
}


class IllegalTransition(Exception):
    """The happening has no place in this state. Nothing has changed."""


def after(state: State, happening: Happening) -> State:
    """The state that follows."""
    try:
        return TRANSITIONS[state][happening]
    except KeyError:
        raise IllegalTransition(f"{happening.name} while {state}") from None


@define  # not frozen: made for each connection, and to set a field would take three times as long
class SessionRow:
    """A stored session. Times are POSIX seconds."""

    player_id: str
    session_id: str
    start: int
    """Its number in the order; messages to everyone with larger numbers are its own."""
    mail_from: int
    """Messages to the player with larger numbers are its own."""
    seen: int
    lost: int
    """The newest number among closed intervals that are gone for good (see `Interval.lost`)."""
    state: str
    told: str
    owed: str
    created_at: float
    last_online: float
    ended_at: float | None = None
    end_reason: str | None = None
    channels: tuple[str, ...] = ()
    """Open subscriptions, in the order of their numbers."""


class Admission(Enum):
    """What becomes of a connection that comes while none of the player's sessions lives."""

    JOIN = "the current session goes on"
    BEGIN = "there is none: one begins"
    SWITCH = "another one is current: it ends, and the wanted one begins"
    ENDED = "the wanted one has ended, and an id that has ended never begins again"


def admission(wanted: str | None, current: str | None, *, ended: bool) -> Admission:
    """
    :param wanted: the session that the client names, if it names one.
    :param current: the player's current one, if there is one.
    :param ended: whether *wanted* has ended.
    """
    if current is not None and wanted in (None, current):
        return Admission.JOIN
    if ended:
        return Admission.ENDED
    return Admission.BEGIN if current is None else Admission.SWITCH


class Told(StrEnum):
    """What the game has been told of a player last, and has committed."""

    ABSENT = "absent"
    PRESENT = "present"
    LINKDEAD = "linkdead"


class Owed(StrEnum):
    """A handler that is to be run."""

    JOIN = "join"
    LINKDEAD = "linkdead"
    RETURN = "return"
    LEAVE = "leave"


_TELLS: Final = {
    Owed.JOIN: Told.PRESENT,
    Owed.LINKDEAD: Told.LINKDEAD,
    Owed.RETURN: Told.PRESENT,
    Owed.LEAVE: Told.ABSENT,
}


@frozen
class Presence:
    """What the game knows of a player, and what it is still owed, in order.

    A change owes (`arrived`, `lost`, `left`), the commit of the handler pays (`paid`). So after a
    crash what is in the session's row is exactly what is still to be run.

    *running*: the first one owed has been started, so it can no longer be cancelled out.
    """

    told: Told = Told.ABSENT
    owed: tuple[Owed, ...] = ()
    running: bool = False

    @property
    def at_last(self) -> Told:
        """What the game will know when everything owed is paid."""
        return _TELLS[self.owed[-1]] if self.owed else self.told

    def arrived(self) -> Presence:
        """A connection has joined."""
        match self.at_last:
            case Told.ABSENT:
                return self._owing(Owed.JOIN)
            case Told.LINKDEAD if self.owed and self._can_drop_last():
                # A link-dead that nobody has been told of, followed by a return: nothing happened.
                return evolve(self, owed=self.owed[:-1])
            case Told.LINKDEAD:
                return self._owing(Owed.RETURN)
            case _:
                return self

    def lost(self) -> Presence:
        """The last connection is gone."""
        return self._owing(Owed.LINKDEAD) if self.at_last is Told.PRESENT else self

    def left(self) -> Presence:
        """The player is offline, or the session has ended."""
        if self.at_last is Told.ABSENT:
            return self
        owed = self.owed
        # A visit that nobody has been told of is taken back whole: this keeps the list short (at
        # most one running, one visit and one leave) while the store refuses every commit.
        if owed.count(Owed.JOIN) and Owed.LEAVE in owed:
            keep = max(i for i, item in enumerate(owed) if item is Owed.LEAVE) + 1
            return evolve(self, owed=owed[:keep])
        return self._owing(Owed.LEAVE)

    def started(self) -> Presence:
        return evolve(self, running=True)

    def paid(self) -> Presence:
        """The first one owed has been run and committed."""
        return Presence(_TELLS[self.owed[0]], self.owed[1:])

    def without(self, unheard: Container[Owed]) -> Presence:
        """Handlers that the game does not have are paid when it is their turn, and they have not been started."""
        presence = self
        while presence.owed and not presence.running and presence.owed[0] in unheard:
            presence = presence.paid()
        return presence

    def not_paid(self) -> Presence:
        """It was run, but the commit failed: nothing happened, it is still owed."""
        return evolve(self, running=False)

    def _owing(self, item: Owed) -> Presence:
        return Presence(self.told, (*self.owed, item), self.running)

    def _can_drop_last(self) -> bool:
        return len(self.owed) > 1 or not self.running

    @property
    def owed_text(self) -> str:
        """As it stands in the session's row."""
        return ",".join(self.owed)


@lru_cache(64)
def parse_presence(told: str, owed: str) -> Presence:
    """The presence that a session's row holds."""
    return Presence(Told(told), tuple(Owed(item) for item in owed.split(",") if item))
