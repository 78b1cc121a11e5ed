"""The tables, version by version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

Schema: TypeAlias = Sequence[Sequence[str]]

# "myth" in the file's header (SQLite file format, section 1.3.15): says that the file is ours.
APPLICATION_ID: Final = 0x6D797468

VERSION_1: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    """INSERT INTO meta (name, value) VALUES
        ('clean', 1), ('next', 1), ('reserved', 0), ('counted', 0), ('commits', 0),
        ('boot_id', ''), ('durability', 'process')""",
    "CREATE TABLE epochs (number INTEGER PRIMARY KEY, first INTEGER NOT NULL, created_at TEXT NOT NULL)",
    """CREATE TABLE sessions (
        player_id TEXT NOT NULL,
        session_id TEXT NOT NULL,
        data TEXT NOT NULL DEFAULT '{}',
        created_at TEXT NOT NULL,
        ended_at TEXT,
        end_reason TEXT,
        state TEXT NOT NULL,
        state_since TEXT NOT NULL,
        last_online TEXT NOT NULL,
        start INTEGER NOT NULL,
        finish INTEGER,
        mail_from INTEGER NOT NULL,
        seen INTEGER NOT NULL,
        lost INTEGER NOT NULL DEFAULT 0,
        told TEXT NOT NULL,
        owed TEXT NOT NULL,
        PRIMARY KEY (player_id, session_id))""",
    # A player has at most one current session, whatever a bug above would do.
    "CREATE UNIQUE INDEX sessions_current ON sessions (player_id) WHERE ended_at IS NULL",
    "CREATE INDEX sessions_newest ON sessions (player_id, start)",
    "CREATE INDEX sessions_start ON sessions (start)",
    "CREATE INDEX sessions_finish ON sessions (finish)",
    "CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at IS NOT NULL",
    "CREATE INDEX sessions_offline ON sessions (state_since) WHERE state = 'offline'",
    "CREATE INDEX sessions_live ON sessions (start) WHERE state IN ('online', 'linkdead') OR owed <> ''",
    """CREATE TABLE connections (
        connection_id TEXT PRIMARY KEY,
        player_id TEXT NOT NULL,
        session_id TEXT NOT NULL,
        transport TEXT NOT NULL,
        server_id TEXT NOT NULL,
        address TEXT NOT NULL,
        created_at TEXT NOT NULL)""",
    "CREATE INDEX idx_connections_player_id ON connections (player_id)",
    "CREATE INDEX idx_connections_session_id ON connections (session_id)",
    "CREATE INDEX idx_connections_created_at ON connections (created_at)",
    """CREATE TABLE messages (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        target TEXT NOT NULL,
        body TEXT NOT NULL,
        digest BLOB,
        stored_at TEXT NOT NULL)""",
    "CREATE UNIQUE INDEX messages_id ON messages (id)",
    "CREATE INDEX messages_target ON messages (target, seq)",
    # An interval: its channel's messages with start < seq < finish (contract: subscribing and leaving
    # take numbers). `last` as `core.position.Interval.last`.
    """CREATE TABLE subscriptions (
        player_id TEXT NOT NULL,
        session_id TEXT NOT NULL,
        channel TEXT NOT NULL,
        start INTEGER NOT NULL,
        finish INTEGER,
        last INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (player_id, session_id, channel, start)) WITHOUT ROWID""",
    "CREATE INDEX subscriptions_channel ON subscriptions (channel, start)",
    "CREATE INDEX subscriptions_closed ON subscriptions (channel, last) WHERE finish IS NOT NULL",
    """CREATE TABLE answers (
        number INTEGER PRIMARY KEY,
        player_id TEXT NOT NULL,
        session_id TEXT NOT NULL,
        command_id TEXT NOT NULL,
        digest BLOB NOT NULL,
        body TEXT NOT NULL,
        stored_at TEXT NOT NULL)""",
    "CREATE UNIQUE INDEX answers_command ON answers (player_id, session_id, command_id)",
    "CREATE INDEX answers_session ON answers (player_id, session_id)",
    # Sessions whose answers clean-up has to look at: they have new ones, old ones, or have ended.
    """CREATE TABLE answered (
        player_id TEXT NOT NULL, session_id TEXT NOT NULL, PRIMARY KEY (player_id, session_id)) WITHOUT ROWID""",
    "CREATE TABLE requests (key TEXT PRIMARY KEY, digest BLOB NOT NULL, seqs TEXT NOT NULL, stored_at TEXT NOT NULL)",
    "CREATE INDEX requests_stored_at ON requests (stored_at)",
    """CREATE TABLE targets (
        target TEXT PRIMARY KEY,
        messages INTEGER NOT NULL DEFAULT 0,
        bytes INTEGER NOT NULL DEFAULT 0,
        removed INTEGER NOT NULL DEFAULT 0,
        removed_at TEXT NOT NULL DEFAULT '') WITHOUT ROWID""",
    "CREATE INDEX targets_bytes ON targets (bytes)",
)

VERSION_2: Final = (
    # The game's data. A value that is NULL was deleted; it goes at the next start.
    "CREATE TABLE data (key TEXT PRIMARY KEY, value TEXT, version INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE timers (
        owner TEXT NOT NULL,
        name TEXT NOT NULL,
        id TEXT NOT NULL,
        seconds REAL NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (owner, name)) WITHOUT ROWID""",
)

VERSION_3: Final = (
    # Messages that retention has removed: `key` is of their id (`tables.id_key`). The newest ones only.
    """CREATE TABLE expired (
        number INTEGER PRIMARY KEY,
        key INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        target TEXT NOT NULL,
        removed_at TEXT NOT NULL)""",
    "CREATE INDEX expired_key ON expired (key)",
)

# What makes version n of version n - 1. A new version is one more entry; entries never change.
SCHEMA: Final[Schema] = (VERSION_1, VERSION_2, VERSION_3)
