"""The API over Quart-Trio's test client: who may ask, what is answered, what is wrong with a request."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
from attrs import evolve, frozen
from quart.wrappers import Response
from trio.testing import MockClock

from mythos_trio import logs
from mythos_trio.access import Access, Visitor
from mythos_trio.api import MAX_BODY, ROUTES, Needs, create_app
from mythos_trio.config import Settings
from mythos_trio.core.errors import ErrorType, Refusal
from mythos_trio.monitor import Stage
from mythos_trio.storage import Expired
from tests.support.fakes import NOW, FakeRegistrar, Stand

SECRET = "a-secret-key-that-is-long-enough-for-HS256"
DOCS = Path(__file__).parent.parent / "docs" / "http-api.rst"


@frozen
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)


class Api:
    """The app with what it stands on, and a client with or without a token."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings(server_id="node-1")
        self.registrar = FakeRegistrar()
        self.stand = Stand(self.settings)
        self.stand.monitor.stage = Stage.READY
        self.access = Access(self.settings, self.stand.clock)
        self.app = create_app(
            self.stand.monitor,
            cast(Any, self.registrar),
            cast(Any, self.stand.dispatcher),
            self.access,
            self.settings,
            "node-1",
            self.stand.clock,
        )

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        headers = {"Host": "localhost:8000", **(headers or {})}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        client = cast(Any, self.app.test_client())
        response = await client.open(
            path,
            method=method,
            headers=headers,
            data=data,
            scope_base={"state": {"visitor": self.visitor(token)}},
        )
        assert isinstance(response, Response)
        names = [name.lower() for name, _ in response.headers.items()]
        assert len(names) == len(set(names)), f"a header twice: {names}"
        return Answer(
            response.status_code,
            {name.lower(): value for name, value in response.headers.items()},
            await response.get_data(as_text=False),
        )

    def visitor(self, token: str | None) -> Visitor:
        visitor = Visitor("127.0.0.1", False, False, self.settings.protected, True)
        if self.settings.protected or token is None:
            return visitor
        return evolve(visitor, claims=self.access.verify(token))

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.ask("GET", path, **more)


@pytest.fixture
async def api() -> Api:
    return Api()


@pytest.fixture
async def guarded() -> Api:
    """With ``SECRET_KEY``."""
    return Api(Settings(server_id="node-1", secret_key=SECRET))


def fill(path: str) -> str:
    """A route's path with something in its places."""
    return re.sub(r"<any_text:message_id>", "m1", path).replace("<player_id>", "alice").replace("<connection_id>", "c1")


# What every answer has.


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_answer_names_the_server_and_is_not_kept(api: Api, route: Any) -> None:
    answer = await api.ask(route.method, fill(route.path))
    assert answer.headers["server-id"] == "node-1"
    assert answer.headers["cache-control"] == "no-store"
    if route.path == "/metrics":
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    elif route.path != "/":
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("route", [r for r in ROUTES if r.method == "GET" and r.handler], ids=lambda r: r.path)
async def test_head_works_where_get_does(api: Api, route: Any) -> None:
    get, head = await api.get(fill(route.path)), await api.ask("HEAD", fill(route.path))
    assert head.status == get.status


def assert_error(answer: Answer, status: int, error_type: str, word: str = "") -> dict[str, Any]:
    assert answer.status == status
    body = answer.json
    assert set(body) >= {"error", "error_type", "message", "details", "timestamp"}
    assert body["error"] is True
    assert body["error_type"] == error_type
    assert word in body["message"]
    assert body["timestamp"] == "2023-11-14T22:13:20.000Z"
    return cast(dict[str, Any], body)


# The guide's lines: each jq path finds something.


GUIDE = [
    ("/api/connections/stats", "connection_distribution"),
    ("/api/connections/test_player", "connections"),
    ("/api/connections/test_player", "message_delivery_stats"),
    ("/api/connections/test_player/session", "session_id"),
    ("/monitoring/connection-health", "overall_health"),
    ("/monitoring/connection-health", "connection_type_health"),
    ("/monitoring/dual-connections", "session_analytics"),
    ("/monitoring/performance", "message_delivery"),
    ("/monitoring/performance", "connection_establishment"),
    ("/monitoring/performance", "system_performance"),
    ("/monitoring/errors", "error_breakdown"),
]


