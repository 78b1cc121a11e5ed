"""The command line. What is printed for programs goes to stdout, what is said to people to stderr.

Exit codes of a failed start: 2 setting, 3 port, 4 store, 5 missing driver; each says cause and fix on the
console and as one CRITICAL line in the log.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import httpx
import psutil
from attrs import frozen
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mythos_trio import __version__, config, logs
from mythos_trio.access import SCOPES, Access, TokenError, peek
from mythos_trio.config import MissingDriver, SettingError, Settings, is_loopback_name
from mythos_trio.core import names
from mythos_trio.core.errors import ErrorType, Refusal
from mythos_trio.seams import SystemClock, rfc3339

if TYPE_CHECKING:
    from mythos_trio.storage import SessionRow

DEFAULT_GAME: Final = "mythos_trio.world:DefaultGame"
DOTENV: Final = ".env"
HTTP_SECONDS: Final = 10.0

EXIT_FAILED: Final = 1
EXIT_SETTING: Final = 2
EXIT_PORT: Final = 3
EXIT_STORE: Final = 4
EXIT_DRIVER: Final = 5


class _DefaultToServe(click.Group):
    """``mythos-trio --port 8001`` is ``mythos-trio serve --port 8001``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if not args or (args[0].startswith("-") and args[0] not in own):
            args.insert(0, "serve")
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None:
            close = difflib.get_close_matches(name, self.list_commands(ctx), 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"There is no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_DefaultToServe, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mythos-trio")
def main() -> None:
    """A real-time connection server: WebSocket and SSE carry one numbered, stored stream per player.

    Without a command: serve. Settings come from the environment and .env; see `config check`.
    """


# Settings and failures.


@frozen
class Failure:
    """Why a start has failed, and what would help."""

    code: int
    cause: str
    fix: str
    error_type: ErrorType = ErrorType.SYSTEM


def _say(text: str, **style: Any) -> None:
    click.secho(text, err=True, **style)


def _fail(failure: Failure) -> None:
    _say(f"mythos-trio: {failure.cause}", fg="red")
    _say(f"  {failure.fix}")


def _settings(**command_line: str | None) -> Settings:
    """The settings, or the end of the program with exit code 2."""
    try:
        return config.load(None, DOTENV, {name: text for name, text in command_line.items() if text is not None})
    except SettingError as error:
        _fail(_of_setting(error))
        sys.exit(EXIT_SETTING)


def _of_setting(error: SettingError) -> Failure:
    where = {"command line": "the option", "environment": "the environment", ".env": DOTENV}.get(error.source)
    fix = f"Change it in {where}" if where else f"Change {error.name}"
    return Failure(EXIT_SETTING, str(error), f"{fix}. All settings: mythos-trio config check", ErrorType.VALIDATION)


def _store_path(settings: Settings) -> Path:
    """The store's file as the store itself names it, or the end of the program with exit code 5."""
    try:
        return Path(os.path.realpath(config.store_path(settings)))
    except MissingDriver as error:
        _fail(_of_driver(error))
        sys.exit(EXIT_DRIVER)


def _of_driver(error: MissingDriver) -> Failure:
    return Failure(EXIT_DRIVER, str(error), "Change DATABASE_URL.", ErrorType.PERSISTENCE)


# serve


