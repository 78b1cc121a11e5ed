"""What publishers may say, and the bytes that are stored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.errors import ErrorType, Refusal
from mythos_trio.core.messages import (
    MAX_DEPTH,
    RESERVED_TYPES,
    check_message,
    decode_json,
    make_body,
    parse_plain,
    plain_body,
)

LIMIT = 65536

jsons = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


def refusal(message: object, max_bytes: int = LIMIT) -> Refusal:
    with pytest.raises(Refusal) as caught:
        check_message(message, max_bytes)
    assert caught.value.error_type is ErrorType.VALIDATION
    return caught.value


def undecodable(data: bytes | str) -> str:
    with pytest.raises(Refusal) as caught:
        decode_json(data)
    assert caught.value.status == 400
    assert caught.value.error_type is ErrorType.VALIDATION
    return caught.value.message


# check_message


def test_all_other_fields_are_kept() -> None:
    message = check_message({"type": "say", "content": "hi", "id": "m1", "room": "tavern", "replace_key": "k"}, LIMIT)
    assert message.id == "m1"
    assert message.said == {"type": "say", "content": "hi", "room": "tavern", "replace_key": "k"}


def test_the_id_is_optional_and_the_publishers_timestamp_is_dropped() -> None:
    message = check_message({"type": "say", "content": None, "timestamp": "yesterday"}, LIMIT)
    assert message.id is None
    assert message.said == {"type": "say", "content": None}


@pytest.mark.parametrize("length", [1, 64])
def test_a_type_has_1_to_64_characters(length: int) -> None:
    assert check_message({"type": "é" * length, "content": ""}, LIMIT).said["type"] == "é" * length


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ([], "message"),
        ("hi", "message"),
        (None, "message"),
        ({"content": "hi"}, "type"),
        ({"type": "", "content": "hi"}, "type"),
        ({"type": "x" * 65, "content": "hi"}, "type"),
        ({"type": 1, "content": "hi"}, "type"),
        ({"type": None, "content": "hi"}, "type"),
        ({"type": "say"}, "content"),
        ({"type": "say", "content": "hi", "seq": 1}, "seq"),
        ({"type": "say", "content": "hi", "epoch": None}, "epoch"),
        ({"type": "say", "content": "hi", "replaces": 2}, "replaces"),
        ({"type": "say", "content": "hi", "id": ""}, "id"),
        ({"type": "say", "content": "hi", "id": 7}, "id"),
        ({"type": "say", "content": "hi", "id": None}, "id"),
        ({"type": "say", "content": "hi", "id": "x" * 129}, "id"),
        ({"type": "say", "content": "hi", "id": "a\nb"}, "id"),
        ({"type": "say", "content": "hi", "replace_key": 1}, "replace_key"),
        ({"type": "say", "content": "hi", "replace_key": ""}, "replace_key"),
    ],
)
def test_a_bad_message_is_refused_by_the_name_of_its_field(message: object, field: str) -> None:
    refused = refusal(message)
    assert refused.status == 422
    assert refused.details["field"] == field


@pytest.mark.parametrize("name", sorted(RESERVED_TYPES))
def test_the_types_of_control_messages_are_reserved(name: str) -> None:
    refused = refusal({"type": name, "content": "hi"})
    assert refused.status == 422
    assert name in refused.message


def test_the_bound_is_in_bytes_and_exact() -> None:
    size = len('{"content":"éé","type":"say"}'.encode())
    message = {"type": "say", "content": "éé", "id": "not counted", "timestamp": "not counted"}
    check_message(message, size)
    refused = refusal(message, size - 1)
    assert refused.status == 413
    assert refused.details["max_bytes"] == size - 1


def test_a_retry_has_the_same_digest() -> None:
    first = check_message({"type": "say", "content": {"a": 1, "b": 2}, "room": "x", "id": "m"}, LIMIT)
    retry = check_message(
        {"id": "m", "room": "x", "timestamp": "now", "content": {"b": 2, "a": 1}, "type": "say"}, LIMIT
    )
    assert first.digest == retry.digest
    assert len(first.digest) == 16


@pytest.mark.parametrize(
    "other",
    [
        {"type": "shout", "content": "hi"},
        {"type": "say", "content": "hi "},
        {"type": "say", "content": ["hi"]},
        {"type": "say", "content": "hi", "room": None},
    ],
)
def test_another_message_has_another_digest(other: object) -> None:
    assert check_message({"type": "say", "content": "hi"}, LIMIT).digest != check_message(other, LIMIT).digest


# make_body


def test_a_body_begins_with_its_id() -> None:
    body = make_body("m1", "say", {"text": "hi"}, "2026-01-01T00:00:00.000Z", {"room": "tavern"})
    assert body == (
        b'{"id":"m1","type":"say","content":{"text":"hi"},"timestamp":"2026-01-01T00:00:00.000Z","room":"tavern"}'
    )


@given(jsons, st.dictionaries(st.text(min_size=5), jsons, max_size=3))
def test_what_can_be_decoded_can_be_stored(content: Any, fields: dict[str, Any]) -> None:
    fields = {f"x{name}": value for name, value in fields.items()}
    sent = decode_json(json.dumps({"type": "say", "content": content, **fields}).encode())
    message = check_message(sent, 10**9)
    body = message.body("m", "t")
    assert body.startswith(b'{"id":"m",')
    assert json.loads(body) == {"id": "m", "type": "say", "content": content, "timestamp": "t", **fields}
    assert json.loads(make_body("m", "say", content, "t", fields)) == json.loads(body)


@pytest.mark.parametrize("content", [object(), {(1, 2): 3}, "\ud800"])
def test_what_is_not_json_makes_no_body(content: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        make_body("m", "say", content, "t", {})


# decode_json


@pytest.mark.parametrize("data", [b'{"a": [1, 2.5, null, "\xc3\xa9"]}', '{"a": [1, 2.5, null, "é"]}'])
def test_json_is_decoded_from_bytes_and_text(data: bytes | str) -> None:
    assert decode_json(data) == {"a": [1, 2.5, None, "é"]}


@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    try:
        value = decode_json(data)
    except Refusal:
        assert undecodable(data)
    else:
        assert json.loads(data) == value


@pytest.mark.parametrize(
    "data", [b"look", b"{", b"{'a': 1}", b"[1] x", b"NaN", b"[Infinity]", b"1e999", b"9" * 5000, b'"\x00"']
)
def test_what_is_not_json_is_said_to_be_not_json(data: bytes) -> None:
    assert undecodable(data).startswith("this is not JSON: ")


@pytest.mark.parametrize("data", [b"", b" \n", ""])
def test_nothing_is_said_to_be_empty(data: bytes) -> None:
    assert "empty" in undecodable(data)


@pytest.mark.parametrize("data", [b'"\xff"', b'"\xed\xa0\x80"', b'{"a": "\xc3"}', '"\ud800"'])
def test_bad_utf8_is_said_to_be_so(data: bytes | str) -> None:
    assert "UTF-8" in undecodable(data)


@pytest.mark.parametrize("data", [rb'"\ud800"', rb'"\uD800 "', rb'["\udc00"]'])
def test_half_a_surrogate_pair_is_refused_with_a_hint(data: bytes) -> None:
    assert "other half" in undecodable(data)


def test_a_surrogate_pair_is_a_character() -> None:
    assert decode_json(rb'"\ud83d\ude00"') == "\U0001f600"


@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}"), (b'[0,{"a":', b"}]")])
def test_nesting_is_bounded(pair: tuple[bytes, bytes]) -> None:
    opening, closing = pair
    times = MAX_DEPTH // (opening.count(b"[") + opening.count(b"{"))
    decode_json(opening * times + b"1" + closing * times)
    assert "deep" in undecodable(opening * (times + 1) + b"1" + closing * (times + 1))


@pytest.mark.parametrize("times", [2000, 60_000])
def test_absurd_nesting_is_refused_and_not_a_crash(times: int) -> None:
    assert "deep" in undecodable(b"[" * times + b"]" * times)
    # Where nothing closes either is said: it depends on the recursion limit, which test tools raise.
    assert undecodable(b"[" * times)


def test_wide_is_not_deep() -> None:
    assert len(decode_json(b"[" + b"[{}]," * 1000 + b"[]]")) == 1001


def test_brackets_in_text_do_not_count() -> None:
    assert decode_json(b'"' + b"[{" * 100 + b'"') == "[{" * 100


# parse_plain


@given(
    st.text(min_size=1, max_size=3) | st.sampled_from(sorted(RESERVED_TYPES)),
    jsons,
    st.sampled_from([("player_id", "ann", "@ann"), ("channel", "room/1", "#room/1"), ("broadcast", True, "*")]),
    st.sampled_from([0, None, 1]),
)
def test_what_is_taken_as_plain_is_what_would_have_been_taken(
    type_: str, content: Any, target: tuple[str, Any, str], spaces: int | None
) -> None:
    field, name, stored = target
    said = {"type": type_, "content": content}
    data = json.dumps({field: name, "message": said}, indent=spaces).encode()
    plain = parse_plain(data, 100)
    try:
        message = check_message(decode_json(data)["message"], 100)
    except Refusal:
        assert plain is None
    else:
        timestamp = "2026-01-01T00:00:00.000Z"
        assert plain is not None
        assert plain[0] == stored
        assert json.loads(plain[1]) == json.loads(message.json)
        assert plain_body("0123abc", timestamp, plain[1]) == message.body("0123abc", timestamp)
        assert b"\n" not in plain[1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"player_id":"ann"}',
        b'{"player_id":"ann","message":[]}',
        b'{"player_id":"ann","message":{"type":"a"}}',
        b'{"player_id":"ann","message":{"content":1}}',
        b'{"player_id":"ann","message":{"type":"","content":1}}',
        b'{"player_id":"ann","message":{"type":"reply","content":1}}',
        b'{"player_id":"ann","message":{"type":7,"content":1}}',
        b'{"player_id":"ann","message":{"type":"a","content":1,"id":"m"}}',
        b'{"player_id":"ann","message":{"type":"a","content":1,"seq":1}}',
        b'{"player_id":"ann","message":{"type":"a","content":1,"\\u0073eq":1}}',
        b'{"player_id":"ann","message":{"type":"a","content":1,"mood":"glad"}}',
        b'{"player_id":"ann","channel":"a","message":{"type":"a","content":1}}',
        b'{"player_id":null,"channel":"a","message":{"type":"a","content":1}}',
        b'{"player_id":null,"message":{"type":"a","content":1}}',
        b'{"broadcast":false,"message":{"type":"a","content":1}}',
        b'{"broadcast":1,"message":{"type":"a","content":1}}',
        b'{"broadcast":true,"channel":"a","message":{"type":"a","content":1}}',
        b'{"channel":"a b","message":{"type":"a","content":1}}',
        b'{"message":{"type":"a","content":1}}',
        b'{"player_id":"stats","message":{"type":"a","content":1}}',
        b'{"player_id":"an n","message":{"type":"a","content":1}}',
        b'{"player_id":7,"message":{"type":"a","content":1}}',
        b'{"player_id":"ann","message":{"type":"a","content":"\xff"}}',
        b'{"player_id":"ann","message":{"type":"a","content":"\\ud800"}}',
        b'{"player_id":"ann","message":{"type":"a","content":1e999}}',
        b'{"player_id":"ann","message":{"type":"a","content":1}} x',
        b'{"player_id":"ann","message":{"type":"a","content":' + b"[" * 70 + b"]" * 70 + b"}}",
        b'{"player_id":"ann","message":{"type":"a","content":' + b"[" * 70000 + b"}}",
        b'{"player_id":"ann","message":{"type":"a","content":"' + b"x" * 200 + b'"}}',
    ],
)
def test_all_else_is_not_plain(data: bytes) -> None:
    assert parse_plain(data, 100) is None
