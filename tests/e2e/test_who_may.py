"""Protected mode and tokens, from the outside."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.e2e.clients import CurlSSE, NodeWebSocket, WebSocket, refused_status
from tests.e2e.conftest import Make
from tests.e2e.servers import Server

SECRET = "a secret that is long enough to sign with: 0123456789"


@pytest.fixture(scope="module")
def protected(make_shared: Make) -> Server:
    """Without SECRET_KEY, on all addresses: a careless deployment."""
    return make_shared(HOST="0.0.0.0").start()


@pytest.fixture(scope="module")
def guarded(make_shared: Make) -> Server:
    return make_shared(SECRET_KEY=SECRET).start()


def other_address() -> str:
    """An address of this machine that is not its loopback."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family is socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    pytest.skip("this machine has no address but its loopback")


def error_of(answer: httpx.Response) -> str:
    """The error type, after a look at the whole format."""
    body = answer.json()
    assert set(body) == {"error", "error_type", "message", "details", "timestamp"}
    assert body["error"] is True
    assert body["message"]
    assert answer.headers["server-id"]
    error_type: str = body["error_type"]
    return error_type


# Protected mode.


@pytest.mark.parametrize("path", ["/health", "/api/connections/stats", "/sse/alice", "/"])
def test_a_stranger_is_refused_and_told_why(protected: Server, path: str) -> None:
    address = other_address()
    answer = httpx.get(f"http://{address}:{protected.port}{path}", trust_env=False)
    assert answer.status_code == 403
    assert error_of(answer) == "authentication_error"
    assert "SECRET_KEY" in answer.json()["message"]


def test_a_strangers_websocket_is_refused_before_the_upgrade(protected: Server) -> None:
    address = other_address()
    assert refused_status(f"ws://{address}:{protected.port}/ws/alice") == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "203.0.113.9"},
        {"X-Real-IP": "203.0.113.9"},
        {"Forwarded": "for=203.0.113.9"},
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_who_is_not_on_this_machine_by_himself_is_refused(protected: Server, headers: dict[str, str]) -> None:
    for path in ("/health", "/sse/alice", "/api/connections/alice"):
        answer = protected.http.get(path, headers=headers)
        assert answer.status_code == 403
        assert error_of(answer) == "authentication_error"
    message = {"player_id": "alice", "message": {"type": "line", "content": "from a foreign page"}}
    assert protected.http.post("/api/messages", json=message, headers=headers).status_code == 403
    if "Host" not in headers:
        status = refused_status(f"{protected.ws_url}/ws/alice", additional_headers=headers)
        assert status == 403


def test_the_log_names_the_setting_that_would_admit_a_page(protected: Server) -> None:
    assert protected.http.get("/health", headers={"Origin": "https://game.example:8443"}).status_code == 403
    line = protected.wait_logged("Origin refused", origin="https://game.example:8443")
    assert "CORS_ORIGINS=https://game.example:8443" in line["event"]


def test_a_page_of_our_own_is_served(protected: Server) -> None:
    assert protected.http.get("/health", headers={"Origin": protected.url}).status_code == 200


