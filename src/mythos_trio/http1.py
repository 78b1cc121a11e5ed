"""HTTP/1.1 as the front door speaks it: request heads, bodies, answers.

h11 parses, so the front door is as strict as h11, and stricter where two readers of the same bytes
could disagree (two lengths, a length and chunks, folded lines). A head of the plain kind that nearly all clients
send is known by one expression (`_PLAIN`) and needs no h11, which takes ten times as long. Hypercorn, which gets
the heads that the front door does not answer itself, uses h11 too.
"""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit

import h11
import msgspec
import trio
from attrs import define, field

from mythos_trio.core.errors import Close, ErrorType, Refusal
from mythos_trio.link import Link
from mythos_trio.seams import rfc3339

MAX_HEAD: Final = 16 * 1024
MAX_HEADERS: Final = 100
MAX_QUERY_FIELDS: Final = 100
REMEMBERED_HEADS: Final = 16
REMEMBERED_LENGTHS: Final = 8
JSON: Final = "application/json"
Headers = Iterable[tuple[str, str]]

# The end of a head, as h11 finds it.
_END: Final = re.compile(rb"\n\r?\n")
_FOLDED: Final = re.compile(rb"\n[ \t]")
_LENGTHS: Final = re.compile(rb"(?im)^content-length:(.*)$")
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SIMPLE_TARGET: Final = re.compile(r"/[A-Za-z0-9/._~:@-]*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
# A head that h11 would read as it stands: printable ASCII, a space at most behind the colon, nothing empty or folded.
_PLAIN: Final = re.compile(
    rb"([A-Z]{3,7}) (/[!-~]*) HTTP/1\.1\r\n"
    rb"((?:[A-Za-z0-9_-]+: ?[!-~](?:[ -~]*[!-~])?\r\n)+)\r\n"
)
_PLAIN_HEADER: Final = re.compile(r"([^:]+): ?([^\r]+)\r\n")
_MAX_DIGITS: Final = 15
_DIGITS: Final = re.compile(rf"[0-9]{{1,{_MAX_DIGITS}}}")
_LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length: ?([0-9]+)\r\n")
_OF_ONE_REQUEST: Final = ("expect", "idempotency-key")
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
# What a chunked body may be longer than its content, in all: tiny chunks are work for nothing.
_CHUNK_OVERHEAD: Final = 16 * 1024
_CHUNKED_RECEIVE: Final = 4 * 1024


class HttpRefusal(Refusal):
    """A refusal whose answer has headers of its own (``Allow``, ``Upgrade`` …)."""

    def __init__(self, status: int, message: str, *, headers: tuple[tuple[str, str], ...] = (), **details: Any) -> None:
        super().__init__(ErrorType.VALIDATION, message, status=status, details=details)
        self.headers = headers


@define  # not frozen: made for each connection, and to set a field would take three times as long
class Head:
    """The head of a request."""

    method: str
    target: str
    """As it was sent."""
    path: str
    """Percent-decoded; begins with ``/``, or is ``*`` (only with OPTIONS)."""
    query: Mapping[str, str]
    """Decoded; of equal names the last, blank values kept."""
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, values as Latin-1, in the order they came."""
    version: str
    """``1.0`` or ``1.1``."""
    raw: bytes
    """The exact bytes, to the empty line and with it."""
    _values: Mapping[str, str] = field(repr=False, eq=False)

    def header(self, name: str) -> str | None:
        """The value of the header *name* (in lower case); several are joined by ``", "``."""
        return self._values.get(name)

    def tokens(self, name: str) -> frozenset[str]:
        """The words of a header that is a list of words, in lower case."""
        return frozenset(word.strip().lower() for word in self._values.get(name, "").split(",")) - {""}

    @property
    def keep_alive(self) -> bool:
        """Whether the client will send another request on the same connection."""
        if self.version != "1.1":
            return False
        return "connection" not in self._values or "close" not in self.tokens("connection")

    @property
    def chunked(self) -> bool:
        return "transfer-encoding" in self._values

    @property
    def content_length(self) -> int | None:
        """The length that the head names; None if it names none."""
        value = self._values.get("content-length")
        return None if value is None else int(value)

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.content_length)

    @property
    def origin_raw(self) -> bytes:
        """`raw`, but with an absolute target (``http://host/path``) made a path."""
        if self.target.startswith(("/", "*")):
            return self.raw
        target, origin = self.target.encode(), _origin(self.target).encode()
        return self.raw.replace(b" " + target + b" ", b" " + origin + b" ", 1)


async def read_head(
    link: Link, *, limit: int = MAX_HEAD, timeout: float, begun: bytes = b"", since: float | None = None
) -> Head | None:
    """Read a request's head, leaving what follows it to be received.

    *begun* has been received already. *timeout* seconds for the rest, or from *since* on. None: nothing came, or the
    end. Refusal: with the status to be answered.
    """
    end = _find_end(begun, limit)
    if end is not None:  # as nearly always: it comes in one piece
        link.push_back(begun[end:])
        return parse_head(begun[:end])
    data = bytearray(begun)
    with trio.move_on_at((trio.current_time() if since is None else since) + timeout) as scope:
        while (end := _find_end(data, limit)) is None:
            more = await link.receive_some(limit)
            if not more and not data:
                return None
            if not more:
                raise HttpRefusal(400, "the request head is incomplete")
            data += more
    if scope.cancelled_caught:
        if not data:
            return None
        raise HttpRefusal(408, f"the request head took longer than {timeout:g} seconds")
    link.push_back(bytes(data[end:]))
    return parse_head(bytes(data[:end]))


def plain_head(data: bytes) -> tuple[Head, bytes] | None:
    """The head that *data* begins with, if it is here whole and of the plain kind, and what stands behind it. May
    raise a refusal, as `parse_head`."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return None
    head = _parse_plain(data[:end])
    return None if head is None else (head, data[end:])


def _find_end(data: bytes | bytearray, limit: int) -> int | None:
    """Where the head ends, None if that has not come yet. Refusal if it never will."""
    if not data:
        return None
    if data[0] <= 0x20:  # TLS to a plain port begins with 0x16; h11 has the same rule
        raise HttpRefusal(400, "this is not an HTTP request")
    match = _END.search(data)
    if match is not None and match.end() <= limit:
        return match.end()
    if match is None and len(data) <= limit:
        return None
    if b"\n" not in data[:limit]:
        raise HttpRefusal(414, f"the request line is longer than {limit} bytes")
    raise HttpRefusal(431, f"the request head is longer than {limit} bytes")


def parse_head(raw: bytes) -> Head:
    """Parse a complete head. Refusal: 400, 431, 501, 505."""
    return _parse_plain(raw) or _parse_strictly(raw)


def _parse_plain(raw: bytes) -> Head | None:
    """*raw* parsed, if it is a head of the plain kind, without anything that has to be judged."""
    match = _PLAIN.fullmatch(raw)
    if match is None:
        return None
    headers = tuple([(name.lower(), value) for name, value in _PLAIN_HEADER.findall(match[3].decode("ascii"))])
    values = _by_name(headers)
    length = values.get("content-length")
    host = values.get("host")
    if (
        host is None
        or "," in host  # there are two of them, or it is no host
        or (length is not None and not _DIGITS.fullmatch(length))
        or "transfer-encoding" in values
        or len(headers) > MAX_HEADERS
    ):
        return None
    method, target = match[1].decode(), match[2].decode()
    path, query = _parse_target(method, target, host)
    return Head(method, target, path, query, headers, "1.1", raw, values)


def _by_name(headers: Sequence[tuple[str, str]]) -> dict[str, str]:
    values = dict(headers)
    if len(values) < len(headers):
        values.clear()
        for name, value in headers:
            values[name] = f"{values[name]}, {value}" if name in values else value
    return values


class Repeated:
    """A head that has come once, and may come again with nothing changed but the length of the body.

    Of a plain head nothing else depends on that number: so bytes that are equal mean the same, and need not be read.
    """

    __slots__ = ("_after", "_before", "_of_length", "head")

    def __init__(self, head: Head, before: bytes, after: bytes) -> None:
        self.head = head
        self._before = before
        self._after = after
        self._of_length: dict[int, bytes] = {}
        """By the length of a whole request: the head that it had. A publisher's requests have few lengths."""

    @classmethod
    def of(cls, head: Head) -> Repeated | None:
        """None: *head* is not of the plain kind, or says something about its request alone."""
        if any(head.header(name) is not None for name in _OF_ONE_REQUEST) or not _PLAIN.fullmatch(head.raw):
            return None
        length = _LENGTH.search(head.raw)
        if length is None or len(head.raw) > MAX_HEAD - _MAX_DIGITS:
            return None
        return cls(head, head.raw[: length.start(1)], head.raw[length.end(1) :])

    def body(self, data: bytes) -> bytes | None:
        """The body, if *data* is this head and a whole body, and nothing else."""
        known = self._of_length.get(len(data))
        if known is not None and data.startswith(known):
            return data[len(known) :]
        body = self._find_body(data)
        if body is not None and len(self._of_length) < REMEMBERED_LENGTHS:
            self._of_length[len(data)] = data[: len(data) - len(body)]
        return body

    def _find_body(self, data: bytes) -> bytes | None:
        if not data.startswith(self._before):
            return None
        at = len(self._before)
        end = data.find(b"\r", at, at + _MAX_DIGITS + 1)
        digits = data[at:end]
        if end < 0 or not digits.isdigit() or not data.startswith(self._after, end):
            return None
        start = end + len(self._after)
        return data[start:] if len(data) - start == int(digits) else None


def _parse_strictly(raw: bytes) -> Head:
    if _FOLDED.search(raw):
        raise HttpRefusal(400, "a header line begins with white space")
    lengths = _LENGTHS.findall(raw)
    if len(lengths) > 1 or b"," in b"".join(lengths):
        raise HttpRefusal(400, "more than one Content-Length")
    request = _parse(raw)
    version = request.http_version.decode()
    if version not in ("1.0", "1.1"):
        raise HttpRefusal(505, f"HTTP/{version} is not spoken here; HTTP/1.1 is")
    if len(request.headers) > MAX_HEADERS:
        raise HttpRefusal(431, f"more than {MAX_HEADERS} headers")
    headers = tuple((name.decode(), value.decode("latin-1")) for name, value in request.headers)
    values = _by_name(headers)
    if "transfer-encoding" in values and ("content-length" in values or version == "1.0"):
        raise HttpRefusal(400, "Transfer-Encoding with a Content-Length, or in HTTP/1.0")
    method, target = request.method.decode(), request.target.decode()
    path, query = _parse_target(method, target, values.get("host", ""))
    return Head(method, target, path, query, headers, version, raw, values)


def _parse(raw: bytes) -> h11.Request:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(raw) + 1)
    connection.receive_data(raw)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        # What stands after the colon repeats what the client sent, tokens too.
        raise HttpRefusal(error.error_status_hint, str(error).partition(":")[0]) from error
    if not isinstance(event, h11.Request):
        raise HttpRefusal(400, "this is not an HTTP request")
    return event


def _parse_target(method: str, target: str, host: str) -> tuple[str, dict[str, str]]:
    """The decoded path and query of a target in any of its forms (RFC 9112, section 3.2)."""
    if _SIMPLE_TARGET.fullmatch(target):
        return target, {}
    if target == "*" and method == "OPTIONS":
        return "*", {}
    if "#" in target or _BAD_PERCENT.search(target):
        raise HttpRefusal(400, "the request target has a fragment or bad percent-encoding")
    if not target.startswith("/"):
        _check_authority(target, host)
    path, _, query = _origin(target).partition("?")
    try:
        decoded = unquote_to_bytes(path).decode()
        fields = dict(parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS))
    except ValueError as error:
        raise HttpRefusal(400, "the request target is not UTF-8, or has too many fields") from error
    if _CONTROL.search(decoded) or any("\0" in text for pair in fields.items() for text in pair):
        raise HttpRefusal(400, "the request target has control characters")
    return decoded, fields


