from __future__ import annotations

import resource
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mythos_trio.core.errors import Refusal
from mythos_trio.core.session import State
from mythos_trio.core.verdicts import Status
from mythos_trio.explain import STOPPED
from mythos_trio.machine import Machine, container_memory
from mythos_trio.monitor import MAX_RECEIVERS, MAX_UNHEALTHY, Stage
from mythos_trio.storage import Expired
from tests.support.fakes import NOW, FakeConnection, Stand, make_row


@pytest.fixture
async def stand() -> Stand:
    return Stand()


# Health.


async def test_health_of_a_server_that_is_well(stand: Stand) -> None:
    status, answer = await stand.monitor.health()
    assert status is Status.HEALTHY
    assert answer["status"] == "healthy"
    assert answer["timestamp"] == "2023-11-14T22:13:20.000Z"
    assert answer["server_id"] == "node-1"
    assert answer["version"]
    assert answer["uptime_seconds"] >= 0


async def test_uptime_is_of_the_clock_that_does_not_jump(stand: Stand, autojump_clock: MockClock) -> None:
    stand.clock.posix += 1_000_000
    await trio.sleep(30)
    _, answer = await stand.monitor.health()
    assert answer["uptime_seconds"] == 30


async def test_detailed_health_has_every_component_with_measured_values(stand: Stand) -> None:
    _, answer = await stand.monitor.health_detailed()
    components = answer["components"]
    assert set(components) == {"database", "dispatcher", "health_checker", "memory", "event_loop", "disk", "ledger"}
    for component in components.values():
        assert component["status"] == "healthy"
        assert component["why"] is None
        assert len(component) > 2, "no measured values"
    assert components["database"]["driver"] == "sqlite3"
    assert components["dispatcher"]["capacity"] == 4096
    assert components["memory"]["percent"] == 40.0


async def assert_component(stand: Stand, name: str, status: Status, word: str) -> None:
    """*name* alone is as *status* says, and it decides the whole."""
    found, answer = await stand.monitor.health_detailed()
    component = answer["components"].pop(name)
    assert component["status"] == status.value
    assert word in component["why"]
    assert {other["status"] for other in answer["components"].values()} == {"healthy"}
    assert found is status
    assert answer["why"] == component["why"]
    assert (await stand.monitor.health())[0] is status


async def test_trouble_of_the_store_is_unhealthy(stand: Stand) -> None:
    stand.storage.trouble = "database is locked"
    await assert_component(stand, "database", Status.UNHEALTHY, "locked")


async def test_store_that_cannot_be_read_is_unhealthy(stand: Stand) -> None:
    stand.storage.error = "disk I/O error"
    await assert_component(stand, "database", Status.UNHEALTHY, "I/O")


async def test_store_that_hangs_does_not_hang_the_health_check(stand: Stand, autojump_clock: MockClock) -> None:
    stand.storage.hangs = True
    with trio.fail_after(10):
        await assert_component(stand, "database", Status.UNHEALTHY, "did not answer")


async def test_store_that_is_nearly_full(stand: Stand) -> None:
    stand.storage.bytes_in_use = stand.settings.max_store_bytes
    await assert_component(stand, "database", Status.DEGRADED, "full")


async def test_queue_that_is_nearly_full(stand: Stand) -> None:
    stand.dispatcher.queued = 4000
    await assert_component(stand, "dispatcher", Status.DEGRADED, "wait")


async def test_checker_that_is_stuck(stand: Stand, autojump_clock: MockClock) -> None:
    await trio.sleep(100)
    await assert_component(stand, "health_checker", Status.DEGRADED, "100 s ago")


async def test_high_memory(stand: Stand) -> None:
    stand.machine.percent = 91
    await assert_component(stand, "memory", Status.DEGRADED, "High memory usage")


async def test_late_event_loop(stand: Stand) -> None:
    for _ in range(100):
        stand.statistics.loop_lag(900)
    await assert_component(stand, "event_loop", Status.DEGRADED, "event loop")


async def test_full_disk(stand: Stand) -> None:
    stand.machine.free_bytes = 1 << 20
    await assert_component(stand, "disk", Status.DEGRADED, "disk")


