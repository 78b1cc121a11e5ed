"""What may be skipped for a connection that is behind: the rule, against a model that tries all there is."""

from __future__ import annotations

import json
from collections.abc import Sequence

from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st

from mythos_trio.core.backlog import KEPT, Batch, Replaced, Skipped, next_batch
from mythos_trio.core.messages import make_body
from mythos_trio.core.wire import Message

EVERYTHING = 1 << 30


def message(seq: int, key: str | None = None, target: str = "@ann", size: int = 0) -> Message:
    fields = {} if key is None else {"replace_key": key}
    return Message(seq, f"m{seq}", target, make_body(f"m{seq}", "line", "x" * size, "now", fields))


@frozen
class Said:
    """A message as the model knows it."""

    key: str | None
    target: str
    size: int


said = st.builds(
    Said,
    st.sampled_from((None, "hp", "mp")),
    st.sampled_from(("@ann", "#inn", "#attic", "*")),
    st.sampled_from((0, 40, 900)),
)
streams = st.lists(said, min_size=1, max_size=30)


def messages_of(stream: Sequence[Said]) -> list[Message]:
    return [message(3 * index + 2, one.key, one.target, one.size) for index, one in enumerate(stream)]


def model(messages: Sequence[Message], stream: Sequence[Said], max_bytes: int) -> tuple[int, list[int], list[Skipped]]:
    """(count, numbers kept, skipped), by the words of the rule: each message asks all that follow it."""

    def skipped_of(count: int) -> list[Skipped]:
        found = []
        for index in range(count):
            one = stream[index]
            alike = [
                later
                for later in range(index + 1, count)
                if one.key is not None and (stream[later].key, stream[later].target) == (one.key, one.target)
            ]
            if alike:
                found.append(Skipped(messages[index].seq, messages[alike[-1]].seq))
        return found

    def kept_of(count: int) -> list[Message]:
        gone = {skipped.seq for skipped in skipped_of(count)}
        return [m for m in messages[:count] if m.seq not in gone]

    count = 1
    while count < len(messages) and sum(len(m.body) for m in kept_of(count + 1)) <= max_bytes:
        count += 1
    return count, [m.seq for m in kept_of(count)], skipped_of(count)


@given(streams, st.sampled_from((1, 500, 2000, EVERYTHING)))
def test_a_write_is_what_the_rule_says(stream: list[Said], max_bytes: int) -> None:
    messages = messages_of(stream)
    batch = next_batch(iter(messages), max_bytes)
    assert (batch.count, [m.seq for m in batch.messages], list(batch.skipped)) == model(messages, stream, max_bytes)


@given(streams, st.sampled_from((1, 500, 2000, EVERYTHING)))
def test_writes_one_after_the_other_are_the_stream(stream: list[Said], max_bytes: int) -> None:
    """All without a key, in order, once; of each key the last; and what stands for others says for how many."""
    messages = messages_of(stream)
    rest, written, skipped = messages, list[Message](), 0
    while rest:
        batch = next_batch(rest, max_bytes)
        assert sum(len(m.body) for m in batch.messages) <= max_bytes or len(batch.messages) == 1
        assert batch.messages[-1] is rest[batch.count - 1]  # so a write's position is that of its last message
        assert sum(batch.replaces().values()) == batch.count - len(batch.messages)
        written += batch.messages
        skipped += len(batch.skipped)
        rest = rest[batch.count :]
    assert [m for m in written if m.key is None] == [m for m in messages if m.key is None]
    assert [m.seq for m in written] == sorted(m.seq for m in written)
    assert {m.key: m for m in written if m.key} == {m.key: m for m in messages if m.key}
    assert len(written) + skipped == len(messages)


def test_a_health_bar_is_not_replayed_forty_times() -> None:
    """Their bytes do not count either: one write has them all."""
    bars = [message(seq, "hp", size=10_000) for seq in range(1, 41)]
    batch = next_batch(bars, 65536)
    assert (batch.count, [m.seq for m in batch.messages], batch.replaces()) == (40, [40], {40: 39})


def test_the_keys_of_two_targets_are_two() -> None:
    messages = [message(1, "hp", "@ann"), message(2, "hp", "#ann"), message(3, "hp", "*")]
    assert next_batch(messages, EVERYTHING) == Batch(messages, 3)


def test_a_key_is_read_where_it_stands_and_nowhere_else() -> None:
    within = Message(1, "m", "@ann", make_body("m", "line", {"replace_key": "hp"}, "now", {}))
    quoted = Message(2, "m", "@ann", make_body("m", "line", '"replace_key":"hp"', "now", {}))
    odd = Message(3, "m", "@ann", make_body("m", "line", 1, "now", {"replace_key": 7}))  # no publisher can
    assert [m.key for m in (within, quoted, odd)] == [None] * 3
    real = message(4, 'h"p')
    assert real.key == ("@ann", 'h"p')
    assert real.key is real.key  # read once


def test_nothing_else_is_said_of_a_message_that_stands_for_others() -> None:
    bar = message(7, "hp")
    assert json.loads(bar.payload_replacing(3)) == {**json.loads(bar.payload), "replaces": 3}


def test_what_was_skipped_is_known_for_a_while() -> None:
    replaced = Replaced()
    assert (replaced.count, replaced.forgotten, replaced.by(1)) == (0, 0, None)
    replaced.note([Skipped(3, 9), Skipped(5, 9)])
    replaced.note([Skipped(11, 12)])
    assert [replaced.by(seq) for seq in (2, 3, 4, 5, 9, 11, 12)] == [None, 9, None, 9, None, 12, None]
    assert (replaced.count, replaced.forgotten) == (3, 0)


def test_what_is_known_of_what_was_skipped_is_bounded() -> None:
    replaced = Replaced()
    for start in range(10, 10 + 3 * KEPT, 3):
        replaced.note([Skipped(seq, 10_000) for seq in range(start, start + 3)])
    assert replaced.count == 3 * KEPT
    newest = 10 + 3 * KEPT - 1
    assert replaced.forgotten == newest - KEPT
    assert replaced.by(replaced.forgotten) is None
    assert replaced.by(replaced.forgotten + 1) == replaced.by(newest) == 10_000
