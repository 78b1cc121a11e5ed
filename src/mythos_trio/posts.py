"""POSTs that the front door answers itself: publishing, commands and acknowledgements.

Their clients keep the connection. (Through Hypercorn and Quart a POST costs five times what it costs
FastAPI, and its answer cannot be timed out.)
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import trio
from attrs import define

from mythos_trio import http1, logs
from mythos_trio.core import names, wire
from mythos_trio.core.commands import MAX_WAITING
from mythos_trio.core.errors import ErrorType, Refusal, invalid
from mythos_trio.core.messages import PublisherMessage, check_message, decode_json, parse_plain, plain_body
from mythos_trio.core.rates import Buckets
from mythos_trio.core.requests import Command, ack_position, parse_command
from mythos_trio.core.transaction import MAX_EFFECTS, Append, Committed, Request, Transaction
from mythos_trio.dispatcher import Publications, Submission, raise_if_refused, refusal_of
from mythos_trio.handlers import DRAINED, draining
from mythos_trio.kept import ANSWER_SECONDS as COMMIT_SECONDS
from mythos_trio.registrar import check_current
from mythos_trio.seams import rfc3339
from mythos_trio.streams import Streams

if TYPE_CHECKING:
    from mythos_trio.access import Access, Headers, Visitor
    from mythos_trio.config import Settings
    from mythos_trio.connection import Connection
    from mythos_trio.handlers import Context
    from mythos_trio.http1 import Head
    from mythos_trio.kept import Asker
    from mythos_trio.link import Link
    from mythos_trio.registrar import Registrar
    from mythos_trio.session import LiveSession

log = logs.get("delivery")

MESSAGES: Final = "/api/messages"
_FIELDS: Final = frozenset({"player_id", "channel", "broadcast", "message"})
_TO_ONE_PLAYER: Final = frozenset({"player_id", "message"})
# A batch of small messages: the bound of one transaction, with room for JSON's overhead.
MAX_BODY: Final = 2 << 20
BODY_SECONDS: Final = 30.0
# What a POST waits for beyond the handlers that may run before its own.
ANSWER_SECONDS: Final = 20.0


# The same as JSON of `Posts._receipt`, for an id of hexadecimal digits.
_RECEIPT: Final = b'{"id":"%b","seq":%d,"epoch":%d,"connections":%d}'
# The status of replies that no handler has given: the command has not been run, or it counts for nothing.
_NOT_RUN: Final[Mapping[str, int]] = {ErrorType.PERSISTENCE: 503, ErrorType.CAPACITY: 503, ErrorType.SESSION: 409}


# Not frozen, as others that are made for each message: to set an attribute of a frozen one costs three times as much.
@define
class _Item:
    """One publication of a request."""

    target: str
    message: PublisherMessage
    id: str
    digest: bytes | None


@define
class _Publication:
    """What one request publishes. *key*: its ``Idempotency-Key``."""

    items: list[_Item]
    key: str | None
    is_batch: bool


class PostAsker:
    """A command that came by POST is answered in its body."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply = b""

    def offer_reply(self, command_id: str, body: bytes, position: int | None) -> None:
        self.command_id = command_id
        self.reply = body
        self.position = position
        self.done.set()