@pytest.mark.parametrize(("path", "field"), GUIDE)
async def test_every_jq_path_of_the_guide(api: Api, path: str, field: str) -> None:
    api.stand.connect(api.stand.session("test_player"), "c1", "websocket")
    api.stand.statistics.error("delivery_error", "Message delivery failed", None, NOW)
    answer = await api.get(path)
    assert answer.status == 200
    assert answer.json[field]


# Errors.


async def test_unknown_path(api: Api) -> None:
    assert_error(await api.get("/api/nothing"), 404, "validation_error", "/api/nothing")
    # Not in this stage.
    for path in ("/docs", "/openapi.json", "/monitoring/", "/monitoring", "/health/", "/api//auth/verify"):
        assert_error(await api.get(path), 404, "validation_error")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/health", "GET, HEAD, OPTIONS"),
        ("PUT", "/api/connections/alice", "DELETE, GET, HEAD, OPTIONS"),
        ("PUT", "/api/connections/alice/session", "DELETE, GET, HEAD, OPTIONS, POST"),
        ("GET", "/api/messages", "OPTIONS, POST"),
        ("GET", "/api/connections/alice/commands", "DELETE, OPTIONS, POST"),
        ("GET", "/api/connections/alice/subscriptions", "DELETE, OPTIONS, POST"),
        ("POST", "/sse/alice", "GET, HEAD, OPTIONS"),
        ("POST", "/ws/alice", "GET, HEAD, OPTIONS"),
    ],
)
async def test_wrong_method(api: Api, method: str, path: str, allow: str) -> None:
    answer = await api.ask(method, path)
    assert assert_error(answer, 405, "validation_error", method)["details"]["allowed"] == allow.split(", ")
    assert answer.headers["allow"] == allow


async def test_head_of_a_stream_is_no_stream(api: Api) -> None:
    assert (await api.ask("HEAD", "/sse/alice")).status == 405


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"{", 400, "JSON"),
        (b'"text"', 422, "object"),
        (b"[]", 422, "object"),
        (b'{"session": "s"}', 422, "session"),
        (b'{"session_id": 5}', 400, "session id"),
        (b'{"session_id": "a b"}', 400, "session id"),
        (b"\xff", 400, "JSON"),
        (b"[" * 5000, 400, ""),
    ],
)
async def test_wrong_bodies(api: Api, body: bytes, status: int, word: str) -> None:
    answer = await api.ask("POST", "/api/connections/alice/session", body)
    assert_error(answer, status, "validation_error", word)
    assert api.registrar.asked == []


async def test_unknown_field_is_named(api: Api) -> None:
    answer = await api.ask("POST", "/api/connections/alice/session", {"sesion_id": "s2"})
    assert assert_error(answer, 422, "validation_error", "sesion_id")["details"] == {"field": "sesion_id"}


async def test_body_that_is_too_big(api: Api) -> None:
    answer = await api.ask("POST", "/api/connections/alice/session", b" " * (MAX_BODY + 1))
    assert assert_error(answer, 413, "validation_error")["details"] == {"max_bytes": MAX_BODY}
    assert api.registrar.asked == []


@pytest.mark.parametrize("player", ["a%20b", "%C3%A4", "x" * 65, ".."])
async def test_bad_player(api: Api, player: str) -> None:
    assert_error(await api.get(f"/api/connections/{player}"), 422, "validation_error", "player id")


async def test_stats_is_no_player(api: Api) -> None:
    assert (await api.ask("DELETE", "/api/connections/stats")).status == 422
    assert api.registrar.asked == []


async def test_refusal_with_a_time_to_come_back(api: Api) -> None:
    api.registrar.refusal = Refusal(ErrorType.CAPACITY, "busy", status=503, retry_ms=2500)
    answer = await api.ask("DELETE", "/api/connections/alice")
    assert_error(answer, 503, "capacity_error", "busy")
    assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("debug", [False, True])
async def test_bug_is_logged_and_told_without_its_inside(debug: bool) -> None:
    api = Api(Settings(server_id="node-1", debug=debug))
    api.registrar.crash = ZeroDivisionError("the inside")
    with logs.capture() as lines:
        answer = await api.ask("DELETE", "/api/connections/alice?token=secret")
    body = assert_error(answer, 500, "system_error")
    assert ("the inside" in body["details"].get("traceback", "")) is debug
    assert "the inside" not in body["message"]
    (line,) = lines
    assert line["event"] == "Unexpected error in DELETE /api/connections/alice"
    assert (line["level"], line["error_type"], line["player_id"]) == ("ERROR", "system_error", "alice")
    assert "ZeroDivisionError: the inside" in line["exception"]
    # What is logged is counted by the log.
    assert not api.stand.monitor.errors()["error_breakdown"].get("system_error")


