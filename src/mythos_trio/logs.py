"""Logs: one JSON object a line in a file, readable lines on the console, written by threads.

A log call builds a dictionary and puts it into bounded queues; rendering, hiding of secrets, writing and
rotation are done by one thread for the file and one for the console, so that a terminal that has been
stopped, or a slow disk, holds up neither the event loop nor the other. At the bound lines are dropped, and their
number is logged.

`get` gives loggers that can be used at import time; before `setup`, and after `close`, they hand their lines to
the standard library's logging. Lines of `logging` (Hypercorn), `warnings` and uncaught exceptions
go the same way as ours between the two.

Every line at WARNING and above is shown to the callbacks of `on_error`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO, TypeAlias

import msgspec
import structlog
from attrs import define, field

from mythos_trio.config import SettingError, Settings
from mythos_trio.core.errors import ErrorType
from mythos_trio.seams import rfc3339

Event: TypeAlias = dict[str, Any]
Callback: TypeAlias = Callable[[Event], None]

# Lines that may wait for a thread: about 10 MB of short lines.
MAX_WAITING: Final = 10_000
# Lines that are written in one go, and flushed; then comes a pause, in seconds. A thread that renders lines has the
# interpreter meanwhile: some 0.5 ms with 256 lines in one go, now and then more than 2, and what is published waits.
# (Batches of 64 were better still for who waits, and cost a publication 7 % more.)
BATCH: Final = 128
PAUSE_SECONDS: Final = 0.002
# More, if more than so many batches wait: else they would gather faster than they are written.
MAX_BATCHES: Final = 4
# How long lines gather before their thread is woken, in seconds. A thread that wakes up for each line takes
# the interpreter from the event loop each time: with two of them a publication cost 40 % more.
GATHER_SECONDS: Final = 0.05
# Characters of a traceback: exception groups of many tasks can be of any size.
MAX_EXCEPTION: Final = 65536
# An operator looks for these by their level.
SLOW_MS: Final = 1000.0
# How long `close` waits for what is still to be written, in seconds.
CLOSE_SECONDS: Final = 3.0
# How long a write error is not repeated on the console, in seconds.
QUIET_SECONDS: Final = 60.0

_encoder: Final = msgspec.json.Encoder(enc_hook=repr)
# What it says of what it cannot encode: lone surrogates, integers beyond 64 bits, keys that are no strings.
_ODD: Final = (TypeError, ValueError, OverflowError, RecursionError)


@define(eq=False)
class Lines:
    """One line, or several of one moment that say the same of different things: *facts* are what all say, *rows* what
    each says, without empty ones. No rows: the facts are the line. *facts* has ``event``, ``level``, ``timestamp``.

    Lines that share their beginning are written for a tenth of what each costs alone.
    """

    facts: Event
    rows: Sequence[Event] = ()
    _encoded: bytes | None = field(default=None, init=False)
    _is_encoded: bool = field(default=False, init=False)
    _suspicious: bool | None = field(default=None, init=False)

    @property
    def count(self) -> int:
        return len(self.rows) or 1

    def each(self) -> list[Event]:
        """Each line by itself."""
        return [{**self.facts, **row} for row in self.rows or ({},)]

    @property
    def encoded_rows(self) -> bytes | None:
        """The rows in JSON, each with a line end: made once for all who write them, and who looks through them. None:
        they cannot be written the ordinary way."""
        if not self._is_encoded:
            with suppress(*_ODD):
                self._encoded = _encoder.encode_lines(self.rows)
            self._is_encoded = True
        return self._encoded

    @property
    def suspicious(self) -> bool:
        """Whether there may be a secret in it. What it says is looked through once for all who write it, and what its
        lines share once for all of them: in each finished text it was half of what a line costs."""
        if self._suspicious is None:
            text = self._searched()
            self._suspicious = text is None or _has_sign(text)
        return self._suspicious

    @staticmethod
    def look_through(batch: Sequence[Lines]) -> None:
        """Learn of all of *batch* at once whether they are `suspicious`; nearly always none is. Takes half as long."""
        fresh = [lines for lines in batch if lines._suspicious is None]
        texts = [text for lines in fresh if (text := lines._searched()) is not None]
        if len(texts) == len(fresh) and not _has_sign(b"".join(texts)):
            for lines in fresh:
                lines._suspicious = False

    def _searched(self) -> bytes | None:
        """Where signs of a secret are looked for; None: wherever it is written."""
        try:
            facts = _encoder.encode(self.facts)
        except _ODD:
            return None
        rows = self.encoded_rows
        return None if rows is None else facts + rows


def _has_sign(text: bytes) -> bool:
    text = text.lower()
    return True in [sign in text for sign in _SIGNS]


Sink: TypeAlias = Callable[[Lines], None]

_LEVELS: Final = {name: level for name, level in logging.getLevelNamesMapping().items() if level}
_URGENT: Final = frozenset({"ERROR", "CRITICAL"})
_ERROR_TYPES: Final = {
    "connection": ErrorType.CONNECTION,
    "session": ErrorType.SESSION,
    "authentication": ErrorType.AUTHENTICATION,
    "persistence": ErrorType.PERSISTENCE,
    "database": ErrorType.PERSISTENCE,
    "delivery": ErrorType.DELIVERY,
}

_SECRET: Final = re.compile(
    r"""(?ix)
    (\btoken=) [^&\s"'\\]+                                              # in a query
    | (\bbearer[,\s]\s*) [\w.~+/=-]+                                    # in a header
    | ("(?:token|authorization|secret_key|password)":) "(?:[^"\\]|\\.)*"  # a field of that name
    | () eyJ[\w-]+\.[\w-]+\.[\w-]*                                      # a JWT, wherever it stands
    """
)


# What every secret has in it, in lower case: looking for these costs a tenth of the expression. As letters are written
# as they are in JSON, they are in it wherever they are in a text.
_SIGNS: Final = (b"token", b"bearer", b"authorization", b"secret_key", b"password", b"eyj")


def hide_secrets(lines: Lines, text: str) -> str:
    """*text*, which *lines* are rendered as (so that it is seen as it will be written), without tokens."""
    return _SECRET.sub(_hidden, text) if lines.suspicious else text


def _hidden(match: re.Match[str]) -> str:
    query, header, name, _jwt = match.groups()
    if name:
        return f'{name}"***"'
    return (query or header or "") + "***"


_NOTHING: Final[Event] = {}


class Logger(structlog.BoundLoggerBase):
    """A structlog logger whose level can change while it is held.

    ``bind(**fields)`` gives one with more fields. ``exc_info=True`` or an exception becomes the text
    ``exception``.
    """

    def is_enabled_for(self, level: int) -> bool:
        return level >= _state.level

    def debug(self, event: str, **fields: Any) -> None:
        if _state.level <= logging.DEBUG:
            self._emit("DEBUG", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        slow = (fields.get("delivery_time_ms") or fields.get("establishment_time_ms") or 0) > SLOW_MS
        if slow or _state.level <= logging.INFO:
            self._emit("WARNING" if slow else "INFO", event, fields)

    def info_each(self, event: str, rows: Sequence[Event], same: Event = _NOTHING) -> None:
        """`info` with each of *rows*, and with what is the *same* for all of them, in one go. They hold no exceptions,
        and nothing in them is slow (`SLOW_MS`): so there is nothing for the processors to do, which cost more than the
        rest of a line. They are taken over."""
        self._emit_each(logging.INFO, event, rows, same)

    def warning_each(self, event: str, rows: Sequence[Event]) -> None:
        """The same with `warning`."""
        self._emit_each(logging.WARNING, event, rows, _NOTHING)

    def _emit_each(self, level: int, event: str, rows: Sequence[Event], same: Event) -> None:
        if not rows or (level < logging.WARNING and level < _state.level):
            return
        name = logging.getLevelName(level)
        lines = Lines({**self._context, **same, "event": event, "level": name, "timestamp": time.time()}, rows)
        if level >= logging.WARNING and _state.callbacks:
            for line in lines.each():
                for callback in list(_state.callbacks):
                    callback(line)
        if level >= _state.level:
            _state.sink(lines)

    def warning(self, event: str, **fields: Any) -> None:
        self._emit("WARNING", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._emit("ERROR", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An ERROR with the traceback of the exception that is being handled."""
        self.error(event, **{"exc_info": True, **fields})

    def critical(self, event: str, **fields: Any) -> None:
        self._emit("CRITICAL", event, fields)

    def _emit(self, name: str, event: str, fields: Event) -> None:
        line: Event = {**self._context, **fields, "event": event, "level": name, "timestamp": time.time()}
        # Of all other lines the processors would leave everything as it is, and they cost more than the rest of a line.
        if name in _URGENT or "exc_info" in line:
            line = dict(self._process_event(name, event, fields)[1])
        level = _LEVELS[name]
        if level >= logging.WARNING:
            for callback in list(_state.callbacks):
                callback(line)
        if level >= _state.level:
            _state.sink(Lines(line))