async def test_figures_are_not_read_for_every_health_check(stand: Stand, autojump_clock: MockClock) -> None:
    for _ in range(5):
        await stand.monitor.health()
    assert stand.storage.asked_figures == 1
    await trio.sleep(5)
    await stand.monitor.health()
    assert stand.storage.asked_figures == 2


@pytest.mark.parametrize("stage", list(Stage))
async def test_ready_only_between_start_and_drain(stand: Stand, stage: Stage) -> None:
    stand.monitor.stage = stage
    ready, answer = stand.monitor.ready()
    assert ready is (stage is Stage.READY)
    assert answer["stage"] == stage.value
    assert answer["ready"] is ready


async def test_watch_notes_the_health_of_connections(stand: Stand, autojump_clock: MockClock) -> None:
    stand.connect(stand.session("alice"), "c1", "websocket")
    with trio.move_on_after(25):
        await stand.monitor.watch()
    trends = stand.monitor.connection_health()["health_trends"]
    assert trends["last_hour"], "no sample"


# Players and connections.


def make_crowd(stand: Stand) -> None:
    """One player on both, one on each, one link-dead; one connection is not well."""
    both = stand.session("both")
    stand.connect(both, "c1", "websocket")
    stand.connect(both, "c2", "sse", why="3 messages behind")
    stand.connect(stand.session("web"), "c3", "websocket")
    stand.connect(stand.session("sse"), "c4", "sse")
    stand.session("gone")


async def test_stats(stand: Stand) -> None:
    make_crowd(stand)
    stats = stand.monitor.stats()
    assert stats["total_players"] == 3
    assert stats["total_connections"] == 4
    assert stats["connection_distribution"] == {"websocket_only": 1, "sse_only": 1, "dual_connections": 1}
    assert stats["session_statistics"] == {"total_sessions": 4, "average_connections_per_session": 1.0}
    assert stats["health_statistics"] == {
        "healthy_connections": 3,
        "unhealthy_connections": 1,
        "health_percentage": 75.0,
    }
    assert stats["server_id"] == "node-1"
    assert stats["nodes"] == {"node-1": 4}


async def test_stats_of_an_empty_server(stand: Stand) -> None:
    stats = stand.monitor.stats()
    assert stats["total_players"] == stats["total_connections"] == 0
    assert stats["session_statistics"]["average_connections_per_session"] == 0
    assert stats["health_statistics"]["health_percentage"] == 100


async def test_unknown_player_is_offline(stand: Stand) -> None:
    answer = await stand.monitor.player("nobody")
    assert answer["session_id"] is None
    assert answer["presence"] == {"status": "offline", "last_seen": None, "total_connections": 0}
    assert answer["connections"]["websocket"] == {
        "count": 0,
        "connection_ids": [],
        "last_activity": None,
        "connections": [],
    }
    stats = answer["message_delivery_stats"]
    assert [stats[name] for name in ("sent", "delivered", "acknowledged", "pending", "failed")] == [0] * 5
    assert stats["last_failure"] is None


async def test_player_online_on_both(stand: Stand) -> None:
    make_crowd(stand)
    session = stand.hub.sessions["both"]
    session.deliveries.replaced = 3
    session.deliveries.wrote(104, 4)
    session.deliveries.confirm(104)
    session.deliveries.fail(NOW - 5, "gap: retention")
    cast(FakeConnection, session.connections["c1"]).behind = 2
    cast(FakeConnection, session.connections["c2"]).behind = 3
    answer = await stand.monitor.player("both")
    assert answer["session_id"] == "s1"
    assert answer["presence"] == {
        "status": "online",
        "last_seen": "2023-11-14T22:13:19.000Z",
        "total_connections": 2,
    }
    assert answer["health"] == {
        "overall_health": "degraded",
        "websocket_health": "healthy",
        "sse_health": "unhealthy",
    }
    assert answer["connections"]["sse"]["connection_ids"] == ["c2"]
    one = answer["connections"]["websocket"]["connections"][0]
    assert one["opened"] == "2023-11-14T22:13:10.000Z"
    assert one["server_id"] == "node-1"
    assert {"connection_id", "written", "acknowledged", "behind", "replaced", "waiting_for"} <= set(one)
    assert answer["message_delivery_stats"] == {
        "sent": 9,
        "delivered": 4,
        "replaced": 3,
        "acknowledged": 4,
        "pending": 2,
        "failed": 1,
        "delivery_success_rate": 80.0,
        "last_failure": {"when": "2023-11-14T22:13:15.000Z", "reason": "gap: retention"},
    }


