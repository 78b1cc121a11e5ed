"""Who may: protected mode, Host and Origin, proxies, tokens (contract, section 9).

`Access.check` turns down what a stranger does wrong, by `Refusal` with an HTTP status. Trouble with a
token is not raised there but kept in the `Visitor`: a browser cannot see the status of a refused
WebSocket, so the streams accept it and close it with a code; `Visitor.require_player` and
`Visitor.require_scope` raise what fits both.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, Literal, Protocol, TypeAlias

import jwt
from attrs import evolve, frozen

from mythos_trio import logs
from mythos_trio.config import Network, Settings, is_loopback_name, parse_origin
from mythos_trio.core import names
from mythos_trio.core.errors import BAD_TOKEN, ErrorType, Refusal
from mythos_trio.seams import Clock, rfc3339

ALGORITHM: Final = "HS256"
SCOPES: Final = ("publish", "admin")
# Twice what the largest sensible token needs; a head has 16 KiB in all.
MAX_TOKEN: Final = 8192
# How far the clock of who issued a token may be ahead of ours, in seconds.
LEEWAY: Final = 60.0
# Addresses and origins that have been warned about. Beyond it there are no further warnings: the
# refusals themselves are still logged by who is refusing.
MAX_WARNED: Final = 1024
# The same few addresses and host names come with each request: what these many of the newest ones mean is known.
# Longer texts are not kept (no address has more characters, with its zone), so that this has a bound in bytes too.
REMEMBERED: Final = 1024
SHORT: Final = 64
# How much of a path is logged.
SHOWN: Final = 200

Reason: TypeAlias = Literal["missing", "malformed", "bad_signature", "expired"]
Headers: TypeAlias = tuple[tuple[str, str], ...]
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_log = logs.get("authentication")

_FORWARDING: Final = re.compile(r"x-forwarded-.+|x-real-ip|forwarded|via")
_HOST: Final = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:/@\s]+))(?::(?P<port>[0-9]{1,5}))?")


class RequestHead(Protocol):
    """What is looked at of a request's head."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def query(self) -> Mapping[str, str]: ...
    @property
    def headers(self) -> Sequence[tuple[str, str]]:
        """Names in lower case."""
        ...

    def header(self, name: str, /) -> str | None: ...


class TokenError(Exception):
    """A token that is not good; *reason* is a word of ``/api/auth/verify``."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message


@frozen
class Claims:
    """What a good token says. *expires_at*: POSIX seconds, None if it does not expire."""

    player_id: str | None
    scopes: frozenset[str]
    expires_at: float | None
    token_id: str
    """What tells this token from others, in logs and rate limits: it opens nothing."""


@frozen
class Visitor:
    """Who asks."""

    address: str
    """The client's address, as far as it can be known: the peer's, or what a trusted proxy says."""
    proxied: bool
    """A proxy stands between: the peer is trusted, or there is a forwarding header."""
    trusted_peer: bool
    protected: bool
    loopback: bool
    """Whether *address* is this machine."""
    own_address: bool = False
    """Whether *address* is a trusted proxy's own: no client can be told from another by it."""
    claims: Claims | None = None
    token_error: TokenError | None = None

    @property
    def player_id(self) -> str | None:
        return self.claims.player_id if self.claims else None

    @property
    def scopes(self) -> frozenset[str]:
        return self.claims.scopes if self.claims else frozenset()

    @property
    def expires_at(self) -> float | None:
        return self.claims.expires_at if self.claims else None

    @property
    def token_id(self) -> str | None:
        return self.claims.token_id if self.claims else None

    @property
    def limited(self) -> bool:
        """Whether connects are counted by address: never loopback's or a trusted proxy's own."""
        return not (self.loopback or self.own_address)

    def require_token(self) -> None:
        """Raise the 401 refusal that says what is wrong with the token."""
        if self.protected or self.claims is not None:
            return
        error = self.token_error or TokenError("missing", "a token is needed")
        raise refusal_of(error)

    def require_player(self, player_id: str, *or_scopes: str) -> None:
        """Only this player's token, or one with any of *or_scopes*, may."""
        if self.protected:
            return
        self.require_token()
        if self.player_id != player_id and not self.scopes.intersection(or_scopes):
            raise _forbidden(f"this token is not {player_id}'s", player_id=player_id)

    def require_scope(self, scope: str) -> None:
        if self.protected:
            return
        self.require_token()
        if scope not in self.scopes:
            raise _forbidden(f"this needs a token with the scope {scope}", scope=scope)