async def test_refusals_are_counted(api: Api) -> None:
    await api.get("/nothing")
    await api.get("/api/connections/a%20b")
    assert api.stand.monitor.errors()["error_breakdown"]["validation_error"] == 2


# Who may.


def status_for(needs: Needs, who: str) -> int:
    """What *who* gets from a route that needs *needs*: 0 is "let in"."""
    allowed = {
        Needs.NOTHING: {"nobody", "alice", "bob", "publisher", "admin"},
        Needs.ITSELF: {"alice", "bob", "publisher", "admin"},
        Needs.PLAYER: {"alice", "admin"},
        Needs.PUBLISH: {"publisher"},
        Needs.ADMIN: {"admin"},
    }[needs]
    return 0 if who in allowed else 401 if who == "nobody" else 403


@pytest.mark.parametrize("who", ["nobody", "alice", "bob", "publisher", "admin"])
@pytest.mark.parametrize("route", [r for r in ROUTES if r.handler], ids=lambda r: f"{r.method} {r.path}")
async def test_scopes(guarded: Api, route: Any, who: str) -> None:
    tokens = {
        "nobody": None,
        "alice": guarded.access.issue("alice"),
        "bob": guarded.access.issue("bob"),
        "publisher": guarded.access.issue(None, ["publish"]),
        "admin": guarded.access.issue(None, ["admin"]),
    }
    answer = await guarded.ask(route.method, fill(route.path), token=tokens[who])
    status = status_for(route.needs, who)
    if status:
        assert_error(answer, status, "authentication_error")
        assert guarded.registrar.asked == []
        assert ("www-authenticate" in answer.headers) is (status == 401)
    else:
        assert answer.status not in (401, 403)


async def test_protected_mode_lets_in_whom_the_front_door_let_in(api: Api) -> None:
    for route in ROUTES:
        answer = await api.ask(route.method, fill(route.path))
        assert answer.status not in (401, 403), route


async def test_stranger_is_not_told_what_else_is_wrong(guarded: Api) -> None:
    assert (await guarded.get("/api/connections/a%20b")).status == 401
    assert (await guarded.ask("POST", "/api/connections/alice/session", b"{")).status == 401


# CORS.


@pytest.fixture
async def open_to_a_page() -> Api:
    return Api(Settings(server_id="node-1", secret_key=SECRET, cors_origins=("https://play.example.org",)))


