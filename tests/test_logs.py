"""The log: what a line holds, where it goes, what happens when it cannot be written."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_trio import logs
from mythos_trio.config import SettingError, Settings

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"
log = logs.get("connection")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(log_file=str(tmp_path / "logs" / "mythos.log"), server_id="node-1")


@pytest.fixture
def running(settings: Settings) -> Iterator[logs.Logs]:
    found = logs.setup(settings, console=False)
    yield found
    found.close()


def lines(settings: Settings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(settings.log_file).read_text().splitlines()]


def test_a_line_is_one_json_object(settings: Settings, running: logs.Logs) -> None:
    log.info("WebSocket connected", player_id="alice", establishment_time_ms=1.5, resumed=False)
    running.close()
    text = Path(settings.log_file).read_text()
    assert text.count("\n") == 1
    (line,) = lines(settings)
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert line == {
        "timestamp": line["timestamp"],
        "level": "INFO",
        "event": "WebSocket connected",
        "server_id": "node-1",
        "component": "connection",
        "player_id": "alice",
        "establishment_time_ms": 1.5,
        "resumed": False,
    }
    assert line["timestamp"][-1] == "Z"
    assert len(line["timestamp"]) == len("2026-01-01T00:00:00.000Z")


def test_lines_of_one_moment_share_what_is_the_same(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    running = logs.setup(settings)
    bound = log.bind(server="x")
    bound.info_each("Message delivered", [{"player_id": "ann\n{", "seq": 1}, {"player_id": JWT, "players": [{"a": 1}]}])
    bound.info_each("odd", [{"big": 1 << 70}, {"thing": {1}}])
    bound.info_each("nothing", [])
    running.set_level("WARNING")
    bound.info_each("not seen", [{"seq": 2}])
    running.close()
    same = {"level": "INFO", "server_id": "node-1", "component": "connection", "server": "x"}
    found = lines(settings)
    assert [{**line, "timestamp": None} for line in found] == [
        {**same, "timestamp": None, "event": "Message delivered", "player_id": "ann\n{", "seq": 1},
        {**same, "timestamp": None, "event": "Message delivered", "player_id": "***", "players": [{"a": 1}]},
        {**same, "timestamp": None, "event": "odd", "big": 1 << 70},
        {**same, "timestamp": None, "event": "odd", "thing": [1]},
    ]
    console = capsys.readouterr().err.splitlines()
    assert len(console) == 4
    assert console[0].endswith(r"INFO     connection     Message delivered  server=x player_id=ann\n{ seq=1")
    assert JWT not in console[1]


def test_bound_fields_are_in_every_line() -> None:
    with logs.capture() as found:
        log.bind(player_id="alice").warning("x", why="y")
    assert (found[0]["player_id"], found[0]["why"], found[0]["component"]) == ("alice", "y", "connection")


@pytest.mark.parametrize(("took", "level"), [(999.9, "INFO"), (1000.1, "WARNING"), (None, "INFO")])
@pytest.mark.parametrize("field", ["delivery_time_ms", "establishment_time_ms"])
def test_what_takes_over_a_second_is_a_warning(took: float | None, level: str, field: str) -> None:
    with logs.capture() as found:
        log.info("Message delivered", **{field: took})
    assert found[0]["level"] == level


def test_every_error_has_a_type_and_a_traceback_is_text(settings: Settings, running: logs.Logs) -> None:
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        log.exception("Connection error in a test", player_id="alice")
    log.error("named", error_type="rate_limit_error")
    logs.get("database").error("Database connection failed", driver="sqlite3")
    running.close()
    first, second, third = lines(settings)
    assert first["error_type"] == "connection_error"
    assert first["exception"].startswith("Traceback (most recent call last)")
    assert first["exception"].endswith("ZeroDivisionError: division by zero")
    assert (second["error_type"], third["error_type"]) == ("rate_limit_error", "persistence_error")


def test_a_huge_traceback_is_cut_in_the_middle() -> None:
    with logs.capture() as found:
        log.error("x", exc_info=ValueError("a" * 200_000 + "end"))
    text = found[0]["exception"]
    assert len(text) < 70_000
    assert text.endswith("end")
    assert "characters" in text


def test_levels(settings: Settings, running: logs.Logs) -> None:
    log.debug("1")
    assert not log.is_enabled_for(logging.DEBUG)
    running.set_level("DEBUG")
    assert log.is_enabled_for(logging.DEBUG)
    log.debug("2")
    running.set_level("ERROR")
    log.warning("3")
    log.error("4")
    running.close()
    assert [line["event"] for line in lines(settings)] == ["2", "4"]


def test_errors_are_shown_to_callbacks_whatever_the_level() -> None:
    seen: list[logs.Event] = []
    end = logs.on_error(seen.append)
    with logs.capture(logging.CRITICAL) as found:
        log.info("fine")
        log.warning("odd")
        log.error("bad", player_id="alice")
    end()
    log.warning("not seen")
    assert [event["event"] for event in seen] == ["odd", "bad"]
    assert seen[1]["error_type"] == "connection_error"
    assert found == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"GET /ws/a?token={JWT}&x=1", "GET /ws/a?token=***&x=1"),
        ("GET /ws/a?token=plain&x=1", "GET /ws/a?token=***&x=1"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("mythos-protocol, bearer, abc.def", "mythos-protocol, bearer, ***"),
        (f"so {JWT} there", "so *** there"),
        ("a forbearer of the token", "a forbearer of the token"),
    ],
)
def test_tokens_are_hidden(text: str, shown: str, settings: Settings, running: logs.Logs) -> None:
    log.info(text, target=text, headers=[["authorization", text]], quoted=f'"{text}"')
    running.close()
    (line,) = lines(settings)
    assert line["event"] == line["target"] == line["headers"][0][1] == shown
    assert line["quoted"] == f'"{shown}"'


def test_fields_that_are_named_as_secrets_are_hidden(settings: Settings, running: logs.Logs) -> None:
    log.info("x", token='we"ird\\', secret_key="hunter2", nested={"authorization": "hunter2"}, tokens=3)
    running.close()
    (line,) = lines(settings)
    assert (line["token"], line["secret_key"], line["nested"]["authorization"], line["tokens"]) == ("***",) * 3 + (3,)


def test_values_that_are_no_json(settings: Settings, running: logs.Logs) -> None:
    loop: list[Any] = []
    loop.append(loop)
    log.info("a", thing={1, 2}, path=Path("x"), big=1 << 70, odd="\ud800", nan=float("nan"))
    log.info("b", keys={(1, 2): 3})
    log.info("c", loop=loop)
    log.info("d\nsecond line")
    running.close()
    found = lines(settings)
    assert [line["event"] for line in found] == ["a", "b", "c", "d\nsecond line"]
    assert found[0]["big"] == 1 << 70


def test_the_standard_library_and_warnings_go_the_same_way(settings: Settings, running: logs.Logs) -> None:
    logging.getLogger("hypercorn.error").info("Running on %s", "x")
    logging.getLogger("other").error("bad", exc_info=ValueError("why"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    running.close()
    first, second, third = lines(settings)
    assert (first["event"], first["logger"], first["component"]) == ("Running on x", "hypercorn.error", "server")
    assert (second["error_type"], second["level"]) == ("system_error", "ERROR")
    assert "ValueError: why" in second["exception"]
    assert third["level"] == "WARNING"
    assert "careful" in third["event"]


def test_a_dying_process_says_why(settings: Settings, running: logs.Logs, capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("the end")
    sys.excepthook(ValueError, error, None)
    (line,) = lines(settings)
    assert (line["level"], line["error_type"]) == ("CRITICAL", "system_error")
    assert "the end" in line["exception"]
    assert "the end" in capsys.readouterr().err, "there was no console: it must be seen all the same"


def test_a_dying_thread_says_why(settings: Settings, running: logs.Logs) -> None:
    def die() -> None:
        raise ValueError("in a thread")

    thread = threading.Thread(target=die, name="worker-7")
    thread.start()
    thread.join()
    running.close()
    (line,) = lines(settings)
    assert "worker-7" in line["event"]
    assert "in a thread" in line["exception"]


def test_close_puts_everything_back(settings: Settings) -> None:
    before = (sys.excepthook, sys.unraisablehook, threading.excepthook, list(logging.root.handlers), logging.root.level)
    running = logs.setup(settings, console=False)
    running.close()
    running.close()
    after = (sys.excepthook, sys.unraisablehook, threading.excepthook, list(logging.root.handlers), logging.root.level)
    assert before == after


def test_without_setup_lines_go_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logs.get("session").info("Recovered session", session_id="s1")
    assert caplog.record_tuples == [("mythos_trio.session", logging.INFO, "Recovered session session_id=s1")]


def test_rotation(tmp_path: Path) -> None:
    settings = Settings(log_file=str(tmp_path / "m.log"), log_max_bytes=2000, log_backup_count=2)
    running = logs.setup(settings, console=False)
    for n in range(60):
        log.info("x" * 100, n=n)
        if n % 5 == 0:
            flushed(running)
    running.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["m.log", "m.log.1", "m.log.2"]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    numbers = [json.loads(line)["n"] for name in reversed(files) for line in (tmp_path / name).read_text().splitlines()]
    assert numbers == list(range(numbers[0], 60)), "nothing is lost or out of order but the oldest"


def flushed(running: logs.Logs) -> None:
    """Wait until all that has been logged is in the file."""
    done = threading.Event()
    running._to_file.call(done.set)
    assert done.wait(5)


def held_up(running: logs.Logs) -> threading.Event:
    """The thread of the file waits for this one, 5 seconds at most."""
    hold, held = threading.Event(), threading.Event()

    def block() -> None:
        held.set()
        hold.wait(5)

    running._to_file.call(block)
    assert held.wait(5)
    return hold


def test_reopen_goes_on_in_a_file_of_the_old_name(settings: Settings, running: logs.Logs) -> None:
    log.info("one")
    flushed(running)
    Path(settings.log_file).rename(settings.log_file + ".old")
    log.info("two")
    logs.reopen()
    log.info("three")
    running.close()
    assert [line["event"] for line in lines(settings)] == ["three"]
    assert Path(settings.log_file + ".old").read_text().count("\n") == 2


def test_an_appended_file_is_kept(settings: Settings) -> None:
    for word in ("one", "two"):
        running = logs.setup(settings, console=False)
        log.info(word)
        running.close()
    assert [line["event"] for line in lines(settings)] == ["one", "two"]


def test_lines_are_written_in_batches_with_pauses(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that renders all that has gathered in one go keeps the event loop waiting as long."""
    monkeypatch.setattr(logs, "GATHER_SECONDS", 0.2)
    monkeypatch.setattr(logs, "PAUSE_SECONDS", 60)
    monkeypatch.setattr(logs, "BATCH", 2)
    running = logs.setup(settings, console=False)
    sizes: list[int] = []
    written = threading.Event()

    def write(batch: list[logs.Lines]) -> None:
        sizes.append(len(batch))
        running._file.write(batch)
        written.set()

    running._to_file._write = write
    for n in range(7):
        log.info("x", n=n)
    assert written.wait(5)
    written.clear()
    assert not written.wait(0.05)
    log.error("urgent")
    flushed(running)
    assert sizes == [2, 2, 2, 2]
    running.close()
    assert [line["n"] for line in lines(settings) if "n" in line] == list(range(7))


