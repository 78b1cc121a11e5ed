"""Did it arrive? Every state of a receiver, on a whole server in virtual time."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from mythos_trio.connection import Connection
from mythos_trio.explain import FORGOTTEN, STOPPED, expired_by_its_time, moment
from mythos_trio.hub import MAX_DEPARTED
from mythos_trio.link import LOST
from tests.support.games import Puppet
from tests.support.play import Client, World, play

PATIENT: dict[str, Any] = {"write_timeout": 5000, "pong_timeout": 5000, "connection_timeout": 50_000}
# No ping between the steps.
CALM: dict[str, Any] = {"health_check_interval": 300, "pong_timeout": 100}
BIG = "x" * 60_000


async def opened(
    world: World, player: str = "ann", query: str = "", transport: str = "websocket", *, observable: bool = False
) -> Any:
    client: Any = await (world.websocket if transport == "websocket" else world.sse)(player, query)
    await client.until_type("welcome")
    # As behind a proxy: what the kernel says of acknowledged bytes is not the client's own doing.
    connection_of(world, client).observable = observable
    return client


async def publish(world: World, id_: str, content: object = "x", **target: Any) -> dict[str, Any]:
    return await world.publish(
        **(target or {"player_id": "ann"}), message={"type": "line", "id": id_, "content": content}
    )


async def explain(world: World, id_: str) -> dict[str, Any]:
    status, answer = await world.request("GET", f"/api/messages/{id_}")
    assert status == 200, answer
    return cast(dict[str, Any], answer)


async def receivers(world: World, id_: str) -> list[dict[str, Any]]:
    answer = await explain(world, id_)
    assert answer["state"] == "stored"
    return cast(list[dict[str, Any]], answer["receivers"])


async def only(world: World, id_: str) -> dict[str, Any]:
    (receiver,) = await receivers(world, id_)
    return receiver


def posix(text: str | None) -> float:
    assert text is not None
    return datetime.fromisoformat(text).timestamp()


def now(world: World) -> float:
    return world.server.clock.now()


def connection_of(world: World, client: Client) -> Connection:
    return world.server.hub.connections[client.received[0]["connection_id"]]


def quiet(client: Client) -> None:
    """What it is sent stays unacknowledged in the server's kernel."""
    client.wire._other.stall()


async def fill(world: World, connection: Connection) -> str:
    """Until the kernel takes no more; the id of the message that it has not taken all of."""
    for number in range(20):
        await publish(world, f"big{number}", BIG)
        if connection.link.unsent:
            return f"big{number}"
    raise AssertionError("it takes all of it")


async def test_written_then_acknowledged(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **CALM) as world:
        ann = await opened(world)
        await trio.sleep(5)
        at = now(world)
        await publish(world, "m1")
        await ann.until(lambda m: m.get("id") == "m1")
        await trio.sleep(7)
        got = await only(world, "m1")
        assert (got["state"], got["connection_id"]) == ("written", ann.received[0]["connection_id"])
        assert posix(got["written_at"]) == pytest.approx(at, abs=0.1)
        assert (got["acknowledged_at"], got["why"]) == (None, "the client has not confirmed it yet")
        await ann.say({"type": "ack", "position": ann.position})
        await trio.sleep(1)
        acknowledged = now(world)
        await trio.sleep(100)
        got = await only(world, "m1")
        assert (got["state"], got["why"]) == ("acknowledged", None)
        assert posix(got["acknowledged_at"]) == pytest.approx(acknowledged, abs=1.1)
        assert posix(got["written_at"]) == pytest.approx(at, abs=0.1)


async def test_what_one_connection_confirms_has_arrived(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **CALM) as world:
        ann, stream = await opened(world), await opened(world, transport="sse")
        await publish(world, "m1")
        await stream.until(lambda m: m.get("id") == "m1")
        await ann.until(lambda m: m.get("id") == "m1")
        await ann.say({"type": "ack", "position": ann.position})
        await trio.sleep(1)
        first, second = await receivers(world, "m1")
        assert (first["transport"], first["state"], first["why"]) == ("websocket", "acknowledged", None)
        assert (second["transport"], second["state"]) == ("sse", "acknowledged")
        assert second["why"] == "by the client's kernel, or on another connection"
        assert second["acknowledged_at"] == first["acknowledged_at"]


async def test_the_client_s_kernel_confirms(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **CALM) as world:
        ann = await opened(world, observable=True)
        await publish(world, "m1")
        await ann.until(lambda m: m.get("id") == "m1")
        at = now(world)
        await trio.sleep(100)
        got = await only(world, "m1")
        assert (got["state"], got["why"]) == ("acknowledged", "by the client's kernel, or on another connection")
        assert posix(got["acknowledged_at"]) == pytest.approx(at, abs=1.5)