def test_admitted_pages_are_served(make: Make) -> None:
    server = make(CORS_ORIGINS="https://game.example").start()
    headers = {"Origin": "https://game.example"}
    answer = server.http.get("/health", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://game.example"
    with CurlSSE(f"{server.url}/sse/alice", headers=["Origin: https://game.example"]) as sse:
        assert sse.welcome
        assert sse.header("access-control-allow-origin") == "https://game.example"
    with WebSocket(f"{server.ws_url}/ws/alice", origin="https://game.example") as ws:
        assert ws.welcome


# Tokens.


def issue(server: Server, *arguments: str) -> str:
    """A token, from the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "mythos_trio", "token", "issue", *arguments],
        cwd=server.directory,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


class Tokens:
    def __init__(self, server: Server) -> None:
        self.alice = issue(server, "alice")
        self.publisher = issue(server, "--scope", "publish")
        self.admin = issue(server, "--scope", "admin")

    @property
    def all(self) -> list[str]:
        return [self.alice, self.publisher, self.admin]


@pytest.fixture(scope="module")
def tokens(guarded: Server) -> Iterator[Tokens]:
    tokens = Tokens(guarded)
    yield tokens
    # Whatever the tests of this module did with them.
    said = guarded.log_file.read_text() + guarded.stderr() + guarded.stdout()
    for token in tokens.all:
        assert token not in said
        assert token.rpartition(".")[2] not in said


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_without_a_token(guarded: Server, tokens: Tokens) -> None:
    for path in ("/api/connections/stats", "/api/connections/alice", "/monitoring/performance", "/sse/alice"):
        answer = guarded.http.get(path)
        assert (path, answer.status_code) == (path, 401)
        assert error_of(answer) == "authentication_error"
    assert guarded.publish("alice", "hi").status_code == 401
    assert guarded.http.get("/health").status_code == 200
    with WebSocket(f"{guarded.ws_url}/ws/alice") as ws:
        ws.wait_ended()
        assert ws.close_code == 4500
        assert [(m["type"], m["code"], m["reconnect"]) for m in ws.messages] == [("disconnect", 4500, False)]


def test_a_players_token_opens_that_player(guarded: Server, tokens: Tokens) -> None:
    header = f"Authorization: Bearer {tokens.alice}"
    with (
        CurlSSE(f"{guarded.url}/sse/alice", headers=[header]) as by_header,
        CurlSSE(f"{guarded.url}/sse/alice?token={tokens.alice}") as by_query,
        WebSocket(f"{guarded.ws_url}/ws/alice?token={tokens.alice}") as ws_by_query,
        WebSocket(f"{guarded.ws_url}/ws/alice", additional_headers=bearer(tokens.alice)) as ws_by_header,
    ):
        clients = [by_header, by_query, ws_by_query, ws_by_header]
        assert {client.welcome["player_id"] for client in clients} == {"alice"}
        message = {"player_id": "alice", "message": {"type": "line", "content": "hi"}}
        answer = guarded.http.post("/api/messages", json=message, headers=bearer(tokens.publisher))
        assert answer.status_code == 202
        for client in clients:
            client.wait_line("hi")


@pytest.mark.parametrize("more", [(), ("mythos-protocol",)])
def test_a_token_as_a_subprotocol(guarded: Server, tokens: Tokens, more: tuple[str, ...]) -> None:
    """The way of browsers, which cannot set headers. A client that has offered subprotocols gives up if none
    of them is chosen (npm's ws, and browsers by the Fetch standard)."""
    with NodeWebSocket(f"{guarded.ws_url}/ws/alice", *more, "bearer", tokens.alice) as ws:
        assert ws.welcome["player_id"] == "alice"
        assert ws.wait_event("open").fields["protocol"] == (more[0] if more else "bearer")
    with NodeWebSocket(f"{guarded.ws_url}/ws/bob", *more, "bearer", tokens.alice) as ws:
        assert ws.wait_event("close").fields["code"] == 4500


def test_a_token_opens_nothing_else(guarded: Server, tokens: Tokens) -> None:
    message = {"player_id": "alice", "message": {"type": "line", "content": "hi"}}
    post, get = guarded.http.post, guarded.http.get
    assert post("/api/messages", json=message, headers=bearer(tokens.alice)).status_code == 403
    assert get("/sse/bob", headers=bearer(tokens.alice)).status_code == 403
    assert get("/api/connections/bob", headers=bearer(tokens.alice)).status_code == 403
    assert get("/monitoring/performance", headers=bearer(tokens.alice)).status_code == 403
    assert get("/monitoring/performance", headers=bearer(tokens.admin)).status_code == 200
    assert post("/api/messages", json=message, headers=bearer(tokens.admin)).status_code == 403
    command = {"content": "look"}
    assert post("/api/connections/alice/commands", json=command, headers=bearer(tokens.publisher)).status_code == 403


def test_bad_tokens_are_told_apart(guarded: Server, tokens: Tokens) -> None:
    head, claims, signature = tokens.alice.split(".")
    other = issue_with(guarded, "another secret that is long enough: 0123456789")
    expired = issue(guarded, "alice", "--expires", "1")
    cases = {
        "missing": None,
        "malformed": "not.a.token",
        "bad_signature": other,
    }
    for reason, token in cases.items():
        answer = guarded.http.get("/api/auth/verify", headers={} if token is None else bearer(token))
        assert (answer.status_code, reason_of(answer)) == (401, reason)
    swapped = guarded.http.get("/api/auth/verify", headers=bearer(f"{head}.{claims[:-4]}AAAA.{signature}"))
    assert swapped.status_code == 401
    good = guarded.http.get("/api/auth/verify", headers=bearer(tokens.alice)).json()
    assert (good["valid"], good["player_id"], good["scopes"]) == (True, "alice", [])
    with WebSocket(f"{guarded.ws_url}/ws/alice?token={expired}") as ws:
        # It expires while the connection lives, or has before it began.
        ws.wait_ended(seconds=40)
        assert ws.close_code == 4500
    answer = guarded.http.get("/api/auth/verify", headers=bearer(expired))
    assert (answer.status_code, reason_of(answer)) == (401, "expired")


def reason_of(answer: httpx.Response) -> str | None:
    body = answer.json()
    reason: str | None = body.get("reason") or body.get("details", {}).get("reason")
    return reason


def issue_with(server: Server, secret: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mythos_trio", "token", "issue", "alice"],
        cwd=server.directory,
        env={**server.environment, "SECRET_KEY": secret},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


def test_a_token_is_renewed_on_a_live_connection(guarded: Server, tokens: Tokens) -> None:
    with WebSocket(f"{guarded.ws_url}/ws/alice?token={tokens.alice}") as ws:
        ws.send({"type": "auth", "token": issue(guarded, "alice")})
        assert ws.ask("test", "c1")["ok"]
        ws.send({"type": "auth", "token": "bad"})
        ws.wait_ended()
        assert ws.close_code == 4500


def test_verify_in_protected_mode(protected: Server) -> None:
    answer = protected.http.get("/api/auth/verify")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["valid"], body["mode"]) == (None, "protected")
    assert json.dumps(body)