def test_at_the_bound_lines_are_dropped_and_counted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING", 5)
    running = logs.setup(settings, console=False)
    hold = held_up(running)
    for n in range(12):
        log.info("x", n=n)
    hold.set()
    running.close()
    found = lines(settings)
    assert [line["n"] for line in found if "n" in line] == [0, 1, 2, 3, 4]
    assert [line["dropped"] for line in found if "dropped" in line] == [7]


def test_of_more_lines_of_one_moment_than_may_wait_the_first_are_written(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING", 5)
    running = logs.setup(settings, console=False)
    log.info_each("x", [{"n": n} for n in range(12)])
    running.close()
    found = lines(settings)
    assert [line["n"] for line in found if "n" in line] == [0, 1, 2, 3, 4]
    assert [line["dropped"] for line in found if "dropped" in line] == [7]


def test_lines_by_themselves_and_many_of_one_moment_share_the_bound(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING", 7)
    running = logs.setup(settings, console=False)
    for _ in range(2):  # what has been written makes room again
        hold = held_up(running)
        log.info("one", n=0)
        log.info_each("many", [{"n": n} for n in range(1, 5)])
        log.info("one", n=5)
        log.info_each("many", [{"n": n} for n in range(6, 9)])
        log.info("one", n=9)
        hold.set()
        flushed(running)
    running.close()
    found = lines(settings)
    assert [line["n"] for line in found if "n" in line] == [0, 1, 2, 3, 4, 5, 6] * 2
    assert [line["dropped"] for line in found if "dropped" in line] == [3, 3]


def test_a_line_from_a_finalizer_while_a_line_is_put_is_written(settings: Settings) -> None:
    """The collector may come in while the counts are locked."""
    running = logs.setup(settings, console=False)
    with running._to_file._lock:
        log.info("finalized")
    running.close()
    assert [line["event"] for line in lines(settings)] == ["finalized"]


def test_a_full_disk_does_not_end_the_log(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    running = logs.setup(settings, console=False)
    write = logs._File.write
    complaints: list[str] = []
    monkeypatch.setattr(logs, "_complain", complaints.append)
    failing = threading.Event()
    failing.set()

    def maybe(self: logs._File, batch: list[logs.Lines]) -> None:
        if failing.is_set():
            raise OSError(28, "No space left on device")
        write(self, batch)

    running._to_file._write = lambda batch: maybe(running._file, batch)
    log.info("lost")
    flushed(running)
    log.info("lost too")
    flushed(running)
    failing.clear()
    log.info("kept")
    running.close()
    assert [line["event"] for line in lines(settings)] == ["kept"]
    assert len(complaints) == 1
    assert "No space left" in complaints[0]


def test_a_stopped_terminal_holds_up_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            stopped.wait(5)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Terminal())
    running = logs.setup(settings)
    log.info("to the file at once")
    flushed(running)
    assert [line["event"] for line in lines(settings)] == ["to the file at once"]
    stopped.set()
    running.close()


def test_the_console_is_readable(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    running = logs.setup(settings)
    log.info("SSE connected", player_id="alice", reason="two words\x1b[2J", url=f"/ws/a?token={JWT}")
    log.error("Unexpected error in x", exc_info=ValueError("why"))
    running.close()
    err = capsys.readouterr().err
    assert "INFO     connection     SSE connected  player_id=alice reason='two words" in err
    assert "\x1b" not in err
    assert JWT not in err
    assert "\nValueError: why\n" in err


def test_a_file_that_cannot_be_written_is_a_setting_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError) as caught:
        logs.setup(Settings(log_file=str(tmp_path / "file" / "mythos.log")), console=False)
    assert caught.value.name == "LOG_FILE"


secrets = st.sampled_from(
    ["Bearer abc", "TOKEN=abc", "token", "password", "bearer", "eyJhbGciOi.J9.x", "a b", "", "x=", "Secret_Key"]
)
values = st.recursive(
    st.none() | st.integers() | st.floats() | st.text() | secrets | st.binary() | st.just({1}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | secrets, inner, max_size=3),
    max_leaves=5,
)
some_fields = st.dictionaries(st.text() | secrets, values, max_size=4)


@given(some_fields, st.lists(some_fields, max_size=3))
def test_looking_ahead_for_secrets_overlooks_none(facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    own = {"event": "x", "level": "INFO", "timestamp": 0.0}
    lines = logs.Lines({**facts, **own}, [{**row} or {"n": 1} for row in rows])
    for text in (logs.render_json(lines, "s"), logs.render_console(lines, colours=False)):
        assert logs.hide_secrets(lines, text) == logs._SECRET.sub(logs._hidden, text)


@given(st.lists(some_fields, max_size=4))
def test_looking_ahead_in_several_at_once_overlooks_none(several: list[dict[str, Any]]) -> None:
    own = {"event": "x", "level": "INFO", "timestamp": 0.0}
    batch = [logs.Lines({**facts, **own}) for facts in several]
    logs.Lines.look_through(batch)
    for lines in batch:
        for text in (logs.render_json(lines, "s"), logs.render_console(lines, colours=False)):
            assert logs.hide_secrets(lines, text) == logs._SECRET.sub(logs._hidden, text)


def test_what_is_hidden_in_the_file_is_hidden_on_the_console() -> None:
    own = {"event": "x", "level": "INFO", "timestamp": 0.0}
    for row in ({"d": {"password": 'a"b c'}}, {"d": [{"token": "a b"}]}, {"d": "password", "e": {"secret_key": "x y"}}):
        for lines in (logs.Lines({**own, **row}), logs.Lines(own, [row])):
            for text in (logs.render_json(lines, "s"), logs.render_console(lines, colours=False)):
                hidden = logs.hide_secrets(lines, text)
                assert '"***"' in hidden
                assert not [secret for secret in ("b c", "a b", "x y") if secret in hidden]


words = st.text(st.characters(codec="ascii", exclude_characters=" "), min_size=1)
plain_fields = st.dictionaries(st.sampled_from("abc"), words | st.integers() | st.booleans() | st.floats() | st.none())


@given(st.lists(some_fields | plain_fields, min_size=1, max_size=3), st.sampled_from([{}, {"reason": "a b"}]))
def test_rows_are_shown_alike_together_and_one_by_one(rows: list[dict[str, Any]], same: dict[str, Any]) -> None:
    own = {"event": "x", "level": "INFO", "timestamp": 0.0, **same}
    rows = [{name: value for name, value in row.items() if name not in own} for row in rows]
    one_by_one = [logs.render_console(logs.Lines({**own, **row}), colours=False) for row in rows]
    assert logs.render_console(logs.Lines(own, rows), colours=False) == "".join(one_by_one)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"player_id": "ann", "seq": 7, "ms": 0.25}, "player_id=ann seq=7 ms=0.25\n"),
        ({"position": "1-7", "resumed": True, "token": None}, "position=1-7 resumed=true token=null\n"),
        ({"address": "::1"}, None),
        ({"reason": "two words"}, None),
        ({"reason": "a,b"}, None),
        ({"reason": ""}, None),
        ({"players": ["ann"]}, None),
        ({"data": {}}, None),
        ({"player_id": 'say "x"'}, None),
        ({"player_id": "zoë"}, None),
        ({"player_id": "\x7f"}, None),
        ({}, None),
    ],
)
def test_words_and_numbers_are_shown_in_one_go(row: dict[str, Any], shown: str | None) -> None:
    assert logs._show_plain(logs.Lines({}, [row])) == shown
    assert logs._show_plain(logs.Lines({}, [{"seq": 1}, row])) == (shown and "seq=1\n" + shown)
