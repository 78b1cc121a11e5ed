"""Did it arrive? What became of one message, for each of its receivers.

Nothing is recorded per message or receiver. It is computed from what there is: who receives it from the store
(intervals), how far each connection has come, and timelines (`mythos_trio.core.timeline`) of when marks moved: one of
the dispatcher's rounds, and for each connection those of its writes while it was behind and of its acknowledgements.
Of connections that are over the hub keeps as much, for the newest of each session (`mythos_trio.hub.Departed`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from attrs import define, frozen

from mythos_trio.core.timeline import Timeline
from mythos_trio.seams import rfc3339

if TYPE_CHECKING:
    from mythos_trio.connection import Connection
    from mythos_trio.hub import Departed, Hub
    from mythos_trio.session import LiveSession
    from mythos_trio.storage import SessionRow, StoredMessage

STOPPED: Final = "unknown: the server stopped"
FORGOTTEN: Final = "unknown: so long ago that it is not remembered when"
# Moves of a mark that have become one in the record: as long as it is no longer, a moment.
EXACT_SECONDS: Final = 1.0

_OUR_ID: Final = re.compile(r"[0-9a-f]{32}")


@frozen
class Moment:
    """When something was, as RFC 3339, or why that is not known or not exact."""

    at: str | None = None
    why: str | None = None


def moment(span: tuple[float, float] | None, otherwise: str) -> Moment:
    """The end of *span*, in which it was; *otherwise* says why there is none."""
    if span is None:
        return Moment(None, otherwise)
    first, last = span
    return Moment(rfc3339(last), None if last - first <= EXACT_SECONDS else f"between {rfc3339(first)} and then")


@define
class Explainer:
    """:param rounds: when the newest number of each round of writing was written.
    :param newest_at_start: messages up to this number were handled by an earlier life of the server.
    """

    hub: Hub
    rounds: Timeline
    newest_at_start: int

    def receivers(self, message: StoredMessage, row: SessionRow) -> list[dict[str, Any]]:
        """One entry for every connection of a session that carried the message or was there to; without such a
        connection one that says what the session waits for."""
        live = self.hub.live(row.player_id, row.session_id)
        entries = [self._departed(message, gone, row, live) for gone in self._gone(message, row)]
        if live is not None:
            on = [connection for connection in live.connections.values() if connection.starts_after < message.seq]
            entries += [self._on_connection(message, connection, live) for connection in on]
        arrived = any(entry["state"] in ("acknowledged", "replaced") for entry in entries)
        if (live is None or not live.connections) and not arrived:
            entries.append(self._without_connection(message, row, live))
        if not entries:
            # All of its connections began behind the message.
            entries.append(self._before(message, row, live))
        return entries

    def _seen(self, row: SessionRow, live: LiveSession | None) -> int:
        """The session's mark: what is in memory is newer than what is stored."""
        return live.seen if live is not None else max(row.seen, self.hub.marked(row.player_id, row.session_id))

    def _seen_at(self, seq: int, live: LiveSession | None) -> Moment:
        if live is None:
            return Moment(None, STOPPED if seq <= self.newest_at_start else FORGOTTEN)
        return moment(live.sightings.when(seq), STOPPED if seq <= self.newest_at_start else FORGOTTEN)

    # Connections.

    def _on_connection(self, message: StoredMessage, connection: Connection, live: LiveSession) -> dict[str, Any]:
        seq = message.seq
        if (entry := self._replaced(seq, connection)) is not None:
            return entry
        written = self._written(seq, connection) if connection.written >= seq else Moment()
        acknowledged = Moment()
        if connection.acknowledged >= seq:
            state, why = "acknowledged", None
            acknowledged = moment(connection.acknowledgements.when(seq), FORGOTTEN)
        elif connection.written < seq:
            state = "pending"
            why = f"{connection.behind} messages behind, waiting for {connection.waiting_for or 'its turn'}"
        elif live.seen >= seq:
            state, why = "acknowledged", "by the client's kernel, or on another connection"
            acknowledged = self._seen_at(seq, live)
        else:
            state, why = "written", "the client has not confirmed it yet"
            if connection.link.unsent:
                why = f"{connection.link.unsent} bytes wait here until the client reads on; not confirmed yet"
        return _entry(connection, state, why, written, acknowledged)

    def _departed(
        self, message: StoredMessage, gone: Departed, row: SessionRow, live: LiveSession | None
    ) -> dict[str, Any]:
        seq = message.seq
        if (entry := self._replaced(seq, gone)) is not None:
            return entry
        ended = f"the connection ended at {rfc3339(gone.closed_at)} ({gone.reason})"
        written = self._written(seq, gone) if gone.written >= seq else Moment()
        acknowledged = Moment()
        if gone.acknowledged >= seq:
            state, why = "acknowledged", ended
            acknowledged = moment(gone.acknowledgements.when(seq), FORGOTTEN)
        elif gone.written < seq:
            state, why = "cut", f"{ended} before it was written"
        elif self._seen(row, live) >= seq:
            state, why = "acknowledged", f"by the client's kernel, or on another connection; {ended}"
            acknowledged = self._seen_at(seq, live)
        else:
            state, why = "written", f"{ended} before the client had confirmed it"
        return _entry(gone, state, why, written, acknowledged)

    def _gone(self, message: StoredMessage, row: SessionRow) -> list[Departed]:
        """The connections that are over and carried the message, or were there when it was stored."""
        known = self.hub.departed.get((row.player_id, row.session_id), ())
        return [
            gone
            for gone in known
            if gone.starts_after < message.seq and (gone.written >= message.seq or gone.closed_at >= message.stored_at)
        ]

    def _replaced(self, seq: int, connection: Connection | Departed) -> dict[str, Any] | None:
        by = connection.replaced.by(seq)
        if by is None:
            return None
        why = f"the client was behind: {by}, which replaces it (replace_key), was sent instead"
        return _entry(connection, "replaced", why, self._written(by, connection), Moment())

    def _written(self, seq: int, connection: Connection | Departed) -> Moment:
        """When the connection was written it: with everybody in the round, or by itself when it was behind."""
        late = connection.late_writes.when(seq)
        if late is not None:
            return moment(late, FORGOTTEN)
        if connection.replaced.forgotten >= seq:
            return Moment(None, "unknown: or skipped for one that replaces it, which is not remembered so far back")
        return moment(self.rounds.when(seq), STOPPED if seq <= self.newest_at_start else FORGOTTEN)

    # Sessions.

    def _without_connection(self, message: StoredMessage, row: SessionRow, live: LiveSession | None) -> dict[str, Any]:
        if self._seen(row, live) >= message.seq:
            return self._before(message, row, live)
        if row.ended_at is not None:
            state, why = "ended", f"the session ended ({row.end_reason}) before the message had surely arrived"
        elif message.seq <= self.newest_at_start:
            state, why = "unknown", f"{STOPPED}; it is sent when the player comes back"
        elif live is not None:
            state, why = "pending", "the player is link-dead: it is sent when a connection comes back"
        else:
            state, why = "pending", "the player is offline: it is mail, sent when the player comes back"
        return _session_entry(row, state, why, Moment())

    def _before(self, message: StoredMessage, row: SessionRow, live: LiveSession | None) -> dict[str, Any]:
        if self._seen(row, live) < message.seq:
            return _session_entry(row, "gap", "the client named a position behind it", Moment())
        at = self._seen_at(message.seq, live)
        return _session_entry(row, "acknowledged", "it arrived on a connection that is gone", at)


