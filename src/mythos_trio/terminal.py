"""``mythos-trio connect``: a person at a terminal, or a script at a pipe, over `mythos_trio.client`.

At a terminal prompt_toolkit edits the line and shows both transports' state below it. It runs in a thread
of its own: it is built on asyncio. From a pipe lines are read plainly, one command after the other; what
the game says goes to stdout, everything about the connection to stderr.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final, Protocol

import msgspec
import trio
from prompt_toolkit import PromptSession
from prompt_toolkit.patch_stdout import patch_stdout

from mythos_trio.client import ClientEnded, DualClient, TransportState

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130
# A line of input longer than this is no command.
MAX_LINE: Final = 1 << 20
REFRESH_SECONDS: Final = 0.5
LEAVE_SECONDS: Final = 1.0


def run(client: DualClient, *, stay: bool = False) -> int:
    """The exit code: 0 if the person left, 1 if the server did not want the client any more."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with patch_stdout(raw=True):
            return _run(client, TerminalInput(client), stay=False)
    return _run(client, PipeInput(), stay=stay)


def _run(client: DualClient, source: Input, *, stay: bool) -> int:
    try:
        code = trio.run(_play, client, source, stay)
    except* KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except* BrokenPipeError:  # as in: mythos-trio connect alice | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = EXIT_OK
    return code


class Input(Protocol):
    def lines(self) -> AsyncGenerator[str, None]: ...
    def state_changed(self) -> None: ...
    def stop(self) -> None:
        """End `lines`, from Trio's thread."""
        ...


async def _play(client: DualClient, source: Input, stay: bool) -> int:
    client.on_change = source.state_changed
    async with client, trio.open_nursery() as nursery:
        nursery.start_soon(_show_events, client, nursery.cancel_scope, source)
        nursery.start_soon(_count_down, source)
        try:
            await _send_lines(client, source)
            if stay:
                await trio.sleep_forever()
        except ClientEnded:
            # `_show_events` ends too, after it has shown what is left.
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    if client.ended is not None and client.ended.reason != "closed":
        _note(f"ended: {client.ended.reason}")
        return EXIT_FAILED
    return EXIT_OK


async def _send_lines(client: DualClient, source: Input) -> None:
    async with aclosing(source.lines()) as lines:
        async for line in lines:
            if not line.strip():
                continue
            reply = await client.send_command(line.strip())
            if isinstance(reply.get("position"), str):
                await client.wait_consumed(reply["position"])
            _show_reply(reply)


async def _show_events(client: DualClient, scope: trio.CancelScope, source: Input) -> None:
    async for event in client.events():
        match event["type"]:
            case "gap" if "seq" not in event:
                _note(f"messages were lost here ({event['reason']})")
            case "session_changed" if "seq" not in event:
                _note("a new session")
            case _:
                _say(text_of(event.get("content")))
    source.stop()
    scope.cancel()


async def _count_down(source: Input) -> None:
    while True:
        await trio.sleep(REFRESH_SECONDS)
        source.state_changed()


def _show_reply(reply: dict[str, Any]) -> None:
    if reply.get("ok"):
        if reply.get("content") is not None:
            _say(text_of(reply["content"]))
        return
    error = reply.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    _say(text_of(f"! {message}"))


def text_of(content: Any) -> str:
    """*content* for a terminal: text as it is, anything else as compact JSON; no control characters, by
    which others could move the cursor or worse."""
    text = content if isinstance(content, str) else msgspec.json.encode(content).decode()
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _note(text: str) -> None:
    """About the connection: not part of what the game says."""
    sys.stderr.write(f"-- {text_of(text)} --\n")
    sys.stderr.flush()


def state_line(client: DualClient, now: float) -> str:
    """``websocket connected · sse waiting 3 s (connection refused)``"""
    return " · ".join(_state_text(state, now) for state in client.transports.values())


def _state_text(state: TransportState, now: float) -> str:
    text = f"{state.name} {state.status}"
    if state.connected:
        return text
    if state.status == "waiting" and state.retry_at is not None:
        text += f" {max(0, round(state.retry_at - now))} s"
    return text + (f" ({state.why})" if state.why else "")


class PipeInput:
    """Lines of a pipe or a file, read in a thread by the system call: a thread that waits inside of
    ``sys.stdin`` keeps the interpreter from ending."""

    def __init__(self, read: Callable[[], bytes] = lambda: os.read(0, 65536)) -> None:
        self._read = read

    async def lines(self) -> AsyncGenerator[str, None]:
        rest = b""
        while chunk := await trio.to_thread.run_sync(self._read, abandon_on_cancel=True):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
            if len(rest) > MAX_LINE:
                raise ValueError("a line of input is too long")
        if rest:
            yield rest.decode(errors="replace")

    def state_changed(self) -> None:
        return

    def stop(self) -> None:
        return


class TerminalInput:
    """Lines that a person edits; the transports' state stands below."""

    def __init__(self, client: DualClient) -> None:
        self._client = client
        self._session: PromptSession[str] | None = None
        self._line = ""
        self._stopped = False
        self._idle = threading.Event()

    async def lines(self) -> AsyncGenerator[str, None]:
        self.state_changed()
        self._session = PromptSession(bottom_toolbar=lambda: self._line)
        while not self._stopped:
            self._idle.clear()
            try:
                line = await trio.to_thread.run_sync(self._prompt, self._session, abandon_on_cancel=True)
            except (EOFError, KeyboardInterrupt):
                return
            except trio.Cancelled:
                # The terminal has to be put back as it was before the process ends.
                self.stop()
                self._idle.wait(LEAVE_SECONDS)
                raise
            yield line

    def _prompt(self, session: PromptSession[str]) -> str:
        try:
            # Signals are the main thread's: Ctrl-C comes as a key.
            return session.prompt("> ", handle_sigint=False, pre_run=lambda: self._leave_if_stopped(session))
        finally:
            self._idle.set()

    def _leave_if_stopped(self, session: PromptSession[str]) -> None:
        if self._stopped and session.app.is_running and not session.app.is_done:
            session.app.exit(exception=EOFError())

    def state_changed(self) -> None:
        self._line = state_line(self._client, trio.current_time())
        if self._session is not None:
            self._session.app.invalidate()

    def stop(self) -> None:
        # Set before the look at the prompt, which looks at it when it has begun: one of them sees the other.
        self._stopped = True
        session = self._session
        if session is not None and session.app.loop is not None and session.app.is_running:
            session.app.loop.call_soon_threadsafe(self._leave_if_stopped, session)