class Posts:
    """See the module's docstring."""

    def __init__(self, context: Context, registrar: Registrar, streams: Streams, access: Access) -> None:
        self._context = context
        self._registrar = registrar
        self._streams = streams
        self._access = access
        limit = context.settings.publish_rate_limit
        window = context.settings.rate_limit_window
        self._publishes = None if limit is None else Buckets(limit, window)

    async def serve(self, link: Link, head: Head, visitor: Visitor) -> bool:
        """Answer one POST; whether the connection can be kept for the next."""
        try:
            body = await http1.read_body(link, head, limit=MAX_BODY, timeout=BODY_SECONDS)
        except Refusal as refusal:
            # The rest of the body may still come: it must not be taken for a request.
            self._count(refusal, visitor)
            await http1.refuse(
                link,
                refusal,
                now=self._context.clock.now(),
                server_id=self._context.hub.server_id,
                headers=self._access.cors_headers(head),
            )
            return False
        try:
            status, answer = await self._route(head, visitor, body)
            data, keep = self._answered(head, status, answer)
        except Refusal as refusal:
            data, keep = self._refused(head, visitor, refusal)
        await link.send_all(data)
        return keep

    def take(self, head: Head, visitor: Visitor, body: bytes, asker: Asker) -> bool:
        """Have a publication stored, and *asker* told the answer then: no task waits for it. False: nothing has
        been done, since it is none, or there is no room."""
        dispatcher = self._context.dispatcher
        if head.path != MESSAGES or self._context.draining or not dispatcher.has_room:
            return False
        try:
            if self._take_plain(head, visitor, body, asker):
                return True
            publication = self._check_publication(head, visitor, body)
        except Refusal as refusal:
            asker.answer(*self._refused(head, visitor, refusal))
            return True

        def stored(submission: Submission) -> None:
            try:
                asker.answer(*self._stored(head, visitor, publication, submission))
            except Exception as error:
                asker.crashed(error)

        dispatcher.submit_nowait(self._transaction(publication), stored)
        return True

    def _take_plain(self, head: Head, visitor: Visitor, body: bytes, asker: Asker) -> bool:
        """As `take`, if *body* is of the kind that nearly all are of: then it is stored and answered with those that
        have come at the same time. May raise a refusal."""
        context = self._context
        visitor.require_scope("publish")
        plain = parse_plain(body, context.settings.max_message_size)
        if plain is None or head.header("idempotency-key") is not None:
            return False
        self._check_rate(visitor)
        target, json = plain
        id = context.randomness.message_id()
        message = Append(target, id, plain_body(id, rfc3339(context.clock.now()), json))
        context.dispatcher.publish(message, (asker, head, visitor), self._tell_published)
        return True

    def _tell_published(self, publications: Publications) -> None:
        """Answer all who have published them."""
        outcome = publications.outcome
        if isinstance(outcome, Committed):
            self._tell_stored(publications, outcome)
            return
        for _, _, (asker, head, visitor) in publications.each:
            refusal = _not_stored_yet() if outcome is None else refusal_of(outcome)
            asker.answer(*self._refused(head, visitor, refusal))

    def _tell_stored(self, publications: Publications, outcome: Committed) -> None:
        """As `_receipt` and `_answered`; what most answers of one moment have in common is made once."""
        epoch, server_id = self._context.hub.epoch, self._context.hub.server_id
        begins: dict[tuple[bool, Headers], bytes] = {}
        settled = zip(publications.each, outcome.seqs, publications.connections, strict=True)
        for (id, _, (asker, head, _)), seq, connections in settled:
            try:
                kind = keep, cors = self._keeps(head), self._access.cors_headers(head)
                begin = begins.get(kind)
                if begin is None:
                    begin = begins[kind] = http1.begin(202, headers=cors, keep_alive=keep, server_id=server_id)
                asker.answer(http1.finish(begin, _RECEIPT % (id.encode(), seq, epoch, connections)), keep)
            except Exception as error:
                asker.crashed(error)

    def too_late(self, head: Head) -> bytes:
        """The answer to what was taken and is not stored yet, the last one on its connection."""
        headers = self._access.cors_headers(head)
        return http1.refused(
            _not_stored_yet(), now=self._context.clock.now(), server_id=self._context.hub.server_id, headers=headers
        )

    def _stored(
        self, head: Head, visitor: Visitor, publication: _Publication, submission: Submission
    ) -> tuple[bytes, bool]:
        try:
            return self._answered(head, 202, self._receipt(publication, submission))
        except Refusal as refusal:
            return self._refused(head, visitor, refusal)

    def _answered(self, head: Head, status: int, body: bytes) -> tuple[bytes, bool]:
        """The whole answer; whether the connection is kept."""
        keep, cors = self._keeps(head), self._access.cors_headers(head)
        server_id = self._context.hub.server_id
        return http1.response(status, body, headers=cors, keep_alive=keep, server_id=server_id), keep

    def _refused(self, head: Head, visitor: Visitor, refusal: Refusal) -> tuple[bytes, bool]:
        self._count(refusal, visitor)
        keep, cors = self._keeps(head), self._access.cors_headers(head)
        now, server_id = self._context.clock.now(), self._context.hub.server_id
        return http1.refused(refusal, now=now, server_id=server_id, headers=cors, keep_alive=keep), keep

    def _keeps(self, head: Head) -> bool:
        """Whether the connection carries another request. Draining it does not, and the answer must say so:
        else the client's next request dies with it."""
        return head.keep_alive and not self._context.draining

    def _count(self, refusal: Refusal, visitor: Visitor) -> None:
        self._context.statistics.error(
            refusal.error_type, refusal.message, visitor.player_id, self._context.clock.now()
        )

    async def _route(self, head: Head, visitor: Visitor, body: bytes) -> tuple[int, bytes]:
        if self._context.draining:
            raise Refusal(ErrorType.SYSTEM, "the server is restarting", status=503, retry_ms=1000)
        if head.path == MESSAGES:
            return 202, await self._publish(self._check_publication(head, visitor, body))
        player = names.player_id(unquote(head.path.split("/")[3]))
        visitor.require_player(player)
        value = decode_json(body)
        if not isinstance(value, dict):
            raise invalid("the body is a JSON object")
        if head.path.endswith("/commands"):
            return await self._command(player, value)
        return 200, self._ack(player, value)

    # Publishing.

    def _check_publication(self, head: Head, visitor: Visitor, body: bytes) -> _Publication:
        visitor.require_scope("publish")
        value = decode_json(body)
        self._check_rate(visitor)
        key = head.header("idempotency-key")
        if key is not None:
            names.message_id(key)
        batch = value if isinstance(value, list) else [value]
        if not 1 <= len(batch) <= MAX_EFFECTS:
            raise invalid(f"a batch has 1-{MAX_EFFECTS} messages")
        items = [self._item(entry, index, key) for index, entry in enumerate(batch)]
        return _Publication(items, key, isinstance(value, list))

    async def _publish(self, publication: _Publication) -> bytes:
        submission = await self._context.dispatcher.submit(self._transaction(publication))
        with trio.move_on_after(COMMIT_SECONDS):
            await submission.wait()
            return self._receipt(publication, submission)
        raise _not_stored_yet()

    def _check_rate(self, visitor: Visitor) -> None:
        if self._publishes is None:
            return
        key = visitor.token_id or visitor.player_id or visitor.address
        wait = self._publishes.take(key, trio.current_time())
        if wait:
            raise Refusal(
                ErrorType.RATE_LIMIT,
                "too many messages published: PUBLISH_RATE_LIMIT",
                status=429,
                retry_ms=int(wait * 1000) + 1,
            )

    def _item(self, entry: object, index: int, key: str | None) -> _Item:
        if not isinstance(entry, dict):
            raise invalid('a publication is an object: {"player_id": …, "message": {…}}')
        target = _target(entry)
        message = check_message(entry.get("message"), self._context.settings.max_message_size)
        id = message.id
        if id is None and key is not None:
            # A retry with the same key finds the same ids, so it is known for what it is.
            id = "key-" + blake2b(f"{index}:{key}".encode(), digest_size=16).hexdigest()
        if id is None:
            return _Item(target, message, self._context.randomness.message_id(), None)
        digest = blake2b(target.encode() + b"\0" + message.digest, digest_size=16).digest()
        return _Item(target, message, id, digest)

    def _transaction(self, publication: _Publication) -> Transaction:
        timestamp = rfc3339(self._context.clock.now())
        items, key = publication.items, publication.key
        transaction = Transaction(
            [Append(item.target, item.id, item.message.body(item.id, timestamp), item.digest) for item in items]
        )
        if key is not None:
            digests = b"".join(item.target.encode() + item.message.digest for item in items)
            transaction.request = Request(key, blake2b(digests, digest_size=16).digest())
        return transaction

    def _receipt(self, publication: _Publication, submission: Submission) -> bytes:
        """What the publisher is told when *submission* is settled; a refusal, if that is what became of it."""
        if submission.outcome is None:
            raise RuntimeError("a publication is answered that is not settled")
        outcome = raise_if_refused(submission.outcome)
        answers = []
        for index, item in enumerate(publication.items):
            answer: dict[str, Any] = {
                "id": item.id,
                "seq": outcome.seqs[index],
                "epoch": self._context.hub.epoch,
                "connections": submission.connections[index],
            }
            if index in outcome.duplicates:
                answer["duplicate"] = True
                log.info("Duplicate message detected", message_id=item.id, seq=outcome.seqs[index])
            answers.append(answer)
        return wire.encode(answers if publication.is_batch else answers[0])

    # Commands and acknowledgements.

    async def _command(self, player: str, value: dict[str, Any]) -> tuple[int, bytes]:
        _check_fields(value, {"type", "id", "content", "session_id", "connection_id"})
        if value.get("type", "command") != "command":
            raise invalid('"type" is "command" here', field="type")
        id = value.get("id")
        command: Command = parse_command(value, None if id is None else names.message_id(id))
        session = self._session(player, value)
        self._sign_of_life(session, value)
        self._streams.take_command(player)
        asker = PostAsker()
        await session.submit(command, asker)
        seconds = self._context.settings.handler_timeout * (session.waiting_commands + 1) + ANSWER_SECONDS
        with trio.move_on_after(seconds):
            await asker.done.wait()
            return self._reply(asker)
        raise Refusal(
            ErrorType.SYSTEM, "the command is not answered yet: ask again with the same id", status=503, retry_ms=1000
        )

    def _reply(self, asker: PostAsker) -> tuple[int, bytes]:
        if asker.reply == DRAINED:
            raise draining()
        hub = self._context.hub
        position = hub.newest if asker.position is None else asker.position
        answer = decode_json(asker.reply)
        kind = "" if answer["ok"] else answer["error"]["error_type"]
        status = _NOT_RUN.get(kind, 200)
        return status, wire.reply(asker.command_id, asker.reply, hub.epoch, position)

    def _ack(self, player: str, value: dict[str, Any]) -> bytes:
        _check_fields(value, {"type", "id", "position", "session_id", "connection_id"})
        position = ack_position(value)
        session = self._session(player, value)
        connection = self._sign_of_life(session, value)
        self._streams.acknowledge(session, None, position)
        if connection is not None:
            connection.confirm(position.seq)
        return wire.encode({"success": True, "position": f"{self._context.hub.epoch}-{session.seen}"})

    def _session(self, player: str, value: dict[str, Any]) -> LiveSession:
        """The live session that a POST is for."""
        session = self._context.hub.sessions.get(player)
        named = names.session_id(value.get("session_id"))
        if session is None or session.over:
            raise Refusal(ErrorType.SESSION, f"player {player!r} is not connected: connect first", status=409)
        check_current(session.session_id, named)
        return session

    def _sign_of_life(self, session: LiveSession, value: dict[str, Any]) -> Connection | None:
        """A POST that names its connection shows that the client is alive."""
        named = value.get("connection_id")
        if named is None:
            return None
        connection = session.connections.get(named) if isinstance(named, str) else None
        if connection is None:
            raise Refusal(
                ErrorType.CONNECTION,
                "no such connection in this session",
                status=409,
                details={"field": "connection_id"},
            )
        connection.post_at = trio.current_time()
        return connection


