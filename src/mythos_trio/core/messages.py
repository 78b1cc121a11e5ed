"""Messages: what a publisher may say, and the bytes that are stored (contract, section 4)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final

import msgspec
from attrs import define, field

from mythos_trio.core import names
from mythos_trio.core.errors import ErrorType, Refusal, invalid

# Types of the control messages that the server alone may say.
RESERVED_TYPES: Final = frozenset({"welcome", "heartbeat", "gap", "reply", "pong", "session_changed", "disconnect"})
# Fields of a message that are the server's, or have a place of their own in `PublisherMessage`.
SERVER_FIELDS: Final = frozenset({"seq", "epoch", "replaces"})
OWN_FIELDS: Final = frozenset({"id", "type", "content", "timestamp"})

# Deep enough for any message that people write. The decoder itself stops at Python's recursion limit
# (about 1,000), but clients in other languages stop sooner, and what they stop at was stored by us.
MAX_DEPTH: Final = 64

_encode: Final = msgspec.json.Encoder().encode
# Keys in order: the same message has the same digest however its publisher's language orders them.
_encode_sorted: Final = msgspec.json.Encoder(order="deterministic").encode
_decode: Final = msgspec.json.Decoder().decode

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


@define
class PublisherMessage:
    """A publisher's message that may be stored.

    *id* is None if the publisher chose none. *said* is everything but the id and the timestamp, *json* what that is
    written as.
    """

    id: str | None
    said: Mapping[str, Any]
    json: bytes = field(repr=False)

    @property
    def digest(self) -> bytes:
        """Of *said*: 16 bytes, the same for a retry, and another one for another message."""
        return blake2b(_encode_sorted(self.said), digest_size=16).digest()

    def body(self, id: str, timestamp: str) -> bytes:
        """The stored JSON, as of `make_body`."""
        return b'{"id":%b,"timestamp":"%b",%b' % (_encode(id), timestamp.encode(), self.json[1:])


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    """What a message says that says no more than it has to."""

    type: str
    content: Any


class _Plain(msgspec.Struct, forbid_unknown_fields=True):
    message: _Said
    player_id: str | msgspec.UnsetType = msgspec.UNSET
    channel: str | msgspec.UnsetType = msgspec.UNSET
    broadcast: bool | msgspec.UnsetType = msgspec.UNSET


_decode_plain: Final = msgspec.json.Decoder(_Plain).decode


def parse_plain(data: bytes, max_bytes: int) -> tuple[str, bytes] | None:
    """The target and the message's JSON (as `PublisherMessage.json`), if *data* is one publication whose message has
    a type and a content and nothing else.

    Most publications are of this kind, and are taken as they are decoded, in a quarter of the time. None: it is of
    another kind, or something is wrong with it: that is for `decode_json` and `check_message` to say.
    """
    try:
        plain = _decode_plain(data)
        message_type(plain.message.type)
        target = _target(plain)
    except (msgspec.DecodeError, UnicodeError, RecursionError, Refusal):
        return None
    encoded = _encode(plain.message)
    return None if may_be_deep(data) or len(encoded) > max_bytes else (target, encoded)


def _target(plain: _Plain) -> str:
    player, channel, broadcast = plain.player_id, plain.channel, plain.broadcast
    if isinstance(player, str) and channel is broadcast is msgspec.UNSET:
        return names.to_player(names.player_id(player))
    if isinstance(channel, str) and player is broadcast is msgspec.UNSET:
        return names.to_channel(names.channel(channel))
    if broadcast is True and player is channel is msgspec.UNSET:
        return names.EVERYONE
    raise invalid("name one target", field="player_id")


def plain_body(id: str, timestamp: str, json: bytes) -> bytes:
    """As `PublisherMessage.body`, for an *id* of hexadecimal digits."""
    return b'{"id":"%b","timestamp":"%b",%b' % (id.encode(), timestamp.encode(), json[1:])


def check_message(message: object, max_bytes: int) -> PublisherMessage:
    """*message*, decoded JSON, as a publisher's message.

    :param max_bytes: bound of the message's JSON without its id and timestamp.
    :raises Refusal: ``validation_error``: 413 if it is too big, 422 for all else.
    """
    if not isinstance(message, dict):
        raise invalid('a message is an object: {"type": …, "content": …}', field="message")
    if not SERVER_FIELDS.isdisjoint(message):
        name = min(SERVER_FIELDS & message.keys())
        raise invalid(f"{name!r} is the server's to set", field=name)
    if "content" not in message:
        raise invalid("a message needs 'content' (any JSON)", field="content")
    message_type(message.get("type"))
    said = message.copy()
    said.pop("id", None)
    said.pop("timestamp", None)
    if "replace_key" in said:
        replace_key(said["replace_key"])
    encoded = _encode(said)
    if len(encoded) > max_bytes:
        raise invalid(f"the message has {len(encoded)} bytes; at most {max_bytes}", status=413, max_bytes=max_bytes)
    return PublisherMessage(names.message_id(message["id"]) if "id" in message else None, said, encoded)


def message_type(value: object) -> str:
    """*value* if a publisher or a game may use it as a message's type, else a 422 refusal."""
    if not isinstance(value, str) or not 1 <= len(value) <= 64:
        raise invalid("a message needs a 'type', a string of 1-64 characters", field="type")
    if value in RESERVED_TYPES:
        raise invalid(f"the type {value!r} is reserved for the server", field="type")
    return value


