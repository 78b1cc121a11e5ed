"""The HTTP API but for its hot part: a Quart-Trio app that Hypercorn serves behind the front door.

The routes are one table (`ROUTES`) that says of each path who may ask. Every answer is JSON, errors in
the one format, whoever raised them (`Refusal` in our code, werkzeug's exceptions in the framework, or a
bug). The front door takes the streams and the POSTs of publishers and clients itself; their paths stand
in the table too, so that a wrong method there is answered 405 and not 404.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum
from html import escape
from http import HTTPStatus
from typing import Any, Final, NoReturn, TypeAlias

from attrs import define, frozen
from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse as Response
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import BaseConverter

from mythos_trio import logs
from mythos_trio.access import Access, RequestHead, TokenError, Visitor, find_token, refusal_of
from mythos_trio.config import Settings
from mythos_trio.core import names, wire
from mythos_trio.core.errors import ErrorType, Refusal, invalid
from mythos_trio.core.messages import decode_json
from mythos_trio.core.transaction import MAX_EFFECTS
from mythos_trio.core.verdicts import Status
from mythos_trio.dispatcher import Dispatcher
from mythos_trio.http1 import JSON, error_body, refusal_headers
from mythos_trio.monitor import Answer, Monitor
from mythos_trio.registrar import Registrar
from mythos_trio.seams import Clock, rfc3339

log = logs.get("server")

# 1,000 channels with the longest names, in JSON.
MAX_BODY: Final = 256 * 1024
# A body comes with its head, or soon after: this is for clients that dribble.
BODY_SECONDS: Final = 10.0

Handler: TypeAlias = Callable[..., Awaitable[Response]]


class Needs(Enum):
    """Who may ask for a path. In protected mode everybody who gets this far may."""

    NOTHING = "open to all"
    ITSELF = "the handler looks at the token by itself"
    PLAYER = "the player's own token, or the scope admin"
    PUBLISH = "the scope publish"
    ADMIN = "the scope admin"


@frozen
class Route:
    """One path with one method. *handler*: the name of a method of `_Api`; None: the front door's."""

    method: str
    path: str
    needs: Needs
    handler: str | None


ROUTES: Final = (
    Route("GET", "/", Needs.NOTHING, "index"),
    Route("GET", "/health", Needs.NOTHING, "health"),
    Route("GET", "/health/detailed", Needs.NOTHING, "health_detailed"),
    Route("GET", "/health/ready", Needs.NOTHING, "health_ready"),
    Route("GET", "/api/auth/verify", Needs.ITSELF, "verify"),
    Route("GET", "/api/messages/<any_text:message_id>", Needs.ADMIN, "explain"),
    Route("GET", "/api/connections/stats", Needs.ADMIN, "stats"),
    Route("GET", "/api/connections/<player_id>", Needs.PLAYER, "player"),
    Route("DELETE", "/api/connections/<player_id>", Needs.ADMIN, "end_player"),
    Route("DELETE", "/api/connections/<player_id>/<connection_id>", Needs.ADMIN, "end_connection"),
    Route("GET", "/api/connections/<player_id>/session", Needs.PLAYER, "session"),
    Route("POST", "/api/connections/<player_id>/session", Needs.PLAYER, "switch"),
    Route("POST", "/api/connections/<player_id>/subscriptions", Needs.PUBLISH, "subscriptions"),
    Route("GET", "/monitoring/dual-connections", Needs.ADMIN, "dual_connections"),
    Route("GET", "/monitoring/performance", Needs.ADMIN, "performance"),
    Route("GET", "/monitoring/connection-health", Needs.ADMIN, "connection_health"),
    Route("GET", "/monitoring/errors", Needs.ADMIN, "errors"),
    Route("GET", "/monitoring/tasks", Needs.ADMIN, "tasks"),
    Route("GET", "/metrics", Needs.ADMIN, "metrics"),
    Route("GET", "/ws/<player_id>", Needs.NOTHING, None),
    Route("GET", "/sse/<player_id>", Needs.NOTHING, None),
    Route("POST", "/api/messages", Needs.NOTHING, None),
    Route("POST", "/api/connections/<player_id>/commands", Needs.NOTHING, None),
    Route("POST", "/api/connections/<player_id>/ack", Needs.NOTHING, None),
)


class _AnyText(BaseConverter):
    """The rest of the path: a message's id may have slashes, wherever it likes."""

    regex = ".+"
    part_isolating = False


