"""Every refusal on every transport: what a stranger does wrong is a status, what a client must act on is told."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.games import Disk, Puppet
from tests.support.play import Client, SSEClient, WebSocketClient, World, play

KEY = "k" * 32
PUBLICATION = {"player_id": "ann", "message": {"type": "line", "content": 1}}


async def open_websocket(world: World, path: str, headers: str = "", peer: str = "127.0.0.1") -> WebSocketClient:
    pairs = [line.split(": ", 1) for line in headers.split("\r\n") if line]
    encoded = [(name.encode(), value.encode()) for name, value in pairs]
    return await WebSocketClient(world.listener.connect(peer)).open(path, headers=encoded)


async def statuses(world: World, headers: str = "", *, peer: str = "127.0.0.1", host: str = "localhost") -> list[int]:
    """The status of a WebSocket, an event stream, a publication and a page of the API."""
    found = []
    for request in (
        "GET /ws/ann HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
        "GET /sse/ann HTTP/1.1\r\n",
        "POST /api/messages HTTP/1.1\r\nContent-Length: 0\r\nConnection: close\r\n",
        "GET /api/connections/ann HTTP/1.1\r\nConnection: close\r\n",
    ):
        client = Client(world.listener.connect(peer))
        await client.send_all(f"{request}Host: {host}\r\n{headers}\r\n".encode())
        answer = await client.receive()
        found.append(int(answer.split()[1]))
        client.close()
    return found


# Strangers: a status, before any upgrade.


async def test_protected_mode_serves_this_machine_alone(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        assert await statuses(world) == [101, 200, 400, 200]
        for peer in ("192.0.2.7", "10.0.0.1", "2001:db8::1"):
            assert await statuses(world, peer=peer) == [403] * 4
        for header in ("X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1", "Forwarded: for=127.0.0.1"):
            assert await statuses(world, f"{header}\r\n") == [403] * 4


async def test_a_strange_host_or_origin_is_refused(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        assert await statuses(world, host="rebound.example") == [403] * 4
        for origin in ("http://evil.example", "null", "http://localhost:3000", "https://localhost"):
            assert await statuses(world, f"Origin: {origin}\r\n") == [403] * 4
        assert await statuses(world, "Origin: http://localhost\r\n") == [101, 200, 400, 200]


async def test_a_named_origin_is_admitted_and_told_so(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), cors_origins=("http://game.example",)) as world:
        assert await statuses(world, "Origin: http://game.example\r\n") == [101, 200, 400, 200]
        stream = await world.sse("ann", headers="Origin: http://game.example\r\n")
        assert stream.headers["access-control-allow-origin"] == "http://game.example"


async def test_a_refusal_says_what_is_wrong(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        status, answer = await world.request("POST", "/api/messages", PUBLICATION, "Origin: http://evil.example\r\n")
        assert (status, answer["error"], answer["error_type"]) == (403, True, "authentication_error")
        assert answer["details"]["value"] == "http://evil.example"  # what CORS_ORIGINS would have to be
        assert answer["details"]["setting"] == "CORS_ORIGINS"


async def test_a_full_server_is_a_status_for_a_websocket_and_a_pause_for_a_stream(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), max_total_connections=2) as world:
        ann, bob = await world.websocket("ann"), await world.sse("bob")
        await ann.next()
        await bob.next()
        late = await world.websocket("eve")
        assert late.status == 503
        assert b'"capacity_error"' in late.body
        stream = await world.sse("eve")
        assert stream.status == 200
        said = await stream.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"]) == (4009, True)
        assert stream.retry_ms == said["retry_ms"] > 0
        assert (await ann.command("echo fine"))["ok"] is True
        bob.close()
        await trio.sleep(1)
        eve = await world.websocket("eve")
        assert (await eve.next())["type"] == "welcome"


async def test_too_many_connects_of_one_address(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings: dict[str, Any] = {"secret_key": KEY, "rate_limit_requests": 3, "rate_limit_window": 30}
    async with play(tmp_path / "m.db", game=Puppet(), **settings) as world:
        token = world.server.access.issue("ann")
        for _ in range(3):
            client = await open_websocket(world, f"/ws/ann?token={token}", peer="192.0.2.7")
            assert client.status == 101
            client.close()
        refused = await open_websocket(world, f"/ws/ann?token={token}", peer="192.0.2.7")
        assert refused.status == 429
        stream = await SSEClient(world.listener.connect("192.0.2.7")).open(f"/sse/ann?token={token}")
        said = await stream.until_over()
        assert (stream.status, (said or {})["code"]) == (200, 4029)
        # Another address, and this machine's own, are not concerned.
        for peer in ("192.0.2.8", *["127.0.0.1"] * 5):
            client = await open_websocket(world, f"/ws/ann?token={token}", peer=peer)
            assert client.status == 101
            client.close()
            await trio.sleep(0.1)


# Bad requests.


@pytest.mark.parametrize("position", ["7", "1-", "-1", "1-2-3", "a-b", "1-+2", "1-99999999999999999", "1 - 2"])
async def test_a_malformed_position_is_400(tmp_path: Path, autojump_clock: MockClock, position: str) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        query = "position=" + position.replace(" ", "%20").replace("+", "%2B")
        for client in (
            await world.websocket("ann", query),
            await world.sse("ann", query),
            await world.sse("ann", headers=f"Last-Event-ID: {position}\r\n"),
        ):
            assert client.status == 400
        assert world.server.hub.sessions == {}


@pytest.mark.parametrize("session", ["a%20b", "x" * 65, "%2F", "%C3%BC", "a%00"])
async def test_a_bad_session_id_is_400(tmp_path: Path, autojump_clock: MockClock, session: str) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        for client in (
            await world.websocket("ann", f"session_id={session}"),
            await world.sse("ann", f"session_id={session}"),
        ):
            assert client.status == 400


@pytest.mark.parametrize("player", ["stats", "a%20b", "x" * 65, "%C3%BC", "a%2Fb", "..", "%2E%2E", "a%00"])
async def test_a_bad_player_id_is_422(tmp_path: Path, autojump_clock: MockClock, player: str) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        for client in (await world.websocket(player), await world.sse(player)):
            assert client.status in (400, 404, 422)
        assert world.server.hub.sessions == {}


# Tokens.


def bad_tokens(world: World) -> dict[str, str]:
    issue = world.server.access.issue
    good = issue("ann", ["publish"])
    return {
        "none": "",
        "nonsense": "nonsense",
        "another player's": issue("bob"),
        "nobody's": issue(None, ["admin"]),
        "expired": issue("ann", seconds=-10),
        "forged": good[:-4] + ("AAAA" if not good.endswith("AAAA") else "BBBB"),
    }


async def test_a_bad_token_is_told_4500_on_a_websocket_and_401_or_403_over_http(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), secret_key=KEY) as world:
        for why, token in bad_tokens(world).items():
            client = await world.websocket("ann", f"token={token}")
            assert client.status == 101, why
            said = await client.until_over()
            assert said is not None, why
            assert (said["code"], said["reconnect"]) == (4500, False), why
            assert (await world.sse("ann", f"token={token}")).status in (401, 403), why
            for path in ("/api/messages", "/api/connections/ann/commands"):
                status, answer = await world.request("POST", f"{path}?token={token}", PUBLICATION)
                assert (status in (401, 403), answer["error_type"]) == (True, "authentication_error"), why
        assert world.server.hub.sessions == {}


async def test_a_good_token_opens_its_players_paths_on_every_way_it_can_come(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), secret_key=KEY, max_connections_per_player=10) as world:
        token = world.server.access.issue("ann")
        ways: list[tuple[str, dict[str, Any]]] = [
            (f"/ws/ann?token={token}", {}),
            ("/ws/ann", {"headers": [(b"Authorization", b"Bearer " + token.encode())]}),
            ("/ws/ann", {"subprotocols": ["mythos-protocol", "bearer", token]}),
            ("/ws/ann", {"subprotocols": ["bearer", token]}),
        ]
        for path, more in ways:
            client = await WebSocketClient(world.listener.connect("192.0.2.7")).open(path, **more)
            assert (await client.next())["type"] == "welcome"
            # A browser wants one of those that it named; a token is never echoed.
            assert client.subprotocol == more.get("subprotocols", [None])[0]
        status, answer = await world.request("POST", f"/api/messages?token={token}", PUBLICATION)
        assert (status, answer["error_type"]) == (403, "authentication_error")  # it has not the scope


async def test_a_token_that_expires_ends_the_connection_unless_it_is_renewed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with play(tmp_path / "m.db", game=Puppet(), secret_key=KEY) as world:
        issue = world.server.access.issue
        ann = await world.websocket("ann", f"token={issue('ann', seconds=60)}")
        eve = await world.websocket("ann", f"token={issue('ann', seconds=60)}")
        stream = await world.sse("ann", f"token={issue('ann', seconds=60)}")
        await ann.next()
        await ann.say({"type": "auth", "token": issue("ann", seconds=600)})
        async with trio.open_nursery() as nursery:
            for client in (eve, stream):
                nursery.start_soon(client.until_over)
            with trio.move_on_after(100):
                await ann.until_over()
        for client in (eve, stream):
            said = client.of("disconnect")[0]
            assert (said["code"], said["reconnect"]) == (4500, False)
        assert not ann.over
        await ann.say({"type": "auth", "token": issue("bob")})
        assert (await ann.until_over() or {})["code"] == 4500


async def test_behind_a_trusted_proxy_addresses_are_the_clients_own(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings: dict[str, Any] = {"secret_key": KEY, "trusted_proxies": (ip_network("10.0.0.0/8"),)}
    async with play(tmp_path / "m.db", game=Puppet(), **settings) as world:
        token = world.server.access.issue("ann")
        client = await open_websocket(
            world, f"/ws/ann?token={token}", "X-Forwarded-For: 203.0.113.5\r\n", peer="10.0.0.3"
        )
        await client.next()
        connection = next(iter(world.server.hub.connections.values()))
        assert (connection.address, connection.observable) == ("203.0.113.5", False)


# The store.


async def test_while_the_store_cannot_be_read_a_newcomer_is_told_to_come_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk) as world:
        disk.broken = True
        ann = await world.websocket("ann")
        said = await ann.until_over()
        assert said is not None
        assert (said["code"], said["reconnect"]) == (4009, True)
        stream = await world.sse("ann")
        assert stream.status == 200
        said = await stream.until_over()
        assert said is not None
        assert (said["code"], said["retry_ms"]) == (4009, stream.retry_ms)
        disk.mend()
        back = await world.websocket("ann")
        assert (await back.next())["type"] == "welcome"


async def test_while_the_store_cannot_replay_a_stream_its_client_is_told_to_come_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Puppet(), hook=disk) as world:
        ann = await world.websocket("ann")
        start = (await ann.next())["position"]
        await world.publish(player_id="ann", message={"type": "line", "content": "one"})
        await ann.until_type("line")
        ann.close()
        await trio.sleep(1)
        disk.broken = True
        for client in (await world.websocket("ann", f"position={start}"), await world.sse("ann", f"position={start}")):
            said = await client.until_over()
            assert (said or {})["code"] == 4009
            assert client.numbered == []
        disk.mend()
        back = await world.sse("ann", f"position={start}")
        await back.until_type("line")
