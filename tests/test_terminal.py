"""``connect`` at a pipe: what goes to stdout and to stderr, and how it ends. The terminal itself is tried
in ``test_cli.py``, on a pseudo-terminal."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mythos_trio import terminal
from mythos_trio.client import DualClient, TransportState
from mythos_trio.terminal import PipeInput, state_line, text_of
from tests.support.games import Puppet
from tests.support.memory_net import MemoryStream
from tests.support.play import World, play


class Lines:
    """Input that waits for nothing: what a script pipes in."""

    def __init__(self, *lines: str) -> None:
        self._lines = lines
        self.stopped = False

    async def lines(self) -> AsyncGenerator[str, None]:
        for line in self._lines:
            await trio.lowlevel.checkpoint()
            yield line

    def state_changed(self) -> None:
        return

    def stop(self) -> None:
        self.stopped = True


def client_of(world: World, player: str = "ann", **more: Any) -> DualClient:
    async def dial(_base: object) -> trio.abc.Stream:
        return MemoryStream(world.wire())

    return DualClient("http://localhost:8000", player, dial=dial, **more)


async def test_commands_are_answered_in_order_behind_what_they_caused(
    tmp_path: Path, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        with trio.fail_after(60):
            code = await terminal._play(client_of(world), Lines("echo one", "", "line two", "refuse"), False)
        await trio.sleep(2)
    assert code == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["one", "two", "two"]
    assert out[3].startswith("! ")


async def test_with_stay_it_goes_on_listening(
    tmp_path: Path, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str], nursery: trio.Nursery
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        async with trio.open_nursery() as inner:
            inner.start_soon(terminal._play, client_of(world), Lines(), True)
            await trio.sleep(5)
            for content in ("hello", {"x": 1}):
                await world.publish(player_id="ann", message={"type": "line", "content": content})
            await trio.sleep(5)
            inner.cancel_scope.cancel()
        await trio.sleep(5)
    assert capsys.readouterr().out == 'hello\n{"x":1}\n'


async def test_removed_it_ends_and_says_why(
    tmp_path: Path, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Lines("kick")
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        with trio.fail_after(60):
            code = await terminal._play(client_of(world), source, True)
        await trio.sleep(2)
    assert code == 1
    assert source.stopped
    captured = capsys.readouterr()
    assert "4503" in captured.err
    assert "4503" not in captured.out


async def test_a_game_may_send_types_that_look_like_ours(
    tmp_path: Path, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with play(tmp_path / "m.db", game=Puppet()) as world:
        await world.publish(player_id="ann", message={"type": "mood", "content": None, "text": "x"})
        await terminal._play(client_of(world), Lines("echo done"), False)
        await trio.sleep(2)
    assert capsys.readouterr().out == "null\ndone\n"


def test_what_others_send_cannot_move_the_cursor() -> None:
    assert text_of("a\x1b[2Jb\x07\x9b\u202ec\nd\té") == "a\ufffd[2Jb\ufffd\ufffd\ufffdc\nd\té"
    assert text_of({"a": ["\x1b"]}) == '{"a":["\\u001b"]}'


async def test_lines_of_a_pipe() -> None:
    chunks = [b"one\ntw", b"o\n", b"\xff\nlast", b""]
    source = PipeInput(read=lambda: chunks.pop(0))
    assert [line async for line in source.lines()] == ["one", "two", "\ufffd", "last"]


async def test_a_line_without_an_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "MAX_LINE", 100)
    source = PipeInput(read=lambda: b"x" * 60)
    with pytest.raises(ValueError, match="too long"):
        assert [line async for line in source.lines()] == []


def test_the_state_line() -> None:
    client = DualClient("http://localhost", "ann")
    client.transports = {
        "websocket": TransportState("websocket", "connected", why="slow (4008)"),
        "sse": TransportState("sse", "waiting", why="connection refused", retry_at=107.4),
    }
    assert state_line(client, 104.0) == "websocket connected · sse waiting 3 s (connection refused)"
    assert "waiting 0 s" in state_line(client, 200.0)
    client.transports["sse"].status = "connecting"
    assert state_line(client, 0).endswith("sse connecting (connection refused)")
