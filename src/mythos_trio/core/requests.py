"""What a client says: text frames and the bodies of POSTs (contract, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

import msgspec
from attrs import frozen

from mythos_trio.core import names
from mythos_trio.core.errors import Refusal, invalid
from mythos_trio.core.messages import decode_json, may_be_deep
from mythos_trio.core.position import Position, parse_position


class Command(msgspec.Struct, frozen=True):
    """*id* is None if the client gave none; *kind* is ``command``, ``subscribe`` or ``unsubscribe``
    (the latter two are commands too: one at a time, in order, each id once)."""

    id: str | None
    content: Any
    kind: str = "command"


@frozen
class Ack:
    position: Position


@frozen
class Ping:
    id: str | None


@frozen
class Auth:
    """A fresh token for a live connection."""

    token: str


@frozen
class Wrong:
    """What cannot be understood: an error reply with *refusal*, and with *id* if it could be read."""

    id: str | None
    refusal: Refusal


ClientRequest: TypeAlias = Command | Ack | Ping | Auth | Wrong

_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "command": frozenset({"type", "id", "content"}),
    "ack": frozenset({"type", "id", "position"}),
    "ping": frozenset({"type", "id"}),
    "subscribe": frozenset({"type", "id", "channel"}),
    "unsubscribe": frozenset({"type", "id", "channel"}),
    "auth": frozenset({"type", "id", "token"}),
}


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    """What clients nearly always say."""

    type: Literal["command"]
    content: Any
    id: str | None = None


_decode_said: Final = msgspec.json.Decoder(_Said).decode
_encode_sorted: Final = msgspec.json.Encoder(order="deterministic").encode


def parse_payload(payload: bytes) -> ClientRequest:
    """The request in a text frame's payload.

    A command is taken as it is decoded, 1 µs quicker; all else, and what is wrong with it, is for `parse_frame`.

    :raises UnicodeDecodeError: it is not UTF-8.
    """
    try:
        said = _decode_said(payload)
        if type(said.content) is str or not may_be_deep(payload):
            return Command(None if said.id is None else names.message_id(said.id), said.content)
    except (msgspec.DecodeError, UnicodeError, RecursionError, Refusal):
        pass
    return parse_frame(payload.decode())


def parse_frame(text: str) -> ClientRequest:
    """The request in a text frame. Never raises: what is wrong comes back as `Wrong`."""
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return _plain_line(text)
    try:
        value = decode_json(text.encode())
    except (Refusal, UnicodeEncodeError) as error:
        return Wrong(None, error if isinstance(error, Refusal) else invalid("the text has lone surrogates"))
    return parse_request(value)


def _plain_line(text: str) -> ClientRequest:
    """``wscat`` and a plain terminal send lines: a command of that text."""
    line = text.strip()
    if not line:
        return Wrong(None, invalid("an empty line: send a command"))
    if not line.isprintable():
        return Wrong(None, invalid("a plain line is one line of printable characters"))
    return Command(None, line)


def parse_request(value: object) -> ClientRequest:
    """The request in a decoded JSON value. Never raises."""
    if not isinstance(value, dict):
        return Wrong(None, invalid('a JSON object with a "type" is expected'))
    given = value.get("id")
    id = given if isinstance(given, str) and 1 <= len(given) <= 128 else None
    try:
        return _parse(value, None if given is None else names.message_id(given))
    except Refusal as refusal:
        return Wrong(id, refusal)


def _parse(value: dict[str, Any], id: str | None) -> ClientRequest:
    kind = value.get("type")
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise invalid(f'"type" is one of {", ".join(_FIELDS)}', field="type")
    unknown = value.keys() - fields
    if unknown:
        raise invalid(f"unknown field {min(unknown)!r} in a {kind}", field=min(unknown))
    match kind:
        case "command":
            return parse_command(value, id)
        case "ack":
            return Ack(ack_position(value))
        case "ping":
            return Ping(id)
        case "auth":
            return Auth(_text(value, "token"))
        case _:
            return Command(id, names.channel(value.get("channel")), str(kind))


def parse_command(value: Mapping[str, Any], id: str | None) -> Command:
    if "content" not in value:
        raise invalid('a command has a "content"', field="content")
    return Command(id, value["content"])


def ack_position(value: Mapping[str, Any]) -> Position:
    return parse_position(_text(value, "position"))


def _text(value: Mapping[str, Any], field: str) -> str:
    text = value.get(field)
    if not isinstance(text, str):
        raise invalid(f'"{field}" is a string', field=field)
    return text


def command_said(command: Command) -> bytes:
    """What tells whether two commands with one id are the same."""
    return _encode_sorted([command.kind, command.content])
