"""Settings: one table that holds each one's name, default, unit, bounds and what happens there.

A field of `Settings` is a setting: ``pong_timeout`` is ``PONG_TIMEOUT`` in the environment and in
``.env``. What the field's metadata says (`Spec`) is what is parsed, refused, printed by
``mythos-trio config check`` and held against ``docs/configuration.rst`` by a test.

The command line wins over the environment, the environment over ``.env``, that over the default. An
empty value is as good as none: compose files and templates hand on empty variables.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import urlsplit

import attrs
from attrs import field, frozen
from dotenv.parser import parse_stream

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

DAY: Final = 86400.0
YEAR: Final = 365 * DAY
# RFC 7518, section 3.2: a key of the size of the hash output, or larger, must be used with HS256.
SECRET_KEY_BYTES: Final = 32
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
HIDDEN: Final = "********"


class SettingError(Exception):
    """A setting that cannot be used. Exit code 2.

    *value* is as it was given, with secrets hidden; *expected* says what would be right.
    """

    def __init__(self, name: str, value: str, expected: str, source: str = "") -> None:
        where = f" (from {source})" if source else ""
        super().__init__(f"{name}={value!r}{where} cannot be used: expected {expected}")
        self.name = name
        self.value = value
        self.expected = expected
        self.source = source


class MissingDriver(Exception):
    """The store that ``DATABASE_URL`` names is known, but cannot be used here. Exit code 5."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"DATABASE_URL names a {kind} store, which is not in this version: "
            "use sqlite:///PATH (such as sqlite:///./data/players/mythos.db)"
        )
        self.kind = kind


# What a value may be: each parser turns text into a value or raises ValueError, and can say in words
# what would have been right.