async def test_online_player_is_told_of_although_the_store_cannot_be_read(stand: Stand) -> None:
    make_crowd(stand)
    stand.storage.error = "disk I/O error"
    assert (await stand.monitor.player("both"))["presence"]["status"] == "online"
    with pytest.raises(Refusal) as refused:
        await stand.monitor.player("nobody")
    assert refused.value.status == 503
    assert refused.value.error_type == "persistence_error"
    assert refused.value.retry_ms


async def test_store_that_hangs_is_a_503(stand: Stand, autojump_clock: MockClock) -> None:
    stand.storage.hangs = True
    with pytest.raises(Refusal, match="did not answer"):
        await stand.monitor.session("nobody")


async def test_linkdead_and_offline_players_have_mail(stand: Stand) -> None:
    session = stand.session("gone")
    stand.storage.rows["away"] = make_row("away", "s2", seen=101)
    for seq in (101, 102, 103):
        stand.message(f"g{seq}", seq, "@gone")
        stand.message(f"a{seq}", seq, "@away")
    session.deliveries.wrote(101, 1)
    gone = await stand.monitor.player("gone")
    assert gone["presence"]["status"] == "linkdead"
    assert gone["presence"]["last_seen"] == "2023-11-14T22:12:30.000Z"
    assert (gone["message_delivery_stats"]["delivered"], gone["message_delivery_stats"]["pending"]) == (1, 2)
    away = await stand.monitor.player("away")
    assert away["session_id"] == "s2"
    assert away["presence"]["status"] == "offline"
    assert away["message_delivery_stats"]["pending"] == 2
    stand.hub.mark("away", "s2", 102)
    assert (await stand.monitor.player("away"))["message_delivery_stats"]["pending"] == 1


async def test_session(stand: Stand) -> None:
    make_crowd(stand)
    assert await stand.monitor.session("both") == {
        "player_id": "both",
        "session_id": "s1",
        "session_created": "2023-11-14T22:11:40.000Z",
        "active_connections": 2,
        "connection_types": ["sse", "websocket"],
        "owner": "node-1",
        "state": "online",
        "server_id": "node-1",
        "timestamp": "2023-11-14T22:13:20.000Z",
    }
    stand.storage.rows["away"] = make_row("away", "s2")
    away = await stand.monitor.session("away")
    assert (away["session_id"], away["owner"], away["state"]) == ("s2", None, "offline")
    nobody = await stand.monitor.session("nobody")
    assert nobody["session_id"] is nobody["session_created"] is nobody["state"] is None


# Explaining a message.


async def test_unknown_message_is_404(stand: Stand) -> None:
    with pytest.raises(Refusal) as refused:
        await stand.monitor.message("m1")
    assert refused.value.status == 404


async def test_expired_message_says_so(stand: Stand) -> None:
    stand.storage.expired["m1"] = Expired(7, "#ooc", NOW - 60)
    answer = await stand.monitor.message("m1")
    assert (answer["state"], answer["seq"], answer["target"]) == ("expired", 7, {"channel": "ooc"})
    assert "2023-11-14T22:12:20.000Z" in answer["why"]
    assert "MESSAGE_RETENTION" in answer["why"]
    assert answer["receivers"] == []


