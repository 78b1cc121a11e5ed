"""A session switch: the old one's clients are told, stop, and never take the player back."""

from __future__ import annotations

import time

from tests.e2e.clients import CurlSSE, EventSource, NodeWebSocket, WebSocket, Wscat, refused_status
from tests.e2e.servers import Server


def test_an_old_browser_window_is_told_and_stops(server: Server) -> None:
    """It comes back by itself with its old session's id, gets 204, and gives up: no ping-pong."""
    with (
        EventSource(f"{server.url}/sse/alice?session_id=old") as browser,
        NodeWebSocket(f"{server.ws_url}/ws/alice?session_id=old") as socket,
    ):
        assert browser.welcome["session_id"] == "old"
        assert socket.welcome["session_id"] == "old"
        switched = server.http.post("/api/connections/alice/session", json={"session_id": "new"}).json()
        assert switched["success"]
        assert (switched["session_id"], switched["previous_session_id"]) == ("new", "old")
        assert switched["previous_connections_disconnected"] == 2
        for client in (browser, socket):
            told = client.wait_type("disconnect")
            assert (told["code"], told["reconnect"]) == (4501, False)
        closed = socket.wait_event("close").fields
        assert (closed["code"], closed["reason"]) == (4501, "session replaced")
        with NodeWebSocket(f"{server.ws_url}/ws/alice") as newcomer:
            assert newcomer.welcome["session_id"] == "new"
            assert browser.wait_gave_up().fields["code"] == 204
            assert len(browser.all("open")) == 1
            assert not newcomer.all("close")
            server.published("alice", "for the new one")
            newcomer.wait_line("for the new one")
            assert "for the new one" not in browser.lines
    assert server.session_id("alice") == "new"
    switch = server.wait_logged("", session_id="new", previous_session_id="old")
    assert "switched from" in switch["event"]


def test_an_ended_session_never_begins_again(server: Server) -> None:
    """On no transport, by no method, not after a crash."""
    with WebSocket(f"{server.ws_url}/ws/alice?session_id=old") as old:
        assert old.welcome
        with WebSocket(f"{server.ws_url}/ws/alice?session_id=new") as new:
            assert new.welcome["session_id"] == "new"
            assert new.wait_type("session_changed")["previous_session_id"] == "old"
            old.wait_ended()
            assert old.close_code == 4501
    _refuse_old(server)
    server.kill9()
    server.start()
    _refuse_old(server)
    assert server.session_id("alice") == "new"


def _refuse_old(server: Server) -> None:
    with WebSocket(f"{server.ws_url}/ws/alice?session_id=old") as again:
        again.wait_ended()
        assert again.close_code == 4501
        assert [m["type"] for m in again.messages] == ["disconnect"]
    with CurlSSE(f"{server.url}/sse/alice?session_id=old", last_event_id="1-1") as again_sse:
        assert again_sse.status == 204
    for path, body in (
        ("commands", {"content": "look", "session_id": "old"}),
        ("ack", {"position": "1-1", "session_id": "old"}),
        ("subscriptions", {"subscribe": ["ooc"], "session_id": "old"}),
        ("session", {"session_id": "old"}),
    ):
        answer = server.http.post(f"/api/connections/alice/{path}", json=body)
        assert (path, answer.status_code, answer.json()["error_type"]) == (path, 409, "session_error")


def test_a_switch_keeps_the_mail_and_shows_nothing_twice(server: Server) -> None:
    with WebSocket(f"{server.ws_url}/ws/alice?session_id=one") as first:
        server.published("alice", "seen")
        first.wait_line("seen")
        position = first.position
    server.published("alice", "missed")
    with WebSocket(f"{server.ws_url}/ws/alice?session_id=two&position={position}") as second:
        second.wait_line("missed")
        assert second.lines == ["missed"]


def test_two_windows_that_fight_end_with_one_session(server: Server) -> None:
    """Each window asks for its own session once and comes back by itself: the last one asked wins, for good."""
    browsers = []
    try:
        for name in ("a", "b", "c"):
            browser = EventSource(f"{server.url}/sse/alice?session_id={name}")
            browsers.append(browser)
            assert browser.welcome["session_id"] == name
        for browser in browsers[:2]:
            browser.wait_gave_up()
        assert server.session_id("alice") == "c"
        server.published("alice", "who is it?")
        browsers[2].wait_line("who is it?")
        assert [len(browser.all("open")) for browser in browsers] == [1, 1, 1]
    finally:
        for browser in browsers:
            browser.close()


def test_removed_by_the_operator(server: Server) -> None:
    with (
        EventSource(f"{server.url}/sse/alice") as browser,
        NodeWebSocket(f"{server.ws_url}/ws/alice") as socket,
    ):
        assert browser.welcome
        assert socket.welcome
        removed = server.http.delete("/api/connections/alice").json()
        assert (removed["success"], removed["connections_closed"]) == (True, 2)
        assert socket.wait_event("close").fields["code"] == 4503
        assert browser.wait_type("disconnect")["code"] == 4503
        browser.wait_gave_up()
    assert server.http.delete("/api/connections/alice").status_code == 404
    assert server.session_id("alice") is None


def test_a_game_begins_a_new_session(puppet: Server) -> None:
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        client.command("switch", "c1")
        assert client.wait_line("switching")
        assert client.wait_reply("c1")["ok"]
        client.wait_ended()
        assert client.close_code == 4501
        old = client.welcome["session_id"]
    with WebSocket(f"{puppet.ws_url}/ws/alice") as client:
        assert client.welcome["session_id"] != old


def test_one_connection_too_many(server: Server) -> None:
    """All four have just proved alive: the fifth is turned away, the four stay."""
    clients = [WebSocket(f"{server.ws_url}/ws/alice") for _ in range(4)]
    try:
        for client in clients:
            assert client.welcome
        with WebSocket(f"{server.ws_url}/ws/alice") as fifth:
            fifth.wait_ended()
            assert fifth.close_code in (4009, 4509)
        with EventSource(f"{server.url}/sse/alice") as browser:
            browser.wait_event("error")
        replaced = clients[0].welcome["connection_id"]
        with WebSocket(f"{server.ws_url}/ws/alice?replaces={replaced}") as instead:
            assert instead.welcome
            clients[0].wait_ended()
            server.published("alice", "still here")
            for client in (*clients[1:], instead):
                client.wait_line("still here")
    finally:
        for client in clients:
            client.close()


def test_one_connection_is_ended_by_the_operator(server: Server) -> None:
    with WebSocket(f"{server.ws_url}/ws/alice") as one, Wscat(f"{server.ws_url}/ws/alice") as other:
        assert other.welcome
        began = time.monotonic()
        path = f"/api/connections/alice/{one.welcome['connection_id']}"
        assert server.http.delete(path).status_code == 200
        one.wait_ended()
        assert time.monotonic() - began < 5
        server.published("alice", "the other stays")
        other.wait_line("the other stays")


def test_a_player_who_is_not_there_takes_no_commands(server: Server) -> None:
    answer = server.command("nobody", "look", "c1")
    assert (answer.status_code, answer.json()["error_type"]) == (409, "session_error")
    assert refused_status(f"{server.ws_url}/ws/a%20b") == 422
