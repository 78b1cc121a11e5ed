"""The command line: what it prints, its exit codes, and that a failed start says cause and fix."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from attrs import frozen
from click.testing import CliRunner, Result

from mythos_trio import __version__, cli, config, server
from mythos_trio.config import Settings
from mythos_trio.net import PortTaken
from mythos_trio.seams import SystemClock
from mythos_trio.sqlite import SqliteDatabase
from mythos_trio.storage import StoreUnusable

KEY = "a-key-of-the-tests-that-is-32-bytes-long"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, and no settings in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in config.SPECS:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.main, args, input=stdin, prog_name="mythos-trio")


def critical(place: Path) -> dict[str, Any]:
    """The one CRITICAL line of the log."""
    lines = [json.loads(line) for line in (place / "logs" / "mythos.log").read_text().splitlines()]
    (found,) = [line for line in lines if line["level"] == "CRITICAL"]
    assert isinstance(found, dict)
    return found


# Help.


def all_commands(group: click.Group, path: Sequence[str] = ()) -> Iterator[Sequence[str]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from all_commands(command, (*path, name))


@pytest.mark.parametrize("path", list(all_commands(cli.main)), ids=" ".join)
def test_every_command_has_help(path: Sequence[str]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert f"Usage: mythos-trio {' '.join(path)}" in result.output
    command: Any = cli.main
    for name in path:
        command = command.commands[name]
    assert command.help
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_the_commands_there_are() -> None:
    assert set(cli.main.commands) == {
        "config",
        "connect",
        "explain",
        "new",
        "pid",
        "serve",
        "sessions",
        "store",
        "token",
    }


def test_version() -> None:
    assert __version__ in run("--version").output


def test_a_wrong_command_has_a_hint() -> None:
    result = run("conect", "alice")
    assert result.exit_code == 2
    assert "Did you mean 'connect'?" in result.output


@pytest.mark.parametrize("args", [(), ("serve",), ("--port", "9"), ("serve", "--port", "9", "mygame:game")])
def test_serve_is_the_default(args: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[Settings, str]] = []

    def fake(settings: Settings, game: str, **_more: object) -> int:
        served.append((settings, game))
        return 0

    monkeypatch.setattr(server, "run", fake)
    assert run(*args).exit_code == 0
    ((settings, game),) = served
    assert settings.port == (9 if "9" in args else 8000)
    assert game == ("mygame:game" if "mygame:game" in args else cli.DEFAULT_GAME)


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []

    def fake(settings: Settings, _game: str, **_more: object) -> int:
        served.append(settings)
        return 0

    monkeypatch.setattr(server, "run", fake)
    monkeypatch.setenv("PORT", "7000")
    monkeypatch.setenv("DEBUG", "true")
    run("serve", "--log-level", "error", "--host", "::1")
    assert (served[0].port, served[0].log_level, served[0].host) == (7000, "ERROR", "::1")


# Failed starts.


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    def raise_it(*_args: object, **_more: object) -> int:
        raise error

    monkeypatch.setattr(server, "run", raise_it)
    return run("serve", "--port", "80")


def check_failure(result: Result, place: Path, code: int, *words: str) -> None:
    """The exit code, and the words on the console and in the one CRITICAL line."""
    assert result.exit_code == code
    line = critical(place)
    assert line["exit_code"] == code
    assert line["error_type"]
    assert line["fix"]
    assert line["fix"] in result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr
        assert word in line["event"]
    assert result.stderr.count(line["event"]) == 1, "once is enough for the console"


def test_a_wrong_setting_is_exit_code_2(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "eight")
    check_failure(run(), place, 2, "PORT='eight'", "a whole number from 0 to 65535")


def test_a_wrong_option_is_exit_code_2(place: Path) -> None:
    check_failure(run("serve", "--log-level", "loud"), place, 2, "LOG_LEVEL='loud'", "command line")


def test_a_game_that_there_is_not_is_exit_code_2(place: Path) -> None:
    check_failure(run("serve", "no_such_game:game"), place, 2, "no_such_game")


def test_a_taken_port_is_exit_code_3(place: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        result = run("serve", "--port", str(port))
    check_failure(result, place, 3, f"port {port} is in use by", f"(pid {os.getpid()})")


def test_a_port_that_is_not_permitted_is_exit_code_3(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_failure(fail_with(PermissionError(errno.EACCES, "no"), monkeypatch), place, 3, "port 80")


def test_a_host_that_is_not_ours_is_exit_code_2(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "192.0.2.1")
    check_failure(run("serve", "--port", "0"), place, 2, "HOST='192.0.2.1'")


def test_a_store_that_is_not_ours_is_exit_code_4_and_is_not_touched(place: Path) -> None:
    path = place / "notes.txt"
    path.write_text("my notes")
    (place / ".env").write_text(f"DATABASE_URL=sqlite:///{path}\nPORT=0\n")
    check_failure(run(), place, 4, str(path))
    assert path.read_text() == "my notes"


def test_a_held_store_is_exit_code_4_with_the_pid(place: Path) -> None:
    holder = SqliteDatabase("data/players/mythos.db")
    holder.open(0.0)
    try:
        check_failure(run("serve", "--port", "0"), place, 4, str(os.getpid()))
    finally:
        holder.close()


@pytest.mark.parametrize("error", [StoreUnusable("held"), ExceptionGroup("", [StoreUnusable("held")])])
def test_causes_are_found_in_groups(place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    check_failure(fail_with(error, monkeypatch), place, 4, "held")


def test_a_missing_driver_is_exit_code_5(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:hunter2@localhost/mythos")
    result = run()
    check_failure(result, place, 5, "postgresql", "not in this version")
    assert "hunter2" not in result.output + json.dumps(critical(place))


def test_a_crash_is_exit_code_1_with_its_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = fail_with(ExceptionGroup("x", [ValueError("why")]), monkeypatch)
    assert result.exit_code == 1
    assert "ValueError: why" in critical(place)["exception"]
    assert "ValueError: why" in result.stderr


def test_a_log_that_cannot_be_written_is_exit_code_2(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("LOG_FILE", "file/mythos.log")
    result = run()
    assert result.exit_code == 2
    assert "LOG_FILE" in result.stderr


def test_every_known_failure_has_a_fix() -> None:
    for error in (PortTaken("localhost", 1), StoreUnusable("x"), config.MissingDriver("redis")):
        failure = cli._failure(error, Settings())
        assert failure is not None
        assert failure.fix
    assert cli._failure(ValueError(), Settings()) is None
    assert cli._failure(OSError(errno.EIO, "x"), Settings()) is None


def test_warnings_are_logged_at_the_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "run", lambda *_args, **_more: 0)
    (place / ".env").write_text("PROT=8001\n")
    run()
    assert "did you mean PORT?" in (place / "logs" / "mythos.log").read_text()


# config


def test_config_check_prints_each_setting_with_its_source(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / ".env").write_text("PORT=8001\nPONG_TIMEOUT=290\nPORTT=1\n")
    monkeypatch.setenv("SECRET_KEY", KEY)
    result = run("config", "check")
    assert result.exit_code == 0
    lines = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    assert set(config.SPECS) <= set(lines)
    assert lines["PORT"] == ["8001", ".env"]
    assert lines["SECRET_KEY"] == ["********", "environment"]
    assert lines["WRITE_TIMEOUT"] == ["10", "default"]
    assert KEY not in result.output
    assert "PONG_TIMEOUT is more than CONNECTION_TIMEOUT" in result.stderr
    assert "PORTT is not a setting" in result.stderr


def test_config_check_names_all_that_is_wrong(place: Path) -> None:
    (place / ".env").write_text("PORT=eight\nDURABILITY=forever\n")
    result = run("config", "check")
    assert result.exit_code == 2
    assert "PORT='eight'" in result.stderr
    assert "DURABILITY='forever'" in result.stderr
    assert "one of process, power" in result.stderr


@pytest.mark.parametrize(("name", "value"), [("PORT", "8000"), ("port", "8000"), ("CORS_ORIGINS", "none")])
def test_config_get(name: str, value: str) -> None:
    result = run("config", "get", name)
    assert (result.exit_code, result.stdout) == (0, value + "\n")


def test_config_get_hides_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:hunter2@localhost/mythos")
    assert run("config", "get", "DATABASE_URL").stdout == "postgresql://user:********@localhost/mythos\n"


def test_config_get_of_what_is_wrong_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "eight")
    assert run("config", "get", "PORT").exit_code == 2
    assert run("config", "get", "HOST").stdout == "localhost\n"
    result = run("config", "get", "PROT")
    assert result.exit_code == 2
    assert "Did you mean PORT?" in result.output


def test_config_init_writes_once_and_privately(place: Path) -> None:
    assert run("config", "init").exit_code == 0
    path = place / ".env"
    assert path.stat().st_mode & 0o777 == 0o600
    assert run("config", "check").exit_code == 0
    path.write_text("PORT=1\n")
    assert run("config", "init").exit_code == 1
    assert path.read_text() == "PORT=1\n"


# token


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SECRET_KEY", KEY)
    return KEY


@pytest.mark.usefixtures("key")
def test_a_token_that_was_issued_is_good() -> None:
    issued = run("token", "issue", "alice", "--scope", "publish", "--expires", "1h")
    token = issued.stdout.strip()
    for result in (run("token", "verify", token), run("token", "verify", "-", stdin=f"{token}\n")):
        assert result.exit_code == 0
        assert '"alg": "HS256"' in result.stdout
        assert '"sub": "alice"' in result.stdout
        assert re.search(r"in 3(600|599|598) s", result.stdout)
        assert "good: player alice, scopes publish" in result.stdout


@pytest.mark.usefixtures("key")
def test_why_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    token = run("token", "issue", "alice", "--expires", "1").stdout.strip()
    forever = run("token", "issue", "alice", "--expires", "never").stdout.strip()
    assert "never" in run("token", "verify", forever).stdout
    monkeypatch.setattr(SystemClock, "now", lambda _self: time.time() + 60)
    result = run("token", "verify", token)
    assert result.exit_code == 1
    assert "refused: expired: the token expired at" in result.stderr
    monkeypatch.setenv("SECRET_KEY", "another-key-that-is-32-bytes-long-too")
    assert "bad_signature" in run("token", "verify", forever).stderr
    assert "malformed" in run("token", "verify", "nonsense").stderr
    assert "malformed" in run("token", "verify", "--", "").stderr


@pytest.mark.parametrize("expires", ["0", "-1", "soon", "1y", "1.5h"])
@pytest.mark.usefixtures("key")
def test_bad_durations(expires: str) -> None:
    result = run("token", "issue", "alice", f"--expires={expires}")
    assert result.exit_code == 2
    assert "15m" in result.stderr


def test_tokens_need_a_key_a_player_or_a_scope() -> None:
    result = run("token", "issue", "alice")
    assert result.exit_code == 2
    assert "SECRET_KEY" in result.stderr
    assert run("token", "issue").exit_code == 2
    assert run("token", "issue", "no player").exit_code == 2
    assert run("token", "issue", "alice", "--scope", "root").exit_code == 2


# pid, sessions, store: without a server


def test_pid_without_a_server(place: Path) -> None:
    result = run("pid")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no server runs on" in result.stderr


def test_a_pid_that_was_left_behind_is_nobodys(place: Path) -> None:
    """After kill -9 the file still holds the pid; by now it may be somebody else's."""
    lock = place / "data" / "players" / "mythos.db.lock"
    lock.parent.mkdir(parents=True)
    for text in ("999999999", str(os.getppid()), "", "nonsense", "-5"):
        lock.write_text(text)
        assert run("pid").exit_code == 1


