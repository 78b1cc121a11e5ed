"""The rules of the game's data, against a store that is a dict and a queue that is a list."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from attrs import define, field
from hypothesis import given, note
from hypothesis import strategies as st

from mythos_trio.core.data import ABSENT, PLAYER, Data, Value, Write, check_key, max_bytes, player_key
from mythos_trio.core.errors import Refusal

KEYS = ("a", "b", "c")


@define(eq=False)
class Handler:
    """One that runs: what it has seen, and what it is going to write, in that order."""

    plan: list[str]
    """Keys to read, one a step."""
    writes: list[str]
    reads: dict[str, Value] = field(factory=dict)
    written: dict[str, bytes | None] = field(factory=dict)
    put: list[Write] = field(factory=list)
    fate: bool | None = None

    @property
    def versions(self) -> dict[str, int]:
        return {key: value.version for key, value in self.reads.items()}


class Life:
    """Random handlers that interleave, a queue in front of the store, and a store that fails now and then."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.data: Data[Handler] = Data()
        self.data.load({"a": Value(b"start", 7)})
        self.store = {"a": Value(b"start", 7)}
        self.running: list[Handler] = []
        self.queue: list[Handler] = []
        self.looking: list[tuple[Handler, list[Handler]]] = []
        self.states: list[dict[str, bytes | None]] = [self.contents()]
        self.count = 0

    def contents(self) -> dict[str, bytes | None]:
        return {key: self.store.get(key, ABSENT).body for key in KEYS}

    def step(self) -> None:
        self.random.choice((self.begin, self.read, self.read, self.read, self.finish, self.finish, self.commit))()

    def begin(self) -> None:
        pick = self.random.sample
        self.running.append(
            Handler(pick(KEYS, self.random.randint(1, 3)), pick(KEYS, self.random.choice((0, 0, 1, 1, 2))))
        )

    def read(self) -> None:
        handler = self.random.choice(self.running) if self.running else None
        if handler is not None and handler.plan:
            self._look(handler, handler.plan.pop())

    def _look(self, handler: Handler, key: str) -> None:
        value = self.data.newest(key)
        handler.reads.setdefault(key, value)

    def finish(self) -> None:
        if not self.running:
            return
        handler = self.running.pop(self.random.randrange(len(self.running)))
        for key in handler.writes:
            self._look(handler, key)
            self.count += 1
            handler.written[key] = None if self.random.random() < 0.2 else b"%d" % self.count
        assert self.data.is_current(handler.versions) == (not self.data.changed(handler.versions))
        if not self.data.is_current(handler.versions):
            return  # in the server it would run again: here another one will
        if handler.written:
            handler.put = self.data.join(handler.written, handler)
            assert [write.before for write in handler.put] == [
                handler.reads[write.key].version for write in handler.put
            ]
            self.queue.append(handler)
        else:
            self.looking.append((handler, self.data.rests_on(handler.versions)))

    def commit(self) -> None:
        """The oldest few as one batch, which the disk may refuse; then they are applied."""
        size = self.random.randint(1, 3)
        batch, self.queue = self.queue[:size], self.queue[size:]
        broken = self.random.random() < 0.3
        for handler in batch:
            stale = any(self.store.get(key, ABSENT).version != version for key, version in handler.versions.items())
            handler.fate = not (broken or stale)
            if handler.fate:
                self._store(handler)
        for handler in batch:
            (self.data.stored if handler.fate else self.data.failed)(handler.put)

    def _store(self, handler: Handler) -> None:
        assert {key: value.body for key, value in handler.reads.items()}.items() <= self.contents().items()
        for write in handler.put:
            assert write.version > self.store.get(write.key, ABSENT).version
            self.store[write.key] = Value(write.body, write.version)
        self.states.append(self.contents())

    def end(self) -> None:
        while self.queue:
            self.commit()

    def check(self) -> None:
        assert self.data.pending == 0
        assert {key: self.data.newest(key) for key in KEYS} == {key: self.store.get(key, ABSENT) for key in KEYS}
        assert self.data.bytes == sum(len(value.body or b"") for value in self.store.values())
        for handler, rests_on in self.looking:
            if all(other.fate for other in rests_on):
                seen = {key: value.body for key, value in handler.reads.items()}
                assert any(seen.items() <= state.items() for state in self.states), f"it never was so: {seen}"


@given(seed=st.integers(0, 2**32), steps=st.integers(10, 300))
def test_what_is_stored_and_what_is_told_was_so_at_one_moment(seed: int, steps: int) -> None:
    """Each that is stored has read exactly what those before it left; each that only looked, and whose ground was
    stored, has seen a state that the store went through."""
    note(f"seed {seed}")
    life = Life(seed)
    for _ in range(steps):
        life.step()
    life.end()
    life.check()


def put(data: Data[str], ticket: str, **bodies: bytes | None) -> list[Write]:
    return data.join(bodies, ticket)


def test_what_was_made_from_a_failed_value_goes_with_it_and_what_came_after_stays() -> None:
    """Two are queued on one key; the first fails; a third begins from what is stored; then the second fails."""
    data: Data[str] = Data()
    first = put(data, "first", a=b"1")
    second = put(data, "second", a=b"2")
    data.failed(first)
    assert data.newest("a") == ABSENT
    third = put(data, "third", a=b"3", b=b"3")
    assert third[0].before == 0
    data.failed(second)
    # Else who looks now would see one half of the third, and rest on it.
    assert (data.newest("a").body, data.newest("b").body) == (b"3", b"3")
    data.stored(third)
    assert data.pending == 0


def test_a_failed_value_leaves_the_one_below_it() -> None:
    data: Data[str] = Data()
    first = put(data, "first", a=b"1")
    second = put(data, "second", a=b"2")
    data.failed(second)
    assert data.newest("a").body == b"1"
    data.stored(first)
    assert data.newest("a").body == b"1"


def test_a_deleted_key_keeps_its_version() -> None:
    data: Data[str] = Data()
    data.stored(put(data, "one", a=b"1"))
    gone = put(data, "two", a=None)
    data.stored(gone)
    assert data.newest("a") == Value(None, gone[0].version)
    assert not data.is_current({"a": 0})
    assert data.bytes == 0


def test_who_looked_waits_for_what_it_saw_and_for_nothing_else() -> None:
    data: Data[str] = Data()
    data.stored(put(data, "old", a=b"1"))
    old = data.newest("a").version
    put(data, "new", a=b"2", b=b"2")
    seen = {"b": data.newest("b").version, "nothing": 0}
    assert data.rests_on(seen) == ["new"]
    assert data.rests_on({"a": old}) == []
    assert data.is_current(seen)


def test_versions_go_on_where_the_store_has_come_to() -> None:
    data: Data[str] = Data()
    values: Mapping[str, Value] = {"a": Value(b"12", 5), "b": Value(None, 9)}
    data.load(values)
    assert data.bytes == 2
    assert put(data, "t", c=b"")[0].version == 10


def test_keys_are_like_channels() -> None:
    assert check_key("room:cellar/sword") == "room:cellar/sword"
    for wrong in ("", "a b", "x" * 129, 5, None):
        with pytest.raises(Refusal, match="a key has"):
            check_key(wrong)
    assert player_key("ann") == PLAYER + "ann" == check_key("player/ann")
    assert max_bytes("player/ann") < max_bytes("players")