def _check_authority(target: str, host: str) -> None:
    """An absolute target must name the host that the Host header names: rules look at that one."""
    try:
        parts = urlsplit(target)
    except ValueError as error:
        raise HttpRefusal(400, "the request target is not a URL") from error
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise HttpRefusal(400, "the request target is neither a path nor an http URL")
    if parts.netloc.lower() != host.lower():
        raise HttpRefusal(400, "the request target and the Host header name different hosts")


def _origin(target: str) -> str:
    """*target* as path and query."""
    if target.startswith("/"):
        return target
    authority = target.partition("://")[2]
    rest = re.search(r"[/?].*", authority)
    origin = rest.group() if rest else "/"
    return origin if origin.startswith("/") else "/" + origin


# Bodies.


async def read_body(link: Link, head: Head, *, limit: int, timeout: float) -> bytes:
    """The body of the request: at most *limit* bytes, within *timeout* seconds.

    Refusal: 400, 408, 411, 413, 417. After it the connection cannot carry another request.
    """
    if not head.chunked and head.content_length is None:
        raise HttpRefusal(411, "Content-Length is missing")
    if (head.content_length or 0) > limit:
        raise _too_big(limit)
    _check_expect(head)
    if head.content_length is not None and (whole := link.take(head.content_length)) is not None:
        return whole
    body = b""
    with trio.move_on_after(timeout) as scope:
        if head.header("expect") and head.version == "1.1" and not link.unread():
            await link.send_all(_CONTINUE)
        body = await (_read_chunked(link, head, limit) if head.chunked else _read_length(link, head))
    if scope.cancelled_caught:
        raise HttpRefusal(408, f"the request body took longer than {timeout:g} seconds")
    return body


