"""What every store does: run with each kind in `support.stores.KINDS`. And the store's facade."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio
from attrs import evolve, field, frozen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mythos_trio.core.data import Write
from mythos_trio.core.position import Epoch
from mythos_trio.core.transaction import (
    Admit,
    Append,
    Begin,
    Committed,
    End,
    Outcome,
    PresenceMark,
    Reason,
    Refused,
    Request,
    Subscribe,
    Transaction,
    Unsubscribe,
)
from mythos_trio.storage import (
    ASIDE_NICENESS,
    ConnectionRow,
    Database,
    Expired,
    InlineRunner,
    Notes,
    Storage,
    StoredMessage,
    StoreError,
    StoreUnusable,
    ThreadRunner,
)
from tests.support.stores import ANYBODY, FOREVER, KINDS, NOW, Bench, Kind, answer, bench

NO_NOTES = Notes({}, (), (), {})


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param
    return made


@pytest.fixture
def store(kind: Kind, tmp_path: Path) -> Iterator[Bench]:
    with bench(kind, tmp_path) as made:
        yield made


# Numbers and commits.


def test_a_new_store_is_in_its_first_epoch(store: Bench) -> None:
    assert store.recovered.epochs.all == (Epoch(1, 1),)
    assert (store.recovered.newest, store.recovered.clean, list(store.recovered.sessions)) == (0, True, [])


def test_every_effect_takes_a_number_in_order(store: Bench) -> None:
    outcome = store.do(
        Begin("ann", "s1", 0),
        Subscribe("ann", "s1", "room"),
        Append("#room", "a", b"{}"),
        Subscribe("ann", "s1", "room"),  # open already: nothing to do, but a number all the same
        Unsubscribe("ann", "s1", "room"),
        Unsubscribe("ann", "s1", "room"),
        End("ann", "s1", "over"),
    )
    assert outcome == Committed((1, 2, 3, 4, 5, 6, 7), 7)
    assert store.do() == Committed((), 7)


def test_a_batch_is_committed_in_order_and_each_transaction_by_itself(store: Bench) -> None:
    outcomes = store.try_(
        Transaction([Append("#r", "a", b"1", b"x")]),
        Transaction([Append("#r", "b", b"2"), Append("#r", "a", b"3", b"y")]),  # a: other content
        Transaction([Append("#r", "c", b"4", b"x")], abandoned=True),
        Transaction([Append("#r", "a", b"1", b"x"), Append("#r", "d", b"5")]),
    )
    assert outcomes[0] == Committed((1,), 1)
    assert isinstance(outcomes[1], Refused)
    assert outcomes[1].reason == Reason.CONFLICT
    assert isinstance(outcomes[2], Refused)
    assert outcomes[2].reason == Reason.FAILED
    assert outcomes[3] == Committed((1, 2), 2, frozenset({0}))
    assert store.db.find_message("b") is None
    assert store.db.find_message("c") is None
    assert store.db.find_message("d") == StoredMessage(2, "d", "#r", b"5", NOW)


@pytest.mark.parametrize(
    "again",
    [
        Append("#r", "a", b"1", b"other"),
        Append("#elsewhere", "a", b"1", b"x"),
        Append("#r", "a", b"1"),
    ],
    ids=["other content", "other target", "no digest"],
)
def test_an_id_names_one_message(store: Bench, again: Append) -> None:
    store.say("#r", "a", b"1", b"x")
    store.refuse(Transaction([again]), Reason.CONFLICT)
    assert store.do(Append("#r", "a", b"1", b"x")).duplicates == {0}
    assert store.say("#r", "new") == 2


def test_the_same_message_twice_in_one_transaction(store: Bench) -> None:
    outcome = store.do(Append("#r", "a", b"1", b"x"), Append("#r", "a", b"1", b"x"))
    assert outcome == Committed((1, 1), 1, frozenset({1}))


@given(body=st.binary(max_size=40), name=st.text(min_size=1, max_size=20))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_bodies_come_back_byte_by_byte(store: Bench, body: bytes, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        store.refuse(Transaction([Append("#r", name, body)]), Reason.FAILED)
        return
    existing = store.db.find_message(name)
    if existing is None:
        store.say("#r", name, body)
        found = store.db.find_message(name)
        assert found is not None
        assert found.body == body


def test_what_cannot_be_stored_takes_nothing_else_down(store: Bench) -> None:
    outcomes = store.try_(
        Transaction([Append("#r", "a", b"1")]),
        Transaction([Append("#r", "\ud800", b"2")]),
        Transaction([Begin("ann", "s1", 2**70)]),
        Transaction([Append("#r", "b", b"3")]),
    )
    assert [isinstance(outcome, Committed) for outcome in outcomes] == [True, False, False, True]
    assert store.db.find_message("b") is not None


# Requests and answers.


def test_an_idempotency_key_names_the_whole_request(store: Bench) -> None:
    def batch(digest: bytes) -> Transaction:
        return Transaction(
            [Append("#r", "k1", b"1", b"x"), Append("@ann", "k2", b"2", b"x")], request=Request("key", digest)
        )

    assert store.commit(batch(b"one")) == Committed((1, 2), 2)
    assert store.commit(batch(b"one")) == Committed((1, 2), 2, frozenset({0, 1}))
    store.refuse(batch(b"two"), Reason.KEY)
    # Retention may take its messages first: the request is still the same one.
    store.clean(evolve(FOREVER, message_count=0))
    assert store.commit(batch(b"one")) == Committed((1, 2), 2, frozenset({0, 1}))
    assert store.stream() == []


def test_an_answer_is_given_once(store: Bench) -> None:
    store.begin()
    first = answer("c1", body=b'{"ok":true,"content":1}')
    store.do(Append("@ann", "a", b"1"), answer=first)
    assert store.db.find_answer("ann", "s1", "c1") == first
    again = Transaction([Append("@ann", "b", b"2")], answer=answer("c1", digest=b"other"))
    assert store.refuse(again, Reason.ANSWERED).answer == first
    assert store.db.find_message("b") is None
    assert store.db.find_answer("ann", "s2", "c1") is None


# Sessions.


def test_a_session_begins_and_ends_once(store: Bench) -> None:
    begun = store.begin("ann", "s1", mail_from=0)
    store.refuse(Transaction([Begin("ann", "s2", 0)]), Reason.ENDED)
    store.refuse(Transaction([Append("@ann", "x", b""), Begin("ann", "s2", 0)]), Reason.ENDED)
    assert store.db.find_message("x") is None
    store.now += 10
    switched = store.switch("ann", "s1", "s2", mail_from=begun)
    old, new = store.db.find_session("ann", "s1"), store.db.current_session("ann")
    assert old is not None
    assert new is not None
    assert (old.state, old.ended_at, old.end_reason) == ("ended", NOW + 10, "replaced")
    assert (new.session_id, new.start, new.mail_from, new.seen) == ("s2", switched.seqs[1], begun, begun)
    assert (new.created_at, new.ended_at, new.told, new.owed) == (NOW + 10, None, "absent", "")
    store.refuse(Transaction([End("ann", "s1", "again")]), Reason.ENDED)
    store.refuse(Transaction([End("ann", "s2", "x"), Begin("ann", "s1", 0)]), Reason.ENDED)
    assert store.db.current_session("ann") == new
    store.do(End("ann", "s2", "removed"))
    assert store.db.current_session("ann") is None
    assert store.db.last_seen("ann") == begun
    assert store.db.last_seen("bob") == 0
    assert [row.session_id for row in store.db.sessions("ann", 10)] == ["s2", "s1"]
    assert [row.session_id for row in store.db.sessions(None, 1)] == ["s2"]


def admit(player_id: str, wanted: str | None, new_id: str, mail_from: int = 0) -> Transaction:
    return Transaction(admit=Admit(player_id, wanted, new_id, mail_from, "absent", "join"))


def test_an_admission_begins_the_first_session_and_joins_the_current_one(store: Bench) -> None:
    store.say("@ann")
    store.now += 5
    # In one batch: who comes second joins what the first has begun.
    begun, joined, named, other = store.try_(
        admit("ann", None, "s1"), admit("ann", None, "s9"), admit("ann", "s1", "s9"), admit("ann", "s2", "s9")
    )
    assert isinstance(begun, Committed)
    assert begun.begun
    assert begun.session == store.db.current_session("ann")
    assert begun.session is not None
    assert (begun.session.session_id, begun.session.start, begun.session.state) == ("s1", begun.last, "online")
    assert (begun.session.told, begun.session.owed, begun.session.created_at) == ("absent", "join", NOW + 5)
    for outcome in (joined, named):
        assert isinstance(outcome, Committed)
        assert (outcome.session, outcome.begun, outcome.last) == (begun.session, False, begun.last)
    assert isinstance(other, Refused)
    assert (other.reason, other.session) == (Reason.OTHER, None)
    store.join("room")
    again = store.commit(admit("ann", None, "s9")).session
    assert again is not None
    assert again.channels == ("room",)


def test_an_admission_after_a_session_has_ended(store: Bench) -> None:
    store.begin("ann", "s1")
    store.db.note(Notes({("ann", "s1"): 7}, (), (), {}))
    store.do(End("ann", "s1", "removed"))
    refused = store.refuse(admit("ann", "s1", "s9"), Reason.ENDED)
    assert refused.session == store.db.find_session("ann", "s1")
    before = store.commit(Transaction([Append("@bob", "x", b"{}")])).last
    store.now -= 3600
    row = store.commit(admit("ann", None, "s2", mail_from=3)).session
    assert row is not None
    # Its mail goes on where the last session has seen it; its number is the next one; it is the newest also though
    # the clock was set back.
    assert (row.session_id, row.mail_from, row.seen, row.start) == ("s2", 7, 7, before + 1)
    assert row == store.db.current_session("ann")
    assert max(store.db.sessions("ann", 10), key=lambda r: r.created_at) == row
    store.do(End("ann", "s2", "removed"))
    assert store.commit(admit("ann", "s3", "s9", mail_from=9)).session == store.db.current_session("ann")
    # That it has ended counts more than that another one is current.
    store.refuse(admit("ann", "s1", "s9"), Reason.ENDED)


NAMES = ("ann", "bob", "cid", "dan", "eve", "fay")
SESSIONS = st.sampled_from(("s1", "s2", "s3"))
CHANGES = st.one_of(
    st.builds(lambda name: Append(f"@{name}", f"to {name}", b"{}", b"x"), st.sampled_from(NAMES)),
    st.builds(lambda name: Begin(name, "s1", 0), st.sampled_from(NAMES)),
    st.builds(lambda name: End(name, "s1", "removed"), st.sampled_from(NAMES)),
)


@given(
    before=st.lists(CHANGES, max_size=4),
    removed=st.booleans(),
    admits=st.lists(
        st.builds(admit, st.sampled_from(NAMES), st.none() | SESSIONS, SESSIONS, st.sampled_from((0, 0, 1))),
        max_size=8,
    ),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_admissions_in_one_commit_come_out_as_one_by_one(
    kind: Kind, before: list[Append | Begin | End], removed: bool, admits: list[Transaction]
) -> None:
    """Those of players who are new go together; of the others each sees what those before it have done."""
    found: list[object] = []
    for together in (True, False):
        with tempfile.TemporaryDirectory() as place, bench(kind, Path(place)) as store:
            for change in before:
                store.try_(Transaction([change]))
            store.try_(Transaction(writes=[Write("player/bob", b'{"hp":1}', 0, 1)]))
            if removed:
                store.clean(evolve(FOREVER, message_count=0))
            outcomes = store.try_(*admits) if together else [store.try_(admit)[0] for admit in admits]
            found.append((outcomes, store.db.sessions(None, 99), store.say("#r")))
    assert found[0] == found[1]


def test_more_admissions_than_are_stored_in_one_go_keep_their_order(store: Bench) -> None:
    store.say("@p40")
    outcomes = store.try_(*(admit(f"p{n}", None, f"s{n}") for n in range(100)))
    for n, outcome in enumerate(outcomes):
        assert isinstance(outcome, Committed)
        assert outcome.session == store.db.current_session(f"p{n}")
        assert outcome.session is not None
        assert (outcome.session.session_id, outcome.session.start) == (f"s{n}", n + 2)
        assert (outcome.last, outcome.begun, outcome.mail) == (n + 2, True, n == 40)
    assert store.say("#r") == 102


def test_an_admission_that_cannot_be_stored_takes_no_other_down(store: Bench) -> None:
    first, odd, last = store.try_(admit("ann", None, "s1"), admit("\ud800", None, "s1"), admit("bob", None, "s1"))
    assert (type(first), type(odd), type(last)) == (Committed, Refused, Committed)
    assert store.db.current_session("bob") is not None


def test_the_newest_time_is_the_current_session_also_when_the_clock_was_set_back(store: Bench) -> None:
    store.begin("ann", "s1")
    store.now -= 3600
    store.switch("ann", "s1", "s2")
    store.switch("ann", "s2", "s3")
    newest = max(store.db.sessions("ann", 10), key=lambda row: row.created_at)
    assert newest.session_id == "s3"


def test_marks_of_presence(store: Bench) -> None:
    store.begin()
    store.mark("ann", "s1", "linkdead", "present", "linkdead")
    row = store.db.current_session("ann")
    assert row is not None
    assert (row.state, row.told, row.owed) == ("linkdead", "present", "linkdead")
    store.do(End("ann", "s1", "removed"))
    # An ended session does not come to life again, but what it owes may still be paid.
    store.mark("ann", "s1", "online", "absent", "leave")
    row = store.db.find_session("ann", "s1")
    assert row is not None
    assert (row.state, row.told, row.owed) == ("ended", "absent", "leave")
    assert store.db.current_session("ann") is None


def test_what_a_session_asked_for_before_it_ended_is_dropped(store: Bench) -> None:
    store.begin()
    store.do(End("ann", "s1", "removed"))
    outcome = store.do(Append("#r", "a", b""), Subscribe("ann", "s1", "r"), Unsubscribe("ann", "s1", "r"))
    assert outcome.seqs == (3, 4, 5)
    row = store.db.find_session("ann", "s1")
    assert row is not None
    assert row.channels == ()


def test_a_start_finds_who_was_there_and_who_is_owed(store: Bench) -> None:
    for name, state, owed in (("ann", "online", ""), ("bob", "linkdead", "linkdead"), ("cid", "offline", "")):
        store.begin(name)
        store.mark(name, "s1", state, owed=owed)
    for name, owed in (("dan", "leave"), ("eve", "")):
        store.begin(name)
        store.do(End(name, "s1", "removed"))
        store.mark(name, "s1", "ended", owed=owed)
    store.join("r2")
    store.join("r1")
    found = {row.player_id: row for row in store.crash().sessions}
    assert sorted(found) == ["ann", "bob", "dan"]
    assert found["ann"].channels == ("r2", "r1")
    assert found["dan"].owed == "leave"
    assert store.recovered.clean is False


# Streams.


def test_a_stream_is_mail_everybody_and_channels_in_order(store: Bench) -> None:
    store.say(ANYBODY)  # before the session
    mail = store.say("@ann")
    store.say("@bob")
    store.begin()
    store.say("#r")
    joined = store.join("r")
    heard = [store.say("#r"), store.say(ANYBODY), store.say("@ann"), store.say("#r")]
    left = store.leave("r")
    store.say("#r")
    again = store.join("r")
    heard += [store.say("#r"), store.say(ANYBODY)]
    assert store.stream() == [mail, *heard]
    assert store.stream(after=heard[1]) == heard[2:]
    assert (joined, left, again) == (6, 11, 13)
    part = store.db.read("ann", "s1", 0, heard[2], 10)
    assert [message.seq for message in part.messages] == [mail, *heard[:3]]
    assert part.complete_to == heard[2]
    first = store.db.read("ann", "s1", 0, heard[-1], 2)
    assert [message.seq for message in first.messages] == [mail, heard[0]]
    assert first.complete_to == heard[0]
    assert store.read(player_id="bob", session_id="none").messages == ()


def test_mail_outlives_a_switch_and_subscriptions_do_not(store: Bench) -> None:
    store.begin()
    store.join("r")
    seen = store.say("@ann")
    unseen = store.say("@ann")
    store.say("#r")
    store.switch("ann", "s1", "s2", mail_from=seen)
    store.say("#r")
    later = store.say("@ann")
    assert store.stream(seen, session_id="s2") == [unseen, later]
    # The ended session's stream ends with it.
    assert later not in store.stream(0, session_id="s1")


def test_a_chunk_has_a_bound_of_bytes(store: Bench) -> None:
    store.begin()
    numbers = [store.say("@ann", body=b"x" * (700 << 10)) for _ in range(4)]
    after, got, rounds = 0, [], 0
    while after < numbers[-1]:
        chunk = store.db.read("ann", "s1", after, numbers[-1], 1000)
        got += [message.seq for message in chunk.messages]
        after = chunk.complete_to
        rounds += 1
    assert got == numbers
    assert rounds == 2


def test_losses_are_the_session_s_own(store: Bench) -> None:
    store.begin()
    store.join("old")
    first = store.say("#old")
    store.leave("old")
    store.join("new")
    for _ in range(3):
        store.say("#old")  # not hers
        store.say("#new")
    assert store.read().lost == 0
    store.clean(evolve(FOREVER, message_count=1))
    chunk = store.read()
    assert chunk.lost == 9  # the second of three in #new
    assert store.read(after=9).lost == 0
    assert store.db.find_message("m1") is None
    assert first < 9


def test_receivers_are_the_sessions_whose_stream_has_it(store: Bench) -> None:
    for name in ("ann", "bob", "cid"):
        store.begin(name)
    store.join("r", "ann")
    store.join("r", "bob")
    store.leave("r", "bob")

    def say(target: str) -> StoredMessage:
        store.say(target, target)
        message = store.db.find_message(target)
        assert message is not None
        return message

    def receivers(message: StoredMessage) -> list[str]:
        rows, count = store.db.receivers(message, 10)
        assert count == len(rows)
        return [f"{row.player_id} {row.session_id}" for row in rows]

    assert receivers(say("#r")) == ["ann s1"]
    assert receivers(say("@ann")) == ["ann s1"]
    to_all = say(ANYBODY)
    assert receivers(to_all) == ["ann s1", "bob s1", "cid s1"]
    # She had it, though her session is over; the new one began after it.
    store.switch("cid", "s1", "s2")
    assert receivers(to_all) == ["ann s1", "bob s1", "cid s1"]
    rows, count = store.db.receivers(to_all, 1)
    assert (len(rows), count) == (1, 3)


# What is written behind.


def test_presence_is_noted_of_sessions_that_have_not_ended(store: Bench) -> None:
    store.begin()
    mark = PresenceMark("ann", "s1", "linkdead", "linkdead", "")
    store.db.note(evolve(NO_NOTES, presence={("ann", "s1"): (mark, NOW + 3)}))
    row = store.db.current_session("ann")
    assert row is not None
    assert (row.state, row.told, row.owed) == ("linkdead", "linkdead", "")
    store.do(End("ann", "s1", "removed"))
    store.mark("ann", "s1", "ended", "linkdead", "leave")
    store.db.note(evolve(NO_NOTES, presence={("ann", "s1"): (mark, NOW + 4)}))
    row = store.db.find_session("ann", "s1")
    assert row is not None
    assert (row.state, row.told, row.owed) == ("ended", "linkdead", "leave")
    assert row.last_online == NOW
    # When somebody was online last is told of an ended one too.
    store.db.note(evolve(NO_NOTES, presence={("ann", "s1"): (mark, NOW + 4)}, last_online={("ann", "s1"): NOW + 3}))
    assert store.db.find_session("ann", "s1") == evolve(row, last_online=NOW + 3)


def test_presence_and_when_one_was_online_last_are_noted_together_and_alone(store: Bench) -> None:
    marks = {(name, "s1"): (PresenceMark(name, "s1", "linkdead", "present", ""), NOW + 2) for name in ("ann", "bob")}
    for name in ("ann", "bob", "cid"):
        store.begin(name)
    store.db.note(evolve(NO_NOTES, presence=marks, last_online={("ann", "s1"): NOW + 1, ("cid", "s1"): NOW + 3}))
    rows = [store.db.current_session(name) for name in ("ann", "bob", "cid")]
    assert [row and (row.state, row.last_online) for row in rows] == [
        ("linkdead", NOW + 1),
        ("linkdead", NOW),
        ("online", NOW + 3),
    ]


def test_marks_and_connections_are_noted(store: Bench) -> None:
    store.begin()
    key = ("ann", "s1")
    row = ConnectionRow("c1", "ann", "s1", "sse", "server", "127.0.0.1", NOW)
    store.db.note(Notes({key: 7}, [row, evolve(row, connection_id="c2")], ["c2"], {key: NOW + 5}))
    store.db.note(Notes({key: 3, ("nobody", "s1"): 9}, [], [], {}))
    session = store.db.current_session("ann")
    assert session is not None
    assert (session.seen, session.last_online) == (7, NOW + 5)
    assert store.db.last_seen("ann") == 7
    assert store.db.figures()["connections"] == 1
    store.crash()
    assert store.db.figures()["connections"] == 0


# Retention.


@pytest.mark.parametrize("how", ["age", "count"])
def test_what_retention_removes_is_remembered(store: Bench, how: str) -> None:
    store.say("#r", "old")
    store.now += 100
    store.say("#r", "new")
    assert store.db.find_expired("old") is None
    bounds = evolve(FOREVER, message_seconds=60) if how == "age" else evolve(FOREVER, message_count=1)
    assert store.clean(bounds).messages == 1
    assert store.db.find_expired("old") == Expired(1, "#r", store.now)
    assert store.db.find_expired("new") is None
    store.now += 200
    store.clean(evolve(FOREVER, session_seconds=300))
    assert store.db.find_expired("old") is not None
    store.clean(evolve(FOREVER, session_seconds=100))
    assert store.db.find_expired("old") is None


def test_of_what_was_removed_the_newest_is_remembered(store: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mythos_trio.sqlite.retention.MAX_EXPIRED", 5)
    for number in range(20):
        store.say("#r", f"m{number}")
    bounds = evolve(FOREVER, message_count=0)
    assert store.clean(bounds).messages == 20
    assert [n for n in range(20) if store.db.find_expired(f"m{n}") is not None] == list(range(15, 20))


def test_messages_beyond_the_count_go_oldest_first(store: Bench) -> None:
    store.begin()
    store.join("r")
    busy = [store.say("#r") for _ in range(10)]
    quiet = [store.say("@ann") for _ in range(3)]
    assert store.clean(evolve(FOREVER, message_count=4), slice_rows=2).messages == 6
    chunk = store.read()
    assert [message.seq for message in chunk.messages] == busy[6:] + quiet
    assert chunk.lost == busy[5]
    assert store.clean(evolve(FOREVER, message_count=4)).messages == 0
    store.say("#r")
    assert store.clean(evolve(FOREVER, message_count=4)).messages == 1
    # A smaller bound also meets targets that nothing was said to since.
    assert store.clean(evolve(FOREVER, message_count=2)).messages == 3


@pytest.mark.parametrize("stop", ["crash", "restart"])
def test_counts_outlive_a_stop(store: Bench, stop: str) -> None:
    for _ in range(5):
        store.say("#r")
    store.db.note(NO_NOTES)
    for _ in range(5):
        store.say("#r")
    getattr(store, stop)()
    store.say("#r")
    assert store.clean(evolve(FOREVER, message_count=4)).messages == 7


def test_old_messages_go(store: Bench) -> None:
    store.begin()
    old = [store.say("@ann"), store.say(ANYBODY), store.say("@bob")]
    store.db.note(Notes({("ann", "s1"): old[0]}, [], [], {}))
    store.now += 100
    kept = store.say("@ann")
    cleaned = store.clean(evolve(FOREVER, message_seconds=60), slice_rows=1)
    assert (cleaned.messages, cleaned.expired_mail) == (3, 1)  # bob has not seen his
    assert store.stream() == [kept]
    assert store.read(old[0]).lost == old[1]
    assert store.read(old[1]).lost == 0


def test_a_clock_set_back_keeps_nothing_for_ever(store: Bench) -> None:
    store.now += 1e6
    store.say("#r")
    store.now -= 1e6
    store.say("#r")
    store.now += 100
    store.say("#r")
    assert store.clean(evolve(FOREVER, message_seconds=60)).messages == 2


def test_closed_subscriptions_are_folded_when_their_messages_are_gone(store: Bench) -> None:
    store.begin()
    for _ in range(3):
        store.join("r")
        said = store.say("#r")
        store.leave("r")
    store.join("r")  # nothing is said: it leaves no trace
    store.leave("r")
    assert store.clean(evolve(FOREVER, message_count=0)).subscriptions == 3
    row = store.db.current_session("ann")
    assert row is not None
    assert row.lost == said
    assert store.read(said - 1).lost == said
    assert store.read(said).lost == 0


def test_leaving_what_has_been_removed_already(store: Bench) -> None:
    store.begin()
    store.join("r")
    said = store.say("#r")
    store.clean(evolve(FOREVER, message_count=0))
    store.leave("r")
    assert store.read().lost == said
    assert store.clean(FOREVER).subscriptions == 0


def test_answers_are_kept_by_count_and_by_age(store: Bench) -> None:
    bounds = evolve(FOREVER, answer_count=3, answer_seconds=600)
    store.begin()
    store.begin("bob")
    for n in range(5):
        store.do(answer=answer(f"old{n}"))
    store.now += 500
    for n in range(2):
        store.do(answer=answer(f"new{n}"))
    assert store.clean(bounds).answers == 0  # all are younger than ten minutes
    store.crash()
    store.now += 200
    assert store.clean(bounds, slice_rows=2).answers == 4
    kept = [n for n in ("old0", "old1", "old2", "old3", "old4", "new0", "new1") if is_answered(store, n)]
    assert kept == ["old4", "new0", "new1"]
    store.do(End("ann", "s1", "removed"))
    assert store.clean(bounds).answers == 3


def is_answered(store: Bench, command_id: str) -> bool:
    return store.db.find_answer("ann", "s1", command_id) is not None


def test_sessions_that_are_offline_for_long_are_named(store: Bench) -> None:
    bounds = evolve(FOREVER, message_seconds=60)
    for name, state in (("ann", "offline"), ("bob", "online"), ("cid", "linkdead"), ("dan", "offline")):
        store.begin(name)
        store.mark(name, "s1", state)
    store.now += 30
    store.mark("dan", "s1", "online")
    store.now += 1
    store.mark("dan", "s1", "offline")
    store.now += 40
    assert store.db.expired_sessions(store.now, bounds, 10) == [("ann", "s1")]
    assert store.clean(bounds).sessions == 0  # it is for others to end it
    store.do(End("ann", "s1", "expired"))
    assert store.db.expired_sessions(store.now, bounds, 10) == []


def test_ended_sessions_are_forgotten_late(store: Bench) -> None:
    store.begin()
    store.join("r")
    store.do(End("ann", "s1", "removed"))
    bounds = evolve(FOREVER, session_seconds=60)
    store.now += 59
    assert store.clean(bounds).sessions == 0
    store.refuse(Transaction([Begin("ann", "s1", 0)]), Reason.ENDED)
    store.now += 2
    assert store.clean(bounds).sessions == 1
    assert store.db.sessions("ann", 10) == []


def test_old_requests_go(store: Bench) -> None:
    store.do(request=Request("k", b"1"))
    store.now += 100
    assert store.clean(evolve(FOREVER, message_seconds=60)).requests == 1
    store.do(request=Request("k", b"2"))


def test_losses_are_remembered_as_long_as_somebody_may_ask(store: Bench) -> None:
    bounds = evolve(FOREVER, message_count=0, session_seconds=100)
    store.begin()
    store.join("mine")
    for target in ("#mine", "#nobody's", "@ann", "@ghost"):
        store.say(target)
    store.clean(bounds)
    store.clean(bounds)
    assert store.db.figures()["targets"] == 3
    assert store.read().lost == 5
    store.now += 200
    store.clean(bounds)
    assert store.db.figures()["targets"] == 2


# Room.


def test_beyond_the_bound_of_bytes_the_oldest_of_the_largest_goes(kind: Kind, tmp_path: Path) -> None:
    with bench(kind, tmp_path, max_store_bytes=2 << 20) as store:
        store.begin()
        mail = store.say("@ann")
        body = b"x" * 1000
        for n in range(120):
            outcomes = store.try_(*[Transaction([Append("#r", f"{n}-{i}", body)]) for i in range(50)])
            assert all(isinstance(outcome, Committed) for outcome in outcomes)
        figures = store.db.figures()
        assert figures["bytes_in_use"] < (2 << 20) * 1.1
        assert store.stream() == [mail]
        store.db.note(NO_NOTES)
        assert 1000 < store.db.figures()["messages"] < 2500
        assert store.db.find_message("119-49") is not None
        assert store.db.find_message("0-0") is None
        store.db.probe()


def test_when_nothing_can_be_removed_it_is_full(kind: Kind, tmp_path: Path) -> None:
    with bench(kind, tmp_path) as store:
        store.begin()
        store.say("@ann", "a", digest=b"x")
        store.db.clean(store.now, evolve(FOREVER, store_bytes=4096))
        store.refuse(Transaction([Append("@ann", "b", b"")]), Reason.FULL)
        store.refuse(Transaction([Begin("bob", "s1", 0)]), Reason.FULL)
        store.refuse(Transaction(answer=answer("c1")), Reason.FULL)
        with pytest.raises(StoreError) as caught:
            store.db.probe()
        assert caught.value.full
        store.mark("ann", "s1", "linkdead")
        store.do(End("ann", "s1", "removed"))
        store.db.clean(store.now, FOREVER)
        store.db.probe()
        store.say("@ann", "b")


# Starting again.


@pytest.mark.parametrize("stop", ["crash", "restart"])
def test_nothing_is_forgotten(store: Bench, stop: str) -> None:
    store.begin()
    store.join("r")
    store.do(Append("#r", "a", b"1", b"x"), answer=answer("c1"), request=Request("k", b"r"))
    said = store.stream()
    newest = getattr(store, stop)().newest
    assert store.stream() == said
    assert is_answered(store, "c1")
    assert store.do(Append("#r", "a", b"1", b"x")).duplicates == {0}
    assert store.say("#r") > newest
    assert store.recovered.epochs.present == 1


def test_a_clean_stop_wastes_no_number(store: Bench) -> None:
    store.say("#r")
    recovered = store.restart()
    assert (recovered.newest, recovered.clean) == (1, True)
    assert store.say("#r") == 2


def test_numbers_are_never_used_again(kind: Kind, tmp_path: Path) -> None:
    with bench(kind, tmp_path, reserve=10) as store:
        given: list[int] = []
        for round_ in range(6):
            for n in range(round_ * 5):
                given += store.do(*[Append("#r", f"{round_}-{n}-{i}", b"") for i in range(3)]).seqs
            recovered = store.crash() if round_ % 2 else store.restart()
            assert recovered.newest >= max(given, default=0)
        assert given == sorted(set(given))


def test_closed_stores_say_so(store: Bench) -> None:
    store.db.close()
    store.db.close()
    store.refuse(Transaction([Append("#r", "a", b"")]), Reason.FAILED)
    with pytest.raises(StoreError):
        store.db.probe()
    with pytest.raises(StoreError):
        store.db.current_session("ann")


def test_a_store_is_opened_once(kind: Kind, store: Bench, tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="open already"):
        store.db.open(NOW)
    other = kind.make(tmp_path)
    with pytest.raises(StoreUnusable, match="in use by process"):
        other.open(NOW)
    store.say("#r")


# Any history: the stream and its gaps are exactly those of a model that forgets nothing.


@frozen
class Span:
    target: str
    start: int
    end: int | None = None

    def has(self, target: str, seq: int) -> bool:
        return target == self.target and self.start < seq and (self.end is None or seq < self.end)


@frozen
class Model:
    """One player's present session, and everything that was ever said."""

    said: dict[int, tuple[str, str]] = field(factory=dict)
    """Number → (target, id)."""
    spans: list[Span] = field(factory=list)

    def expected(self, store: Bench, after: int, upto: int) -> tuple[list[int], int]:
        stream = [
            (seq, store.db.find_message(id_) is not None)
            for seq, (target, id_) in sorted(self.said.items())
            if seq > after and any(span.has(target, seq) for span in self.spans)
        ]
        held = [seq for seq, is_held in stream if is_held and seq <= upto]
        return held, max((seq for seq, is_held in stream if not is_held), default=0)

    def close(self, channel: str, end: int) -> None:
        self.spans[:] = [evolve(s, end=end) if s.end is None and s.target == f"#{channel}" else s for s in self.spans]


