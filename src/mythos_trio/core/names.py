"""The words that clients choose, and what they may look like (contract, section 2)."""

from __future__ import annotations

import re
from typing import Final

from mythos_trio.core.errors import ErrorType, Refusal, invalid

_PLAYER: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_SESSION: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_CHANNEL: Final = re.compile(r"[A-Za-z0-9_.:/-]{1,128}", re.ASCII)
# "stats" is a path of its own under /api/connections/; "." and ".." are eaten by URL normalisation.
_NOT_PLAYERS: Final = frozenset({"stats", ".", ".."})
# What JavaScript clients send when they have no session yet.
_NO_SESSION: Final = frozenset({"", "null", "undefined"})

EVERYONE: Final = "*"


def player_id(value: object) -> str:
    """*value* if it is a player's id, else a 422 refusal."""
    if isinstance(value, str) and _PLAYER.fullmatch(value) and value not in _NOT_PLAYERS:
        return value
    raise invalid("a player id has 1-64 of A-Z a-z 0-9 _ . - and is not 'stats', '.' or '..'", field="player_id")


def session_id(value: object) -> str | None:
    """*value* if it is a session's id, None if it says "I have none", else a 400 refusal."""
    if value is None or value in _NO_SESSION:
        return None
    if isinstance(value, str) and _SESSION.fullmatch(value):
        return value
    raise Refusal(
        ErrorType.VALIDATION,
        "a session id has 1-64 of A-Z a-z 0-9 _ . -",
        status=400,
        details={"field": "session_id"},
    )


def channel(value: object) -> str:
    """*value* if it is a channel's name, else a 422 refusal."""
    if isinstance(value, str) and _CHANNEL.fullmatch(value):
        return value
    raise invalid("a channel has 1-128 of A-Z a-z 0-9 _ . : / -", field="channel")


def message_id(value: object) -> str:
    """*value* if it can be the id of a message or a command, else a 422 refusal."""
    if isinstance(value, str) and 1 <= len(value) <= 128 and value.isprintable():
        return value
    raise invalid("an id is a string of 1-128 printable characters", field="id")


# Targets: where a message is stored. The marks cannot stand in a player's or a channel's name.


def to_player(player: str) -> str:
    return "@" + player


def to_channel(name: str) -> str:
    return "#" + name


def target_fields(target: str) -> dict[str, str | bool]:
    """The publisher's words for a stored target."""
    if target == EVERYONE:
        return {"broadcast": True}
    return {"player_id": target[1:]} if target.startswith("@") else {"channel": target[1:]}