@main.command()
@click.argument("game", default=DEFAULT_GAME, metavar="[MODULE:NAME]")
@click.option("--host", help="What to listen on (HOST).")
@click.option("--port", help="The port (PORT); 0 picks a free one.")
@click.option("--log-level", help="debug, info, warning, error or critical (LOG_LEVEL).")
@click.option("--supervise", is_flag=True, help="Keep the port open and start the server anew when it dies.")
@click.option("--reload", is_flag=True, help="Start anew when the game's code changes: for development.")
@click.option("--fd", "fds", type=click.IntRange(3), multiple=True, help="Listen on this inherited socket. Repeatable.")
@click.option("--standby", type=click.IntRange(3), hidden=True, help="Where the supervisor is told that it may go on.")
def serve(
    game: str,
    host: str | None,
    port: str | None,
    log_level: str | None,
    supervise: bool,
    reload: bool,
    fds: tuple[int, ...],
    standby: int | None,
) -> None:
    """Run the server, with the game at MODULE:NAME (such as mygame:game) or the default one.

    SIGTERM and Ctrl-C drain: clients are told when to come back, all is stored; a second one hurries.
    SIGHUP reopens the log. With --supervise a small parent process owns the port: while there is no
    server, those who connect wait, and SIGUSR2 to it has a new server follow the old one. Sockets of
    systemd (LISTEN_FDS) are listened on by themselves.
    """
    if supervise + reload + bool(fds) > 1:
        raise click.UsageError("--supervise, --reload and --fd: one of them")
    options = {"HOST": host, "PORT": port, "LOG_LEVEL": log_level}
    given = {name: text for name, text in options.items() if text is not None}
    reading = config.read(None, DOTENV, given)
    if supervise or reload:
        sys.exit(_serve_in_a_child(game, reading, log_level, reload=reload))
    sys.exit(_start(reading, lambda: _run_server(reading.settings, game, fds, standby)))


def _serve_in_a_child(game: str, reading: config.Reading, log_level: str | None, *, reload: bool) -> int:
    """This process keeps the port, and the server is a child that is handed it."""
    from mythos_trio.handover import UnusableSocket, take_over
    from mythos_trio.net import PortTaken, open_listeners
    from mythos_trio.reload import Reloader, code_of
    from mythos_trio.supervisor import Supervisor

    settings = reading.settings
    if reading.problems:
        return _start(reading, lambda: EXIT_SETTING)
    try:
        listeners = take_over(os.environ) or open_listeners(settings.host, settings.port)
    except (UnusableSocket, PortTaken, OSError) as error:
        return _start(reading, partial(_raise, error))
    fds = [listener.fileno() for listener in listeners]
    command = [sys.executable, "-m", "mythos_trio", "serve", game, "--port", str(listeners[0].address[1])]
    for name, text in (("--host", settings.host), ("--log-level", log_level)):
        command += [name, text] if text else []
    for fd in fds:
        command += ["--fd", str(fd)]
    say: Callable[[str], None] = lambda text: _say(f"mythos-trio: {text}")  # noqa: E731
    if reload:
        return Reloader(command, code_of(game), fds, drain_seconds=settings.drain_timeout, say=say).run()
    say(f"supervisor, pid {os.getpid()}: kill -USR2 {os.getpid()} starts the server anew, kill {os.getpid()} stops it")
    return Supervisor(command, fds, drain_seconds=settings.drain_timeout, say=say).run()


def _raise(error: Exception) -> int:
    raise error


def _start(reading: config.Reading, run: Callable[[], int]) -> int:
    """*run* with logging set up; a failed start is said on the console and in the log."""
    settings = reading.settings
    try:
        running = logs.setup(settings)
    except SettingError as error:
        _fail(_of_setting(error))
        return EXIT_SETTING
    try:
        if reading.problems:
            raise reading.problems[0]
        for text in reading.warnings:
            logs.get("server").warning(text)
        return run()
    except BaseException as error:  # noqa: ASYNC103  # no task runs any more
        failure = _failure(_cause(error), settings)
        if failure is None:
            if isinstance(error, Exception | BaseExceptionGroup):
                logs.get("server").critical("Unexpected error in the server: the process ends", exc_info=error)
                return EXIT_FAILED  # noqa: ASYNC104
            raise
        # Once is enough for the console, where it is said in a person's words.
        running.mute_console()
        log = logs.get("server")
        log.critical(failure.cause, error_type=failure.error_type.value, fix=failure.fix, exit_code=failure.code)
        _fail(failure)
        return failure.code  # noqa: ASYNC104
    finally:
        running.close()