async def test_stored_message_and_the_states_of_its_receivers(stand: Stand) -> None:
    session = stand.session("alice")
    stand.connect(session, "got", "websocket", written=105, acknowledged=105, opened_at=NOW - 60)
    stand.connect(session, "sent", "sse", written=105, opened_at=NOW - 60)
    stand.connect(session, "slow", "sse", written=101, behind=2, waiting_for="the client to read")
    session.seen = 105
    for above, upto, at in ((101, 103, NOW - 20), (103, 105, NOW - 1), (105, 106, NOW)):
        stand.dispatcher.rounds.add(above, upto, at)
    session.sightings.add(100, 105, NOW)
    session.connections["got"].acknowledgements.add(0, 105, NOW - 0.5)
    stand.message("m1", 104, "@alice", session.row)
    answer = await stand.monitor.message("m1")
    assert (answer["id"], answer["seq"], answer["target"]) == ("m1", 104, {"player_id": "alice"})
    assert answer["accepted_at"] == "2023-11-14T22:13:19.000Z"
    assert answer["stored_at"] == "2023-11-14T22:13:19.000Z"
    assert answer["receivers_total"] == 1
    got, sent, slow = answer["receivers"]
    assert (got["state"], got["why"], got["transport"]) == ("acknowledged", None, "websocket")
    assert got["written_at"] == "2023-11-14T22:13:19.000Z"
    assert got["acknowledged_at"] == "2023-11-14T22:13:19.500Z"
    assert (sent["state"], sent["acknowledged_at"]) == ("acknowledged", "2023-11-14T22:13:20.000Z")
    assert sent["why"] == "by the client's kernel, or on another connection"
    assert (slow["state"], slow["written_at"]) == ("pending", None)
    assert "2 messages behind" in slow["why"]
    assert "the client to read" in slow["why"]


async def only_receiver(stand: Stand) -> dict[str, Any]:
    (receiver,) = (await stand.monitor.message("m1"))["receivers"]
    return cast(dict[str, Any], receiver)


async def test_what_was_written_before_this_start_is_not_known(stand: Stand) -> None:
    session = stand.session("alice")
    stand.message("m1", 90, "@alice", session.row)
    receiver = await only_receiver(stand)
    assert receiver["state"] == "unknown"
    assert receiver["why"].startswith(STOPPED)
    stand.connect(session, "c1", "sse", written=100, acknowledged=100)
    receiver = await only_receiver(stand)
    assert (receiver["state"], receiver["written_at"]) == ("acknowledged", None)
    assert f"written {STOPPED}" in receiver["why"]


@pytest.mark.parametrize(
    ("change", "state", "word"),
    [
        ({}, "pending", "mail"),
        ({"seen": 101}, "acknowledged", "gone"),
        ({"ended_at": NOW, "end_reason": "switched"}, "ended", "switched"),
        ({"ended_at": NOW, "end_reason": "switched", "seen": 101}, "acknowledged", "gone"),
    ],
)
async def test_sessions_that_are_not_live(stand: Stand, change: dict[str, Any], state: str, word: str) -> None:
    stand.message("m1", 101, "#ooc", make_row("away", "s2", **change))
    receiver = await only_receiver(stand)
    assert receiver["state"] == state
    assert word in receiver["why"]
    assert receiver["connection_id"] is None


async def test_linkdead_receiver(stand: Stand) -> None:
    stand.message("m1", 101, "*", stand.session("gone").row)
    receiver = await only_receiver(stand)
    assert receiver["state"] == "pending"
    assert "link-dead" in receiver["why"]


async def test_receivers_are_bounded_and_counted(stand: Stand) -> None:
    stand.message("m1", 101, "*", *(make_row(f"p{i}", "s") for i in range(250)))
    answer = await stand.monitor.message("m1")
    assert len(answer["receivers"]) == MAX_RECEIVERS
    assert answer["receivers_total"] == 250
    assert answer["target"] == {"broadcast": True}


# Monitoring pages.


async def test_dual_connections(stand: Stand) -> None:
    make_crowd(stand)
    stand.statistics.session("created")
    stand.statistics.session("created")
    stand.statistics.session("replaced")
    answer = stand.monitor.dual_connections()
    assert answer["connection_distribution"] == {
        "websocket_only": 1,
        "sse_only": 1,
        "dual_connections": 1,
        "dual_connection_percentage": 33.33,
    }
    assert answer["connection_health"]["healthy"] == 3
    analytics = answer["session_analytics"]
    assert (analytics["total_sessions"], analytics["linkdead"]) == (4, 1)
    assert (analytics["created"], analytics["replaced"]) == (2, 1)
    assert (analytics["recovered"], analytics["ended"]) == (0, 0)
    assert analytics["average_connections_per_session"] == 1.0
    assert analytics["average_age_seconds"] == 100.0
    assert answer["server_id"] == "node-1"