def refusal_of(error: TokenError) -> Refusal:
    """401 over HTTP, 4500 on a stream."""
    return Refusal(
        ErrorType.AUTHENTICATION, error.message, status=401, close=BAD_TOKEN, details={"reason": error.reason}
    )


def _forbidden(message: str, **details: Any) -> Refusal:
    details = {"reason": "forbidden", **details}
    return Refusal(ErrorType.AUTHENTICATION, message, status=403, close=BAD_TOKEN, details=details)


def _stranger(message: str, reason: str, **details: Any) -> Refusal:
    """What a stranger does wrong: a status before any upgrade, no close code."""
    return Refusal(ErrorType.AUTHENTICATION, message, status=403, details={"reason": reason, **details})


@frozen
class _Place:
    """A host and port as a URL has them: lower case, no brackets."""

    host: str
    port: int | None


def _is_navigation(head: RequestHead) -> bool:
    """Whether somebody has followed a link (Fetch Metadata Request Headers, section 2)."""
    return (head.header("sec-fetch-mode"), head.header("sec-fetch-dest")) == ("navigate", "document")


def _is_forwarding(name: str) -> bool:
    return name.startswith(("x-", "forwarded", "via")) and _FORWARDING.fullmatch(name) is not None


def _parse_host(text: str) -> _Place | None:
    return _parse_place(text) if len(text) <= SHORT else _parse_place.__wrapped__(text)


@lru_cache(REMEMBERED)
def _parse_place(text: str) -> _Place | None:
    match = _HOST.fullmatch(text.strip())
    if match is None:
        return None
    host = (match["v6"] or match["name"]).lower()
    return _Place(host, int(match["port"]) if match["port"] else None)