def _cause(error: BaseException) -> BaseException:
    """What is in the groups that nurseries put around it, if it is one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _failure(error: BaseException, settings: Settings) -> Failure | None:
    """What a failed start means to an operator; None if it is none of those that are known."""
    from mythos_trio.game import GameSpecError
    from mythos_trio.handover import UnusableSocket
    from mythos_trio.net import PortTaken
    from mythos_trio.storage import StoreUnusable

    match error:
        case SettingError():
            return _of_setting(error)
        case MissingDriver():
            return _of_driver(error)
        case GameSpecError():
            return Failure(EXIT_SETTING, str(error), "See mythos-trio serve --help.", ErrorType.VALIDATION)
        case PortTaken():
            cause = f"{error.host} port {error.port} is in use by {_port_holder(error.port)}"
            return Failure(EXIT_PORT, cause, "Stop it, or choose another: --port 8001", ErrorType.CONNECTION)
        case UnusableSocket():
            fix = "Hand over a TCP socket that listens: ListenStream= and Accept=no in the socket unit, or --fd NUMBER"
            return Failure(EXIT_PORT, str(error), fix, ErrorType.CONNECTION)
        case StoreUnusable():
            fix = "See DATABASE_URL: mythos-trio config get DATABASE_URL"
            return Failure(EXIT_STORE, f"the store cannot be used: {error}", fix, ErrorType.PERSISTENCE)
        case socket.gaierror():
            return Failure(EXIT_SETTING, f"HOST={settings.host!r} is not known: {error.strerror}", "Change HOST.")
        case OSError(errno=errno.EADDRNOTAVAIL):
            return Failure(EXIT_SETTING, f"HOST={settings.host!r} is no address of this machine", "Change HOST.")
        case OSError(errno=errno.EACCES) if settings.port < 1024:
            cause = f"port {settings.port} may not be used by this user"
            return Failure(EXIT_PORT, cause, "Choose a port from 1024 on, and put a proxy in front of it.")
    return None


def _port_holder(port: int) -> str:
    """Who listens on *port*: name and pid, as far as the system says."""
    try:
        found = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        found = []
    pids = {c.pid for c in found if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port}
    holders = [_process(pid) for pid in sorted(pid for pid in pids if pid)]
    return ", ".join(holders) or "a process of another user"


def _process(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:
        return f"pid {pid}"


def _run_server(settings: Settings, game: str, fds: Sequence[int], standby: int | None) -> int:
    from mythos_trio import server
    from mythos_trio.handover import Notifier, take_over

    config.store_path(settings)  # another store is refused before anything is opened
    return server.run(
        settings,
        game,
        announce=lambda at: _announce(settings, at),
        hang_up=logs.reopen,
        inherited=take_over(os.environ, fds),
        notifier=Notifier.of(os.environ),
        stands_by=None if standby is None else partial(_stand_by, standby),
    )


def _stand_by(fd: int) -> None:
    """The supervisor is told that the server before this one can go."""
    with contextlib.suppress(BrokenPipeError):  # it has died meanwhile: nobody has to be told
        os.write(fd, b"1")
    os.close(fd)


def _announce(settings: Settings, addresses: Sequence[tuple[str, int]]) -> None:
    """What to open, once the server is ready."""
    port = addresses[0][1] if addresses else settings.port
    host = _reachable(settings.host)
    mode = " · protected mode: this machine only" if settings.protected else ""
    lines = [
        click.style(f"mythos-trio {__version__}", bold=True) + f" · pid {os.getpid()}{mode}",
        f"  http://{host}:{port}/",
        f"  http://{host}:{port}/health",
        f"  play     mythos-trio connect alice{'' if port == 8000 else f' --url http://{host}:{port}'}",
        f"           npx wscat -c ws://{host}:{port}/ws/alice",
        f"           curl -N http://{host}:{port}/sse/alice",
        "  stop     Ctrl-C",
    ]
    click.echo("\n".join(lines))
    # A start script that reads this must not wait for a buffer to fill.
    sys.stdout.flush()


def _reachable(host: str) -> str:
    """A name in a URL for what *host* listens on."""
    name = {"0.0.0.0": "localhost", "::": "localhost", "": "localhost"}.get(host, host)
    return f"[{name}]" if ":" in name else name


def _own_url(settings: Settings) -> str:
    return f"http://{_reachable(settings.host)}:{settings.port}"


# new


@main.command()
@click.argument("name")
def new(name: str) -> None:
    """Write a small game called NAME, with tests, into a new directory. Nothing is overwritten."""
    from mythos_trio.scaffold import CannotWrite, write_game

    try:
        files = write_game(name, Path.cwd())
    except CannotWrite as error:
        _fail(Failure(EXIT_FAILED, str(error), "Such as: mythos-trio new mygame"))
        sys.exit(EXIT_FAILED)
    for path in files:
        click.echo(f"written: {path.relative_to(Path.cwd())}")
    click.echo(f"\nRun it:   cd {name} && mythos-trio serve {name}:game --reload")
    click.echo(f"Test it:  cd {name} && python -m pytest")


# connect


_URL = click.option("--url", help="The server; default: where the settings say that it listens.")
_TOKEN = click.option("--token", envvar="MYTHOS_TOKEN", help="A token (or the variable MYTHOS_TOKEN).")


@main.command()
@click.argument("player")
@_URL
@_TOKEN
@click.option("--session-id", help="Take this session; an unknown id begins a new one.")
@click.option("--stay", is_flag=True, help="With piped input: go on listening when it ends.")
def connect(player: str, url: str | None, token: str | None, session_id: str | None, stay: bool) -> None:
    """Play as PLAYER in this terminal, over WebSocket and SSE at once.

    Each line you type is a command; Ctrl-D leaves. It comes back by itself when a connection, or the
    server, goes, and shows each message once.
    """
    from mythos_trio import terminal
    from mythos_trio.client import BadUrl, DualClient

    settings = _settings()
    player = _player(player)
    if token is None and url is None and settings.secret_key is not None:
        token = Access(settings, SystemClock()).issue(player)
    try:
        client = DualClient(url or _own_url(settings), player, token=token, session_id=session_id)
    except BadUrl as error:
        raise click.BadParameter(str(error), param_hint="--url") from None
    sys.exit(terminal.run(client, stay=stay))


def _player(text: str) -> str:
    try:
        return names.player_id(text)
    except Refusal as refusal:
        raise click.BadParameter(refusal.message, param_hint="PLAYER") from None


# config


@main.group("config")
def config_group() -> None:
    """Look at the settings."""


@config_group.command("check")
def config_check() -> None:
    """Print each setting with its source, and what is wrong. Exit code 2 if a setting is."""
    reading = config.read(None, DOTENV)
    wrong = {problem.name: problem for problem in reading.problems}
    rows = []
    for name in config.SPECS:
        problem = wrong.get(name)
        value = reading.settings.display(name) if problem is None else f"{problem.value}  (WRONG)"
        rows.append((name, value, reading.sources[name]))
    _print_table(("setting", "value", "source"), rows)
    for text in reading.warnings:
        _say(f"warning: {text}", fg="yellow")
    for problem in reading.problems:
        _say(f"wrong: {problem}", fg="red")
    sys.exit(EXIT_SETTING if reading.problems else 0)


@config_group.command("get")
@click.argument("name")
def config_get(name: str) -> None:
    """Print the setting NAME. Passwords and SECRET_KEY are hidden."""
    upper = name.upper()
    if upper not in config.SPECS:
        close = difflib.get_close_matches(upper, config.SPECS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise click.BadParameter(f"{name} is not a setting.{hint}", param_hint="NAME")
    reading = config.read(None, DOTENV)
    for problem in reading.problems:
        if problem.name == upper:
            _fail(_of_setting(problem))
            sys.exit(EXIT_SETTING)
    click.echo(reading.settings.display(upper))


@config_group.command("init")
def config_init() -> None:
    """Write a .env with every setting, commented out, at its default. Never overwrites one."""
    try:
        # Private from the start: a SECRET_KEY will stand in it.
        fd = os.open(DOTENV, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        _say(f"mythos-trio: {Path(DOTENV).resolve()} exists already; it has not been touched", fg="red")
        sys.exit(EXIT_FAILED)
    with os.fdopen(fd, "w") as file:
        file.write(config.template())
    click.echo(f"written: {Path(DOTENV).resolve()}")


# explain


@main.command()
@click.argument("what", metavar="MESSAGE_ID | player")
@click.argument("name", required=False)
@_URL
@_TOKEN
@click.option("--json", "as_json", is_flag=True, help="The server's answer as it is.")
def explain(what: str, name: str | None, url: str | None, token: str | None, as_json: bool) -> None:
    """Why a message did or did not arrive, or how a player is: `explain player NAME`.

    Asks the running server.
    """
    settings = _settings()
    if name is not None and what != "player":
        raise click.UsageError("Either a message's id, or: explain player NAME")
    path = f"/api/connections/{_player(name)}" if name is not None else f"/api/messages/{_quote(what)}"
    if token is None and url is None and settings.secret_key is not None:
        # Whoever can read SECRET_KEY may ask; it is our own server, so the token stays here.
        token = Access(settings, SystemClock()).issue(None, ["admin"], 60)
    answer = _ask(url or _own_url(settings), path, token)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    elif name is not None:
        _explain_player(answer)
    else:
        _explain_message(answer)


def _quote(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _ask(url: str, path: str, token: str | None) -> dict[str, Any]:
    """The server's answer to GET *path*, or the end of the program with exit code 1."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        # A proxy of the environment has no way to this machine's own loopback.
        local = is_loopback_name(httpx.URL(url).host)
        with httpx.Client(timeout=HTTP_SECONDS, trust_env=not local) as client:
            response = client.get(url.rstrip("/") + path, headers=headers)
            answer = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        _fail(
            Failure(1, f"{url} does not answer: {error}", "Is the server running? mythos-trio pid; or name it: --url")
        )
        sys.exit(EXIT_FAILED)
    if response.status_code >= 400 or not isinstance(answer, dict):
        message = answer.get("message", "") if isinstance(answer, dict) else str(answer)
        fix = "A token helps: --token" if response.status_code in (401, 403) else f"{url}{path}"
        _fail(Failure(1, f"{response.status_code}: {message}", fix))
        sys.exit(EXIT_FAILED)
    return answer


