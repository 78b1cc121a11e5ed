"""Commands whose handler waits for nothing: run where they were heard, without a task, by the same rules."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mythos_trio import logs, testing
from mythos_trio.connection import Connection
from mythos_trio.game import Command, CommandError, Game, Player, never_waits
from mythos_trio.seams import rfc3339
from tests.support.games import Disk
from tests.support.play import WebSocketClient, World, play
from tests.test_drain import stopped

WHO: ContextVar[str] = ContextVar("WHO", default="nobody")


class Prompt(Game):
    """Waits for nothing."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    async def on_command(self, player: Player, command: Command) -> Any:
        verb, _, rest = command.text.partition(" ")
        self.ran.append(command.text)
        act: Callable[[Player, str], Any] = getattr(self, f"do_{verb}")
        return act(player, rest)

    def do_echo(self, player: Player, text: str) -> str:
        return text

    def do_line(self, player: Player, text: str) -> str:
        player.send("line", text)
        return text

    def do_add(self, player: Player, number: str) -> int:
        total: int = player.world.data.get("sum", 0) + int(number)
        player.world.data["sum"] = total
        return total

    def do_look(self, player: Player, _: str) -> int:
        total: int = player.world.data.get("sum", 0)
        return total

    def do_refuse(self, player: Player, _: str) -> None:
        player.send("line", "this must not come")
        raise CommandError("no")

    def do_renew(self, player: Player, _: str) -> str:
        player.new_session()
        return player.session_id

    def do_go(self, player: Player, _: str) -> None:
        player.disconnect("told to")

    def do_name(self, player: Player, _: str) -> str:
        before = WHO.get()
        WHO.set(player.id)
        return before

    def do_block(self, player: Player, _: str) -> None:
        time.sleep(0.15)

    def do_exit(self, player: Player, _: str) -> None:
        raise SystemExit("bye")

    def do_scope(self, player: Player, _: str) -> None:
        trio.move_on_after(1).__enter__()  # noqa: ASYNC122 - a mistake

    def do_shield(self, player: Player, _: str) -> None:
        trio.CancelScope(shield=True).__enter__()

    def do_open(self, player: Player, _: str) -> None:
        trio.CancelScope().__enter__()


async def entered(world: World, player: str = "ann", query: str = "") -> WebSocketClient:
    client = await world.websocket(player, query=query)
    await client.next()
    return client


def has_task(world: World, player: str = "ann") -> bool:
    """Whether there is a task that runs the player's handlers."""
    nursery = world.server.hub.sessions[player].nursery
    assert nursery is not None
    return any(task.name == f"handlers of {player}" for task in nursery.child_tasks)


class Various:
    async def nothing(self) -> int:
        return 1

    async def waits(self) -> None:
        await trio.sleep(1)

    async def opens(self) -> None:
        async with trio.open_nursery():
            pass

    async def loops(self, items: Any) -> None:
        async for _ in items:
            pass

    async def collects(self, items: Any) -> list[Any]:
        return [item async for item in items]

    async def makes(self) -> Any:
        return (rfc3339(item) for item in [1.0])

    def plain(self) -> None:
        pass


@functools.wraps(Various.nothing)
async def wrapped(self: Various) -> int:
    return await Various.nothing(self)


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (Various().nothing, True),
        (Various.nothing, True),
        (Various().makes, True),
        (Various().waits, False),
        (Various().opens, False),
        (Various().loops, False),
        (Various().collects, False),
        (Various().plain, False),
        (wrapped, False),
        (functools.partial(Various.nothing, Various()), False),
        (Game().on_command, True),
    ],
)
def test_what_never_waits(handler: Callable[..., object], expected: bool) -> None:
    assert never_waits(handler) is expected


async def test_a_command_without_effects_needs_no_task(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Prompt()) as world:
        ann = await entered(world)
        assert (await ann.command("echo hi", "c1"))["content"] == "hi"
        assert (await ann.command("look", "c2"))["content"] == 0
        assert not has_task(world)
        assert world.server.statistics.transactions()["runs"] == 2
        assert world.server.statistics.commands()["count"] == 2
        await ann.command("line hello", "c3")
        assert has_task(world)


