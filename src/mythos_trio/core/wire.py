"""The bytes on the wire: how a message and a control message look on each transport.

A message is encoded once: its WebSocket frame and its SSE event are made when the first receiver
needs them, and are shared by all receivers (a delivery of 230 bytes costs 10 µs with shared bytes,
100 µs when each connection frames its own).

Sources: RFC 6455 section 5.2 (frames), the HTML standard's "server-sent events" (event streams).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec

from mythos_trio.core.errors import Close

PING_PAYLOAD: Final = b"mythos"
PING: Final = b"\x89" + bytes([len(PING_PAYLOAD)]) + PING_PAYLOAD

# RFC 6455, section 5.5: a control frame carries at most 125 bytes, two of which are the close code.
_MAX_CLOSE_REASON: Final = 123

_encoder = msgspec.json.Encoder()


class _Keyed(msgspec.Struct):
    """What of a message's body says whether it may be replaced; the rest is passed over."""

    replace_key: Any = None


_decode_keyed: Final = msgspec.json.Decoder(_Keyed).decode
_UNREAD: Final = ("", "")
# How many of a message's receivers the log line names.
NAMED: Final = 50


class Message:
    """A stored message, shared by the logs of all its receivers.

    *body* is its JSON object without ``seq``. *receivers* and *players* (the first `NAMED`) count the
    sessions to which it was written, for the log line that says so.
    """

    __slots__ = ("_key", "_sse", "_websocket", "accepted_at", "body", "id", "players", "receivers", "seq", "target")

    def __init__(self, seq: int, id: str, target: str, body: bytes, accepted_at: float = 0.0) -> None:
        self.seq = seq
        self.id = id
        self.target = target
        self.body = body
        self.accepted_at = accepted_at
        self.receivers = 0
        self.players: list[str] = []
        self._websocket: bytes | None = None
        self._sse: bytes | None = None
        self._key: tuple[str, str] | None = _UNREAD

    def received_by(self, player_id: str) -> None:
        """It has been written to a session for the first time."""
        self.receivers += 1
        if self.receivers <= NAMED:
            self.players.append(player_id)

    def received_by_all(self, sessions: int, named: Sequence[str]) -> None:
        """As `received_by`, of so many sessions at once; *named* are some of their players, or all."""
        self.receivers += sessions
        self.players += named[: NAMED - len(self.players)]

    def settle(self) -> None:
        """Its round is over, and so is the line about it: nearly all receivers have it. Logs hold it for the others,
        without what can be made again: frames and names are two thirds of it (1.6 KiB with a body of 250 bytes)."""
        self._websocket = self._sse = None
        self.players = []

    @property
    def key(self) -> tuple[str, str] | None:
        """Target and ``replace_key``: a newer message with the same may stand in for this one. None: none may.

        It is read when a connection is behind, and not before: few messages have one, and few
        connections are behind.
        """
        if self._key is _UNREAD:
            said = _decode_keyed(self.body).replace_key if b'"replace_key"' in self.body else None
            self._key = (self.target, said) if isinstance(said, str) else None
        return self._key

    @property
    def payload(self) -> bytes:
        return b'{"seq":%d,%b' % (self.seq, self.body[1:])

    def payload_replacing(self, count: int) -> bytes:
        """As it looks to a connection that was not sent *count* older messages with its key."""
        return b'{"seq":%d,"replaces":%d,%b' % (self.seq, count, self.body[1:])

    def websocket(self) -> bytes:
        frame = self._websocket
        if frame is None:
            frame = self._websocket = text_frame(self.payload)
        return frame

    def sse(self, epoch: int) -> bytes:
        """*epoch* is the present one: it is the same for every receiver in one process."""
        event = self._sse
        if event is None:
            event = self._sse = _numbered_event(epoch, self.seq, self.payload)
        return event


class Framing(Protocol):
    """One transport's way of putting messages into bytes."""

    name: str

    def message(self, message: Message, epoch: int) -> bytes: ...
    def messages(self, messages: Sequence[Message], epoch: int) -> bytes:
        """Some that follow one another."""
        ...

    def replacing(self, message: Message, epoch: int, count: int) -> bytes:
        """*message* for one connection, to which it stands in for *count* others."""
        ...

    def control(self, payload: bytes, position: str | None = None) -> bytes:
        """*position* becomes the SSE event's id, where the control message carries one."""
        ...

    def last_words(self, payload: bytes, close: Close, retry_ms: int | None = None) -> bytes:
        """The ``disconnect`` message and whatever ends the transport.

        :param retry_ms: as it stands in the message, for clients that come back by themselves.
        """
        ...