@pytest.mark.parametrize("path", ["/api/messages", "/api/connections/alice/commands", "/sse/alice", "/api/auth/verify"])
async def test_preflight(open_to_a_page: Api, path: str) -> None:
    headers = {"Origin": "https://play.example.org", "Access-Control-Request-Method": "POST"}
    answer = await open_to_a_page.ask("OPTIONS", path, headers=headers)
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == "https://play.example.org"
    assert "Authorization" in answer.headers["access-control-allow-headers"]
    assert answer.headers["server-id"] == "node-1"
    refused = await open_to_a_page.ask("OPTIONS", path, headers={**headers, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers


async def test_answers_and_errors_can_be_read_by_an_allowed_page(open_to_a_page: Api) -> None:
    headers = {"Origin": "https://play.example.org"}
    for path in ("/health", "/api/connections/stats", "/nothing"):
        answer = await open_to_a_page.get(path, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://play.example.org"
        assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in (await open_to_a_page.get("/health")).headers


async def test_options_without_cors_says_what_there_is(api: Api) -> None:
    answer = await api.ask("OPTIONS", "/api/connections/alice")
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert_error(await api.ask("OPTIONS", "/nothing"), 404, "validation_error")


# Health.


async def test_health_codes(api: Api) -> None:
    assert (await api.get("/health")).status == 200
    api.stand.machine.percent = 99
    degraded = await api.get("/health")
    assert (degraded.status, degraded.json["status"]) == (200, "degraded")
    api.stand.storage.trouble = "database is locked"
    for path in ("/health", "/health/detailed"):
        unhealthy = await api.get(path)
        assert (unhealthy.status, unhealthy.json["status"]) == (503, "unhealthy")
        assert unhealthy.json["why"] == "database is locked"


async def test_ready_code(api: Api) -> None:
    assert (await api.get("/health/ready")).status == 200
    api.stand.monitor.stage = Stage.DRAINING
    answer = await api.get("/health/ready")
    assert (answer.status, answer.json["ready"], answer.json["stage"]) == (503, False, "draining")


# Players.


async def test_unknown_player_is_an_answer(api: Api) -> None:
    answer = await api.get("/api/connections/nobody")
    assert answer.status == 200
    assert answer.json["presence"]["status"] == "offline"


@pytest.mark.parametrize("body", [None, b"", {}, {"session_id": None}, {"session_id": "undefined"}])
async def test_switch_to_a_session_that_is_made_up(api: Api, body: object) -> None:
    answer = await api.ask("POST", "/api/connections/alice/session", body)
    assert answer.json == {
        "success": True,
        "player_id": "alice",
        "session_id": "made-up",
        "previous_session_id": "before",
        "previous_connections_disconnected": 2,
        "timestamp": "2023-11-14T22:13:20.000Z",
    }
    assert api.registrar.asked == [("switch", "alice", None)]


async def test_switch_to_a_session_of_the_clients_choice(api: Api) -> None:
    answer = await api.ask("POST", "/api/connections/alice/session", {"session_id": "mine"})
    assert answer.json["session_id"] == "mine"
    api.registrar.refusal = Refusal(ErrorType.SESSION, "session 'mine' has ended", status=409)
    assert_error(
        await api.ask("POST", "/api/connections/alice/session", {"session_id": "mine"}), 409, "session_error", "ended"
    )


async def test_end_a_player(api: Api) -> None:
    answer = await api.ask("DELETE", "/api/connections/alice")
    assert answer.json == {"success": True, "player_id": "alice", "connections_closed": 2}
    assert_error(await api.ask("DELETE", "/api/connections/nobody"), 404, "session_error", "nobody")


async def test_end_a_connection(api: Api) -> None:
    answer = await api.ask("DELETE", "/api/connections/alice/c1")
    assert answer.json["connections_closed"] == 1
    assert_error(await api.ask("DELETE", "/api/connections/alice/c9"), 404, "connection_error", "c9")


# Subscriptions.


async def test_subscriptions(api: Api) -> None:
    body = {"subscribe": ["ooc", "room:inn", "ooc"], "unsubscribe": ["room:yard"], "session_id": "s1"}
    answer = await api.ask("POST", "/api/connections/alice/subscriptions", body)
    assert answer.json == {"success": True, "player_id": "alice", "position": "3-42"}
    assert api.registrar.asked == [("subscriptions", "alice", "s1", ["ooc", "room:inn"], ["room:yard"])]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "subscribe"),
        ({"subscribe": "ooc"}, "list"),
        ({"subscribe": None}, "list"),
        ({"subscribe": ["a b"]}, "channel"),
        ({"unsubscribe": [5]}, "channel"),
        ({"subscribe": ["ooc"], "unsubscribe": ["ooc"]}, "ooc"),
        ({"subscribe": [f"c{i}" for i in range(1001)]}, "1000"),
        ({"subscribe": ["ooc"], "channel": "ooc"}, "unknown field 'channel'"),
    ],
)
async def test_wrong_subscriptions(api: Api, body: object, word: str) -> None:
    answer = await api.ask("POST", "/api/connections/alice/subscriptions", body)
    assert_error(answer, 422, "validation_error", word)
    assert api.registrar.asked == []


# Messages.


@pytest.mark.parametrize("message_id", ["m1", "a/b", "/a", "a%2Fb/", "%C3%A4"])
async def test_explain_any_id(api: Api, message_id: str) -> None:
    wanted = message_id.replace("%2F", "/").replace("%C3%A4", "ä")
    api.stand.storage.expired[wanted] = Expired(5, "@alice", NOW)
    answer = await api.get(f"/api/messages/{message_id}")
    assert (answer.status, answer.json["id"], answer.json["state"]) == (200, wanted, "expired")


async def test_explain_an_unknown_message(api: Api) -> None:
    assert_error(await api.get("/api/messages/none"), 404, "validation_error", "none")
    assert_error(await api.get("/api/messages/" + "x" * 129), 422, "validation_error")


async def test_store_that_cannot_be_read(api: Api) -> None:
    api.stand.storage.error = "disk I/O error"
    answer = await api.get("/api/messages/m1")
    assert_error(answer, 503, "persistence_error", "I/O")
    assert int(answer.headers["retry-after"]) >= 1


# Tokens.