def _not_stored_yet() -> Refusal:
    return Refusal(
        ErrorType.PERSISTENCE,
        "not stored yet, and it is not known whether it will be: publish it again with the same id",
        status=503,
        retry_ms=5000,
    )


def longest_request(settings: Settings) -> float:
    """How long any request may take to be answered, in seconds: a command behind as many others as may wait."""
    return BODY_SECONDS + settings.handler_timeout * (MAX_WAITING + 1) + ANSWER_SECONDS + settings.write_timeout


def _target(entry: Mapping[str, Any]) -> str:
    if entry.keys() == _TO_ONE_PLAYER:  # as nearly always
        return names.to_player(names.player_id(entry["player_id"]))
    _check_fields(entry, _FIELDS)
    given = [name for name in ("player_id", "channel", "broadcast") if name in entry]
    if len(given) != 1:
        raise invalid('name one target: "player_id", "channel" or "broadcast": true', field="player_id")
    match given[0]:
        case "player_id":
            return names.to_player(names.player_id(entry["player_id"]))
        case "channel":
            return names.to_channel(names.channel(entry["channel"]))
        case _ if entry["broadcast"] is True:
            return names.EVERYONE
    raise invalid('"broadcast" is true or absent', field="broadcast")


def _check_fields(value: Mapping[str, Any], known: Set[str]) -> None:
    unknown = value.keys() - known
    if unknown:
        raise invalid(f"unknown field {min(unknown)!r}", field=min(unknown))