async def test_performance(stand: Stand) -> None:
    stand.statistics.established(trio.current_time(), "websocket", 12.0)
    stand.statistics.published(2)
    stand.statistics.delivered(2, [3.0])
    stand.statistics.ran()
    stand.statistics.to_be_repeated()
    stand.statistics.ran()
    answer = stand.monitor.performance()
    for transport, count in (("websocket", 1), ("sse", 0)):
        establishment = answer["connection_establishment"][transport]
        assert establishment["count"] == count
        assert {"avg_ms", "p50_ms", "p95_ms", "p99_ms", "max_ms"} <= set(establishment)
    delivery = answer["message_delivery"]
    assert (delivery["total_messages"], delivery["delivered"], delivery["failed"]) == (2, 2, 0)
    assert delivery["delivery_success_rate"] == 100
    system = answer["system_performance"]
    assert set(system) == {"cpu_percent", "memory_rss_bytes", "open_fds", "tasks", "loop_lag_ms"}
    assert system["open_fds"] > 0
    assert system["tasks"] >= 1
    assert answer["rates"]
    assert answer["transactions"] == {"runs": 2, "repeated": 1}


async def test_connection_health(stand: Stand, autojump_clock: MockClock) -> None:
    make_crowd(stand)
    await trio.sleep(700)
    stand.connect(stand.session("new"), "c5", "sse")
    answer = stand.monitor.connection_health()
    assert answer["overall_health"] == {
        "status": "degraded",
        "healthy": 4,
        "unhealthy": 1,
        "health_percentage": 80.0,
    }
    by_type = answer["connection_type_health"]
    assert by_type["websocket"] == {"healthy": 2, "unhealthy": 0, "health_percentage": 100.0}
    assert by_type["sse"] == {"healthy": 2, "unhealthy": 1, "health_percentage": 66.67}
    assert by_type["unhealthy"] == [{"connection_id": "c2", "player_id": "both", "why": "3 messages behind"}]
    assert {"last_hour", "last_24_hours"} <= set(answer["health_trends"])
    ages = answer["connection_age_distribution"]
    assert (ages["under_1_minute"], ages["under_1_hour"]) == (1, 4)
    assert sum(ages.values()) == 5


async def test_unhealthy_connections_are_listed_up_to_a_bound(stand: Stand) -> None:
    session = stand.session("alice")
    for number in range(MAX_UNHEALTHY + 10):
        stand.connect(session, f"c{number}", "sse", why="no answer to the last ping")
    answer = stand.monitor.connection_health()
    assert len(answer["connection_type_health"]["unhealthy"]) == MAX_UNHEALTHY
    assert answer["overall_health"]["status"] == "unhealthy"


async def test_errors(stand: Stand) -> None:
    stand.statistics.error("delivery_error", "Message delivery failed", "alice", NOW)
    answer = stand.monitor.errors()
    assert answer["error_breakdown"]["delivery_error"] == 1
    assert answer["recent_errors"][-1]["player_id"] == "alice"
    assert "rates" in answer


# Tasks and leaks.


async def test_tasks_of_players_and_the_tree(stand: Stand, nursery: trio.Nursery) -> None:
    session = stand.session("alice")
    async with trio.open_nursery() as players:
        session.nursery = players
        stand.connect(session, "c1", "websocket")
        players.start_soon(trio.sleep_forever, name="websocket of alice")
        players.start_soon(nested, name="handlers of alice")
        await wait_all_tasks_blocked()
        answer = await stand.monitor.tasks()
        alice = answer["players"]["alice"]
        assert alice["session_id"] == "s1"
        assert alice["tasks"] == 3
        assert alice["names"] == {"websocket of alice": 1, "handlers of alice": 1, "the nested one": 1}
        (connection,) = alice["connections"]
        assert (connection["connection_id"], connection["unsent_bytes"]) == ("c1", 0)
        assert answer["leaks"] == 0
        assert answer["total_tasks"] == trio.lowlevel.current_statistics().tasks_living
        assert "websocket of alice" in str(answer["tree"])
        assert (await stand.monitor.tasks("bob"))["players"] == {}
        assert (await stand.monitor.tasks("alice"))["tree"] is None
        players.cancel_scope.cancel()


async def nested() -> None:
    async with trio.open_nursery() as nursery:  # noqa: ASYNC112
        nursery.start_soon(trio.sleep_forever, name="the nested one")