def _check_expect(head: Head) -> None:
    expect = head.header("expect")
    if expect is not None and head.version == "1.1" and expect.lower() != "100-continue":
        raise HttpRefusal(417, "Expect can only be 100-continue")


def _too_big(limit: int) -> HttpRefusal:
    return HttpRefusal(413, f"the request body is larger than {limit} bytes", limit=limit)


async def _read_length(link: Link, head: Head) -> bytes:
    length = head.content_length or 0
    body = bytearray()
    while len(body) < length:
        data = await link.receive_some(min(length - len(body), 65536))
        if not data:
            raise HttpRefusal(400, "the request body is shorter than its Content-Length")
        body += data
    return bytes(body)


async def _read_chunked(link: Link, head: Head, limit: int) -> bytes:
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    parser.receive_data(head.raw)
    parser.next_event()
    body = bytearray()
    received, most = 0, limit + limit // 4 + _CHUNK_OVERHEAD
    while True:
        try:
            event = parser.next_event()
        except h11.RemoteProtocolError as error:
            raise HttpRefusal(400, str(error).partition(":")[0]) from error
        if isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            break
        else:
            data = await link.receive_some(_CHUNKED_RECEIVE)
            received += len(data)
            parser.receive_data(data)
        if len(body) > limit or received > most:
            raise _too_big(limit)
    link.push_back(parser.trailing_data[0])
    return bytes(body)


