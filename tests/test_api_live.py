"""The API of a whole server: what is told is what is so."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from mythos_trio.explain import STOPPED
from tests.support.play import Client, World, play


async def publish(world: World, message_id: str, **target: object) -> None:
    message = {"id": message_id, "type": "test", "content": message_id}
    status, _ = await world.request("POST", "/api/messages", {"message": message, **target})
    assert status == 202


async def test_player_on_both_transports(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "mythos.db") as world:
        websocket, sse = await world.websocket("alice"), await world.sse("alice")
        await websocket.until_type("welcome")
        await publish(world, "m1", player_id="alice")
        await websocket.until(lambda m: m.get("id") == "m1")
        await sse.until(lambda m: m.get("id") == "m1")
        _, stats = await world.request("GET", "/api/connections/stats")
        assert stats["connection_distribution"] == {"websocket_only": 0, "sse_only": 0, "dual_connections": 1}
        status, player = await world.request("GET", "/api/connections/alice")
        assert status == 200
        assert player["presence"]["status"] == "online"
        assert player["health"]["overall_health"] == "healthy"
        assert player["connections"]["websocket"]["count"] == player["connections"]["sse"]["count"] == 1
        delivery = player["message_delivery_stats"]
        assert delivery["delivered"] == delivery["sent"] >= 1
        assert (delivery["pending"], delivery["failed"]) == (0, 0)
        _, session = await world.request("GET", "/api/connections/alice/session")
        assert session["session_id"] == player["session_id"] == websocket.received[0]["session_id"]
        assert session["connection_types"] == ["sse", "websocket"]
        assert session["owner"] == session["server_id"]


async def test_explain_from_mail_to_acknowledged(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "mythos.db") as world:
        first = await world.websocket("alice")
        await first.until_type("welcome")
        await publish(world, "m1", player_id="alice")
        await first.until(lambda m: m.get("id") == "m1")
        _, written = await world.request("GET", "/api/messages/m1")
        (receiver,) = written["receivers"]
        assert receiver["state"] in ("written", "acknowledged")
        assert receiver["written_at"] is not None
        assert written["target"] == {"player_id": "alice"}
        await first.say({"type": "ack", "position": first.position})
        await first.say({"type": "ping", "id": "p"})
        await first.until_type("pong")
        _, acknowledged = await world.request("GET", "/api/messages/m1")
        assert acknowledged["receivers"][0]["state"] == "acknowledged"
        await publish(world, "m2", player_id="bob")
        _, mail = await world.request("GET", "/api/messages/m2")
        assert (mail["state"], mail["receivers"]) == ("stored", [])
        assert (await world.request("GET", "/api/messages/m3"))[0] == 404


async def test_explain_after_a_restart(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "mythos.db") as world:
        client = await world.websocket("alice")
        await client.until_type("welcome")
        client.close()
        await trio.sleep(1)
        await publish(world, "m1", player_id="alice")
    async with play(tmp_path / "mythos.db") as world:
        _, answer = await world.request("GET", "/api/messages/m1")
        (receiver,) = answer["receivers"]
        assert receiver["state"] == "unknown"
        assert receiver["why"].startswith(STOPPED)
        _, player = await world.request("GET", "/api/connections/alice")
        assert player["presence"]["status"] == "linkdead"
        assert player["message_delivery_stats"]["pending"] >= 1


async def test_switch_subscribe_and_end(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "mythos.db") as world:
        client = await world.websocket("alice")
        old = (await client.until_type("welcome"))["session_id"]
        body = {"subscribe": ["news"], "session_id": old}
        status, answer = await world.request("POST", "/api/connections/alice/subscriptions", body)
        assert status == 200
        await publish(world, "n1", channel="news")
        await client.until(lambda m: m.get("id") == "n1")
        assert int(answer["position"].split("-")[1]) < client.numbered[-1]["seq"]
        status, switched = await world.request("POST", "/api/connections/alice/session", {"session_id": "next"})
        assert (status, switched["previous_session_id"], switched["session_id"]) == (200, old, "next")
        assert switched["previous_connections_disconnected"] == 1
        said = await client.until_over()
        assert said is not None
        assert said["code"] == 4501
        status, error = await world.request("POST", "/api/connections/alice/session", {"session_id": old})
        assert (status, error["error_type"]) == (409, "session_error")
        assert (await world.request("DELETE", "/api/connections/alice"))[0] == 200
        assert (await world.request("DELETE", "/api/connections/alice"))[0] == 404


async def test_end_one_connection(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "mythos.db") as world:
        one, two = await world.websocket("alice"), await world.sse("alice")
        ended = (await one.until_type("welcome"))["connection_id"]
        await two.until_type("welcome")
        assert (await world.request("DELETE", f"/api/connections/bob/{ended}"))[0] == 404
        assert (await world.request("DELETE", f"/api/connections/alice/{ended}"))[0] == 200
        said = await one.until_over()
        assert said is not None
        assert said["code"] == 4503
        await trio.sleep(2)
        _, player = await world.request("GET", "/api/connections/alice")
        assert (player["connections"]["websocket"]["count"], player["connections"]["sse"]["count"]) == (0, 1)


async def test_tasks_of_a_player_come_and_go_without_leaks(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "mythos.db") as world:
        client = await world.websocket("alice")
        await client.until_type("welcome")
        await client.hear()
        _, answer = await world.request("GET", "/monitoring/tasks")
        assert answer["leaks"] == 0
        assert answer["players"]["alice"]["tasks"] >= 1
        assert answer["left_out"] == 0
        assert '"dispatcher"' in str(answer["tree"]).replace("'", '"')
        await world.request("DELETE", "/api/connections/alice")
        await client.until_over()
        await trio.sleep(5)
        _, answer = await world.request("GET", "/monitoring/tasks")
        assert (answer["leaks"], answer["players"]) == (0, {})


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/health/detailed",
        "/health/ready",
        "/monitoring/dual-connections",
        "/monitoring/performance",
        "/monitoring/connection-health",
        "/monitoring/errors",
        "/monitoring/tasks",
        "/api/auth/verify",
    ],
)
async def test_every_page_of_a_real_server(tmp_path: Path, autojump_clock: MockClock, path: str) -> None:
    async with play(tmp_path / "mythos.db") as world:
        client = await world.websocket("alice")
        await client.until_type("welcome")
        await client.hear()
        status, answer = await world.request("GET", path)
        assert status == 200
        assert answer


async def test_health_of_a_real_server_is_judged_by_measured_values(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "mythos.db") as world:
        await publish(world, "m1", player_id="alice")
        _, answer = await world.request("GET", "/health/detailed")
        database = answer["components"]["database"]
        assert database["status"] == "healthy"
        assert database["bytes_in_use"] > 0
        assert database["max_store_bytes"] == world.server.settings.max_store_bytes
        assert database["last_commit_ms"] is not None
        assert answer["components"]["health_checker"]["status"] == "healthy"


async def raw(world: World, request: bytes) -> bytes:
    client = Client(world.wire())
    await client.send_all(request)
    answer = b""
    while chunk := await client.receive():
        answer += chunk
    client.close()
    return answer


async def test_server_id_stands_once_on_every_answer(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "mythos.db") as world:
        for line in (b"GET /health", b"HEAD /health", b"GET /nothing", b"OPTIONS /health", b"DELETE /health"):
            answer = await raw(world, line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.lower().count(b"server-id: ") == 1, head
            assert bool(body) is line.startswith((b"GET", b"DELETE"))
