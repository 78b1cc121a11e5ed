from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol, Opcode

from mythos_trio.core import frames
from mythos_trio.core.frames import (
    Binary,
    Closing,
    Event,
    FrameScanner,
    Pong,
    TooBig,
    Unusual,
    closing_words,
    take_frame,
)

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bytes = b"\x01\x02\x03\x04") -> bytes:
    """A masked frame as a client sends it (RFC 6455, section 5.2), written independently."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    masked = bytes(payload[i] ^ mask[i % 4] for i in range(size))
    return bytes([(0x80 if fin else 0) | opcode]) + length + mask + masked


def scan(data: bytes, limit: int = 1000, *, pieces: int | None = None, skip: int = 0) -> list[Event]:
    scanner = FrameScanner(limit, skip)
    step = pieces or max(1, len(data))
    return [event for at in range(0, len(data), step) for event in scanner.feed(data[at : at + step])]


def test_plain_messages_are_nothing_to_tell() -> None:
    assert scan(frame(TEXT, b"hello") + frame(PING, b"?") + frame(TEXT) + frame(TEXT, bytes(1000))) == []


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, None])
def test_a_pong_is_told_unmasked(pieces: int | None) -> None:
    data = frame(TEXT, b"before") + frame(PONG, b"payload") + frame(PONG) + frame(TEXT, b"after")
    assert scan(data, pieces=pieces) == [Pong(b"payload"), Pong(b"")]


def test_a_pong_between_fragments() -> None:
    data = frame(TEXT, bytes(500), fin=False) + frame(PONG, b"x") + frame(CONTINUATION, bytes(500))
    assert scan(data) == [Pong(b"x")]


@pytest.mark.parametrize("size", [125, 126, 127, 65535, 65536, 70000])
def test_a_message_may_be_as_long_as_the_bound(size: int) -> None:
    assert scan(frame(TEXT, bytes(size)), limit=size) == []
    assert scan(frame(TEXT, bytes(size)), limit=size - 1) == [TooBig(0)]


def test_too_big_is_known_from_the_header() -> None:
    assert scan(frame(TEXT, bytes(100_000))[:14], limit=65536) == [TooBig(0)]
    assert scan(bytes([0x81, 0xFF]) + (2**62).to_bytes(8, "big") + bytes(4), limit=65536) == [TooBig(0)]


def test_fragments_count_together_and_messages_apart() -> None:
    first, second = frame(TEXT, bytes(600), fin=False), frame(CONTINUATION, bytes(600))
    assert scan(first + second) == [TooBig(len(first))]
    assert scan(frame(TEXT, bytes(600)) + frame(TEXT, bytes(600))) == []


def test_what_precedes_the_violating_frame() -> None:
    fine = frame(TEXT, b"fine")
    assert scan(fine + frame(BINARY, b"x") + fine) == [Binary(len(fine))]


def test_a_frame_whose_header_began_earlier_is_preceded_by_nothing() -> None:
    scanner = FrameScanner(10)
    bad = frame(TEXT, bytes(1000))
    assert scanner.feed(bad[:3]) == []
    assert scanner.feed(bad[3:]) == [TooBig(0)]


def test_the_first_violation_is_the_last_but_the_close_is_still_seen() -> None:
    data = frame(BINARY, bytes(50)) + frame(TEXT, bytes(5000)) + frame(PONG, b"x") + frame(CLOSE, b"\x03\xe8")
    scanner = FrameScanner(1000)
    assert scanner.feed(data) == [Binary(0), Closing()]
    assert scanner.violated


def test_a_binary_message_that_is_too_big_is_binary() -> None:
    assert scan(frame(BINARY, bytes(5000))) == [Binary(0)]


def test_close_is_told_when_it_has_come_in_full() -> None:
    scanner = FrameScanner(1000)
    data = frame(CLOSE, b"\x03\xe8bye")
    assert scanner.feed(data[:-1]) == []
    assert scanner.feed(data[-1:]) == [Closing()]


def test_bytes_before_the_first_frame_are_skipped() -> None:
    head = b"GET /ws/alice HTTP/1.1\r\n\r\n"
    for pieces in (1, 5, None):
        assert scan(head + frame(PONG, b"x"), skip=len(head), pieces=pieces) == [Pong(b"x")]


def test_malformed_control_frames_are_left_to_the_parser() -> None:
    too_long = bytes([0x80 | PONG, 0xFE]) + (5000).to_bytes(2, "big") + bytes(4) + bytes(5000)
    assert scan(too_long + frame(PONG, b"x")) == [Pong(b"x")]


def test_an_unmasked_pong() -> None:
    assert scan(b"\x8a\x02hi") == [Pong(b"hi")]


@given(
    st.lists(st.tuples(st.sampled_from([TEXT, PING, PONG, CLOSE]), st.binary(max_size=125), st.booleans())),
    st.integers(1, 50),
)
def test_pieces_make_no_difference(frames: list[tuple[int, bytes, bool]], pieces: int) -> None:
    data = b"".join(frame(opcode, payload, fin=fin or opcode >= 8) for opcode, payload, fin in frames)
    assert scan(data, pieces=pieces) == scan(data)
    expected = [payload for opcode, payload, _ in frames if opcode == PONG]
    assert [event.payload for event in scan(data) if isinstance(event, Pong)] == expected


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_taken_with_bounded_memory(data: bytes, pieces: int) -> None:
    scanner = FrameScanner(100)
    for at in range(0, len(data), pieces):
        scanner.feed(data[at : at + pieces])
        assert len(scanner._header) <= 14
        assert scanner._payload is None or len(scanner._payload) <= 125


# Frames that are taken whole.

MOST = 300


@given(
    st.lists(st.tuples(st.sampled_from([TEXT, PING, PONG]), st.text(max_size=60)), max_size=6),
    st.binary(min_size=4, max_size=4),
    st.integers(1, 200),
)
def test_what_is_taken_is_what_wsproto_reads(said: list[tuple[int, str]], mask: bytes, piece: int) -> None:
    whole = b"".join(frame(opcode, text.encode()[:125], mask=mask) for opcode, text in said)
    taken, data, at = [], b"", 0
    for begin in range(0, len(whole), piece):
        data += whole[begin : begin + piece]
        while (one := take_frame(data, at, MOST)) is not None:
            taken.append((one[0], one[1]))
            at = one[2]
    reader = FrameProtocol(client=False, extensions=[])
    kinds = {Opcode.TEXT: frames.TEXT, Opcode.PING: frames.PING, Opcode.PONG: frames.PONG}
    expected = []
    for opcode, text in said:  # one by one: wsproto refuses text that was cut within a character
        payload = text.encode()[:125]
        if opcode == TEXT and payload.decode(errors="ignore").encode() != payload:
            expected.append((frames.TEXT, payload))
            continue
        reader.receive_bytes(frame(opcode, payload, mask=mask))
        for event in reader.received_frames():
            assert not isinstance(event.payload, tuple)  # only a close frame's is
            content = event.payload.encode() if isinstance(event.payload, str) else bytes(event.payload)
            expected.append((kinds[event.opcode], content))
    assert taken == expected
    assert at == len(whole)


def test_a_frame_that_is_not_whole_is_waited_for() -> None:
    for text in (b"", b"short", b"x" * 126, b"x" * MOST):
        data = frame(TEXT, text)
        assert [take_frame(data[:size], 0, MOST) for size in range(len(data))] == [None] * len(data)
        assert take_frame(data + b"\x81", 0, MOST) == (frames.TEXT, text, len(data))


@pytest.mark.parametrize(
    "data",
    [
        frame(TEXT, b"a part", fin=False),
        frame(CONTINUATION, b"the rest"),
        frame(BINARY, b"bytes"),
        frame(3, b"reserved"),
        b"\xc1" + frame(TEXT, b"compressed")[1:],
        frame(TEXT, bytes(MOST + 1)),
        frame(TEXT, bytes(70_000)),
        frame(PING, bytes(126)),
        frame(CLOSE, fin=False),
        b"\x81\x02hi",  # without a mask
        b"\x81\xfe\x00\x05maskhello",  # a length in more bytes than it needs
    ],
)
def test_what_is_not_ordinary_is_not_taken(data: bytes) -> None:
    with pytest.raises(Unusual):
        take_frame(data, 0, MOST)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", (1005, "")),
        (b"\x03\xe8", (1000, "")),
        (b"\x03\xe9bye", (1001, "bye")),
        (b"\x0f\xa0", (4000, "")),
        ("\u00e9".encode().join([b"\x03\xf4", b""]), (1012, "é")),
    ],
)
def test_closing_words(payload: bytes, words: tuple[int, str]) -> None:
    assert closing_words(payload) == words


@pytest.mark.parametrize(
    "payload", [b"\x03", b"\x00\x00", b"\x03\xed", b"\x03\xee", b"\x03\xf7", b"\x13\x88", b"\x03\xe8\xff"]
)
def test_malformed_closing_words(payload: bytes) -> None:
    with pytest.raises(Unusual):
        closing_words(payload)


@pytest.mark.parametrize("pieces", [1, 5, None])
def test_all_frames_are_counted(pieces: int | None) -> None:
    data = frame(TEXT, b"a", fin=False) + frame(PING, b"?") + frame(CONTINUATION) + frame(PONG) + frame(CLOSE)
    scanner = FrameScanner(1000, skip=3)
    for at in range(0, len(data) + 3, pieces or 1000):
        scanner.feed((b"xyz" + data)[at : at + (pieces or 1000)])
    assert scanner.frames == 5