async def test_its_answer_is_remembered_like_any_other(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Prompt()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        first = await ann.command("echo hi", "c1")
        assert await ann.command("echo hi", "c1") == first
        assert (await ann.command("echo ho", "c1"))["error"]["error_type"] == "validation_error"
        assert (await ann.command("refuse", "c2"))["error"]["message"] == "no"
        assert (await ann.command("refuse", "c2"))["error"]["message"] == "no"
        assert game.ran == ["echo hi", "refuse"]
        assert ann.lines == []


async def test_what_it_does_is_stored_with_its_answer(tmp_path: Path, autojump_clock: MockClock) -> None:
    game = Prompt()
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        reply = await ann.command("line hello", "c1")
        assert (ann.lines, reply["position"]) == (["hello"], f"1-{ann.numbered[-1]['seq']}")
        assert ann.received.index(reply) > ann.received.index(ann.numbered[-1])
        assert (await ann.command("add 5", "c2"))["content"] == 5
        assert (await ann.command("add 2", "c3"))["content"] == 7
    async with play(tmp_path / "m.db", game=game) as world:
        ann = await entered(world)
        assert (await ann.command("add 2", "c3"))["content"] == 7
        assert (await ann.command("look", "c4"))["content"] == 7
    assert game.ran == ["line hello", "add 5", "add 2", "look"]


async def test_the_next_command_waits_for_the_commit(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Prompt(), hook=disk) as world:
        ann, bob = await entered(world), await entered(world, "bob")
        disk.write_seconds = 1.0
        await ann.give("line first", "c1")
        await ann.give("echo second", "c2")
        await bob.give("look", "c1")
        assert (await bob.until_type("reply"))["content"] == 0
        assert [(await ann.until_type("reply"))["id"] for _ in range(2)] == ["c1", "c2"]


async def test_who_reads_what_is_not_stored_yet_waits_for_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Prompt(), hook=disk) as world:
        ann, bob = await entered(world), await entered(world, "bob")
        disk.write_seconds = 1.0
        began = trio.current_time()
        await ann.give("add 1", "c1")
        await trio.sleep(0.2)
        await bob.give("look", "c1")
        assert (await bob.until_type("reply"))["content"] == 1
        assert trio.current_time() - began >= 1.0


async def test_a_refused_commit_is_an_error_that_is_not_remembered(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Prompt(), hook=disk) as world:
        ann = await entered(world)
        disk.no_writes = True
        assert (await ann.command("add 1", "c1"))["error"]["error_type"] == "persistence_error"
        disk.mend()
        assert (await ann.command("add 1", "c1"))["content"] == 1


async def test_a_drain_waits_for_its_commit(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with play(tmp_path / "m.db", game=Prompt(), hook=disk) as world:
        ann = await entered(world)
        disk.write_seconds = 1.0
        await ann.give("line mine", "c1")
        await trio.sleep(0.2)
        world.server.stop()
        reply = await ann.until_type("reply")
        assert (reply["ok"], ann.lines) == (True, ["mine"])
        assert await stopped(world) == 0


async def test_what_it_asks_for_is_done_behind_its_reply(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with play(tmp_path / "m.db", game=Prompt()) as world:
        ann = await entered(world)
        old = (await ann.command("renew", "c1"))["content"]
        assert (await ann.until_over() or {})["code"] == 4501
        back = await entered(world)
        assert back.received[0]["session_id"] != old
        await back.give("go", "c2")
        assert (await back.until_type("reply"))["ok"]
        assert (await back.until_over() or {})["reason"] == "told to"


async def test_a_fault_in_a_reply_harms_nobody_else(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(tmp_path / "m.db", game=Prompt()) as world:
        ann, bob = await entered(world), await entered(world, "bob")
        offer = Connection.offer_reply

        def fail(connection: Connection, command_id: str | None, answer: bytes, position: int | None) -> None:
            if command_id == "c1":
                raise ZeroDivisionError("on purpose")
            offer(connection, command_id, answer, position)

        monkeypatch.setattr(Connection, "offer_reply", fail)
        with logs.capture() as lines:
            await ann.give("echo lost", "c1")
            assert (await bob.command("echo hi", "c2"))["ok"]
            await trio.sleep(1)
        assert "Unexpected error in a reply" in [line["event"] for line in lines]
        monkeypatch.undo()
        assert (await ann.command("echo lost", "c1"))["content"] == "lost"


# Mistakes.


async def test_it_leaves_nothing_behind_for_others(autojump_clock: MockClock) -> None:
    async with testing.play(Prompt(), allow_errors=True) as world:
        alice, bob = await world.connect("alice"), await world.connect("bob")
        assert (await alice.command("name")).content == "nobody"
        assert (await bob.command("name")).content == "nobody"
        for mistake in ("scope", "shield", "exit"):
            reply = await alice.command(mistake)
            assert reply.error == "the game made a mistake; nothing has happened"
            assert (await bob.command("echo hi")).content == "hi"
        assert (await alice.command("open")).ok
        await world.sleep(100)
        assert (await alice.command("echo hi")).content == "hi"
        assert (await bob.command("line hi")).content == "hi"
    said = "\n".join(world.errors)
    assert said.count("Cancel scope stack corrupted") == 2
    assert "on_command raised SystemExit('bye'): a game cannot end the server" in said


async def test_one_that_blocks_is_named(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with play(tmp_path / "m.db", game=Prompt()) as world:
        ann = await entered(world)
        assert (await ann.command("block"))["ok"]
    assert "The game blocked the server: on_command ran for" in caplog.text
