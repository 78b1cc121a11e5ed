"""What clients say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.errors import ErrorType
from mythos_trio.core.position import Position
from mythos_trio.core.requests import (
    Ack,
    Auth,
    ClientRequest,
    Command,
    Ping,
    Wrong,
    command_said,
    parse_frame,
    parse_payload,
)


def parse(value: Any) -> Any:
    return parse_frame(json.dumps(value))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "command", "id": "a", "content": "look"}, Command("a", "look")),
        ({"type": "command", "content": None}, Command(None, None)),
        ({"type": "subscribe", "id": "a", "channel": "room:inn"}, Command("a", "room:inn", "subscribe")),
        ({"type": "unsubscribe", "channel": "room:inn"}, Command(None, "room:inn", "unsubscribe")),
        ({"type": "ack", "position": "3-17"}, Ack(Position(3, 17))),
        ({"type": "ping", "id": "p"}, Ping("p")),
        ({"type": "ping"}, Ping(None)),
        ({"type": "auth", "token": "t"}, Auth("t")),
    ],
)
def test_what_is_understood(value: Any, expected: Any) -> None:
    assert parse(value) == expected


@pytest.mark.parametrize("line", ["look", "7", "null", "true", "say {hello}", "  go west  ", "grüße"])
def test_a_plain_line_is_a_command_of_that_text(line: str) -> None:
    assert parse_frame(line) == Command(None, line.strip())


@pytest.mark.parametrize(
    ("text", "id_"),
    [
        ("", None),
        (" \t ", None),
        ("a\nb", None),
        ("{", None),
        ("[]", None),
        ('"look"', None),
        ("{}", None),
        ('{"type":"fly","id":"a"}', "a"),
        ('{"type":["command"],"id":"a"}', "a"),
        ('{"type":"command","id":"a"}', "a"),
        ('{"type":"command","id":"a","content":1,"extra":1}', "a"),
        ('{"type":"command","id":1,"content":1}', None),
        ('{"type":"command","id":null,"extra":1,"content":1}', None),
        ('{"type":"ack","id":"a","position":"x"}', "a"),
        ('{"type":"ack","id":"a"}', "a"),
        ('{"type":"subscribe","id":"a","channel":""}', "a"),
        ('{"type":"auth","id":"a","token":1}', "a"),
    ],
)
def test_what_is_wrong_is_said_with_the_id_that_could_be_read(text: str, id_: str | None) -> None:
    wrong = parse_frame(text)
    assert isinstance(wrong, Wrong)
    assert wrong.id == id_
    assert wrong.refusal.error_type is ErrorType.VALIDATION
    assert wrong.refusal.message


@given(st.text())
def test_no_text_raises(text: str) -> None:
    parse_frame(text)


jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["type", "id", "content", "position", "channel", "token", "x"]), jsons))
def test_no_object_raises(value: dict[str, Any]) -> None:
    parse_frame(json.dumps(value))


@given(jsons)
def test_a_command_is_the_same_however_it_is_written(content: Any) -> None:
    text = json.dumps(content, allow_nan=False) if "Infinity" not in json.dumps(content) else None
    if text is None:
        return
    again = json.loads(text)
    if isinstance(again, dict):
        again = dict(reversed(again.items()))
    assert command_said(Command("a", content)) == command_said(Command("b", again))


def test_other_commands_are_told_apart() -> None:
    said = {
        command_said(command)
        for command in (
            Command("a", "inn"),
            Command("a", "inn", "subscribe"),
            Command("a", "inn", "unsubscribe"),
            Command("a", ["inn"]),
            Command("a", 1),
            Command("a", True),
            Command("a", "1"),
            Command("a", None),
        )
    }
    assert len(said) == 8


# As clients write, with small mistakes in all places.
_IDS = st.sampled_from(["c1", "", "x" * 128, "x" * 129, "a\nb", None, 7, "\u00e9"])
_VALUES = st.one_of(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["command", "ack", "ping", "subscribe", "other", 1])},
        optional={
            "id": _IDS,
            "content": st.recursive(st.none() | st.text() | st.integers(), st.lists),
            "extra": st.none(),
        },
    ),
    st.text(),
)


@given(_VALUES)
def test_a_payload_is_read_as_its_text(value: Any) -> None:
    payload = value.encode() if isinstance(value, str) else json.dumps(value, ensure_ascii=False).encode()
    assert show(parse_payload(payload)) == show(parse_frame(payload.decode()))


@pytest.mark.parametrize(
    "payload",
    [
        b'{"type":"command","content":%b1%b}' % (b"[" * 70, b"]" * 70),
        b'{"type":"command","content":"%b"}' % (b"{" * 70),
        b'{"type":"command","content":"\\ud800"}',
        b'{"type":"command","content":1,"content":2}',
        b'{"type":"ping","type":"command","content":1}',
        b'{"type":"command","type":"ping","content":1}',
        b'{"type":"command","content":1e999}',
        b' {"content":1,"type":"command"} ',
        b'{"type":"command","content":1}{',
    ],
)
def test_an_odd_payload_is_read_as_its_text(payload: bytes) -> None:
    assert show(parse_payload(payload)) == show(parse_frame(payload.decode()))


def test_a_payload_that_is_not_utf_8() -> None:
    with pytest.raises(UnicodeDecodeError):
        parse_payload(b'{"type":"command","content":"\xff"}')


def show(request: ClientRequest) -> Any:
    """*request* so that refusals can be compared."""
    if isinstance(request, Wrong):
        refusal = request.refusal
        return request.id, refusal.error_type, refusal.message, refusal.details
    return request