CHANNELS = ("a", "b")
STEPS = st.one_of(
    st.tuples(st.just("say"), st.sampled_from(["#a", "#b", "@ann", ANYBODY]), st.integers(1, 3)),
    st.tuples(st.just("join"), st.sampled_from(CHANNELS)),
    st.tuples(st.just("leave"), st.sampled_from(CHANNELS)),
    st.tuples(st.just("count"), st.integers(0, 3), st.integers(1, 4)),
    st.tuples(st.just("age"), st.integers(0, 40), st.integers(1, 4)),
    st.tuples(st.just("slice"), st.integers(0, 2)),
    st.tuples(st.just("switch"), st.booleans()),
    st.tuples(st.just("crash")),
)


@given(steps=st.lists(STEPS, max_size=40))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_streams_and_gaps_are_exact(kind: Kind, steps: Sequence[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as place, bench(kind, Path(place), reserve=64) as store:
        model = Model()
        session, mail_from, newest = 1, 0, store.begin()
        model.spans.extend([Span("@ann", 0), Span(ANYBODY, newest)])
        for step in steps:
            store.now += 1
            match step:
                case ("say", str(target), int(count)):
                    for n in range(count):
                        id_ = f"{target}{newest}-{n}"
                        newest = store.say(target, id_)
                        model.said[newest] = (target, id_)
                case ("join", str(channel)):
                    newest = store.join(channel, session_id=f"s{session}")
                    if not any(s.end is None and s.target == f"#{channel}" for s in model.spans):
                        model.spans.append(Span(f"#{channel}", newest))
                case ("leave", str(channel)):
                    newest = store.leave(channel, session_id=f"s{session}")
                    model.close(channel, newest)
                case ("count", int(count), int(rows)):
                    store.clean(evolve(FOREVER, message_count=count), slice_rows=rows)
                case ("age", int(age), int(rows)):
                    store.clean(evolve(FOREVER, message_seconds=age), slice_rows=rows)
                case ("slice", int(count)):
                    store.db.clean(store.now, evolve(FOREVER, message_count=count), slice_rows=1)
                case ("switch", keeps_mail):
                    mail_from = mail_from if keeps_mail else newest
                    outcome = store.switch("ann", f"s{session}", f"s{session + 1}", mail_from)
                    session, newest = session + 1, outcome.last
                    model.spans[:] = [Span("@ann", mail_from), Span(ANYBODY, newest)]
                case ("crash",):
                    store.crash()
        for after in range(mail_from, newest + 2, max(1, newest // 12)):
            compare(store, model, f"s{session}", after, newest)


def compare(store: Bench, model: Model, session_id: str, after: int, newest: int) -> None:
    held, lost = model.expected(store, after, newest)
    chunk = store.db.read("ann", session_id, after, newest, 1000)
    assert [message.seq for message in chunk.messages] == held
    assert chunk.lost == lost
    assert chunk.complete_to == newest
    # The same in pieces.
    place, pieces = after, []
    while place < newest:
        chunk = store.db.read("ann", session_id, place, newest, 2)
        assert all(place < message.seq <= chunk.complete_to for message in chunk.messages)
        pieces += [message.seq for message in chunk.messages]
        place = chunk.complete_to
    assert pieces == held


# The facade.


@frozen
class StillClock:
    def now(self) -> float:
        return NOW


class Facade:
    """A `Storage` with what its tests have to reach for."""

    def __init__(self, database: Database, runner: InlineRunner | ThreadRunner) -> None:
        self.storage = Storage(database, runner, StillClock())
        self.database = database


@pytest.fixture(params=["inline", "threads"])
def facade(request: pytest.FixtureRequest, kind: Kind, tmp_path: Path) -> Iterator[Facade]:
    runner = InlineRunner() if request.param == "inline" else ThreadRunner()
    made = Facade(kind.make(tmp_path), runner)
    yield made
    made.database.abandon()
    if isinstance(runner, ThreadRunner):
        runner.close()


def trouble(storage: Storage) -> str | None:
    """Not by its name: mypy would take a value that was seen once for granted."""
    return storage.trouble


def one(id_: str) -> Transaction:
    return Transaction([Append("@ann", id_, b"{}", b"x")])


async def test_the_facade_has_all_of_it(facade: Facade) -> None:
    storage = facade.storage
    recovered = await storage.open()
    assert recovered.newest == 0
    assert isinstance((await storage.commit([Transaction([Begin("ann", "s1", 0)])]))[0], Committed)
    outcomes = await storage.commit([one("a"), one("a"), one("b")])
    assert [outcome.last for outcome in outcomes if isinstance(outcome, Committed)] == [2, 2, 3]
    assert (storage.commits, storage.messages, trouble(storage)) == (2, 2, None)
    assert storage.last_commit_ms is not None
    assert storage.last_commit_ms >= 0
    await storage.note(Notes({("ann", "s1"): 2}, [], [], {}))
    assert await storage.last_seen("ann") == 2
    chunk = await storage.read("ann", "s1", 0, 3, 10)
    assert [message.id for message in chunk.messages] == ["a", "b"]
    message = await storage.find_message("a")
    assert message is not None
    assert (await storage.receivers(message, 10))[1] == 1
    assert await storage.find_expired("never") is None
    assert await storage.find_answer("ann", "s1", "c") is None
    assert await storage.current_session("ann") == await storage.find_session("ann", "s1")
    assert len(await storage.sessions(None, 10)) == 1
    assert await storage.expired_sessions(FOREVER, 10) == []
    assert (await storage.figures())["newest"] == 3
    await storage.probe()
    assert (await storage.clean(evolve(FOREVER, message_count=1))).messages == 1
    await storage.close()
    with pytest.raises(StoreError):
        await storage.current_session("ann")


async def test_reads_and_writes_go_on_side_by_side(kind: Kind, tmp_path: Path) -> None:
    runner = ThreadRunner()
    storage = Facade(kind.make(tmp_path), runner).storage
    await storage.open()
    await storage.commit([Transaction([Begin("ann", "s1", 0)])])
    stored = 0

    async def write() -> None:
        nonlocal stored
        for n in range(100):
            (outcome,) = await storage.commit([one(f"m{n}")])
            assert isinstance(outcome, Committed)
            stored = outcome.last

    async def read() -> None:
        while stored < 101:
            upto = stored
            chunk = await storage.read("ann", "s1", 1, max(upto, 1), 1000)
            assert [message.seq for message in chunk.messages] == list(range(2, upto + 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        for _ in range(4):
            nursery.start_soon(read)
    await storage.close()
    runner.close()


async def test_a_failed_write_is_an_outcome_and_trouble_until_one_works(facade: Facade) -> None:
    storage = facade.storage
    await storage.open()
    facade.database.abandon()
    (outcome,) = await storage.commit([one("a")])
    assert isinstance(outcome, Refused)
    assert outcome.reason == Reason.FAILED
    assert trouble(storage) == outcome.message
    with pytest.raises(StoreError):
        await storage.probe()
    with pytest.raises(StoreError):
        await storage.note(NO_NOTES)
    await storage.open()
    await storage.probe()
    assert trouble(storage) is None
    assert storage.commits == 0


async def test_a_refusal_is_no_trouble(facade: Facade) -> None:
    storage = facade.storage
    await storage.open()
    await storage.commit([one("a")])
    (outcome,) = await storage.commit([Transaction([Append("@ann", "a", b"", b"other")])])
    assert isinstance(outcome, Refused)
    assert trouble(storage) is None
    await storage.commit([Transaction([], abandoned=True)])
    assert trouble(storage) is None


async def test_a_hook_is_a_slow_or_a_broken_disk(kind: Kind, tmp_path: Path, autojump_clock: object) -> None:
    broken = False

    async def hook(kind_of_call: str) -> None:
        await trio.sleep(3 if kind_of_call == "write" else 0)
        if broken:
            raise StoreError("no space", full=True)

    facade = Facade(kind.make(tmp_path), InlineRunner(hook))
    with contextlib.closing(facade.database):
        storage = facade.storage
        await storage.open()
        await storage.commit([one("a")])
        assert storage.last_commit_ms == 3000
        broken = True
        (outcome,) = await storage.commit([one("b")])
        assert isinstance(outcome, Refused)
        assert (outcome.reason, outcome.message) == (Reason.FULL, "no space")
        assert trouble(storage) == "no space"
        broken = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(storage.probe)
            await trio.sleep(2)
            assert storage.writing_seconds == pytest.approx(2)
        assert trouble(storage) is None
        assert not storage.writing_seconds


class HangingDatabase:
    """Wraps a database whose commits hang until they are let go."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.hanging = threading.Event()
        self.go_on = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._database, name)

    def commit(self, batch: Sequence[Transaction], now: float) -> list[Outcome]:
        self.hanging.set()
        self.go_on.wait(10)
        return self._database.commit(batch, now)


async def test_an_abandoned_commit_ends_all_writing(kind: Kind, tmp_path: Path) -> None:
    database = kind.make(tmp_path)
    hanging = HangingDatabase(database)
    runner = ThreadRunner()
    storage = Storage(hanging, runner, StillClock())  # type: ignore[arg-type]
    await storage.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.commit, [one("a")])
        await trio.to_thread.run_sync(hanging.hanging.wait, 10)
        # This one has not begun: to cancel it leaves no doubt.
        with trio.move_on_after(0.01) as waiting:
            await storage.commit([one("b")])
        assert waiting.cancelled_caught
        assert trouble(storage) is None
        nursery.cancel_scope.cancel()
    assert trouble(storage) is not None
    (outcome,) = await storage.commit([one("c")])
    assert isinstance(outcome, Refused)
    with pytest.raises(StoreError, match="not closed in order"):
        await storage.close()
    hanging.go_on.set()
    # The thread ends by itself; what it did is there after a start.
    await storage.note(NO_NOTES)
    found = [await storage.find_message(id_) for id_ in ("a", "b", "c")]
    assert [message is not None for message in found] == [True, False, False]
    database.abandon()
    runner.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
async def test_only_what_nobody_waits_for_has_a_low_priority() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    runner, own = ThreadRunner(), niceness()
    try:
        assert [await runner.write(niceness), await runner.read(niceness)] == [own, own]
        assert await runner.aside(niceness) == min(own + ASIDE_NICENESS, 19)
    finally:
        runner.close()