async def test_mail_waits_and_is_written_when_the_player_comes(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), linkdead_grace=20, **CALM) as world:
        ann = await opened(world)
        position = ann.position
        ann.close()
        await trio.sleep(2)
        await publish(world, "m1")
        got = await only(world, "m1")
        assert (got["state"], got["connection_id"]) == ("pending", None)
        assert "link-dead" in got["why"]
        await trio.sleep(60)
        assert "offline" in (await only(world, "m1"))["why"]
        at = now(world)
        ann = await opened(world, query=f"position={position}")
        await ann.until(lambda m: m.get("id") == "m1")
        await trio.sleep(50)
        got = await only(world, "m1")
        assert got["state"] == "written"
        assert posix(got["written_at"]) == pytest.approx(at, abs=0.5), "not when the round was, but when it was sent"


async def test_a_connection_that_is_behind(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world)
        quiet(ann)
        connection = connection_of(world, ann)
        await fill(world, connection)
        await publish(world, "m1")
        got = await only(world, "m1")
        assert (got["state"], got["written_at"]) == ("pending", None)
        assert "waiting for the client to read" in got["why"]
        await trio.sleep(100)
        ann.wire._other.stall(False)
        at = now(world)
        await ann.until(lambda m: m.get("id") == "m1")
        await trio.sleep(200)
        got = await only(world, "m1")
        assert got["state"] == "written"
        assert posix(got["written_at"]) == pytest.approx(at, abs=1)


async def test_taken_but_waiting_in_the_server(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world)
        quiet(ann)
        connection = connection_of(world, ann)
        got = await only(world, await fill(world, connection))
        assert got["state"] == "written"
        assert got["why"] == f"{connection.link.unsent} bytes wait here until the client reads on; not confirmed yet"


async def test_replaced_by_a_newer_one(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world)
        quiet(ann)
        connection = connection_of(world, ann)
        await fill(world, connection)
        bars = [
            await world.publish(
                player_id="ann", message={"type": "bar", "id": f"bar{hits}", "content": hits, "replace_key": "hp"}
            )
            for hits in (3, 2, 1)
        ]
        ann.wire._other.stall(False)
        await ann.until(lambda m: m.get("id") == "bar1")
        for hits in (3, 2):
            got = await only(world, f"bar{hits}")
            assert got["state"] == "replaced"
            assert f"{bars[2]['seq']}, which replaces it" in got["why"]
            assert got["written_at"] is not None
        assert (await only(world, "bar1"))["state"] in ("written", "acknowledged")


async def test_a_connection_that_was_cut(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **PATIENT) as world:
        ann = await opened(world)
        await publish(world, "early")
        await ann.until(lambda m: m.get("id") == "early")
        await trio.sleep(1)
        quiet(ann)
        connection = connection_of(world, ann)
        await publish(world, "m1")
        await fill(world, connection)
        await publish(world, "m2")
        await trio.sleep(1)
        connection.link.reset(LOST, by="network")
        await trio.sleep(3)
        sent, waits = await receivers(world, "m1")
        assert (sent["state"], waits["state"]) == ("written", "pending")
        assert "before the client had confirmed it" in sent["why"]
        assert LOST.reason in sent["why"]
        cut, waits = await receivers(world, "m2")
        assert (cut["state"], cut["written_at"], waits["state"]) == ("cut", None, "pending")
        assert "before it was written" in cut["why"]
        # It comes back, behind what it has: only the connections that carried a message are told of.
        again = await opened(world, query=f"position={ann.position}")
        await again.until(lambda m: m.get("id") == "m2")
        assert [entry["state"] for entry in await receivers(world, "m2")] == ["cut", "written"]
        assert len(await receivers(world, "early")) == 1
        await again.say({"type": "ack", "position": again.position})
        await trio.sleep(1)
        first, second = await receivers(world, "m1")
        assert (first["state"], second["state"]) == ("acknowledged", "acknowledged")
        assert first["why"].startswith("by the client's kernel, or on another connection; the connection ended at")


async def test_a_connection_that_is_gone_and_had_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), linkdead_grace=10, **CALM) as world:
        ann = await opened(world)
        await publish(world, "m1")
        await ann.until(lambda m: m.get("id") == "m1")
        await ann.say({"type": "ack", "position": ann.position})
        await trio.sleep(1)
        ann.close()
        await trio.sleep(60)
        got = await only(world, "m1")  # she is offline
        assert (got["state"], got["connection_id"]) == ("acknowledged", ann.received[0]["connection_id"])
        assert got["acknowledged_at"] is not None
        assert got["written_at"] is not None
        assert "the connection ended at" in got["why"]
        for _ in range(MAX_DEPARTED + 2):
            other = await opened(world)
            other.close()
            await trio.sleep(2)
        (known,) = world.server.hub.departed.values()
        assert len(known) == MAX_DEPARTED
        got = await only(world, "m1")
        assert (got["state"], got["connection_id"]) == ("acknowledged", None)
        assert got["why"].startswith("it arrived on a connection that is gone")


async def test_a_connection_that_begins_behind_the_message(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **CALM) as world:
        ann = await opened(world)
        await publish(world, "m1")
        await ann.until(lambda m: m.get("id") == "m1")
        ann.close()
        await trio.sleep(2)
        world.server.hub.departed.clear()
        await opened(world, query=f"position={ann.position}")
        got = await only(world, "m1")
        assert (got["state"], got["connection_id"]) == ("acknowledged", None)