async def test_shown_tasks_are_bounded(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mythos_trio.monitor.MAX_TASKS", 10)
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(trio.sleep_forever, name="one of many")
        await wait_all_tasks_blocked()
        answer = await stand.monitor.tasks()
        nursery.cancel_scope.cancel()
    assert answer["total_tasks"] > 30
    assert str(answer["tree"]).count("one of many") <= 10
    assert answer["left_out"] == answer["total_tasks"] - 10


async def leak_kinds(stand: Stand) -> list[str]:
    answer = await stand.monitor.tasks()
    assert answer["leaks"] == len(answer["leaked"])
    return [leak["kind"] for leak in answer["leaked"]]


async def test_stuck_session_is_a_leak_until_its_tasks_have_ended(stand: Stand) -> None:
    session = stand.session("alice")
    stand.hub.stuck.append(cast(Any, session))
    assert await leak_kinds(stand) == ["session"]
    stand.hub.remove(cast(Any, session))
    session.finished.set()
    assert await leak_kinds(stand) == []


async def test_connection_of_a_session_that_is_over_is_a_leak(stand: Stand) -> None:
    session = stand.session("alice")
    stand.connect(session, "c1", "sse")
    assert await leak_kinds(stand) == []
    stand.hub.remove(cast(Any, session))
    assert await leak_kinds(stand) == ["connection"]
    stand.session("alice", "s2")
    (leak,) = (await stand.monitor.tasks())["leaked"]
    assert leak.pop("age_seconds") >= 0
    assert leak == {
        "kind": "connection",
        "name": "connection c1",
        "player_id": "alice",
        "session_id": "s1",
        "connection_id": "c1",
        "why": "its session is over",
    }


async def test_subscription_of_a_session_that_is_over_is_a_leak(stand: Stand) -> None:
    session = stand.session("alice")
    stand.hub.channels["ooc"] = {cast(Any, session): None}
    assert await leak_kinds(stand) == []
    stand.hub.remove(cast(Any, session))
    assert await leak_kinds(stand) == ["subscription"]


async def test_linkdead_sessions_are_no_leaks(stand: Stand) -> None:
    make_crowd(stand)
    assert stand.hub.sessions["gone"].state is State.LINKDEAD
    assert await leak_kinds(stand) == []


# The machine.


def test_machine_tells_true_figures(tmp_path: Path) -> None:
    machine = Machine()
    memory = machine.memory()
    assert 0 < memory.percent <= 100
    assert 0 < memory.rss_bytes < memory.limit_bytes
    assert machine.cpu_percent() >= 0
    before = machine.open_files()
    with (tmp_path / "file").open("w"):
        assert machine.open_files() == before + 1
    disk = machine.disk(tmp_path / "not" / "there.db")
    assert disk.path == str(tmp_path)
    assert 0 < disk.free_bytes <= disk.total_bytes


def test_machine_without_file_descriptors_tells_what_it_knew() -> None:
    """The health checker and the monitoring pages ask, and a server that is short of descriptors must not end of it."""
    machine = Machine()
    known = machine.memory(), machine.cpu_percent(), machine.open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        machine._cpu_at -= 60
        told = machine.memory(), machine.cpu_percent(), machine.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert told == known
    assert machine.open_files() > 0


def make_cgroup(path: Path, limit: str, current: int, inactive: int) -> Path:
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(f"{current}\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
    return path


def test_memory_of_a_container_is_what_it_may_use(tmp_path: Path) -> None:
    cgroup = make_cgroup(tmp_path, "1000", 950, 50)
    memory = container_memory(cgroup)
    assert memory is not None
    assert (memory.percent, memory.available_bytes, memory.limit_bytes) == (90.0, 100, 1000)
    assert Machine(cgroup).memory().percent == 90.0


def test_container_without_a_limit_is_the_machine(tmp_path: Path) -> None:
    assert container_memory(make_cgroup(tmp_path, "max", 950, 50)) is None
    assert container_memory(tmp_path / "none") is None
    too_much = make_cgroup(tmp_path, str(1 << 60), 950, 50)
    assert Machine(too_much).memory().limit_bytes < 1 << 60