def test_pid_of_who_holds_the_store(place: Path) -> None:
    holder = SqliteDatabase("data/players/mythos.db")
    holder.open(0.0)
    assert run("pid").stdout == f"{os.getpid()}\n"
    holder.close()
    assert run("pid").exit_code == 1


def test_pid_of_a_process_that_cannot_be_looked_into(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_has_open", lambda _pid, _path: False)
    holder = SqliteDatabase("data/players/mythos.db")
    holder.open(0.0)
    assert run("pid").stdout == f"{os.getpid()}\n"
    holder.close()
    assert run("pid").exit_code == 1


def test_no_store_no_sessions(place: Path) -> None:
    for args in (("sessions", "list"), ("store", "new-epoch")):
        result = run(*args)
        assert result.exit_code == 4
        assert "there is no store at" in result.stderr
    assert not (place / "data").exists()


def test_what_is_no_store(place: Path) -> None:
    (place / "data" / "players").mkdir(parents=True)
    (place / "data" / "players" / "mythos.db").write_text("my notes")
    for args in (("sessions", "list"), ("store", "new-epoch")):
        assert run(*args).exit_code == 4
    assert (place / "data" / "players" / "mythos.db").read_text() == "my notes"


def test_new_epoch(place: Path) -> None:
    holder = SqliteDatabase("data/players/mythos.db")
    holder.open(0.0)
    held = run("store", "new-epoch")
    assert held.exit_code == 4
    assert f"process {os.getpid()}" in held.stderr
    holder.close()
    began = int(time.time() * 1000)
    said = [run("store", "new-epoch").stdout for _ in range(2)]
    with sqlite3.connect("data/players/mythos.db") as database:
        first, second, third = (row[0] for row in database.execute("SELECT number FROM epochs ORDER BY number"))
    database.close()
    assert first == 1
    assert began <= second < third
    assert [text.partition(" with")[0] for text in said] == [f"epoch {second} begins", f"epoch {third} begins"]


# With a server.


@frozen
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    place: Path
    url: str


def start(place: Path, *args: str) -> Running:
    environ = {name: value for name, value in os.environ.items() if name not in config.SPECS}
    process = subprocess.Popen(
        [sys.executable, "-m", "mythos_trio", "serve", "--port", "0", *args],
        cwd=place,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if match := re.fullmatch(r"\s+(http://\S+)/health\n", line):
            return Running(process, place, match[1])
    raise AssertionError(said)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    found = start(tmp_path_factory.mktemp("server"))
    yield found
    found.process.send_signal(signal.SIGTERM)
    assert found.process.wait(20) == 0
    assert found.process.stdout is not None
    found.process.stdout.close()


@pytest.fixture
def at_server(running: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.chdir(running.place)
    return running


def publish(url: str, player: str, content: str) -> str:
    body = json.dumps({"player_id": player, "message": {"type": "line", "content": content}}).encode()
    request = urllib.request.Request(f"{url}/api/messages", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(json.loads(response.read())["id"])


def connect(running: Running, player: str, *lines: str, url: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mythos_trio", "connect", player, *(["--url", running.url] if url else [])],
        cwd=running.place,
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_connect_is_a_script(at_server: Running) -> None:
    publish(at_server.url, "carol", "mail for you")
    result = connect(at_server, "carol", "say hello", "nonsense")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines().count("mail for you") == 1
    assert result.stdout.splitlines().count("carol says: hello") == 1


def test_connect_to_nobody_can_be_interrupted(place: Path) -> None:
    """A server that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "mythos_trio", "connect", "alice", "--url", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Else it is ignored where these tests run in the background of a script (POSIX, "asynchronous lists").
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            silent.settimeout(20)
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                _out, err = process.communicate(timeout=20)
            assert process.returncode == 130
            assert b"Traceback" not in err
        finally:
            process.kill()
            process.wait()


class Terminal:
    """A person at a terminal: `connect` on a pseudo-terminal."""

    def __init__(self, running: Running, player: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.chdir(running.place)
            args = [sys.executable, "-m", "mythos_trio", "connect", player, "--url", running.url]
            os.execv(sys.executable, args)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait(self, text: str) -> None:
        """Until *text* has been shown since the last wait."""
        until = time.monotonic() + 20
        while text not in self.seen:
            left = until - time.monotonic()
            assert left > 0, (text, self.seen[-2000:])
            if select.select([self._fd], [], [], left)[0]:
                self.seen += self._read().decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def _read(self) -> bytes:
        data = os.read(self._fd, 65536)
        if b"\x1b[6n" in data:  # where is the cursor?
            os.write(self._fd, b"\x1b[1;1R")
        return data

    def leave(self) -> int:
        """Read what is left, and the exit code."""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while self._read():
                pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("key", ["\x04", "\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_a_person_at_a_terminal(at_server: Running, key: str) -> None:
    terminal = Terminal(at_server, "grace")
    terminal.wait("websocket")
    terminal.type("say hello\r")
    terminal.wait("grace says: hello")
    publish(at_server.url, "grace", "psst")
    terminal.wait("psst")
    # While something is printed the terminal is not the line editor's: a key would be lost.
    terminal.wait("websocket connected")
    terminal.type(key)
    assert terminal.leave() == 0


def test_a_person_at_a_terminal_is_removed(at_server: Running) -> None:
    """The line that is being edited is given up, and the terminal put back."""
    terminal = Terminal(at_server, "heidi")
    terminal.type("look\r")
    terminal.wait("You are")
    request = urllib.request.Request(f"{at_server.url}/api/connections/heidi", method="DELETE")
    urllib.request.urlopen(request, timeout=10).close()
    terminal.wait("4503")
    assert terminal.leave() == 1


@pytest.mark.parametrize("args", [("no player",), ("alice", "--url", "ftp://x")])
def test_connect_refuses_nonsense(args: Sequence[str]) -> None:
    assert run("connect", *args).exit_code == 2


def test_explain_a_message(at_server: Running) -> None:
    message_id = publish(at_server.url, "dave", "hello")
    result = run("explain", message_id, "--url", at_server.url)
    assert result.exit_code == 0
    assert message_id in result.stdout
    assert '{"player_id": "dave"}' in result.stdout
    answer = json.loads(run("explain", message_id, "--json", "--url", at_server.url).stdout)
    assert answer["id"] == message_id


def test_explain_a_player(at_server: Running) -> None:
    connect(at_server, "erin", "look")
    result = run("explain", "player", "erin", "--url", at_server.url)
    assert result.exit_code == 0
    assert re.search(r"status +linkdead, last seen 20", result.stdout)
    answer = json.loads(run("explain", "player", "erin", "--json", "--url", at_server.url).stdout)
    assert answer["player_id"] == "erin"


def test_explain_what_there_is_not(at_server: Running) -> None:
    result = run("explain", "no-such-message", "--url", at_server.url)
    assert result.exit_code == 1
    assert "404" in result.stderr
    assert run("explain", "a", "b").exit_code == 2


def test_explain_without_a_server(place: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        result = run("explain", "x", "--url", f"http://127.0.0.1:{sock.getsockname()[1]}")
    assert result.exit_code == 1
    assert "does not answer" in result.stderr
    assert "mythos-trio pid" in result.stderr


def test_sessions_are_listed_while_the_server_runs(at_server: Running) -> None:
    connect(at_server, "frank", "look")
    plain = run("sessions", "list", "--player", "frank")
    assert plain.exit_code == 0
    header, row = plain.stdout.splitlines()
    assert header.split()[:2] == ["player", "id"]
    assert row.split()[0] == "frank"
    (line,) = run("sessions", "list", "--player", "frank", "--json").stdout.splitlines()
    assert json.loads(line)["player_id"] == "frank"


def test_pid_and_a_second_server(at_server: Running) -> None:
    pid = at_server.process.pid
    assert run("pid").stdout == f"{pid}\n"
    second = run("serve", "--port", "0")
    assert second.exit_code == 4
    assert str(pid) in second.stderr
    taken = run("serve", "--port", at_server.url.rpartition(":")[2])
    assert taken.exit_code == 3
    assert f"(pid {pid})" in taken.stderr
    assert run("store", "new-epoch").exit_code == 4
    assert at_server.process.poll() is None


def test_explain_with_a_key_asks_with_a_token(place: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    (place / ".env").write_text(f"SECRET_KEY={KEY}\nPORT={port}\n")
    (place / ".env").chmod(0o600)
    running = start(place, "--port", str(port))
    try:
        assert json.loads(run("explain", "player", "alice", "--json").stdout)["player_id"] == "alice"
        # Another server is not shown a token of ours.
        refused = run("explain", "player", "alice", "--url", running.url)
        assert refused.exit_code == 1
        assert "--token" in refused.stderr
        played = connect(running, "alice", "say hello", url=False)
        assert played.returncode == 0
        assert "alice says: hello" in played.stdout
    finally:
        running.process.terminate()
        assert running.process.wait(20) == 0
        assert running.process.stdout is not None
        running.process.stdout.close()