def _explain_player(answer: dict[str, Any]) -> None:
    presence, health = answer["presence"], answer["health"]
    stats = answer["message_delivery_stats"]
    rows = [
        ("player", answer["player_id"]),
        ("status", f"{presence['status']}, last seen {presence['last_seen'] or 'never'}"),
        ("session", answer["session_id"] or "none"),
        ("health", health["overall_health"]),
        (
            "messages",
            ", ".join(f"{stats[key]} {key}" for key in ("sent", "delivered", "replaced", "acknowledged", "pending")),
        ),
    ]
    failure = stats.get("last_failure")
    failed = f"{stats['failed']}" + (f", the last {failure['when']}: {failure['reason']}" if failure else "")
    rows.append(("failed", failed))
    _print_pairs(rows)
    connections = [(kind, entry) for kind in ("websocket", "sse") for entry in _entries(answer, kind)]
    if connections:
        click.echo()
        _print_table(
            ("transport", "connection", "opened", "written", "acknowledged", "behind", "waiting for"),
            [
                (
                    kind,
                    entry["connection_id"],
                    entry["opened"],
                    entry["written"],
                    entry["acknowledged"],
                    entry["behind"],
                    entry["waiting_for"] or "-",
                )
                for kind, entry in connections
            ],
        )
    _print_rest(answer, {"player_id", "session_id", "connections", "presence", "health", "message_delivery_stats"})