@frozen
class _Head:
    """The request in the words of `mythos_trio.access`."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Sequence[tuple[str, str]]

    def header(self, name: str, /) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


def create_app(
    monitor: Monitor,
    registrar: Registrar,
    dispatcher: Dispatcher,
    access: Access,
    settings: Settings,
    server_id: str,
    clock: Clock,
) -> QuartTrio:
    """The app. Each request's ``scope["state"]["visitor"]`` is the `Visitor` that the front door let in."""
    app = QuartTrio("mythos_trio", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.config["BODY_TIMEOUT"] = BODY_SECONDS
    # A path is what it is: no redirects to one with fewer slashes.
    app.url_map.merge_slashes = False
    app.url_map.converters["any_text"] = _AnyText
    api = _Api(monitor, registrar, dispatcher, access, settings, server_id, clock)
    for route in ROUTES:
        endpoint = f"{route.method} {route.path}"
        app.add_url_rule(route.path, endpoint, api.view(route), methods=[route.method], provide_automatic_options=False)
    app.before_request(api.preflight)
    app.after_request(api.finish)
    # Quart runs functions that are not async in threads: all of these are.
    app.register_error_handler(Refusal, api.refused)
    app.register_error_handler(HTTPException, api.framework_refused)
    app.register_error_handler(Exception, api.failed)
    return app


@define(eq=False)
class _Api:
    monitor: Monitor
    registrar: Registrar
    dispatcher: Dispatcher
    access: Access
    settings: Settings
    server_id: str
    clock: Clock

    # Around every request.

    def view(self, route: Route) -> Handler:
        """The view of *route*: its handler behind the check of who asks."""
        if route.handler is None:
            return self._front_door(route)
        handler: Handler = getattr(self, route.handler)

        async def view(**arguments: str) -> Response:
            # First of all: a stranger learns nothing from what would have been wrong otherwise.
            self._authorise(route.needs, arguments.get("player_id"))
            if "player_id" in arguments:
                names.player_id(arguments["player_id"])
            return await handler(**arguments)

        return view

    def _front_door(self, route: Route) -> Handler:
        async def view(**_: str) -> NoReturn:
            # The method in the table is taken at the front door; what comes here is HEAD.
            raise MethodNotAllowed(valid_methods=[route.method])

        return view

    def _authorise(self, needs: Needs, player_id: str | None) -> None:
        visitor = _visitor()
        match needs:
            case Needs.PLAYER:
                visitor.require_player(player_id or "", "admin")
            case Needs.PUBLISH:
                visitor.require_scope("publish")
            case Needs.ADMIN:
                visitor.require_scope("admin")

    async def preflight(self) -> Response | None:
        """Answers OPTIONS, also for the paths that the front door serves."""
        if request.method != "OPTIONS":
            return None
        preflight = self.access.preflight_headers(_head())
        if preflight is not None:
            return Response(status=204, headers=dict(preflight))
        if isinstance(request.routing_exception, MethodNotAllowed):
            return Response(status=204, headers={"Allow": _allowed(request.routing_exception)})
        return None

    async def finish(self, response: Response) -> Response:
        """What every answer carries."""
        response.headers["Server-Id"] = self.server_id
        response.headers.setdefault("Cache-Control", "no-store")
        if request.method != "OPTIONS":
            for name, value in self.access.cors_headers(_head()):
                response.headers[name] = value
        return response

    # Errors.

    async def refused(self, refusal: Refusal) -> Response:
        headers = dict(refusal_headers(refusal))
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return self._error(refusal.status, refusal.error_type, refusal.message, refusal.details, headers)

    async def framework_refused(self, error: HTTPException) -> Response:
        """What the framework turns down: no such path or method, a body that is too big or late."""
        status = error.code or 500
        if status >= 500:
            return await self.failed(error)
        headers: dict[str, str] = {}
        details: dict[str, Any] = {}
        error_type = ErrorType.CONNECTION if status == 408 else ErrorType.VALIDATION
        message = f"{HTTPStatus(status).phrase}: {request.method} {request.path}"
        if isinstance(error, MethodNotAllowed):
            headers["Allow"] = _allowed(error)
            details["allowed"] = headers["Allow"].split(", ")
            message = f"{request.path} does not take {request.method}; it takes {headers['Allow']}"
        elif status == 404:
            message = f"there is nothing at {request.path}"
        elif status == 413:
            message = f"the body has more than {MAX_BODY} bytes"
            details["max_bytes"] = MAX_BODY
        return self._error(status, error_type, message, details, headers)

    async def failed(self, error: Exception) -> Response:
        """A bug: logged (which counts it) and said, with the traceback only where ``DEBUG`` is on."""
        where = f"{request.method} {request.path}"
        log.error(
            f"Unexpected error in {where}",
            error_type=ErrorType.SYSTEM.value,
            player_id=(request.view_args or {}).get("player_id"),
            exc_info=error,
        )
        details: dict[str, Any] = {}
        if self.settings.debug:
            details["traceback"] = "".join(traceback.format_exception(error))
        return self._error(500, ErrorType.SYSTEM, f"the server made a mistake in {where}", details, {}, logged=True)

    def _error(
        self,
        status: int,
        error_type: ErrorType,
        message: str,
        details: Mapping[str, Any],
        headers: Mapping[str, str],
        *,
        logged: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> Response:
        """The answer that says what is wrong. Counted, unless a line of the log does that."""
        now = self.clock.now()
        if not logged:
            rule = request.url_rule.rule if request.url_rule is not None else "(no such path)"
            player = (request.view_args or {}).get("player_id")
            self.monitor.statistics.error(error_type.value, f"{status} {request.method} {rule}", player, now)
        body = error_body(error_type, message, details, now)
        if more:
            body = wire.encode({**decode_json(body), **more})
        return Response(body + b"\n", status, dict(headers), content_type=JSON)

    # Health.

    async def health(self) -> Response:
        status, answer = await self.monitor.health()
        return _json(answer, _health_code(status))

    async def health_detailed(self) -> Response:
        status, answer = await self.monitor.health_detailed()
        return _json(answer, _health_code(status))

    async def health_ready(self) -> Response:
        ready, answer = self.monitor.ready()
        return _json(answer, 200 if ready else 503)

    # Players, sessions, connections.

    async def stats(self) -> Response:
        return _json(self.monitor.stats())

    async def player(self, player_id: str) -> Response:
        return _json(await self.monitor.player(player_id))

    async def session(self, player_id: str) -> Response:
        return _json(await self.monitor.session(player_id))

    async def switch(self, player_id: str) -> Response:
        body = await _body("session_id")
        result = await self.registrar.switch(player_id, names.session_id(body.get("session_id")))
        return _json(
            {
                "success": True,
                "player_id": player_id,
                "session_id": result.session_id,
                "previous_session_id": result.previous_session_id,
                "previous_connections_disconnected": result.connections,
                "timestamp": rfc3339(self.clock.now()),
            }
        )

    async def end_player(self, player_id: str) -> Response:
        closed = await self.registrar.end(player_id)
        return _json({"success": True, "player_id": player_id, "connections_closed": closed})

    async def end_connection(self, player_id: str, connection_id: str) -> Response:
        if not self.registrar.disconnect(player_id, connection_id):
            raise Refusal(
                ErrorType.CONNECTION,
                f"player {player_id!r} has no connection {connection_id!r}",
                status=404,
                details={"player_id": player_id, "connection_id": connection_id},
            )
        return _json({"success": True, "player_id": player_id, "connection_id": connection_id, "connections_closed": 1})

    async def subscriptions(self, player_id: str) -> Response:
        body = await _body("session_id", "subscribe", "unsubscribe")
        subscribe, unsubscribe = _channels(body, "subscribe"), _channels(body, "unsubscribe")
        if both := sorted({*subscribe} & {*unsubscribe}):
            raise invalid(f"{both[0]!r} is to be subscribed and unsubscribed: say one", field="subscribe")
        if not subscribe and not unsubscribe:
            raise invalid('name channels in "subscribe" or "unsubscribe"', field="subscribe")
        if len(subscribe) + len(unsubscribe) > MAX_EFFECTS:
            raise invalid(f"at most {MAX_EFFECTS} channels at once", field="subscribe")
        session_id = names.session_id(body.get("session_id"))
        position = await self.registrar.subscriptions(player_id, session_id, subscribe, unsubscribe)
        return _json({"success": True, "player_id": player_id, "position": str(position)})

    # Messages and tokens.

    async def explain(self, message_id: str) -> Response:
        return _json(await self.monitor.message(names.message_id(message_id)))

    async def verify(self) -> Response:
        if self.settings.protected:
            return _json({"valid": None, "mode": "protected"})
        try:
            claims = self.access.verify(find_token(_head()))
        except TokenError as error:
            refusal = refusal_of(error)
            return self._error(
                refusal.status,
                refusal.error_type,
                refusal.message,
                refusal.details,
                {"WWW-Authenticate": "Bearer"},
                more={"valid": False, "reason": error.reason},
            )
        left = None if claims.expires_at is None else max(0.0, round(claims.expires_at - self.clock.now(), 3))
        return _json(
            {
                "valid": True,
                "player_id": claims.player_id,
                "scopes": sorted(claims.scopes),
                "expires_at": None if claims.expires_at is None else rfc3339(claims.expires_at),
                "expires_in_seconds": left,
            }
        )

    # Monitoring pages.

    async def dual_connections(self) -> Response:
        return _json(self.monitor.dual_connections())

    async def performance(self) -> Response:
        return _json(self.monitor.performance())

    async def connection_health(self) -> Response:
        return _json(self.monitor.connection_health())

    async def errors(self) -> Response:
        return _json(self.monitor.errors())

    async def tasks(self) -> Response:
        player = request.args.get("player")
        return _json(await self.monitor.tasks(None if player is None else names.player_id(player)))

    async def metrics(self) -> Response:
        return Response(self.monitor.metrics(), content_type="text/plain; version=0.0.4; charset=utf-8")

    # The page for people.

    async def index(self) -> Response:
        page = _PAGE.replace("HOST", escape(request.host)).replace("NOTE", "" if self.settings.protected else _TOKENS)
        return Response(
            page,
            content_type="text/html; charset=utf-8",
            headers={
                "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
                "X-Content-Type-Options": "nosniff",
            },
        )


def _visitor() -> Visitor:
    visitor: Visitor = request.scope["state"]["visitor"]
    return visitor


def _head() -> RequestHead:
    headers = [(name.lower(), value) for name, value in request.headers.items()]
    return _Head(request.method, request.path, request.args.to_dict(), headers)


async def _body(*fields: str) -> Mapping[str, Any]:
    """The request's JSON object, which may have *fields* only; an empty body is an empty object."""
    data = await request.get_data()
    value = decode_json(data) if data.strip() else {}
    if not isinstance(value, dict):
        raise invalid("the body is a JSON object")
    for name in value:
        if name not in fields:
            raise invalid(f"unknown field {name!r}; there are {', '.join(fields)}", field=name)
    return value


def _channels(body: Mapping[str, Any], field: str) -> list[str]:
    """The channels that *field* lists, each once."""
    value = body.get(field, [])
    if not isinstance(value, list):
        raise invalid(f"{field!r} is a list of channels", field=field)
    return list(dict.fromkeys(names.channel(name) for name in value))


def _json(value: Answer, status: int = 200) -> Response:
    return Response(wire.encode(value) + b"\n", status, content_type=JSON)


def _allowed(error: MethodNotAllowed) -> str:
    return ", ".join(sorted({*(error.valid_methods or ()), "OPTIONS"}))


def _health_code(status: Status) -> int:
    return 503 if status is Status.UNHEALTHY else 200


_TOKENS: Final = """
It asks for tokens: add <code>?token=TOKEN</code> to each address, with one that
<code>mythos-trio token issue</code> has made on the server."""

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>mythos-trio</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em; }
pre { background: #f3f3f3; color: #111; padding: .8em; overflow-x: auto; }
</style>
</head>
<body>
<h1>mythos-trio</h1>
<p>A real-time connection server: WebSocket and SSE carry one numbered, stored stream per player.
This server runs. To play in it, open two terminals.NOTE</p>
<h2>Listen</h2>
<pre>curl -N http://HOST/sse/alice</pre>
<h2>Play</h2>
<pre>npx wscat -c ws://HOST/ws/alice</pre>
<p>and type <code>help</code>, or <code>look</code>. Each line comes on both. Without <code>wscat</code>:</p>
<pre>curl http://HOST/api/connections/alice/commands \\
  -H 'Content-Type: application/json' -d '{"type": "command", "id": "1", "content": "look"}'</pre>
<h2>Send</h2>
<pre>curl http://HOST/api/messages \\
  -H 'Content-Type: application/json' \\
  -d '{"player_id": "alice", "message": {"type": "test", "content": "hello"}}'</pre>
<h2>Look behind it</h2>
<ul>
<li><a href="/health/detailed">/health/detailed</a></li>
<li><a href="/api/connections/stats">/api/connections/stats</a></li>
<li><a href="/monitoring/dual-connections">/monitoring/dual-connections</a></li>
<li><a href="/monitoring/performance">/monitoring/performance</a></li>
<li><a href="/monitoring/connection-health">/monitoring/connection-health</a></li>
<li><a href="/monitoring/errors">/monitoring/errors</a></li>
<li><a href="/monitoring/tasks">/monitoring/tasks</a></li>
<li><a href="/metrics">/metrics</a></li>
</ul>
</body>
</html>
"""