class Parser(Protocol):
    @property
    def expected(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def bounds(self) -> str: ...
    def parse(self, text: str) -> Any: ...
    def show(self, value: Any) -> str: ...


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


@frozen
class Seconds:
    low: float
    high: float
    unit: str = "seconds"

    @property
    def bounds(self) -> str:
        return f"{_plain(self.low)} to {_plain(self.high)}"

    @property
    def expected(self) -> str:
        return f"a number of seconds from {self.bounds}"

    def parse(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or not self.low <= value <= self.high:
            raise ValueError(text)
        return value

    def show(self, value: float) -> str:
        return _plain(value)


@frozen
class Count:
    low: int
    high: int
    unit: str = ""
    zero: str = ""
    """What 0 means, if it may be given although it is below *low*."""
    none: str = ""
    """The word for "not set" if there is no default."""

    @property
    def bounds(self) -> str:
        zero = f", or 0 ({self.zero})" if self.zero else ""
        none = f", or {self.none}" if self.none else ""
        return f"{self.low} to {self.high}{zero}{none}"

    @property
    def expected(self) -> str:
        return f"a whole number from {self.bounds}"

    def parse(self, text: str) -> int | None:
        if self.none and text.lower() == self.none:
            return None
        value = int(text)
        if not (self.low <= value <= self.high or (self.zero and value == 0)):
            raise ValueError(text)
        return value

    def show(self, value: int | None) -> str:
        return self.none if value is None else str(value)


@frozen
class Flag:
    unit: str = ""
    bounds: str = "true or false"
    expected: str = "true or false"

    def parse(self, text: str) -> bool:
        word = text.lower()
        if word in ("true", "1", "yes", "on"):
            return True
        if word in ("false", "0", "no", "off"):
            return False
        raise ValueError(text)

    def show(self, value: bool) -> str:
        return "true" if value else "false"


@frozen
class OneOf:
    words: tuple[str, ...]
    fold: Callable[[str], str]
    unit: str = ""

    @property
    def bounds(self) -> str:
        return ", ".join(self.words)

    @property
    def expected(self) -> str:
        return f"one of {self.bounds}"

    def parse(self, text: str) -> str:
        word = self.fold(text)
        if word not in self.words:
            raise ValueError(text)
        return word

    def show(self, value: str) -> str:
        return value


@frozen
class Text:
    """A string that matches *pattern* as a whole, and what *also* may object to by ValueError."""

    pattern: str
    bounds: str
    expected: str
    also: Callable[[str], str] | None = None
    unit: str = ""

    def parse(self, text: str) -> str:
        if not re.fullmatch(self.pattern, text):
            raise ValueError(text)
        return self.also(text) if self.also else text

    def show(self, value: str) -> str:
        return value


@frozen
class Secret:
    bytes: int
    unit: str = ""

    @property
    def bounds(self) -> str:
        return f"{self.bytes} bytes or more"

    @property
    def expected(self) -> str:
        return (
            f"at least {self.bytes} bytes, hard to guess (RFC 7518, section 3.2), such as the output of "
            "python -c 'import secrets; print(secrets.token_urlsafe(48))'"
        )

    def parse(self, text: str) -> str:
        if len(text.encode()) < self.bytes:
            raise ValueError(text)
        return text

    def show(self, value: str | None) -> str:
        return "none" if value is None else HIDDEN


@frozen
class Origins:
    unit: str = ""
    bounds: str = "comma-separated origins"
    expected: str = (
        "origins separated by commas, each scheme://host or scheme://host:port without a path "
        "(such as https://play.example.org,http://localhost:3000); * is not accepted, name each one"
    )

    def parse(self, text: str) -> tuple[str, ...]:
        return tuple(parse_origin(part.strip()) for part in text.split(",") if part.strip())

    def show(self, value: tuple[str, ...]) -> str:
        return ",".join(value) or "none"


@frozen
class Networks:
    unit: str = ""
    bounds: str = "comma-separated IP addresses or networks"
    expected: str = (
        "IP addresses or networks separated by commas (such as 127.0.0.1,::1,10.0.0.0/8); names are not accepted"
    )

    def parse(self, text: str) -> tuple[Network, ...]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(ipaddress.ip_network(part, strict=False) for part in parts)

    def show(self, value: tuple[Network, ...]) -> str:
        single = [str(net.network_address) if net.num_addresses == 1 else str(net) for net in value]
        return ",".join(single) or "none"


def parse_origin(text: str) -> str:
    """*text* as browsers write an origin: lower case, no default port; ValueError if it is none."""
    parts = urlsplit(text)
    plain = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(text)
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", parts.hostname):
        raise ValueError(text)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default = 443 if parts.scheme == "https" else 80
    port = "" if parts.port in (None, default) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def _host(text: str) -> str:
    bare = text.removeprefix("[").removesuffix("]") if text.startswith("[") else text
    if ":" in bare:
        ipaddress.IPv6Address(bare)
    elif re.fullmatch(r"[0-9.]+", bare):
        ipaddress.IPv4Address(bare)
    return bare


def database_kind(url: str) -> str:
    """``sqlite``, ``postgresql`` or ``redis``; ValueError for anything else."""
    scheme, separator, _rest = url.partition("://")
    kinds = {
        "sqlite": "sqlite",
        "postgresql": "postgresql",
        "redis": "redis",
        "rediss": "redis",
        "redis+cluster": "redis",
        "rediss+cluster": "redis",
    }
    if not separator or scheme not in kinds:
        raise ValueError(url)
    return kinds[scheme]


def sqlite_path(url: str) -> Path:
    """The file of a ``sqlite:///relative`` or ``sqlite:////absolute`` URL; ValueError if there is none."""
    prefix = "sqlite:///"
    path = url.removeprefix(prefix)
    # A store in memory, or a directory, would forget what was answered by "202: stored".
    if not url.startswith(prefix) or not path or path.endswith("/") or ":memory:" in path:
        raise ValueError(url)
    if "?" in path or "#" in path or "\0" in path:
        raise ValueError(url)
    return Path(path)


def _database_url(text: str) -> str:
    if database_kind(text) == "sqlite":
        sqlite_path(text)
    return text


def hide_password(url: str) -> str:
    """*url* with the password of its user part, or of a query, hidden."""
    shown = re.sub(r"(?<=://)([^/@]*?):[^/]*@", rf"\1:{HIDDEN}@", url)
    return re.sub(r"(?i)\b(password|passwd|pwd|secret|token)=[^&]*", rf"\1={HIDDEN}", shown)


@frozen
class Spec:
    """What there is to know about one setting."""

    doc: str
    parser: Parser
    then: str
    """What happens at the bound."""
    default_text: str = ""
    """The default in words, where it is not a fixed value."""


def _setting(default: Any, parser: Parser, doc: str, then: str, *, default_text: str = "", hidden: bool = False) -> Any:
    spec = Spec(doc, parser, then, default_text)
    # A secret must not get into logs by way of a repr.
    return field(default=default, metadata={"spec": spec}, repr=not hidden)


def _server_id(settings: Settings) -> str:
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:50] or "node"
    return f"{host}-{settings.port}"


@frozen(kw_only=True)
class Settings:
    """What the server is told. ``Settings()`` has the defaults; bounds are checked by `load` only,
    so tests can go below them."""

    database_url: str = _setting(
        "sqlite:///./data/players/mythos.db",
        Text(
            r"\S+",
            "sqlite:///PATH",
            "sqlite:///relative/path or sqlite:////absolute/path "
            "(postgresql:// and redis:// are known, but not in this version)",
            _database_url,
        ),
        "Where messages, sessions and answers are kept. sqlite:/// and a path is relative to the working directory, "
        "sqlite://// is absolute.",
        "postgresql:// and redis:// end the start with exit code 5; a file that another process holds, "
        "or that is not ours, with exit code 4.",
        hidden=True,
    )
    host: str = _setting(
        "localhost",
        Text(
            r"[A-Za-z0-9_.:\[\]-]{1,253}",
            "a name or an IP address",
            "a host name or an IP address without scheme and port (such as localhost, 127.0.0.1, 0.0.0.0 or ::)",
            _host,
        ),
        "What to listen on. localhost is 127.0.0.1 and, where it exists, ::1; 0.0.0.0 is every IPv4 address.",
        "Without SECRET_KEY only loopback peers are served, whatever is listened on; others get 403.",
    )
    port: int = _setting(
        8000,
        Count(0, 65535),
        "The one port for everything. 0 lets the system choose one, which is printed.",
        "A port that is in use ends the start with exit code 3 and the name of its holder.",
    )
    debug: bool = _setting(
        False,
        Flag(),
        "Means LOG_LEVEL=DEBUG, and tracebacks in error answers. Without SECRET_KEY, loopback origins of any port "
        "are admitted.",
        "Message contents are logged at DEBUG: not for production.",
    )
    log_level: str = _setting(
        "INFO",
        OneOf(LOG_LEVELS, str.upper),
        "The least level that is logged. DEBUG=true overrules it, --log-level overrules both.",
        "Lines below the level are not written.",
    )
    log_file: str = _setting(
        "logs/mythos.log",
        Text(r"[^\0]+", "a path", "the path of a file"),
        "Where the log goes, one JSON object a line. Its directory is made.",
        "A file that cannot be written ends the start with exit code 2.",
    )
    log_max_bytes: int = _setting(
        10 * 1024 * 1024,
        Count(65536, 1 << 40, "bytes", zero="never"),
        "The size at which the log is rotated (renamed, and a new file begun).",
        "At the bound mythos.log becomes mythos.log.1 and so on; with 0 rotate from outside and send SIGHUP.",
    )
    log_backup_count: int = _setting(
        5,
        Count(1, 1000, "files"),
        "How many rotated logs are kept.",
        "The oldest is removed.",
    )
    max_connections_per_player: int = _setting(
        4,
        Count(1, 1000, "connections"),
        "How many connections, of both transports together, one player may have at a time.",
        "Those not heard of in the last 5 s are pinged and the newcomer is told to come back (4009); "
        "only if all have just proved alive it is turned away (4509).",
    )
    max_total_connections: int = _setting(
        10_000,
        Count(1, 1_000_000, "connections"),
        "How many connections the server carries.",
        "Further ones are refused: WebSocket with 503, SSE with a `disconnect` that says when to come back. "
        "Existing ones stay.",
    )
    connection_timeout: float = _setting(
        300.0,
        Seconds(5, DAY),
        "The outer bound for a connection that shows no life, where nothing finer can be known.",
        "The connection is ended (4012). An idle player is not lifeless: pongs and acknowledged bytes count.",
    )
    health_check_interval: float = _setting(
        30.0,
        Seconds(1, 3600),
        "How often each connection is pinged and judged. Heartbeats come at least every 30 seconds.",
        "A vanished peer is gone within HEALTH_CHECK_INTERVAL + PONG_TIMEOUT.",
    )
    pong_timeout: float = _setting(
        20.0,
        Seconds(1, 3600),
        "How long after a ping a sign of life may take.",
        "The connection is ended (4012).",
    )
    cleanup_interval: float = _setting(
        60.0,
        Seconds(1, 3600),
        "How often expired sessions, messages and answers are removed.",
        "Each time one line 'Cleaned up N old connections' with counts is logged; N should be 0.",
    )
    connection_pool_size: int = _setting(
        1000,
        Count(1, 100_000, "handshakes"),
        "How many handshakes may be under way at once, and how many connections kept for a next request.",
        "Further sockets wait in the system's listen queue; the oldest handshake is ended if it is slow."
        " Of kept connections the one idle longest is closed.",
    )
    max_message_size: int = _setting(
        65536,
        Count(1024, 16 * 1024 * 1024, "bytes"),
        "The largest frame, body or message that is taken.",
        "WebSocket 1009, HTTP 413.",
    )
    message_batch_size: int = _setting(
        1000,
        Count(1, 100_000, "effects"),
        "How many effects (messages, subscriptions) are gathered into one commit. What one command did is never split.",
        "The rest waits for the next commit; publishing waits 5 s at most, then 503.",
    )
    message_retention: float = _setting(
        DAY,
        Seconds(60, 10 * YEAR),
        "How long a message is kept, and how long an offline session lasts.",
        "Older messages go; a client that returns to a position before them is told `gap`.",
    )
    message_retention_count: int = _setting(
        1000,
        Count(10, 10_000_000, "messages"),
        "How many messages are kept for each target (a player, a channel, everyone).",
        "The oldest of the target go; a client that returns to a position before them is told `gap`.",
    )
    max_store_bytes: int = _setting(
        1 << 30,
        Count(16 * 1024 * 1024, 1 << 46, "bytes"),
        "How many bytes of the store may be in use.",
        "The oldest of the largest targets go; if nothing is left to remove, publishing answers 503. "
        "Health is degraded from 90 % on.",
    )
    session_retention: float = _setting(
        90 * DAY,
        Seconds(3600, 10 * YEAR),
        "How long it is remembered that a session has ended, so that its id never begins again.",
        "The row goes; the id would then be taken for a new one.",
    )
    linkdead_grace: float = _setting(
        120.0,
        Seconds(0, DAY),
        "How long a player without a connection stays in the game.",
        "The player goes offline: on_leave is called; the session and its mail stay.",
    )
    handler_timeout: float = _setting(
        10.0,
        Seconds(0.1, 3600),
        "How long a handler of the game may take.",
        "It is cancelled, its effects are dropped, the command gets an error reply.",
    )
    write_timeout: float = _setting(
        10.0,
        Seconds(0.1, 3600),
        "How long a client's kernel may take for the chunk at hand (at most 64 KiB).",
        "The connection is reset (4008); it can be resumed.",
    )
    drain_timeout: float = _setting(
        15.0,
        Seconds(1, 3600),
        "How long SIGTERM may take: running handlers at most half of it, then commits, replies, farewells.",
        "The process exits with what is committed; a commit that hangs makes the exit code 1.",
    )
    durability: str = _setting(
        "process",
        OneOf(("process", "power"), str.lower),
        "What a 202 survives: the end of the process (also by kill -9), or a power cut (each commit is fsynced).",
        "With process, after a crash of the machine the epoch changes and older positions are answered with `gap`.",
    )
    rate_limit_requests: int = _setting(
        100,
        Count(1, 1_000_000, "requests"),
        "How many commands a player, and how many connects an address, may make in RATE_LIMIT_WINDOW."
        " Of WebSocket frames of any kind a player may send 100 times as many.",
        "Error reply or 429 with Retry-After; who goes on is disconnected (4029).",
    )
    rate_limit_window: float = _setting(
        10.0,
        Seconds(0.1, 3600),
        "The window of RATE_LIMIT_REQUESTS and PUBLISH_RATE_LIMIT.",
        "A bucket is full again after this time.",
    )
    publish_rate_limit: int | None = _setting(
        None,
        Count(1, 10_000_000, "messages", none="none"),
        "How many messages a token may publish in RATE_LIMIT_WINDOW; none is no limit.",
        "429 with Retry-After.",
    )
    secret_key: str | None = _setting(
        None,
        Secret(SECRET_KEY_BYTES),
        "Signs and checks tokens (HS256). Without it the server is in protected mode: loopback only, no tokens.",
        "Shorter keys are refused at start.",
        hidden=True,
    )
    cors_origins: tuple[str, ...] = _setting(
        (),
        Origins(),
        "Web pages of these origins may connect, beside the server's own.",
        "Others get 403; the log names the value that would admit them.",
    )
    trusted_proxies: tuple[Network, ...] = _setting(
        (),
        Networks(),
        "Proxies whose X-Forwarded-* and X-Real-IP headers are believed.",
        "Such headers from others are ignored, with one WARNING for each address, and count as proxied.",
    )
    server_id: str = _setting(
        attrs.Factory(_server_id, takes_self=True),
        Text(r"[A-Za-z0-9_.:-]{1,64}", "1-64 of A-Z a-z 0-9 _ . : -", "1 to 64 of A-Z a-z 0-9 _ . : -"),
        "This process's name in the Server-Id header, in `welcome` and in the log.",
        "Two servers on one store must not share it.",
        default_text="HOSTNAME-PORT",
    )
    lease_seconds: float = _setting(
        10.0,
        Seconds(1, 3600),
        "Within what time another server takes over the sessions of one that died. "
        "Of no effect with SQLite: there is one server.",
        "The session's owner changes.",
    )

    def display(self, name: str) -> str:
        """The value of the setting *name* (``PORT``) as one would write it, secrets hidden."""
        value = getattr(self, name.lower())
        shown = SPECS[name].parser.show(value)
        return hide_password(shown) if name == "DATABASE_URL" else shown

    @property
    def protected(self) -> bool:
        """No ``SECRET_KEY``: only loopback peers that no proxy speaks for are served."""
        return self.secret_key is None


SPECS: Final[Mapping[str, Spec]] = {a.name.upper(): a.metadata["spec"] for a in attrs.fields(Settings)}


def default_text(name: str) -> str:
    """The default of the setting *name* in the words of the docs."""
    return SPECS[name].default_text or Settings().display(name)


@frozen
class Reading:
    """What was found: every setting's value and source, what is wrong and what looks wrong.

    Where a setting is wrong *settings* holds its default, so that the others can still be shown.
    """

    settings: Settings
    sources: Mapping[str, str]
    problems: tuple[SettingError, ...] = ()
    warnings: tuple[str, ...] = ()


def load(
    environ: Mapping[str, str] | None = None,
    dotenv_path: str | os.PathLike[str] = ".env",
    command_line: Mapping[str, str] | None = None,
) -> Settings:
    """The settings, or `SettingError` for the first that is wrong.

    :param environ: the environment; None is the process's own.
    :param dotenv_path: may be missing.
    :param command_line: what options said, by the setting's name; it wins.
    """
    reading = read(environ, dotenv_path, command_line)
    if reading.problems:
        raise reading.problems[0]
    return reading.settings


def read(
    environ: Mapping[str, str] | None = None,
    dotenv_path: str | os.PathLike[str] = ".env",
    command_line: Mapping[str, str] | None = None,
) -> Reading:
    """As `load`, but says everything at once and never raises."""
    path = Path(dotenv_path)
    problems: list[SettingError] = []
    warnings: list[str] = []
    from_file = _read_dotenv(path, problems, warnings)
    layers = (
        ("command line", command_line or {}),
        ("environment", os.environ if environ is None else environ),
        (".env", from_file),
    )
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, spec in SPECS.items():
        source, text = next(((s, layer[name]) for s, layer in layers if layer.get(name, "").strip()), ("default", ""))
        sources[name] = source
        if source != "default":
            try:
                values[name.lower()] = spec.parser.parse(text.strip())
            except ValueError:
                problems.append(SettingError(name, _hide(name, text), spec.parser.expected, source))
    if values.get("debug") and sources["LOG_LEVEL"] != "command line":
        values["log_level"] = "DEBUG"
        sources["LOG_LEVEL"] = "DEBUG=true"
    settings = Settings(**values)
    warnings += contradictions(settings)
    return Reading(settings, sources, tuple(problems), tuple(warnings))


def _hide(name: str, text: str) -> str:
    if name == "SECRET_KEY":
        return f"{HIDDEN} ({len(text.strip().encode())} bytes)"
    return hide_password(text) if name == "DATABASE_URL" else text


def _read_dotenv(path: Path, problems: list[SettingError], warnings: list[str]) -> dict[str, str]:
    """Names and values of the ``.env`` file, which may be missing."""
    try:
        # A byte order mark is what some editors leave; it is not part of the first name.
        with path.open(encoding="utf-8-sig") as file:
            bindings = list(parse_stream(file))
            mode = os.fstat(file.fileno()).st_mode
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        problems.append(SettingError(".env", str(path), f"a text file in UTF-8 that can be read ({error})"))
        return {}
    found: dict[str, str] = {}
    for binding in bindings:
        if binding.error:
            warnings.append(f"{path}:{binding.original.line}: not understood, the line is passed over")
        elif binding.key is not None:
            found[binding.key] = binding.value or ""
    warnings += [_unknown(path, name) for name in found if name not in SPECS]
    if (found.get("SECRET_KEY") or "@" in found.get("DATABASE_URL", "")) and mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.append(f"{path} holds a secret and can be read by other users: chmod 600 {path}")
    return found


def _unknown(path: Path, name: str) -> str:
    close = difflib.get_close_matches(name.upper(), SPECS, 1)
    hint = f": did you mean {close[0]}?" if close else ""
    return f"{path}: {name} is not a setting of this server{hint}"


def contradictions(settings: Settings) -> list[str]:
    """What is allowed, each for itself, but can hardly be meant together."""
    s = settings
    found = [
        (
            s.health_check_interval + s.pong_timeout > s.connection_timeout,
            "HEALTH_CHECK_INTERVAL + PONG_TIMEOUT is more than CONNECTION_TIMEOUT: the outer bound ends connections "
            "before they have been judged",
        ),
        (
            s.drain_timeout < s.handler_timeout,
            "DRAIN_TIMEOUT is less than HANDLER_TIMEOUT: a handler that is allowed to run is cut off at a restart",
        ),
        (
            s.drain_timeout > 90,
            "DRAIN_TIMEOUT is more than 90 s, after which systemd kills a service that does not stop (TimeoutStopSec)",
        ),
        (
            s.max_connections_per_player == 1,
            "MAX_CONNECTIONS_PER_PLAYER=1: WebSocket and SSE cannot both be open",
        ),
        (
            s.max_connections_per_player > s.max_total_connections,
            "MAX_CONNECTIONS_PER_PLAYER is more than MAX_TOTAL_CONNECTIONS",
        ),
        (
            s.message_retention < s.linkdead_grace,
            "MESSAGE_RETENTION is less than LINKDEAD_GRACE: a player who is still in the game can lose messages",
        ),
        (
            s.session_retention < s.message_retention,
            "SESSION_RETENTION is less than MESSAGE_RETENTION: a session that has ended could come back",
        ),
        (
            s.protected and not is_loopback_name(s.host),
            f"HOST={s.host} without SECRET_KEY is protected mode: only this machine is served, others get 403",
        ),
        (
            s.debug and not s.protected,
            "DEBUG=true with SECRET_KEY: tracebacks are sent to clients, message contents are logged",
        ),
        (
            any(net.prefixlen == 0 for net in s.trusted_proxies),
            "TRUSTED_PROXIES has a network of all addresses: anyone can claim any address",
        ),
    ]
    return [text for wrong, text in found if wrong]


def is_loopback_name(host: str) -> bool:
    """Whether *host* (no port, no brackets) can only be this machine, without asking any DNS.

    ``localhost`` and names under it: RFC 6761, section 6.3.
    """
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool(mapped.is_loopback if mapped else address.is_loopback)


def store_path(settings: Settings) -> Path:
    """The SQLite file; `MissingDriver` for another store."""
    kind = database_kind(settings.database_url)
    if kind != "sqlite":
        raise MissingDriver(kind)
    return sqlite_path(settings.database_url)


def template() -> str:
    """A ``.env`` with every setting, commented out, at its default."""
    lines = ["# Settings of mythos-trio. The environment wins over this file.", ""]
    for name, spec in SPECS.items():
        lines += [f"# {spec.doc}", f"# {spec.then}"]
        unit = f"{spec.parser.unit}, " if spec.parser.unit else ""
        lines += [f"# ({unit}{spec.parser.bounds})", f"#{name}={_template_value(name)}", ""]
    return "\n".join(lines)


def _template_value(name: str) -> str:
    text = default_text(name)
    return "" if text in ("none", "HOSTNAME-PORT") else text