class Gathered:
    """Lines of one moment, told in its end: those that say the same of different things in one go (`Lines`).

    :param at_end: has a function called at the end of the moment; a thousand players may come, or leave, in one.
    """

    def __init__(self, log: Logger, at_end: Callable[[Callable[[], object]], None]) -> None:
        self._log = log
        self._at_end = at_end
        self._rows: dict[tuple[str, tuple[tuple[str, object], ...]], list[Event]] = {}

    def info(self, event: str, row: Event, **same: object) -> None:
        """As `Logger.info_each` with one row. *same*: what it may have in common with others of the moment. It can be
        hashed."""
        key = event, tuple(same.items())
        rows = self._rows.get(key)
        if rows is not None:
            rows.append(row)
            return
        first = not self._rows
        self._rows[key] = [row]
        if first:
            self._at_end(self._tell)

    def _tell(self) -> None:
        told, self._rows = self._rows, {}
        for (event, same), rows in told.items():
            self._log.info_each(event, rows, dict(same))


def _add_facts(_logger: Any, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["level"] = level
    event["timestamp"] = time.time()
    return event


def _add_exception(_logger: Any, _level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The traceback as text, now: an exception that waits in a queue would keep frames and sockets alive."""
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exception()
    if isinstance(info, tuple):
        info = info[1]
    if isinstance(info, BaseException):
        event["exception"] = _traceback(info)
    return event


def _add_error_type(_logger: Any, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if level in _URGENT and "error_type" not in event:
        event["error_type"] = _ERROR_TYPES.get(event.get("component", ""), ErrorType.SYSTEM).value
    return event


def _done(_logger: Any, _level: str, event: MutableMapping[str, Any]) -> Any:
    return (), event


def _traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error)).rstrip()
    if len(text) <= MAX_EXCEPTION:
        return text
    # The beginning says where, the end says what.
    half = MAX_EXCEPTION // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters …\n{text[-half:]}"


# For lines that have more to say than what they are given: `Logger._emit`.
_PROCESSORS: Final = [_add_facts, _add_exception, _add_error_type, _done]


def get(component: str) -> Logger:
    """A logger; *component* is one of the words of the log's ``component`` field."""
    return Logger(None, _PROCESSORS, {"component": component})


def _to_logging(lines: Lines) -> None:
    """Where lines go while nothing is set up: the standard library, with its usual manners."""
    for event in lines.each():
        _one_to_logging(event)


def _one_to_logging(event: Event) -> None:
    fields = dict(event)
    text, level, component = fields.pop("event"), fields.pop("level"), fields.pop("component", "server")
    fields.pop("timestamp", None)
    rest = "".join(f" {name}={value}" for name, value in fields.items())
    logging.getLogger(f"mythos_trio.{component}").log(logging.getLevelNamesMapping()[level], "%s%s", text, rest)


class _State:
    """Where lines go just now."""

    def __init__(self) -> None:
        self.level = logging.INFO
        self.sink: Sink = _to_logging
        self.running: Logs | None = None
        self.callbacks: list[Callback] = []


_state = _State()


def on_error(callback: Callback) -> Callable[[], None]:
    """Show every line at WARNING and above to *callback*, in the thread that logs it, before it is written.

    :returns: a function that ends this.
    """
    _state.callbacks.append(callback)
    return lambda: _state.callbacks.remove(callback)


@contextmanager
def capture(level: int = logging.DEBUG) -> Iterator[list[Event]]:
    """Collect lines in a list, for tests; they go nowhere else."""
    lines: list[Event] = []
    before = _state.level, _state.sink
    _state.level, _state.sink = level, lambda more: lines.extend(more.each())
    try:
        yield lines
    finally:
        _state.level, _state.sink = before


# Rendering: in the writing threads.


def render_json(lines: Lines, server_id: str) -> str:
    """Whole lines, with their ends. They may hold secrets (`hide_secrets`)."""
    # These are the first ones in the line.
    facts = {"timestamp": "", "level": "", "event": "", "server_id": server_id, **lines.facts}
    facts["timestamp"] = rfc3339(facts["timestamp"])
    facts["event"] = str(facts["event"])
    try:
        head = _encoder.encode(facts)
        if not lines.rows:
            return head.decode() + "\n"
        rows = lines.encoded_rows
        if rows is not None:
            # Within JSON there are no line ends: each is followed by the brace of a row.
            return (b"\n" + rows[:-1]).replace(b"\n{", b"\n" + head[:-1] + b",").decode()[1:] + "\n"
    except _ODD:
        pass
    return "".join([_render_odd(line) + "\n" for line in Lines(facts, lines.rows).each()])


def _render_odd(line: Event) -> str:
    try:
        return json.dumps(line, default=repr, skipkeys=True)
    except (ValueError, RecursionError):  # it contains itself
        plain = {name: value if isinstance(value, str) else repr(value)[:1000] for name, value in line.items()}
        return json.dumps(plain)


_COLOURS: Final = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


def render_console(lines: Lines, colours: bool) -> str:
    """``12:30:00 INFO  connection  SSE connected  player_id=alice``; a traceback below it. They may hold secrets."""
    fields = dict(lines.facts)
    level, exception = fields.pop("level"), fields.pop("exception", None)
    head = _head(int(fields.pop("timestamp")), level, fields.pop("component", ""), str(fields.pop("event")))
    begin, end = (f"\x1b[{_COLOURS[level]}m", "\x1b[0m\n") if colours and level in _COLOURS else ("", "\n")
    if not lines.rows:
        text = f"{begin}{head}{_show_fields(fields)}{end}"
    elif (shown := _show_plain(lines)) is not None:
        head = f"{begin}{head}{_show_fields(fields)}{' ' if fields else '  '}"
        text = head + shown[:-1].replace("\n", end + head) + end
    else:
        text = "".join([f"{begin}{head}{_show_fields({**fields, **row})}{end}" for row in lines.rows])
    return text if exception is None else f"{text}{exception}\n"


# Those of a second are few, as long as they name nobody.
@lru_cache(64)
def _head(posix: int, level: str, component: str, text: str) -> str:
    moment = time.strftime("%H:%M:%S", time.localtime(posix))
    return f"{moment} {level:<8} {component:<14} {_printable(text)}"


# Of what is plain these make ``name=value name=value`` from JSON.
_PLAIN: Final = bytes.maketrans(b":,", b"= ")
_NOT_SHOWN: Final = b'{}"'


def _show_plain(lines: Lines) -> str | None:
    """As `_show_fields` of each row, with a line end. None: not all of them are plain, that is words and numbers.

    Nearly always they are, and that can be seen of all rows at once: what makes up JSON is there as often as for words
    and numbers, and nothing that would have to be quoted. One by one the fields took 1.5 µs a line, so they
    take 0.8.
    """
    text = lines.encoded_rows
    if text is None or not text.isascii() or True in [odd in text for odd in (b"\\", b" ", b'""', b"[", b"\x7f")]:
        return None
    rows, fields = len(lines.rows), sum(map(len, lines.rows))
    counts = text.count(b":"), text.count(b","), text.count(b"{"), text.count(b"}")
    return text.translate(_PLAIN, _NOT_SHOWN).decode() if counts == (fields, fields - rows, rows, rows) else None


def _show_fields(fields: Event) -> str:
    shown = " ".join([f"{name}={_shown(value)}" for name, value in fields.items()])
    return f"  {shown}" if shown else ""


def _shown(value: Any) -> str:
    if not isinstance(value, str):
        json_text = _in_json(value)
        if json_text is not None and not json_text.startswith('"'):
            return _printable(json_text)  # not quoted once more: what is hidden in it is found by its quotes
        value = str(value) if json_text is None else msgspec.json.decode(json_text, type=str)
    text = _printable(value)
    return repr(text) if " " in text or not text else text


def _in_json(value: Any) -> str | None:
    try:
        return _encoder.encode(value).decode()
    except _ODD:
        return None


def _printable(text: str) -> str:
    """Control characters as escapes: what clients send must not move an operator's cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Channel:
    """A bounded queue and the thread that writes what is in it."""

    def __init__(self, name: str, write: Callable[[list[Lines]], None]) -> None:
        self._write = write
        # Appending to a deque and taking from it is atomic; the lock is for the counts. Its holder may come again: what
        # a finalizer logs is logged wherever the collector has come in.
        self._queue: deque[Lines | Callable[[], None] | None] = deque()
        self._lock = threading.RLock()
        # Lines beyond the first one of what is in the queue.
        self._rows = 0
        self._waiting = threading.Event()
        self._urgent = threading.Event()
        self._dropped = 0
        self._complained = -QUIET_SECONDS
        self._thread = threading.Thread(target=self._run, name=f"log-{name}", daemon=True)
        self._thread.start()

    def put(self, lines: Lines) -> None:
        """Have *lines* written within `GATHER_SECONDS`; at once if they are errors: they may be the last ones."""
        # Nearly all are one line, and find room: for these the lock would be a third of what a line costs. Without it
        # threads that come in one moment may put one line each beyond the bound.
        if lines.rows or len(self._queue) + self._rows >= MAX_WAITING:
            fitting = self._fit(lines)
            if fitting is None:
                return
            lines = fitting
        self._queue.append(lines)
        if not self._waiting.is_set():
            self._waiting.set()
        if lines.facts["level"] in _URGENT:
            self._urgent.set()

    def _fit(self, lines: Lines) -> Lines | None:
        """As many of *lines* as may wait, the first ones; the others are counted."""
        count = lines.count
        with self._lock:
            taken = min(count, max(0, MAX_WAITING - len(self._queue) - self._rows))
            self._rows += max(0, taken - 1)
            self._dropped += count - taken
        if taken == count:
            return lines
        return Lines(lines.facts, lines.rows[:taken]) if taken else None

    def call(self, function: Callable[[], None]) -> None:
        """Run *function* in the thread, after what is waiting."""
        self._put_urgent(function)

    def close(self, seconds: float) -> None:
        """Write what is waiting, for at most *seconds*, and end."""
        self._put_urgent(None)
        self._thread.join(seconds)

    def _put_urgent(self, item: Callable[[], None] | None) -> None:
        self._queue.append(item)
        self._urgent.set()
        self._waiting.set()

    def _run(self) -> None:
        while True:
            self._waiting.wait()
            hurry = self._urgent.wait(GATHER_SECONDS)
            # Before the queue is emptied: what is put from now on is seen now, or wakes this thread again.
            self._waiting.clear()
            self._urgent.clear()
            if not self._write_all(hurry):
                return

    def _write_all(self, hurry: bool) -> bool:
        """Write what is in the queue, with pauses unless it is urgent; False if it has come to its end."""
        batch: list[Lines] = []
        count = 0
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, Lines):
                batch.append(item)
                count += item.count
                if count < max(BATCH, (len(self._queue) + self._rows) // MAX_BATCHES):
                    continue
            self._write_batch(batch)
            batch, count = [], 0
            if callable(item):
                self._guard(item)
            elif item is None:
                return False
            elif self._queue and not hurry:
                hurry = self._urgent.wait(PAUSE_SECONDS)
        self._write_batch(batch)
        return True

    def _write_batch(self, batch: list[Lines]) -> None:
        rows = sum([lines.count - 1 for lines in batch])
        with self._lock:
            self._rows -= rows
            dropped, self._dropped = self._dropped, 0
        if dropped:
            batch.append(Lines(_dropped_event(dropped)))
        if batch:
            self._guard(lambda: self._write(batch))

    def _guard(self, function: Callable[[], None]) -> None:
        """A full disk or a closed terminal must not end the thread; what it could not write is gone."""
        try:
            function()
        except (OSError, ValueError) as error:
            now = time.monotonic()
            if now - self._complained >= QUIET_SECONDS:
                self._complained = now
                _complain(f"the log cannot be written: {error}")


def _dropped_event(count: int) -> Event:
    return {
        "event": f"{count} log lines dropped",
        "level": "WARNING",
        "timestamp": time.time(),
        "component": "server",
        "dropped": count,
    }


def _complain(text: str) -> None:
    try:
        os.write(2, f"mythos-trio: {text}\n".encode(errors="replace"))
    except OSError:  # stderr is gone too: there is nobody left to tell
        return


class _File:
    """The log file, rotated by size. Its methods are called in one thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._handler = self._open()

    def _open(self) -> RotatingFileHandler:
        s = self._settings
        Path(s.log_file).parent.mkdir(parents=True, exist_ok=True)
        return RotatingFileHandler(
            s.log_file, maxBytes=s.log_max_bytes, backupCount=s.log_backup_count, encoding="utf-8", errors="replace"
        )

    def write(self, batch: list[Lines]) -> None:
        server_id = self._settings.server_id
        Lines.look_through(batch)
        text = "".join([hide_secrets(lines, render_json(lines, server_id)) for lines in batch])
        length = len(text.encode(errors="replace"))
        if self._settings.log_max_bytes and 0 < self._stream().tell() > self._settings.log_max_bytes - length:
            self._handler.doRollover()
        # The handler's own emit formats each line twice and flushes after each.
        stream = self._stream()
        stream.write(text)
        stream.flush()

    def _stream(self) -> TextIO:
        if self._handler.stream is None:  # a rotation has failed half-way, as on a full disk
            self.reopen()
        assert self._handler.stream is not None
        return self._handler.stream

    def reopen(self) -> None:
        """Somebody has renamed the file: go on in a new one."""
        fresh = self._open()
        self._handler.close()
        self._handler = fresh

    def close(self) -> None:
        self._handler.close()


class _Console:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colours = stream.isatty() and "NO_COLOR" not in os.environ

    def write(self, batch: list[Lines]) -> None:
        Lines.look_through(batch)
        text = "".join([hide_secrets(lines, render_console(lines, self._colours)) for lines in batch])
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
        self._stream.flush()


class _FromLogging(logging.Handler):
    """Lines of the standard library's logging, as ours."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        log = get("server").bind(logger=record.name)
        if record.levelno >= logging.ERROR:
            log.error(text, exc_info=record.exc_info)
        elif record.levelno >= logging.WARNING:
            log.warning(text, exc_info=record.exc_info)
        elif record.levelno >= logging.INFO:
            log.info(text)
        else:
            log.debug(text)


class Logs:
    """What `setup` has set up."""

    def __init__(self, settings: Settings, console: TextIO | None) -> None:
        self._file = _File(settings)
        self._to_file = _Channel("file", self._file.write)
        self._channels = [self._to_file]
        if console is not None:
            self._channels.append(_Channel("console", _Console(console).write))
        self._handler = _FromLogging()
        self._before = (_state.level, _state.sink, logging.root.level, sys.excepthook, sys.unraisablehook)
        self._thread_hook = threading.excepthook
        self._closed = False
        self._install(logging.getLevelNamesMapping()[settings.log_level])

    def _install(self, level: int) -> None:
        _state.level, _state.sink = level, self._put
        logging.root.addHandler(self._handler)
        logging.root.setLevel(level)
        logging.captureWarnings(True)
        sys.excepthook = self._on_death
        sys.unraisablehook = self._on_unraisable
        threading.excepthook = self._on_thread_death

    def _put(self, lines: Lines) -> None:
        for channel in self._channels:
            channel.put(lines)

    def reopen(self) -> None:
        """The file has been renamed: go on in a new one of the old name (SIGHUP)."""
        self._to_file.call(self._file.reopen)

    def mute_console(self) -> None:
        """From now on only the file: somebody else speaks on the console."""
        for channel in self._channels:
            if channel is not self._to_file:
                channel.close(CLOSE_SECONDS)
        self._channels = [self._to_file]

    def set_level(self, level: str) -> None:
        _state.level = logging.getLevelNamesMapping()[level]
        logging.root.setLevel(_state.level)

    def close(self) -> None:
        """Write what is waiting (`CLOSE_SECONDS` at most) and go back to how it was. Idempotent."""
        if self._closed:
            return
        self._closed = True
        _state.running = None
        _state.level, _state.sink, root_level, sys.excepthook, sys.unraisablehook = self._before
        threading.excepthook = self._thread_hook
        logging.captureWarnings(False)
        logging.root.setLevel(root_level)
        logging.root.removeHandler(self._handler)
        until = time.monotonic() + CLOSE_SECONDS
        self._to_file.call(self._file.close)
        for channel in self._channels:
            channel.close(max(0.0, until - time.monotonic()))

    def _on_death(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        get("server").critical("Unexpected error in the main thread: the process ends", exc_info=error)
        self.close()
        # Without a console nobody has seen it yet.
        if len(self._channels) == 1:
            sys.__excepthook__(kind, error, trace)

    def _on_thread_death(self, args: threading.ExceptHookArgs) -> None:
        thread = args.thread.name if args.thread else "?"
        get("server").error(f"Unexpected error in thread {thread}", exc_info=args.exc_value)

    def _on_unraisable(self, unraisable: Any) -> None:
        what = unraisable.err_msg or "Exception ignored in"
        get("server").error(f"Unexpected error in {unraisable.object!r}: {what}", exc_info=unraisable.exc_value)


def setup(settings: Settings, console: bool = True) -> Logs:
    """Begin to log into ``LOG_FILE``, and to stderr if *console*.

    :raises SettingError: the file cannot be written.
    """
    try:
        _state.running = Logs(settings, sys.stderr if console else None)
        return _state.running
    except OSError as error:
        expected = f"a file that can be written ({error.strerror or error})"
        raise SettingError("LOG_FILE", settings.log_file, expected) from error


def reopen() -> None:
    """As `Logs.reopen`, for what has been set up in this process, if anything."""
    if _state.running is not None:
        _state.running.reopen()