# Answers.


class _Date:
    """The Date header, formatted once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def now(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second, self._text = second, email.utils.formatdate(second, usegmt=True)
        return self._text


_DATE: Final = _Date()
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}


def response(
    status: int,
    body: bytes,
    *,
    content_type: str | None = JSON,
    headers: Headers = (),
    keep_alive: bool,
    server_id: str,
    head_only: bool = False,
) -> bytes:
    """A complete answer. *head_only*: as to HEAD, without the body that it announces. 204 has no body."""
    head = _head(_DATE.now(), status, content_type, tuple(headers), keep_alive, server_id)
    if status == 204:
        return head + b"\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) if head_only else finish(head, body)


def begin(status: int, *, headers: tuple[tuple[str, str], ...], keep_alive: bool, server_id: str) -> bytes:
    """What answers of one moment, with JSON in them, begin with: `finish` makes each of it."""
    return _head(_DATE.now(), status, JSON, headers, keep_alive, server_id)


def finish(begin: bytes, body: bytes) -> bytes:
    return b"%bContent-Length: %d\r\n\r\n%b" % (begin, len(body), body)


@lru_cache(REMEMBERED_HEADS)
def _head(
    date: str,
    status: int,
    content_type: str | None,
    headers: tuple[tuple[str, str], ...],
    keep_alive: bool,
    server_id: str,
) -> bytes:
    """The lines of an answer's head, but for the length and the empty line: within a second nearly all are the same."""
    lines = [f"HTTP/1.1 {status} {_PHRASES.get(status, '')}", f"Date: {date}", f"Server-Id: {server_id}"]
    if status != 204:
        lines.append(f"Content-Type: {content_type}")
    others = [f"{name}: {value}" for name, value in headers]
    if not keep_alive and not any(line.startswith("Connection: ") for line in others):
        lines.append("Connection: close")
    lines += others
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header with a line break")
    return ("\r\n".join(lines) + "\r\n").encode("latin-1")


def error_body(error_type: ErrorType, message: str, details: Mapping[str, Any], now: float) -> bytes:
    """The error format of all planes. *now*: POSIX seconds."""
    return msgspec.json.encode(
        {
            "error": True,
            "error_type": error_type.value,
            "message": message,
            "details": details,
            "timestamp": rfc3339(now),
        }
    )


def refusal_headers(refusal: Refusal) -> list[tuple[str, str]]:
    """The headers that belong to *refusal*, whoever answers it."""
    headers = list(refusal.headers) if isinstance(refusal, HttpRefusal) else []
    if refusal.retry_ms is not None:
        headers.append(("Retry-After", str(math.ceil(refusal.retry_ms / 1000))))
    return headers


def refused(
    refusal: Refusal,
    *,
    now: float,
    server_id: str,
    headers: Headers = (),
    keep_alive: bool = False,
    head_only: bool = False,
) -> bytes:
    """The complete answer that says *refusal*."""
    return response(
        refusal.status,
        error_body(refusal.error_type, refusal.message, refusal.details, now),
        headers=[*refusal_headers(refusal), *headers],
        keep_alive=keep_alive,
        server_id=server_id,
        head_only=head_only,
    )


async def refuse(
    link: Link,
    refusal: Refusal,
    *,
    now: float,
    server_id: str,
    headers: Headers = (),
    head_only: bool = False,
) -> None:
    """Answer with *refusal*, let the client take it though it may still be sending, and close."""
    answer = refused(refusal, now=now, server_id=server_id, headers=headers, head_only=head_only)
    link.last_words(answer, Close(1000, refusal.message, refusal.error_type))
    await link.linger()