async def test_verify_in_protected_mode(api: Api) -> None:
    answer = await api.get("/api/auth/verify", headers={"Authorization": "Bearer your_token"})
    assert (answer.status, answer.json) == (200, {"valid": None, "mode": "protected"})


async def test_verify_a_good_token(guarded: Api) -> None:
    answer = await guarded.get("/api/auth/verify", token=guarded.access.issue("alice", ["publish"], 600))
    assert answer.json == {
        "valid": True,
        "player_id": "alice",
        "scopes": ["publish"],
        "expires_at": "2023-11-14T22:23:20.000Z",
        "expires_in_seconds": 600.0,
    }
    forever = await guarded.get("/api/auth/verify", token=guarded.access.issue("alice", seconds=None))
    assert forever.json["expires_at"] is forever.json["expires_in_seconds"] is None


@pytest.mark.parametrize("reason", ["missing", "malformed", "bad_signature", "expired"])
async def test_verify_says_what_is_wrong_with_a_token(guarded: Api, reason: str) -> None:
    other = Access(Settings(secret_key=SECRET[::-1]), guarded.stand.clock)
    old = guarded.access.issue("alice", seconds=10)
    token = {"missing": "", "malformed": "your_token", "bad_signature": other.issue("alice"), "expired": old}[reason]
    guarded.stand.clock.posix += 11
    answer = await guarded.get("/api/auth/verify", headers={"Authorization": f"Bearer {token}"})
    assert answer.status == 401
    assert (answer.json["valid"], answer.json["reason"]) == (False, reason)
    assert answer.json["error_type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "your_token" not in answer.json["message"]


# Tasks, and the page for people.


async def test_tasks_of_one_player(api: Api) -> None:
    assert (await api.get("/monitoring/tasks")).json["tree"]
    assert (await api.get("/monitoring/tasks?player=alice")).json["tree"] is None
    assert_error(await api.get("/monitoring/tasks?player=a%20b"), 422, "validation_error")


async def test_page_for_people(api: Api) -> None:
    answer = await api.get("/", headers={"Host": "game.local:8000"})
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = answer.body.decode()
    assert "curl -N http://game.local:8000/sse/alice" in page
    assert "wscat -c ws://game.local:8000/ws/alice" in page
    assert "<script" not in page
    assert "default-src 'none'" in answer.headers["content-security-policy"]


async def test_page_says_whether_a_token_is_needed(api: Api, guarded: Api) -> None:
    assert b"token issue" not in (await api.get("/")).body
    assert b"token issue" in (await guarded.get("/")).body


async def test_page_cannot_be_made_to_say_something_else(api: Api) -> None:
    page = (await api.get("/", headers={"Host": "<script>alert(1)</script>"})).body
    assert b"<script" not in page


# The docs.


def documented() -> set[str]:
    """The headings of the page: "METHOD /path"."""
    return set(re.findall(r"^``((?:GET|POST|DELETE) /\S*)``$", DOCS.read_text(), re.MULTILINE))


def test_docs_and_routes_are_the_same() -> None:
    routes = {f"{r.method} {r.path}".replace("<any_text:message_id>", "<id>") for r in ROUTES}
    shown = {re.sub(r"<(\w+?)_id>", r"{\1}", route).replace("<id>", "{id}") for route in routes}
    assert documented() == shown


@pytest.mark.parametrize(
    "path", sorted({r.path for r in ROUTES if r.method == "GET" and r.handler} - {"/", "/metrics"})
)
async def test_docs_name_every_field(api: Api, path: str, autojump_clock: MockClock) -> None:
    api.stand.connect(api.stand.session("alice"), "c1", "websocket", why="no answer to the last ping")
    api.stand.message("m1", 101, "@alice", api.stand.hub.sessions["alice"].row)
    api.stand.statistics.error("delivery_error", "Message delivery failed", "alice", NOW)
    text = DOCS.read_text()
    answer = (await api.get(fill(path))).json
    missing = {name for name in field_names(answer) if f"``{name}``" not in text}
    assert not missing


NOT_FIELDS = frozenset({"names", "players", "nodes", "error_breakdown", "tree", "kinds"})


def field_names(value: Any) -> set[str]:
    """All names in an answer but the keys of maps whose keys are data."""
    if isinstance(value, list):
        return set().union(*(field_names(item) for item in value))
    if not isinstance(value, dict):
        return set()
    below = (field_names(item) for name, item in value.items() if name not in NOT_FIELDS)
    return set(value).union(*below)