async def test_a_session_that_was_replaced(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **CALM) as world:
        ann = await opened(world)
        await world.request("POST", "/api/connections/ann/subscriptions", {"subscribe": ["den"]})
        ann.close()
        await trio.sleep(2)
        await publish(world, "m1", channel="den")
        await publish(world, "mail")
        new = await opened(world, query="session_id=second")
        got = await only(world, "m1")
        assert (got["state"], got["session_id"]) == ("ended", ann.received[0]["session_id"])
        assert "switched" in got["why"]
        await new.until(lambda m: m.get("id") == "mail")
        states = {entry["session_id"]: entry["state"] for entry in await receivers(world, "mail")}
        assert states["second"] == "written", "mail goes to the next session"


async def test_receivers_of_a_channel_are_those_of_then(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), **CALM) as world:
        for name in ("ann", "bob", "eve"):
            await opened(world, name)
        for name in ("ann", "bob"):
            await world.request("POST", f"/api/connections/{name}/subscriptions", {"subscribe": ["den"]})
        await publish(world, "m1", channel="den")
        await world.request("POST", "/api/connections/bob/subscriptions", {"unsubscribe": ["den"]})
        await world.request("POST", "/api/connections/eve/subscriptions", {"subscribe": ["den"]})
        assert [entry["player_id"] for entry in await receivers(world, "m1")] == ["ann", "bob"]
        await publish(world, "all", broadcast=True)
        assert len(await receivers(world, "all")) == 3


async def test_where_a_crash_took_the_knowledge(tmp_path: Path, autojump_clock: MockClock) -> None:
    path = tmp_path / "m.db"
    async with play(path, game=Puppet(), crash=True, **CALM) as world:
        ann = await opened(world)
        await publish(world, "sure")
        await ann.until(lambda m: m.get("id") == "sure")
        await ann.say({"type": "ack", "position": ann.position})
        await trio.sleep(5)  # the mark is stored
        position = ann.position
        await publish(world, "m1")
        await ann.until(lambda m: m.get("id") == "m1")
        assert (await only(world, "m1"))["state"] == "written"
    async with play(path, game=Puppet(), **CALM) as world:
        got = await only(world, "sure")
        assert (got["state"], got["acknowledged_at"]) == ("acknowledged", None)
        assert STOPPED in got["why"]
        got = await only(world, "m1")
        assert (got["state"], got["written_at"]) == ("unknown", None)
        assert got["why"].startswith(STOPPED)
        await trio.sleep(10)
        at = now(world)
        again = await opened(world, query=f"position={position}")
        await again.until(lambda m: m.get("id") == "m1")
        got = await only(world, "m1")
        assert got["state"] == "written"
        assert posix(got["written_at"]) == pytest.approx(at, abs=0.5)


async def test_beyond_retention_it_has_expired(tmp_path: Path, autojump_clock: MockClock) -> None:
    path = tmp_path / "m.db"
    settings: dict[str, Any] = {"message_retention_count": 2, "cleanup_interval": 10, **CALM}
    async with play(path, game=Puppet(), **settings) as world:
        await opened(world)
        first = await publish(world, "m1")
        for number in range(2, 6):
            await publish(world, f"m{number}")
        await trio.sleep(15)
        answer = await explain(world, "m1")
        assert (answer["state"], answer["seq"]) == ("expired", first["seq"])
        assert answer["target"] == {"player_id": "ann"}
        assert answer["why"].startswith("retention removed it at 2023-")
        assert (await explain(world, "m5"))["state"] == "stored"
        assert (await world.request("GET", "/api/messages/never"))[0] == 404
    async with play(path, game=Puppet(), **settings) as world:
        assert (await explain(world, "m1"))["state"] == "expired", "also after a restart"
        # One of our own ids that is not remembered: it begins with its time.
        long_ago = f"{int((now(world) - 90_000) * 1000):012x}" + 20 * "a"
        answer = await explain(world, long_ago)
        assert (answer["state"], answer["seq"]) == ("expired", None)
        assert "as far as its id says" in answer["why"]
        just_now = f"{int(now(world) * 1000):012x}" + 20 * "a"
        assert (await world.request("GET", f"/api/messages/{just_now}"))[0] == 404


def test_the_time_in_an_id() -> None:
    assert expired_by_its_time(f"{1_000_000:012x}" + 20 * "0", 2000.0, 500.0)
    assert not expired_by_its_time(f"{1_600_000:012x}" + 20 * "0", 2000.0, 500.0)
    assert not expired_by_its_time("1000000", 2000.0, 500.0)
    assert not expired_by_its_time(f"{1_000_000:012X}" + 20 * "G", 2000.0, 500.0)


def test_a_moment_says_how_exact_it_is() -> None:
    assert moment(None, FORGOTTEN).why == FORGOTTEN
    exact = moment((10.0, 10.5), FORGOTTEN)
    assert (exact.at, exact.why) == ("1970-01-01T00:00:10.500Z", None)
    wide = moment((10.0, 20.0), FORGOTTEN)
    assert (wide.at, wide.why) == ("1970-01-01T00:00:20.000Z", "between 1970-01-01T00:00:10.000Z and then")
