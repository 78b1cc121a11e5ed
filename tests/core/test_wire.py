"""The bytes on the wire, read by parsers that we did not write."""

from __future__ import annotations

import json
from typing import Any

import pytest
from httpx_sse._decoders import SSEDecoder
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Ping, Pong, TextMessage

from mythos_trio.core import wire
from mythos_trio.core.errors import BAD_TOKEN, BUSY, DRAIN, FAULT, NO_PONG, REMOVED, REPLACED, TOO_MANY, Close
from mythos_trio.core.wire import SSE, WEBSOCKET, Message

TEXTS = st.text() | st.sampled_from(["\n", "\r\n", "\u2028", "data: x\n\n", "\x00"])


def frames(data: bytes) -> list[Any]:
    connection = Connection(ConnectionType.CLIENT)
    connection.receive_data(data)
    return list(connection.events())


def event(data: bytes) -> Any:
    """The one event in *data*, as an EventSource would hand it over."""
    decoder, events = SSEDecoder(), []
    assert data.endswith(b"\n\n")
    for line in data.decode().split("\n")[:-1]:
        decoded = decoder.decode(line)
        if decoded is not None:
            events.append(decoded)
    assert len(events) == 1
    return events[0]


@given(TEXTS, st.integers(1, 2**53 - 1))
def test_a_message_is_the_same_on_both_transports(text: str, seq: int) -> None:
    body = json.dumps({"id": "m1", "type": "line", "content": text}).encode()
    message = Message(seq, "m1", "@ann", body)
    expected = {"seq": seq, "id": "m1", "type": "line", "content": text}
    (frame,) = frames(WEBSOCKET.message(message, 3))
    assert isinstance(frame, TextMessage)
    assert frame.message_finished
    assert json.loads(frame.data) == expected
    sse = event(SSE.message(message, 3))
    assert (json.loads(sse.data), sse.id, sse.event) == (expected, f"3-{seq}", "message")


@given(TEXTS, st.integers(1, 1000))
def test_a_message_that_stands_for_others_says_so_on_both_transports(text: str, count: int) -> None:
    message = Message(8, "m1", "@ann", json.dumps({"id": "m1", "content": text, "replace_key": "hp"}).encode())
    expected = {"seq": 8, "replaces": count, "id": "m1", "content": text, "replace_key": "hp"}
    (frame,) = frames(WEBSOCKET.replacing(message, 3, count))
    assert json.loads(frame.data) == expected
    sse = event(SSE.replacing(message, 3, count))
    assert (json.loads(sse.data), sse.id, sse.event) == (expected, "3-8", "message")
    # What the others share is not touched.
    assert json.loads(event(SSE.message(message, 3)).data) == {n: v for n, v in expected.items() if n != "replaces"}


def test_a_message_is_encoded_once() -> None:
    message = Message(1, "m", "@ann", b'{"id":"m"}')
    assert WEBSOCKET.message(message, 1) is WEBSOCKET.message(message, 1)
    assert SSE.message(message, 1) is SSE.message(message, 1)


def test_a_settled_message_holds_its_body_alone_and_looks_the_same() -> None:
    message = Message(1, "a", "*", b'{"content":"' + b"x" * 1000 + b'"}')
    message.received_by("ann")
    frame, sse = message.websocket(), message.sse(1)
    message.settle()
    settled = weight(message)
    assert message.websocket() == frame
    assert message.sse(1) == sse
    assert weight(message) > settled + 2000
    assert message.receivers == 1, "they are counted on"


def weight(message: Message) -> int:
    """Of the bytes that it holds."""
    held = (getattr(message, name) for name in Message.__slots__)
    return sum(len(value) for value in held if isinstance(value, bytes))


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536, 200_000])
def test_frames_of_every_size(size: int) -> None:
    (frame,) = frames(wire.text_frame(b"x" * size))
    assert frame == TextMessage(data="x" * size, frame_finished=True, message_finished=True)


def test_the_ping_is_one_constant_frame() -> None:
    (ping,) = frames(wire.PING)
    assert ping == Ping(payload=wire.PING_PAYLOAD)


