"""Both transports of a player carry one stream: told by clients that we did not write."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.e2e.clients import CurlSSE, EventSource, HttpxSSE, NodeWebSocket, WebSocket, Wscat, tool
from tests.e2e.servers import Server


def curl(server: Server, path: str, body: object) -> dict[str, object]:
    """POST *body* with curl; the answer."""
    command = [tool("curl"), "-sS", "--noproxy", "*", "-X", "POST", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*command, "-d", json.dumps(body), server.url + path], capture_output=True, text=True, timeout=20, check=True
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_what_is_typed_and_what_is_posted_arrives_once_on_both(server: Server) -> None:
    with CurlSSE(f"{server.url}/sse/alice") as sse, Wscat(f"{server.ws_url}/ws/alice") as ws:
        assert sse.welcome["session_id"] == ws.welcome["session_id"]
        assert sse.welcome["connection_id"] != ws.welcome["connection_id"]
        ws.type("say hello")
        reply = ws.wait_type("reply")
        assert reply["ok"]
        assert reply["content"] == "You say: hello"
        posted = curl(
            server, "/api/messages", {"player_id": "alice", "message": {"type": "line", "content": "by post"}}
        )
        assert posted["connections"] == 2
        for client in (sse, ws):
            client.wait_line("alice says: hello")
            assert client.wait_line("by post")["seq"] == posted["seq"]
        common = min(len(sse.numbered), len(ws.numbered))
        assert sse.numbered[-common:] == ws.numbered[-common:]
        assert ws.seqs == sorted(set(ws.seqs))
        spoken = [message for message in ws.numbered if message["type"] == "say"]
        assert [message["content"] for message in spoken] == ["alice says: hello"]


def test_an_event_id_is_the_position_of_its_message(server: Server) -> None:
    with CurlSSE(f"{server.url}/sse/alice") as sse:
        epoch = sse.welcome["epoch"]
        server.published("alice", "one")
        sse.wait_line("one")
        assert sse.header("content-type") == "text/event-stream; charset=utf-8"
        assert sse.header("cache-control") == "no-cache, no-transform"
        assert sse.header("x-accel-buffering") == "no"
        assert sse.retry_ms is not None
        for id, message in zip(sse.ids, sse.messages, strict=True):
            assert id == (f"{epoch}-{message['seq']}" if "seq" in message else message.get("position"))


def test_every_client_sees_the_same(server: Server) -> None:
    """Four libraries, one stream."""
    with (
        EventSource(f"{server.url}/sse/alice") as browser,
        HttpxSSE(f"{server.url}/sse/alice") as httpx,
        NodeWebSocket(f"{server.ws_url}/ws/alice", "mythos-protocol") as node,
        WebSocket(f"{server.ws_url}/ws/alice") as python,
    ):
        clients = [browser, httpx, node, python]
        for client in clients:
            assert client.welcome["player_id"] == "alice"
        assert node.wait_event("open").fields["protocol"] == "mythos-protocol"
        answers = [server.published("alice", number) for number in range(20)]
        assert {answer["connections"] for answer in answers} == {4}
        for client in clients:
            client.wait_line(19)
            assert client.lines == list(range(20))
            assert client.seqs[-20:] == [answer["seq"] for answer in answers]
            ids = [message["id"] for message in client.numbered[-20:]]
            assert ids == [answer["id"] for answer in answers]


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_localhost_is_both_its_addresses(server: Server, address: str) -> None:
    with CurlSSE(f"http://{address}:{server.port}/sse/alice") as sse:
        assert sse.welcome["player_id"] == "alice"


def test_mail_waits_for_a_player_who_is_not_there(server: Server) -> None:
    first = server.published("alice", {"letter": 1}, id="letter-1")
    assert first["connections"] == 0
    assert server.published("alice", {"letter": 1}, id="letter-1") == {**first, "duplicate": True}
    assert server.publish("alice", {"letter": 2}, id="letter-1").status_code == 409
    with Wscat(f"{server.ws_url}/ws/alice") as ws:
        assert ws.wait_line({"letter": 1})["seq"] == first["seq"]


def test_two_players_play(server: Server) -> None:
    """One with a terminal, one with curl alone."""
    with Wscat(f"{server.ws_url}/ws/alice") as alice, CurlSSE(f"{server.url}/sse/bob") as bob:
        alice.wait_type("room")
        bob.wait_type("room")
        answer = curl(server, "/api/connections/bob/commands", {"id": "b1", "content": "say good evening"})
        assert answer["ok"]
        alice.wait_line("bob says: good evening")
        bob.wait_line("bob says: good evening")
        alice.type("tell bob psst")
        bob.wait_line("alice tells you: psst")
        alice.type("north")
        bob.wait_line("alice goes north.")
        curl(server, "/api/connections/bob/commands", {"id": "b2", "content": "say alone now"})
        bob.wait_line("bob says: alone now")
        alice.type("test")
        alice.wait(lambda m: m["type"] == "reply" and m["content"].startswith("ok."), "the reply to test")
        assert "bob says: alone now" not in [message["content"] for message in alice.numbered]