class _Shared:
    """What was joined last. In a round nearly all connections that are sent several messages are sent the same ones."""

    def __init__(self) -> None:
        self._messages: Sequence[Message] = ()
        self._epoch = 0
        self._joined = b""

    def join(self, framing: Framing, messages: Sequence[Message], epoch: int) -> bytes:
        if len(messages) == 1:
            return framing.message(messages[0], epoch)
        # Messages are equal only to themselves.
        if messages != self._messages or epoch != self._epoch:
            self._joined = b"".join([framing.message(message, epoch) for message in messages])
            self._messages, self._epoch = messages, epoch
        return self._joined


class WebSocketFraming:
    name = "websocket"

    def __init__(self) -> None:
        self._shared = _Shared()

    def message(self, message: Message, epoch: int) -> bytes:
        return message._websocket or message.websocket()

    def messages(self, messages: Sequence[Message], epoch: int) -> bytes:
        return self._shared.join(self, messages, epoch)

    def replacing(self, message: Message, epoch: int, count: int) -> bytes:
        return text_frame(message.payload_replacing(count))

    def control(self, payload: bytes, position: str | None = None) -> bytes:
        return text_frame(payload)

    def last_words(self, payload: bytes, close: Close, retry_ms: int | None = None) -> bytes:
        return text_frame(payload) + close_frame(close.code, close.reason)


class SSEFraming:
    name = "sse"

    def __init__(self) -> None:
        self._shared = _Shared()

    def message(self, message: Message, epoch: int) -> bytes:
        return message.sse(epoch)

    def messages(self, messages: Sequence[Message], epoch: int) -> bytes:
        return self._shared.join(self, messages, epoch)

    def replacing(self, message: Message, epoch: int, count: int) -> bytes:
        return _numbered_event(epoch, message.seq, message.payload_replacing(count))

    def control(self, payload: bytes, position: str | None = None) -> bytes:
        return sse_event(payload, position)

    def last_words(self, payload: bytes, close: Close, retry_ms: int | None = None) -> bytes:
        return sse_event(payload, None, retry_ms)


EMPTY_CLOSE: Final = b"\x88\x00"
WEBSOCKET: Final = WebSocketFraming()
SSE: Final = SSEFraming()


def encode(value: Any) -> bytes:
    """*value* as compact JSON."""
    return _encoder.encode(value)


def control(type: str, **fields: Any) -> bytes:
    """A control message's JSON; fields that are None are left out."""
    return _encoder.encode({"type": type} | {name: value for name, value in fields.items() if value is not None})


def disconnect(close: Close, retry_ms: int | None = None) -> bytes:
    """The ``disconnect`` message for *close*."""
    return control("disconnect", code=close.code, reason=close.reason, reconnect=close.reconnect, retry_ms=retry_ms)


def reply(command_id: str | None, answer: bytes, epoch: int, seq: int) -> bytes:
    """The ``reply`` to a command, whose place is behind *seq*. *answer* is the JSON object ``{"ok": …}`` of
    `answer_body`."""
    return b'{"type":"reply","id":%b,%b,"position":"%d-%d"}' % (_encoder.encode(command_id), answer[1:-1], epoch, seq)


def answer_body(content: Any) -> bytes:
    """What a handler returned, as a command's answer."""
    return _encoder.encode({"ok": True, "content": content})


def error_body(error_type: str, message: str, details: dict[str, Any] | None = None) -> bytes:
    """Why a command was not carried out, as its answer."""
    error: dict[str, Any] = {"error_type": error_type, "message": message}
    if details:
        error["details"] = details
    return _encoder.encode({"ok": False, "error": error})


def text_frame(payload: bytes) -> bytes:
    """A whole, unmasked text frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


def pong_frame(payload: bytes) -> bytes:
    """The answer to a ping with *payload* (RFC 6455, section 5.5.3)."""
    return b"\x8a%c%b" % (len(payload), payload)


def close_frame(code: int, reason: str) -> bytes:
    """A close frame; *reason* is cut at what fits, between characters."""
    text = reason.encode()[:_MAX_CLOSE_REASON].decode(errors="ignore").encode()
    return b"\x88%c%b%b" % (2 + len(text), code.to_bytes(2, "big"), text)


def sse_event(payload: bytes, position: str | None, retry_ms: int | None = None) -> bytes:
    """One event of an event stream; *payload* is JSON, so it has no line breaks."""
    head = b"" if position is None else b"id: %b\n" % position.encode()
    retry = b"" if retry_ms is None else b"retry: %d\n" % retry_ms
    return b"%b%bdata: %b\n\n" % (retry, head, payload)


def _numbered_event(epoch: int, seq: int, payload: bytes) -> bytes:
    return b"id: %d-%d\ndata: %b\n\n" % (epoch, seq, payload)