@given(st.text())
def test_a_close_reason_is_cut_between_characters(reason: str) -> None:
    try:
        reason.encode()
    except UnicodeEncodeError:
        return
    (close,) = frames(wire.close_frame(4000, reason))
    assert isinstance(close, CloseConnection)
    assert close.code == 4000
    assert reason.startswith(close.reason or "")
    assert len((close.reason or "").encode()) >= min(len(reason.encode()), 120)


def test_last_words_say_the_same_twice_on_a_websocket() -> None:
    words = WEBSOCKET.last_words(wire.disconnect(DRAIN, 700), DRAIN, 700)
    message, close = frames(words)
    assert json.loads(message.data) == {
        "type": "disconnect",
        "code": 4000,
        "reason": "the server is restarting",
        "reconnect": True,
        "retry_ms": 700,
    }
    assert (close.code, close.reason) == (4000, "the server is restarting")


def test_last_words_on_an_event_stream_say_when_to_come_back_to_browsers_too() -> None:
    sse = event(SSE.last_words(wire.disconnect(DRAIN, 700), DRAIN, 700))
    assert (json.loads(sse.data)["retry_ms"], sse.retry) == (700, 700)
    assert event(SSE.last_words(wire.disconnect(REPLACED), REPLACED)).retry is None


def test_a_control_message_has_an_id_only_if_it_has_a_place() -> None:
    assert event(SSE.control(wire.control("heartbeat", position="1-7"), "1-7")).id == "1-7"
    assert b"id:" not in SSE.control(wire.control("pong", id="p"))
    assert b"retry: 5\n" in wire.sse_event(b"{}", "1-7", 5)


def test_fields_that_are_none_are_left_out() -> None:
    assert wire.control("pong", id=None) == b'{"type":"pong"}'


@given(st.none() | st.text(), TEXTS)
def test_a_reply_is_an_object_whatever_is_in_it(id_: str | None, content: str) -> None:
    try:
        json.dumps([id_, content]).encode()
        str(id_).encode()
        content.encode()
    except UnicodeEncodeError:
        return
    reply = json.loads(wire.reply(id_, wire.answer_body(content), 1, 7))
    assert reply == {"type": "reply", "id": id_, "ok": True, "content": content, "position": "1-7"}


def test_an_error_reply_says_what_and_why() -> None:
    body = wire.error_body("validation_error", "no", {"field": "id"})
    assert json.loads(wire.reply("a", body, 1, 7)) == {
        "type": "reply",
        "id": "a",
        "ok": False,
        "error": {"error_type": "validation_error", "message": "no", "details": {"field": "id"}},
        "position": "1-7",
    }


@pytest.mark.parametrize("close", [DRAIN, BUSY, NO_PONG, FAULT])
def test_from_what_one_comes_back(close: Close) -> None:
    assert close.reconnect


@pytest.mark.parametrize("close", [BAD_TOKEN, REPLACED, REMOVED, TOO_MANY])
def test_from_what_one_does_not_come_back(close: Close) -> None:
    assert not close.reconnect


def test_frames_are_those_of_a_server() -> None:
    """They are unmasked (RFC 6455, section 5.1): another server refuses them."""
    server = Connection(ConnectionType.SERVER)
    server.receive_data(wire.text_frame(b"{}"))
    (refused,) = list(server.events())
    assert isinstance(refused, CloseConnection)
    assert refused.code == 1002


def test_what_follows_one_another_is_joined_once_for_all_that_are_sent_the_same() -> None:
    one, two, three = (Message(seq, str(seq), "*", b'{"id":"%d"}' % seq) for seq in (1, 2, 3))
    for framing in (WEBSOCKET, SSE):
        both = framing.messages([one, two], 1)
        assert both == framing.message(one, 1) + framing.message(two, 1)
        assert framing.messages([one, two], 1) is both
        assert framing.messages([one, three], 1) == framing.message(one, 1) + framing.message(three, 1)
        assert framing.messages([two], 1) == framing.message(two, 1)
    assert one.websocket() is one.websocket()


def test_a_pong_frame_has_the_payload_of_the_ping() -> None:
    connection = Connection(ConnectionType.CLIENT)
    connection.receive_data(wire.pong_frame(b"payload"))
    (pong,) = connection.events()
    assert isinstance(pong, Pong)
    assert bytes(pong.payload) == b"payload"