def replace_key(value: object) -> str:
    """*value* if it can be a message's ``replace_key``, else a 422 refusal."""
    if isinstance(value, str) and 1 <= len(value) <= 128:
        return value
    raise invalid("a 'replace_key' is a string of 1-128 characters", field="replace_key")


def make_body(id: str, type: str, content: object, timestamp: str, fields: Mapping[str, object]) -> bytes:
    """The stored JSON of a message: all but its number. It begins with ``{"id":``.

    :param timestamp: RFC 3339 (`mythos_trio.seams.rfc3339`).
    :param fields: others than `OWN_FIELDS` and `SERVER_FIELDS`.
    :raises TypeError, ValueError, RecursionError: *content* or *fields* cannot be written as JSON. It cannot
        happen to what came from `decode_json`.
    """
    return _encode({"id": id, "type": type, "content": content, "timestamp": timestamp, **fields})


def decode_json(data: bytes | str) -> Any:
    """The value that *data* writes, of nothing that `make_body` could not write again.

    :raises Refusal: ``validation_error`` 400: not JSON, not UTF-8, a number out of range, or
        nested deeper than `MAX_DEPTH`.
    """
    try:
        if isinstance(data, str):
            data = data.encode()
        value = _decode(data)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeError:
        raise _not_json("it is not UTF-8") from None
    except msgspec.DecodeError as error:
        raise _not_json(_explain(error, data)) from None
    if may_be_deep(data) and _is_deep(value):
        raise _too_deep()
    return value


def may_be_deep(data: bytes) -> bool:
    """Counting is quick, walking is not: most messages have few brackets."""
    return data.count(b"{") + data.count(b"[") > MAX_DEPTH


def _is_deep(value: Any) -> bool:
    """Whether containers are nested deeper than `MAX_DEPTH`. Looks at them level by level."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list))
        ]
    return bool(level)


def _explain(error: msgspec.DecodeError, data: bytes | str) -> str:
    """The decoder's words, made clearer where they mislead."""
    if not data.strip():
        return "it is empty"
    # The decoder calls a first half at the end of a string "Input data was truncated".
    if isinstance(data, bytes) and _SURROGATE.search(data):
        return f"{error} (is there a \\uD800-\\uDFFF escape without its other half?)"
    return str(error)


def _not_json(why: str) -> Refusal:
    return Refusal(ErrorType.VALIDATION, f"this is not JSON: {why}", status=400)


def _too_deep() -> Refusal:
    return Refusal(ErrorType.VALIDATION, f"nested too deeply; at most {MAX_DEPTH} levels", status=400)
