"""Protected mode, Host and Origin, proxies, tokens: who is let in, and what the others are told."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from ipaddress import ip_network

import jwt
import pytest
from attrs import define, field

from mythos_trio import logs
from mythos_trio.access import Access, RequestHead, TokenError, Visitor, find_token, peek
from mythos_trio.config import Settings
from mythos_trio.core.errors import ErrorType, Refusal

KEY = "a-key-of-the-tests-that-is-32-bytes-long"
NOW = 1_800_000_000.0


class FixedClock:
    time = NOW

    def now(self) -> float:
        return self.time


@define
class FakeHead:
    headers: tuple[tuple[str, str], ...] = ()
    query: Mapping[str, str] = field(factory=dict)
    method: str = "GET"
    path: str = "/health"

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


def head(host: str | None = "localhost:8000", /, **headers: str) -> FakeHead:
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return FakeHead((*([("host", host)] if host is not None else []), *named))


def with_query(request: FakeHead, **query: str) -> FakeHead:
    request.query = query
    return request


def access(**settings: object) -> Access:
    return Access(Settings(**settings), FixedClock())  # type: ignore[arg-type]


def refused(rules: Access, request: RequestHead, peer: str = "127.0.0.1") -> Refusal:
    with pytest.raises(Refusal) as caught:
        rules.check(request, peer)
    assert caught.value.close is None, "a stranger gets a status, not a close code"
    return caught.value


PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


# Protected mode.


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1"])
def test_protected_mode_serves_loopback_without_any_token(peer: str) -> None:
    visitor = access().check(head(authorization="Bearer nonsense"), peer)
    assert (visitor.protected, visitor.loopback, visitor.proxied, visitor.limited) == (True, True, False, False)
    assert visitor.token_error is None
    visitor.require_player("alice")
    visitor.require_scope("admin")


@pytest.mark.parametrize("peer", ["10.0.0.1", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_protected_mode_refuses_other_peers_and_says_why(peer: str) -> None:
    refusal = refused(access(), head(), peer)
    assert (refusal.status, refusal.error_type, refusal.details["reason"]) == (
        403,
        ErrorType.AUTHENTICATION,
        "protected",
    )
    assert "SECRET_KEY" in refusal.message
    assert peer in refusal.message


@pytest.mark.parametrize("name", ["x_forwarded_for", "x_real_ip", "x_forwarded_proto", "forwarded", "via"])
def test_protected_mode_refuses_whom_a_proxy_speaks_for(name: str) -> None:
    assert refused(access(), head(**{name: "127.0.0.1"})).details["reason"] == "protected"


def test_protected_mode_refuses_a_trusted_proxy_too() -> None:
    rules = access(trusted_proxies=(ip_network("127.0.0.1/32"),))
    assert refused(rules, head()).details["reason"] == "protected"


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:9", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "[::1]", "game.localhost:8000", None],
)
def test_names_of_this_machine_are_fine(host: str | None) -> None:
    access().check(head(host), "127.0.0.1")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "192.168.0.2:8000",
        "0.0.0.0:8000",
        "[::2]",
        "a b",
        "",
    ],
)
def test_a_rebound_name_is_refused(host: str) -> None:
    refusal = refused(access(), head(host))
    assert (refusal.status, refusal.details["reason"]) == (403, "host")


def test_the_name_that_is_listened_on_is_fine() -> None:
    access(host="MyBox").check(head("mybox:8000"), "127.0.0.1")


def test_with_a_key_any_host_name_is_fine() -> None:
    access(secret_key=KEY).check(head("play.example"), "192.0.2.1")


# Origin.


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_own_pages_are_admitted(host: str, origin: str) -> None:
    rules = access()
    request = head(host, origin=origin)
    rules.check(request, "127.0.0.1")
    assert rules.cors_headers(request) == ()


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost:3000",
        "http://127.0.0.1:8000",
        "https://localhost:8000",
        "null",
        "file://",
        "chrome-extension://abc",
        "http://localhost:8000.evil.example",
        "http://localhost:8000@evil.example",
        "",
    ],
)
@pytest.mark.parametrize("key", [None, KEY])
def test_foreign_pages_are_refused(origin: str, key: str | None) -> None:
    refusal = refused(access(secret_key=key), head(origin=origin))
    assert (refusal.status, refusal.details["reason"]) == (403, "origin")


def test_the_refusal_and_the_log_name_the_value_that_would_admit_the_page() -> None:
    rules = access(cors_origins=("https://a.example",))
    with logs.capture() as lines:
        refusal = refused(rules, head(origin="https://B.example:443"))
        refused(rules, head(origin="https://B.example:443"))
    assert refusal.details["value"] == "https://a.example,https://b.example"
    (line,) = lines
    assert (line["level"], line["component"]) == ("WARNING", "authentication")
    assert "CORS_ORIGINS=https://a.example,https://b.example" in line["event"]
    # What is named does admit it.
    access(cors_origins=tuple(refusal.details["value"].split(","))).check(head(origin="https://b.example"), "::1")


def test_a_second_origin_header_does_not_slip_by() -> None:
    request = FakeHead((("host", "localhost"), ("origin", "http://localhost"), ("origin", "http://evil.example")))
    assert refused(access(), request).details["reason"] == "origin"


def test_named_origins_are_admitted_and_told_so() -> None:
    rules = access(secret_key=KEY, cors_origins=("https://a.example",))
    request = head(origin="https://a.example")
    rules.check(request, "192.0.2.1")
    assert ("Access-Control-Allow-Origin", "https://a.example") in rules.cors_headers(request)
    assert rules.cors_headers(head(origin="https://b.example")) == rules.cors_headers(head()) == ()


@pytest.mark.parametrize(
    ("settings", "origin", "admitted"),
    [
        ({"debug": True}, "http://localhost:3000", True),
        ({"debug": True}, "https://127.0.0.1:3000", True),
        ({"debug": True}, "http://evil.example:3000", False),
        ({"debug": True, "secret_key": KEY}, "http://localhost:3000", False),
        ({"debug": False}, "http://localhost:3000", False),
    ],
)
def test_debug_in_protected_mode_admits_loopback_pages(
    settings: dict[str, object], origin: str, admitted: bool
) -> None:
    rules = access(**settings)
    if admitted:
        rules.check(head(origin=origin), "127.0.0.1")
    else:
        refused(rules, head(origin=origin))


def test_an_image_of_a_foreign_page_is_refused_and_a_link_is_not() -> None:
    refusal = refused(access(), head(sec_fetch_site="cross-site", sec_fetch_mode="no-cors", sec_fetch_dest="image"))
    assert refusal.details["reason"] == "origin"
    refused(access(), head(sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="iframe"))
    access().check(head(sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="document"), "127.0.0.1")
    access().check(head(sec_fetch_site="same-origin", sec_fetch_mode="cors"), "127.0.0.1")


def test_a_page_behind_a_trusted_proxy_is_our_own() -> None:
    rules = access(secret_key=KEY, trusted_proxies=PROXIES)
    request = head(
        "inner:8000", origin="https://play.example", x_forwarded_proto="https", x_forwarded_host="play.example"
    )
    rules.check(request, "10.0.0.1")
    with pytest.raises(Refusal):
        rules.check(request, "192.0.2.1")


def test_preflight() -> None:
    rules = access(secret_key=KEY, cors_origins=("https://a.example",))
    asked = head(origin="https://a.example", access_control_request_method="DELETE")
    assert rules.preflight_headers(asked) is None
    asked.method = "OPTIONS"
    answer = dict(rules.preflight_headers(asked) or ())
    assert answer["Access-Control-Allow-Origin"] == "https://a.example"
    assert "DELETE" in answer["Access-Control-Allow-Methods"]
    assert "Last-Event-ID" in answer["Access-Control-Allow-Headers"]
    plain = head()
    plain.method = "OPTIONS"
    assert rules.preflight_headers(plain) is None


# Proxies.


@pytest.mark.parametrize(
    ("peer", "headers", "address"),
    [
        ("10.0.0.1", {"x_forwarded_for": "192.0.2.7"}, "192.0.2.7"),
        ("10.0.0.1", {"x_forwarded_for": "6.6.6.6, 192.0.2.7, 10.0.0.2"}, "192.0.2.7"),
        ("10.0.0.1", {"x_forwarded_for": "192.0.2.7:5555"}, "192.0.2.7"),
        ("10.0.0.1", {"x_forwarded_for": "[2001:db8::1]:5555"}, "2001:db8::1"),
        ("10.0.0.1", {"x_forwarded_for": "::ffff:192.0.2.7"}, "192.0.2.7"),
        ("10.0.0.1", {"x_forwarded_for": "test"}, "10.0.0.1"),
        ("10.0.0.1", {"x_forwarded_for": "192.0.2.7, junk, 10.0.0.2"}, "10.0.0.2"),
        ("10.0.0.1", {"x_real_ip": "192.0.2.8"}, "192.0.2.8"),
        ("10.0.0.1", {"x_real_ip": "192.0.2.8", "x_forwarded_for": "192.0.2.7"}, "192.0.2.7"),
        ("10.0.0.1", {}, "10.0.0.1"),
        ("192.0.2.1", {"x_forwarded_for": "127.0.0.1"}, "192.0.2.1"),
        ("fd00::5", {"x_forwarded_for": "192.0.2.7"}, "192.0.2.7"),
    ],
)
def test_the_address_is_what_trusted_proxies_say(peer: str, headers: dict[str, str], address: str) -> None:
    visitor = access(secret_key=KEY, trusted_proxies=PROXIES).check(head(**headers), peer)
    assert visitor.address == address
    assert visitor.proxied == (bool(headers) or peer != "192.0.2.1")


def test_who_is_counted_by_address() -> None:
    rules = access(secret_key=KEY, trusted_proxies=PROXIES)
    assert rules.check(head(), "192.0.2.1").limited
    assert rules.check(head(x_forwarded_for="192.0.2.7"), "10.0.0.1").limited
    assert not rules.check(head(), "10.0.0.1").limited, "a proxy's own address is everybody's"
    assert not rules.check(head(), "127.0.0.1").limited


def test_forwarding_headers_of_strangers_are_warned_about_once_for_each_address() -> None:
    rules = access(secret_key=KEY)
    with logs.capture() as lines:
        for peer in ("192.0.2.1", "192.0.2.1", "192.0.2.2"):
            rules.check(head(x_forwarded_for="1.2.3.4"), peer)
    assert [(line["level"], line["address"]) for line in lines] == [("WARNING", "192.0.2.1"), ("WARNING", "192.0.2.2")]
    assert "TRUSTED_PROXIES=192.0.2.1" in lines[0]["event"]


def test_what_is_remembered_of_strangers_is_bounded() -> None:
    rules = access(secret_key=KEY)
    with logs.capture() as lines:
        for n in range(2000):
            rules.check(head(x_real_ip="1.2.3.4"), f"192.0.{n // 256}.{n % 256}")
    assert len(lines) == 1024


# Tokens.


def visitor_with(token: str | None, rules: Access | None = None) -> Visitor:
    headers = {"authorization": f"Bearer {token}"} if token is not None else {}
    return (rules or access(secret_key=KEY)).check(head(**headers), "192.0.2.1")


def signed(key: str = KEY, algorithm: str = "HS256", **claims: object) -> str:
    return jwt.encode(claims, key, algorithm=algorithm)


def test_a_players_token_opens_that_players_paths_only() -> None:
    visitor = visitor_with(access(secret_key=KEY).issue("alice", seconds=60))
    assert (visitor.player_id, visitor.scopes, visitor.expires_at) == ("alice", frozenset(), NOW + 60)
    visitor.require_player("alice")
    requirements: list[Callable[[], None]] = [
        lambda: visitor.require_player("bob", "admin"),
        lambda: visitor.require_scope("publish"),
    ]
    for forbidden in requirements:
        with pytest.raises(Refusal) as caught:
            forbidden()
        assert (caught.value.status, caught.value.close and caught.value.close.code) == (403, 4500)


def test_scopes() -> None:
    visitor = visitor_with(access(secret_key=KEY).issue(None, ["publish", "admin"], None))
    assert (visitor.player_id, visitor.expires_at) == (None, None)
    visitor.require_scope("publish")
    visitor.require_player("bob", "admin")
    with pytest.raises(Refusal):
        visitor.require_player("bob")


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "missing"),
        ("", "missing"),
        ("nonsense", "malformed"),
        ("a.b.c", "malformed"),
        ("x" * 9000, "malformed"),
        (signed(key="another-key-that-is-32-bytes-long-too"), "bad_signature"),
        (signed(algorithm="HS512", key=KEY * 2), "bad_signature"),
        (signed(exp=NOW), "expired"),
        (signed(exp=NOW - 1), "expired"),
        (signed(exp="soon"), "malformed"),
        (signed(exp=1e300), "malformed"),
        (signed(nbf=NOW + 3600), "malformed"),
        (signed(sub="no player"), "malformed"),
        (signed(sub="stats"), "malformed"),
        (signed(scope=["admin"]), "malformed"),
        (signed(aud="another service"), "malformed"),
    ],
)
def test_bad_tokens_are_named(token: str | None, reason: str) -> None:
    visitor = visitor_with(token)
    assert visitor.token_error is not None
    assert visitor.token_error.reason == reason
    requirements: list[Callable[[], None]] = [
        lambda: visitor.require_player("alice"),
        lambda: visitor.require_scope("admin"),
        visitor.require_token,
    ]
    for needed in requirements:
        with pytest.raises(Refusal) as caught:
            needed()
        refusal = caught.value
        assert (refusal.status, refusal.error_type, refusal.details) == (
            401,
            ErrorType.AUTHENTICATION,
            {"reason": reason},
        )
        assert refusal.close is not None
        assert (refusal.close.code, refusal.close.reconnect) == (4500, False)


def test_an_unsigned_token_is_refused() -> None:
    def part(value: object) -> str:
        return urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    unsigned = f"{part({'alg': 'none', 'typ': 'JWT'})}.{part({'sub': 'alice', 'scope': 'admin'})}."
    visitor = visitor_with(unsigned)
    assert visitor.player_id is None
    assert visitor.token_error is not None
    assert visitor.token_error.reason == "bad_signature"


def test_expiry_is_by_the_servers_clock() -> None:
    clock = FixedClock()
    rules = Access(Settings(secret_key=KEY), clock)
    token = rules.issue("alice", seconds=10)
    assert rules.verify(token).player_id == "alice"
    clock.time = NOW + 10
    with pytest.raises(TokenError, match=r"expired at 2027-01-15T08:00:10\.000Z"):
        rules.verify(token)


def test_open_paths_need_no_token() -> None:
    visitor = access(secret_key=KEY).check(head(), "192.0.2.1", open_path=True)
    assert visitor.token_error is None


@pytest.mark.parametrize(
    ("request_head", "token"),
    [
        (head(authorization="bearer  abc "), "abc"),
        (head(authorization="Basic abc"), None),
        (head(sec_websocket_protocol="bearer, abc"), "abc"),
        (head(sec_websocket_protocol="mythos-protocol, bearer, abc"), "abc"),
        (head(sec_websocket_protocol="mythos-protocol"), None),
        (with_query(head(), token="abc"), "abc"),
        (with_query(head(), token=""), None),
        (with_query(head(authorization="Bearer one"), token="two"), "one"),
        (head(), None),
    ],
)
def test_where_a_token_may_stand(request_head: FakeHead, token: str | None) -> None:
    assert find_token(request_head) == token


def test_issue_needs_a_key_and_known_scopes() -> None:
    with pytest.raises(ValueError, match="SECRET_KEY"):
        access().issue("alice")
    with pytest.raises(ValueError, match="root: not a scope"):
        access(secret_key=KEY).issue("alice", ["root"])
    with pytest.raises(Refusal):
        access(secret_key=KEY).issue("no player")


def test_peek_reads_without_believing() -> None:
    header, claims = peek(signed(key="another-key-that-is-32-bytes-long-too", sub="alice"))
    assert (header["alg"], claims["sub"]) == ("HS256", "alice")
    with pytest.raises(TokenError):
        peek("nonsense")


def test_a_forged_token_is_an_error_in_the_log_once_for_each_address() -> None:
    rules = access(secret_key=KEY)
    forged = jwt.encode({"sub": "ann"}, "x" * 32, algorithm="HS256")
    with logs.capture() as lines:
        for _ in range(3):
            rules.check(head(authorization=f"Bearer {forged}"), "127.0.0.1")
        rules.check(head(), "127.0.0.1")
    errors = [line for line in lines if line["level"] == "ERROR"]
    assert [line["event"] for line in errors] == ["Authentication error in GET /health"]
    assert errors[0]["error_type"] == "authentication_error"
    assert errors[0]["reason"] == "bad_signature"
    assert forged not in repr(lines)