class Access:
    """The rules, with the settings they depend on."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._trusted: tuple[Network, ...] = settings.trusted_proxies
        self._origins = frozenset(settings.cors_origins)
        self._warned: set[str] = set()
        # Visitors by the address of the socket's other end, as they are if no proxy speaks for anybody.
        self._known_visitor = lru_cache(REMEMBERED)(
            lambda peer: self._new_visitor(peer, trusted=self._is_trusted(peer), proxied=False)
        )

    def check(self, head: RequestHead, peer: str, *, open_path: bool = False) -> Visitor:
        """Who asks, or the 403 or 400 refusal of a request that must not be served at all.

        :param peer: the address of the socket's other end.
        :param open_path: no token is needed (``/health``, the files of the pages).
        """
        visitor = self._visitor(head, peer)
        if self._settings.protected:
            self._check_protected(head, visitor, peer)
        self._check_origin(head, visitor)
        return visitor if open_path else self._with_token(head, visitor)

    # Who asks.

    def _visitor(self, head: RequestHead, peer: str) -> Visitor:
        forwarding = [name for name, _ in head.headers if name[:1] in "xfv" and _is_forwarding(name)]
        plain = self._known_visitor(peer)
        if not (forwarding or plain.trusted_peer):
            return plain
        trusted = plain.trusted_peer
        if forwarding and not trusted:
            self._warn_once(
                peer,
                f"Forwarding headers ignored: to believe this proxy set TRUSTED_PROXIES={peer}",
                address=peer,
                headers=sorted(set(forwarding)),
            )
        return self._new_visitor(self._client(head, peer) if trusted else peer, trusted=trusted, proxied=True)

    def _new_visitor(self, address: str, *, trusted: bool, proxied: bool) -> Visitor:
        return Visitor(
            address=address,
            proxied=proxied,
            trusted_peer=trusted,
            protected=self._settings.protected,
            loopback=_is_loopback(address),
            own_address=trusted and self._is_trusted(address),
        )

    def _client(self, head: RequestHead, peer: str) -> str:
        """The client's address as trusted proxies tell it.

        ``X-Forwarded-For`` is read from its end: each proxy appends who spoke to it, so only what
        stands behind the last stranger's own words is true.
        """
        hops = [hop.strip() for value in _all(head, "x-forwarded-for") for hop in value.split(",")]
        if not hops:
            hops = [value.strip() for value in _all(head, "x-real-ip")[-1:]]
        client = peer
        for hop in reversed(hops):
            address = _parse_hop(hop)
            if address is None:
                break
            client = address
            if not self._is_trusted(address):
                break
        return client

    def _is_trusted(self, address: str) -> bool:
        parsed = _parse_address(address)
        return parsed is not None and any(parsed in network for network in self._trusted)

    def _warn_once(self, key: str, event: str, **fields: Any) -> None:
        if self._first_time(key):
            _log.warning(event, **fields)

    def _first_time(self, key: str) -> bool:
        if key in self._warned or len(self._warned) >= MAX_WARNED:
            return False
        self._warned.add(key)
        return True

    # Protected mode.

    def _check_protected(self, head: RequestHead, visitor: Visitor, peer: str) -> None:
        if visitor.proxied or not _is_loopback(peer):
            who = "a proxy speaks for you" if visitor.proxied else f"you come from {peer}"
            raise _stranger(
                f"protected mode: without SECRET_KEY only clients on the server's own machine are served, and {who}; "
                "the operator can set SECRET_KEY and hand out tokens (mythos-trio token issue)",
                "protected",
            )
        # DNS rebinding: a web page's own name may resolve to 127.0.0.1, so a loopback peer proves nothing
        # about who wrote the page. Only browsers do this, and they always send Host.
        for value in _all(head, "host"):
            place = _parse_host(value)
            if place is None or not self._is_own_name(place.host):
                raise _stranger(
                    f"protected mode: {value[:100]!r} is not a name of this machine; "
                    "use localhost or 127.0.0.1, or set SECRET_KEY",
                    "host",
                )

    def _is_own_name(self, host: str) -> bool:
        return is_loopback_name(host) or host == self._settings.host.lower()

    # Origin.

    def _check_origin(self, head: RequestHead, visitor: Visitor) -> None:
        origins = _all(head, "origin")
        for origin in origins:
            if not (self._admitted(origin) or self._is_own_origin(head, origin, visitor)):
                self._refuse_origin(origin)
        # An <img> or <script> of a foreign page sends no Origin; browsers of today say it this way. A
        # link that somebody follows is fine.
        if not origins and head.header("sec-fetch-site") == "cross-site" and not _is_navigation(head):
            raise _stranger("a page of another site may not use this server", "origin", origin=None)

    def _admitted(self, origin: str) -> bool:
        """Whether the settings admit pages of *origin*."""
        try:
            origin = parse_origin(origin)
        except ValueError:
            return False
        if origin in self._origins:
            return True
        place = _parse_host(origin.partition("://")[2])
        loopback = place is not None and is_loopback_name(place.host)
        return loopback and self._settings.protected and self._settings.debug

    def _is_own_origin(self, head: RequestHead, origin: str, visitor: Visitor) -> bool:
        scheme, host = "http", head.header("host")
        if visitor.trusted_peer:
            scheme = (head.header("x-forwarded-proto") or scheme).split(",")[-1].strip().lower()
            host = (head.header("x-forwarded-host") or host or "").split(",")[-1].strip()
        try:
            return host is not None and parse_origin(origin) == parse_origin(f"{scheme}://{host}")
        except ValueError:
            return False

    def _refuse_origin(self, origin: str) -> None:
        shown = origin[:200]
        try:
            value = ",".join(sorted({*self._origins, parse_origin(origin)}))
        except ValueError:
            value = None
        if value is None:
            hint = f"Origin refused: {shown!r} cannot be admitted"
        else:
            hint = f"Origin refused: to admit it set CORS_ORIGINS={value}"
        self._warn_once(f"origin {shown}", hint, origin=shown)
        setting = {"setting": "CORS_ORIGINS", "value": value} if value else {}
        raise _stranger(f"pages of {shown!r} may not use this server", "origin", origin=shown, **setting)

    def cors_headers(self, head: RequestHead) -> Headers:
        """What an answer to a page of an admitted foreign origin must carry; empty for all others."""
        origin = head.header("origin")
        if origin is None or not self._admitted(origin):
            return ()
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "Server-Id, Retry-After"),
            ("Vary", "Origin"),
        )

    def preflight_headers(self, head: RequestHead) -> Headers | None:
        """The headers of the 204 that answers a browser's question beforehand; None if *head* is none."""
        if head.method != "OPTIONS" or head.header("access-control-request-method") is None:
            return None
        allowed = self.cors_headers(head)
        if not allowed:
            return ()
        private = head.header("access-control-request-private-network") == "true"
        return (
            *allowed,
            ("Access-Control-Allow-Methods", "GET, POST, DELETE"),
            ("Access-Control-Allow-Headers", "Authorization, Content-Type, Idempotency-Key, Last-Event-ID"),
            ("Access-Control-Max-Age", "600"),
            *((("Access-Control-Allow-Private-Network", "true"),) if private else ()),
        )

    # Tokens.

    def _with_token(self, head: RequestHead, visitor: Visitor) -> Visitor:
        if visitor.protected:
            return visitor
        claims: Claims | None = None
        problem: TokenError | None = None
        try:
            claims = self.verify(find_token(head))
        except TokenError as error:
            problem = error
            self._tell_forged(head, visitor, error)
        return evolve(visitor, claims=claims, token_error=problem)

    def _tell_forged(self, head: RequestHead, visitor: Visitor, error: TokenError) -> None:
        """A token that nobody here has signed is worth an ERROR, once for each address and reason; one that is
        missing or has expired is everyday."""
        key = f"{error.reason} {visitor.address}"
        if error.reason in ("malformed", "bad_signature") and self._first_time(key):
            _log.error(
                f"Authentication error in {head.method} {head.path[:SHOWN]}",
                error_type=ErrorType.AUTHENTICATION.value,
                reason=error.reason,
                address=visitor.address,
            )

    def verify(self, token: str | None) -> Claims:
        """What *token* says, or `TokenError`. Without ``SECRET_KEY`` no token is good."""
        if not token:
            raise TokenError("missing", "a token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN")
        if self._settings.secret_key is None:
            raise TokenError("bad_signature", "this server has no SECRET_KEY to check tokens with")
        token_id = hashlib.sha256(token.encode()).hexdigest()[:16]
        return _claims(_decode(token, self._settings.secret_key), token_id, self._clock.now())

    def issue(self, player_id: str | None, scopes: Collection[str] = (), seconds: float | None = 86400.0) -> str:
        """A token for a player, a publisher or an operator.

        :param player_id: None for one that is nobody's (only *scopes* count).
        :param seconds: how long it is good; None is for ever.
        :raises ValueError: no ``SECRET_KEY``, or a scope that there is not.
        """
        if self._settings.secret_key is None:
            raise ValueError("set SECRET_KEY first: without it the server is in protected mode and ignores tokens")
        unknown = set(scopes) - set(SCOPES)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: not a scope; there are {', '.join(SCOPES)}")
        now = int(self._clock.now())
        payload: dict[str, Any] = {"iat": now}
        if player_id is not None:
            payload["sub"] = names.player_id(player_id)
        if scopes:
            payload["scope"] = " ".join(sorted(set(scopes)))
        if seconds is not None:
            payload["exp"] = now + math.ceil(seconds)
        return jwt.encode(payload, self._settings.secret_key, algorithm=ALGORITHM)