def _entries(answer: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = answer["connections"][kind]["connections"]
    return entries


def _explain_message(answer: dict[str, Any]) -> None:
    rows = [("message", answer["id"])]
    for name in ("state", "why", "seq", "epoch", "target", "accepted_at", "stored_at"):
        if answer.get(name) is not None:
            value = answer[name]
            rows.append((name.replace("_", " "), json.dumps(value) if isinstance(value, dict) else str(value)))
    rows.append(("receivers", str(answer.get("receivers_total", len(answer["receivers"])))))
    _print_pairs(rows)
    if answer["receivers"]:
        click.echo()
        _print_table(
            ("player", "transport", "state", "written at", "acknowledged at", "why"),
            [
                (
                    r["player_id"],
                    r["transport"] or "-",
                    r["state"],
                    r["written_at"] or "-",
                    r["acknowledged_at"] or "-",
                    r["why"] or "-",
                )
                for r in answer["receivers"]
            ],
        )


def _print_rest(answer: dict[str, Any], shown: set[str]) -> None:
    """What a newer server says beyond what is known here."""
    rest = {name: value for name, value in answer.items() if name not in shown | {"server_id", "timestamp"}}
    for name, value in rest.items():
        click.echo(f"{name}: {json.dumps(value)}")


# pid, sessions, store


@main.command()
def pid() -> None:
    """Print the pid of the server that runs on this store; exit code 1 if none does."""
    path = _store_path(_settings())
    holder = store_holder(path)
    if holder is None:
        _say(f"mythos-trio: no server runs on {path}", fg="red")
        sys.exit(EXIT_FAILED)
    click.echo(str(holder))


def store_holder(path: Path) -> int | None:
    """The pid of the process that holds the store at *path*; None if there is none.

    A server holds a lock on ``PATH.lock``, in which its pid stands; the kernel lets go of the lock
    however the process ends, so a pid that was left behind is told from a living one's.
    """
    lock = Path(f"{path}.lock")
    try:
        text = lock.read_text(errors="replace").strip()
    except OSError:
        return None
    if not re.fullmatch("[0-9]{1,10}", text):
        return None
    return int(text) if _has_open(int(text), lock) or _is_locked(lock) else None


def _has_open(pid: int, path: Path) -> bool:
    """Whether the process has the file open; False if that cannot be seen."""
    try:
        return any(file.path == str(path) for file in psutil.Process(pid).open_files())
    except (psutil.Error, OSError):
        return False


def _is_locked(path: Path) -> bool:
    """By trying, which could keep out a server that starts at this very moment: the last resort, for
    a process of another user or container."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@main.group()
def sessions() -> None:
    """Look at stored sessions."""


@sessions.command("list")
@click.option("--player", help="Only this player's.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000), help="How many at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def sessions_list(player: str | None, limit: int, as_json: bool) -> None:
    """List sessions, the newest first; the server may run meanwhile."""
    from mythos_trio.sqlite.outside import look
    from mythos_trio.storage import StoreError, StoreUnusable

    wanted = None if player is None else _player(player)
    path = _store_path(_settings())
    _must_exist(path)
    try:
        with look(path) as database:
            rows = [_session_fields(row) for row in database.sessions(wanted, limit)]
    except (StoreUnusable, StoreError) as error:
        _fail(Failure(EXIT_STORE, f"the store cannot be read: {error}", "Is it ours, and may you read it?"))
        sys.exit(EXIT_STORE)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    header = [name.replace("_", " ") for name in _SESSION_FIELDS]
    _print_table(header, [["-" if row[name] is None else row[name] for name in _SESSION_FIELDS] for row in rows])


_SESSION_FIELDS: Final = ("player_id", "session_id", "state", "created_at", "last_online", "ended_at", "end_reason")


def _session_fields(row: SessionRow) -> dict[str, Any]:
    ended_at = None if row.ended_at is None else rfc3339(row.ended_at)
    return {
        "player_id": row.player_id,
        "session_id": row.session_id,
        "state": row.state,
        "created_at": rfc3339(row.created_at),
        "last_online": rfc3339(row.last_online),
        "ended_at": ended_at,
        "end_reason": row.end_reason,
        "seen": row.seen,
        "channels": list(row.channels),
    }


def _must_exist(path: Path) -> None:
    if not path.exists():
        _fail(
            Failure(EXIT_STORE, f"there is no store at {path}", "See DATABASE_URL: mythos-trio config get DATABASE_URL")
        )
        sys.exit(EXIT_STORE)


@main.group()
def store() -> None:
    """Look after the store."""


@store.command("new-epoch")
def store_new_epoch() -> None:
    """Begin a new epoch, after a copy of the store has been put back.

    Clients that come back with a position of the time after the copy was made are then told what is
    missing, instead of getting other messages under the same numbers. The server must not run.
    """
    from mythos_trio.sqlite import SqliteDatabase
    from mythos_trio.storage import StoreError, StoreUnusable

    path = _store_path(_settings())
    _must_exist(path)
    try:
        epoch = SqliteDatabase(path).new_epoch(SystemClock().now())
    except (StoreUnusable, StoreError) as error:
        _fail(Failure(EXIT_STORE, f"the store cannot be used: {error}", "Stop the server first, if it runs."))
        sys.exit(EXIT_STORE)
    click.echo(f"epoch {epoch.number} begins with number {epoch.first}")


# token


@main.group()
def token() -> None:
    """Make and check tokens. They are signed with SECRET_KEY."""


def _duration(_ctx: click.Context, _param: click.Parameter, text: str) -> float | None:
    """``3600``, ``15m``, ``24h``, ``30d`` as seconds; ``never`` as None."""
    if text == "never":
        return None
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{text!r} is not a duration: write 3600, 15m, 24h, 30d or never")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


@token.command("issue")
@click.argument("player", required=False)
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help="May be given twice.")
@click.option("--expires", callback=_duration, default="24h", show_default=True, help="3600, 15m, 24h, 30d or never.")
def token_issue(player: str | None, scopes: tuple[str, ...], expires: float | None) -> None:
    """Print a token for PLAYER (none: for a publisher or an operator, who need a --scope).

    A player's token opens that player's paths only; publish may publish, admin may monitor and disconnect.
    """
    if player is None and not scopes:
        raise click.UsageError("A token without PLAYER needs a --scope: it would open nothing.")
    access = Access(_settings(), SystemClock())
    try:
        click.echo(access.issue(None if player is None else _player(player), scopes, expires))
    except ValueError as error:
        _fail(Failure(EXIT_SETTING, str(error), "Such as: echo SECRET_KEY=$(openssl rand -base64 48) >> .env"))
        sys.exit(EXIT_SETTING)


@token.command("verify")
@click.argument("text", metavar="TOKEN")
def token_verify(text: str) -> None:
    """Show what TOKEN says and whether it is good (- reads it from stdin). Exit code 1 if it is not."""
    text = (sys.stdin.read() if text == "-" else text).strip()
    settings = _settings()
    try:
        header, claims = peek(text)
        _print_pairs([("header", json.dumps(header)), ("claims", json.dumps(claims)), ("expires", _expiry(claims))])
        found = Access(settings, SystemClock()).verify(text)
    except TokenError as error:
        _say(f"refused: {error.reason}: {error.message}", fg="red")
        sys.exit(EXIT_FAILED)
    scopes = ", ".join(sorted(found.scopes)) or "none"
    click.secho(f"good: player {found.player_id or 'none'}, scopes {scopes}", fg="green")


def _expiry(claims: dict[str, Any]) -> str:
    at = claims.get("exp")
    if at is None:
        return "never"
    try:
        left = datetime.fromtimestamp(at, UTC) - datetime.now(UTC)
        shown = rfc3339(at)
    except (TypeError, ValueError, OverflowError, OSError):
        return f"{at!r}, which is no time"
    seconds = round(left.total_seconds())
    return f"{shown} ({f'in {seconds} s' if seconds > 0 else f'{-seconds} s ago'})"


# Printing.


def _print_pairs(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on a terminal; plain columns, never cut or wrapped, for a pipe."""
    if sys.stdout.isatty():
        table = Table(*header, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*(Text(str(value), overflow="fold") for value in row))
        Console().print(table)
        return
    texts = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    for row in texts:
        click.echo("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
