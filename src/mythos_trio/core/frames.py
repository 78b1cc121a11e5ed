"""A WebSocket client's frames as they come in (RFC 6455, section 5).

What clients nearly always send, whole small frames, is taken by `take_frame`. All else is left to
trio-websocket, and then a `FrameScanner` looks on: trio-websocket counts a message's size in characters, only after
it has buffered it, and tells nobody about pongs that answer no `ping()` of its own. The scanner reads the
frame headers in passing and sees these things in time. It judges nothing else: what is malformed is
left to the parser.
"""

from __future__ import annotations

from typing import Final

from attrs import define, field, frozen

_CONTINUATION: Final = 0x0
_TEXT: Final = 0x1
_BINARY: Final = 0x2
_CLOSE: Final = 0x8
_PONG: Final = 0xA
_PING: Final = 0x9
_FIN: Final = 0x80
_MASKED: Final = 0x80
_MAX_CONTROL_PAYLOAD: Final = 125


TEXT: Final = _FIN | _TEXT
CLOSE: Final = _FIN | _CLOSE
PING: Final = _FIN | _PING
PONG: Final = _FIN | _PONG
_TAKEN: Final = frozenset({TEXT, CLOSE, PING, PONG})


class Unusual(Exception):
    """A frame that `take_frame` does not take: a part of a message, a large or a malformed one."""


def take_frame(data: bytes, at: int, most: int) -> tuple[int, bytes, int] | None:
    """The frame that begins at *at*, if it is an ordinary one: whole, masked, with a payload of at most *most* bytes.

    :returns: `TEXT`, `CLOSE`, `PING` or `PONG`, its payload, unmasked, and where the next frame begins; None if more
        bytes are needed to know.
    :raises Unusual: it is none.
    """
    have = len(data) - at
    if have < 2:
        return None
    kind, size = data[at], data[at + 1] & 0x7F
    start = at + 6
    if kind not in _TAKEN or data[at + 1] < _MASKED or size == 127:
        raise Unusual
    if size == 126:
        if have < 4:
            return None
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        start = at + 8
        # Not the shortest form of the length, or a long control frame: both are errors, which are not judged here.
        if size < 126 or kind != TEXT:
            raise Unusual
    if size > most:
        raise Unusual
    end = start + size
    if len(data) < end:
        return None
    return kind, _unmask(data[start:end], data[start - 4 : start]), end


def closing_words(payload: bytes) -> tuple[int, str]:
    """The code and the reason of a close frame; 1005 stands for a frame without either (section 7.1.5).

    :raises Unusual: it is malformed.
    """
    if not payload:
        return 1005, ""
    code = int.from_bytes(payload[:2], "big")
    known = (1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or 3000 <= code < 5000
    if len(payload) < 2 or not known:
        raise Unusual
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise Unusual from None


@frozen
class Pong:
    """A pong has come. *payload*: at most 125 bytes, unmasked."""

    payload: bytes


@frozen
class Closing:
    """A close frame has come in full."""


@frozen
class TooBig:
    """A message is, or will be, larger than the bound: known from the header of its last frame.

    *before*: how many of the bytes just fed precede that frame.
    """

    before: int


@frozen
class Binary:
    """A binary message begins. *before*: how many of the bytes just fed precede its frame."""

    before: int


Event = Pong | Closing | TooBig | Binary


@define
class FrameScanner:
    """Feed it what a client sends, in pieces of any size.

    *max_message_bytes* bounds the sum of the payloads of a message's frames. *skip* bytes come before
    the first frame (the request head, where it passes the same way). Keeps at most 139 bytes. After
    the first violation it tells of `Closing` only.
    """

    max_message_bytes: int
    skip: int = 0
    violated: bool = field(default=False, init=False)
    frames: int = field(default=0, init=False)
    """Whose header has come, of all kinds."""
    _header: bytearray = field(factory=bytearray, init=False)
    _payload: bytearray | None = field(default=None, init=False)
    """A pong's payload as far as it has come."""
    _remaining: int = field(default=0, init=False)
    """Bytes of the frame's payload still to come."""
    _message: int = field(default=0, init=False)
    """Payload bytes of the message so far, by its headers."""
    _opcode: int = field(default=0, init=False)
    _mask: bytes = field(default=b"", init=False)

    def feed(self, data: bytes) -> list[Event]:
        """What is new with *data*, in order."""
        events: list[Event] = []
        at = min(self.skip, len(data))
        self.skip -= at
        while at < len(data):
            step = self._pass_payload if self._remaining else self._pass_header
            at = step(data, at, events)
        return events

    def _pass_payload(self, data: bytes, at: int, events: list[Event]) -> int:
        size = min(self._remaining, len(data) - at)
        if self._payload is not None:
            self._payload += data[at : at + size]
        self._remaining -= size
        if not self._remaining:
            self._end_frame(events)
        return at + size

    def _pass_header(self, data: bytes, at: int, events: list[Event]) -> int:
        """Take bytes of a frame's header; when it is complete, judge the frame."""
        start = at - len(self._header)
        while at < len(data):
            wanted = _header_size(self._header) - len(self._header)
            if wanted == 0:
                break
            self._header += data[at : at + wanted]
            at += min(wanted, len(data) - at)
        if len(self._header) == _header_size(self._header):
            self._begin_frame(max(start, 0), events)
        return at

    def _begin_frame(self, before: int, events: list[Event]) -> None:
        self.frames += 1
        header = self._header
        self._opcode = header[0] & 0x0F
        self._remaining = _payload_size(header)
        self._mask = bytes(header[-4:]) if header[1] & _MASKED else b""
        if self._opcode in (_CONTINUATION, _TEXT, _BINARY):
            self._count(before, final=bool(header[0] & _FIN), events=events)
        elif self._opcode == _PONG and self._remaining <= _MAX_CONTROL_PAYLOAD:
            self._payload = bytearray()
        self._header = bytearray()
        if not self._remaining:
            self._end_frame(events)

    def _count(self, before: int, *, final: bool, events: list[Event]) -> None:
        self._message = (self._message if self._opcode == _CONTINUATION else 0) + self._remaining
        violation: Event | None = None
        if self._opcode == _BINARY:
            violation = Binary(before)
        elif self._message > self.max_message_bytes:
            violation = TooBig(before)
        if violation is not None and not self.violated:
            self.violated = True
            events.append(violation)
        if final:
            self._message = 0

    def _end_frame(self, events: list[Event]) -> None:
        if self._opcode == _CLOSE:
            events.append(Closing())
        if self._payload is not None:
            if not self.violated:
                events.append(Pong(_unmask(self._payload, self._mask)))
            self._payload = None


def _header_size(header: bytearray) -> int:
    """The size of the header that begins with *header*, as far as it can be known: at least 2."""
    if len(header) < 2:
        return 2
    length = header[1] & 0x7F
    extended = {126: 2, 127: 8}.get(length, 0)
    return 2 + extended + (4 if header[1] & _MASKED else 0)


def _payload_size(header: bytearray) -> int:
    length = header[1] & 0x7F
    if length == 126:
        return int.from_bytes(header[2:4], "big")
    if length == 127:
        return int.from_bytes(header[2:10], "big")
    return length


def _unmask(payload: bytes | bytearray, mask: bytes) -> bytes:
    """As one large number: a loop over the bytes costs twenty times as much."""
    size = len(payload)
    if mask in (b"", b"\0\0\0\0"):
        return bytes(payload)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")