def find_token(head: RequestHead) -> str | None:
    """The token of a request: ``Authorization``, the WebSocket subprotocol, or the query."""
    scheme, _, credentials = (head.header("authorization") or "").strip().partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    protocols = [part.strip() for value in _all(head, "sec-websocket-protocol") for part in value.split(",")]
    for name, token in pairwise(protocols):
        if name.lower() == "bearer" and token:
            return token
    return head.query.get("token") or None


def peek(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims of *token*, believed or not; `TokenError` if they cannot be read."""
    try:
        read = jwt.decode_complete(token, options={"verify_signature": False})
    except jwt.PyJWTError as error:
        raise TokenError("malformed", f"not a token: {error}") from None
    return dict(read["header"]), dict(read["payload"])


def _decode(token: str, key: str) -> dict[str, Any]:
    if len(token) > MAX_TOKEN:
        raise TokenError("malformed", f"a token has at most {MAX_TOKEN} characters")
    # The times are checked by our own clock (`_claims`): it is a seam.
    options: Any = {"verify_exp": False, "verify_nbf": False, "verify_iat": False}
    try:
        return jwt.decode(token, key, algorithms=[ALGORITHM], options=options)
    except jwt.InvalidSignatureError:
        raise TokenError("bad_signature", "the token was not signed with this server's SECRET_KEY") from None
    except jwt.InvalidAlgorithmError:
        raise TokenError("bad_signature", f"the token is not signed by {ALGORITHM}") from None
    except (jwt.PyJWTError, ValueError, RecursionError) as error:  # some versions let a deep header's JSON through
        raise TokenError("malformed", f"not a token of this server: {error}") from None


def _claims(payload: dict[str, Any], token_id: str, now: float) -> Claims:
    expires_at = _time(payload, "exp")
    not_before = _time(payload, "nbf")
    if expires_at is not None and now >= expires_at:
        raise TokenError("expired", f"the token expired at {rfc3339(expires_at)}")
    if not_before is not None and not_before > now + LEEWAY:
        raise TokenError("malformed", f"the token is not good before {rfc3339(not_before)}")
    subject, scope = payload.get("sub"), payload.get("scope", "")
    try:
        player = None if subject is None else names.player_id(subject)
    except Refusal as refusal:
        raise TokenError("malformed", f"the token's sub is not a player: {refusal.message}") from None
    if not isinstance(scope, str):
        raise TokenError("malformed", "the token's scope is not a string")
    return Claims(player, frozenset(scope.split()), expires_at, token_id)


def _time(payload: dict[str, Any], name: str) -> float | None:
    value = payload.get(name)
    # The upper bound is the year 9999, beyond which no time can be written.
    valid = value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 253402300800
    )
    if not valid:
        raise TokenError("malformed", f"the token's {name} is not a time")
    return None if value is None else float(value)


def _all(head: RequestHead, name: str) -> list[str]:
    return [value for key, value in head.headers if key == name]


def _parse_hop(text: str) -> str | None:
    """The address of a hop of ``X-Forwarded-For``, which may have a port."""
    address = _parse_address(text)
    if address is None:
        place = _parse_host(text)
        address = _parse_address(place.host) if place else None
    return None if address is None else str(address)


def _parse_address(text: str) -> Address | None:
    return _parse_ip(text) if len(text) <= SHORT else None


@lru_cache(REMEMBERED)
def _parse_ip(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_loopback(text: str) -> bool:
    return len(text) <= SHORT and _is_loopback_ip(text)


@lru_cache(REMEMBERED)
def _is_loopback_ip(text: str) -> bool:
    address = _parse_ip(text)
    return address is not None and address.is_loopback