def expired_by_its_time(message_id: str, now: float, retention: float) -> bool:
    """Whether *message_id* is of the form of ours, and as old as no message is kept (seconds)."""
    if _OUR_ID.fullmatch(message_id) is None:
        return False
    made = int(message_id[:12], 16) / 1000
    return made < now - retention


def _entry(
    connection: Connection | Departed, state: str, why: str | None, written: Moment, acknowledged: Moment
) -> dict[str, Any]:
    reasons = [
        why,
        f"written {written.why}" if written.why else None,
        f"acknowledged {acknowledged.why}" if acknowledged.why else None,
    ]
    return {
        "player_id": connection.player_id,
        "session_id": connection.session_id,
        "connection_id": connection.id,
        "transport": connection.transport,
        "written_at": written.at,
        "acknowledged_at": acknowledged.at,
        "state": state,
        "why": "; ".join(filter(None, reasons)) or None,
    }


def _session_entry(row: SessionRow, state: str, why: str, acknowledged: Moment) -> dict[str, Any]:
    return {
        "player_id": row.player_id,
        "session_id": row.session_id,
        "connection_id": None,
        "transport": None,
        "written_at": None,
        "acknowledged_at": acknowledged.at,
        "state": state,
        "why": f"{why}; acknowledged {acknowledged.why}" if acknowledged.why else why,
    }
