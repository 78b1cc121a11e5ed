"""Publications on kept connections, which are stored and answered several at a time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mythos_trio.core.transaction import Append
from mythos_trio.kept import ANSWER_SECONDS
from mythos_trio.storage import InlineRunner, StoreError
from tests.support.games import Puppet
from tests.support.play import Client, World, play


class Disk:
    """A store that waits while it is held; broken, it takes nothing."""

    def __init__(self) -> None:
        self.runner = InlineRunner(self._wait)
        self.free = trio.Event()
        self.free.set()
        self.broken = False

    def hold(self) -> None:
        self.free = trio.Event()

    async def _wait(self, kind: str) -> None:
        if kind == "write":
            await self.free.wait()
            if self.broken:
                raise StoreError("the disk is broken")


class Publisher:
    """A kept connection that publishes."""

    def __init__(self, world: World) -> None:
        self.client = Client(world.wire())

    async def send(self, body: object, headers: str = "") -> None:
        data = json.dumps(body).encode()
        head = f"POST /api/messages HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
        await self.client.send_all(head.encode() + data)

    async def answer(self) -> tuple[int, bytes, Any]:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await self.client.receive()
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += await self.client.receive()
        return int(head[9:12]), head, json.loads(body)


def line(player: str, content: object, **more: object) -> dict[str, Any]:
    return {"player_id": player, "message": {"type": "line", "content": content, **more}}


@asynccontextmanager
async def publishers(
    path: Path, count: int, disk: Disk, **settings: Any
) -> AsyncIterator[tuple[World, list[Publisher]]]:
    """Connections whose head the server knows."""
    async with play(path / "m.db", game=Puppet(), hook=disk.runner, **settings) as world:
        all_of_them = [Publisher(world) for _ in range(count)]
        for publisher in all_of_them:
            await publisher.send(line("zoe", "first"))
            assert (await publisher.answer())[0] == 202
        yield world, all_of_them
        for publisher in all_of_them:
            publisher.client.close()


async def test_what_comes_during_a_commit_is_stored_with_one_and_answered_each(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = Disk()
    async with publishers(tmp_path, 100, disk) as (world, them):
        ann = await world.websocket("ann")
        await ann.hear()
        disk.hold()
        for number, publisher in enumerate(them):
            await publisher.send(line("ann" if number % 2 else "bob", number))
        await trio.sleep(1)
        before = world.server.storage.commits
        disk.free.set()
        answers = [await publisher.answer() for publisher in them]
        assert world.server.storage.commits - before <= 2  # the first of them, and all the others
        assert {status for status, _, _ in answers} == {202}
        receipts = [receipt for _, _, receipt in answers]
        assert all(receipt.keys() == {"id", "seq", "epoch", "connections"} for receipt in receipts)
        assert {receipt["epoch"] for receipt in receipts} == {1}
        assert [receipt["connections"] for receipt in receipts] == [number % 2 for number in range(100)]
        assert len({receipt["id"] for receipt in receipts}) == 100
        numbers = sorted(receipt["seq"] for receipt in receipts)
        assert numbers == list(range(numbers[0], numbers[0] + 100))
        await ann.hear()
        sent = [number for number, receipt in enumerate(receipts) if receipt["connections"]]
        assert ann.lines == sorted(sent, key=lambda number: receipts[number]["seq"])
        assert [message["seq"] for message in ann.numbered] == sorted(receipts[number]["seq"] for number in sent)
        assert [message["id"] for message in ann.numbered] == [receipts[number]["id"] for number in ann.lines]


async def test_the_answer_is_the_same_as_of_any_other_publication(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with publishers(tmp_path, 1, Disk(), cors_origins=("https://game.example",)) as (world, (one,)):
        await one.send(line("zoe", "plain"))
        plain = await one.answer()
        await one.send(line("zoe", "other", volume=3))
        other = await one.answer()
        assert plain[:2] == other[:2]
        assert list(plain[2]) == list(other[2])
        assert len(plain[2]["id"]) == len(other[2]["id"])
        page = "Origin: https://game.example\r\n"
        for _ in range(2):  # the head is new, then it is known
            await one.send(line("zoe", "from a page"), page)
            assert b"Access-Control-Allow-Origin: https://game.example" in (await one.answer())[1]
        await one.send(line("zoe", "plain"))
        assert b"Access-Control" not in (await one.answer())[1]
        zoe = await world.websocket("zoe", query="position=1-0")
        await zoe.hear()
        assert zoe.lines == ["first", "plain", "other", "from a page", "from a page", "plain"]
        assert [message.get("volume") for message in zoe.numbered] == [None, None, 3, None, None, None]


async def test_numbers_are_in_the_order_in_which_all_kinds_came(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with publishers(tmp_path, 6, disk) as (_, them):
        disk.hold()
        bodies: list[object] = [
            line("ann", 0),
            line("ann", 1),
            [line("ann", 2)],
            line("bob", 3),
            line("ann", 4, mood=1),
        ]
        for publisher, body in zip(them, [*bodies, line("ann", 5)], strict=True):
            await publisher.send(body)
            await trio.sleep(0.1)
        disk.free.set()
        answers = [(await publisher.answer())[2] for publisher in them]
        answers[2] = answers[2][0]
        numbers = [answer["seq"] for answer in answers]
        assert numbers == list(range(numbers[0], numbers[0] + 6))


async def test_if_the_store_refuses_all_are_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with publishers(tmp_path, 5, disk) as (world, them):
        ann = await world.websocket("ann")
        disk.broken = True
        for publisher in them:
            await publisher.send(line("ann", "lost"))
        answers = [await publisher.answer() for publisher in them]
        assert {(status, said["error_type"]) for status, _, said in answers} == {(503, "persistence_error")}
        disk.broken = False
        await them[0].send(line("ann", "kept"))
        assert (await them[0].answer())[0] == 202
        await ann.hear()
        assert ann.lines == ["kept"]


async def test_who_has_gone_or_waited_too_long_does_not_concern_the_others(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = Disk()
    async with publishers(tmp_path, 4, disk) as (world, them):
        disk.hold()
        for publisher in them[:3]:
            await publisher.send(line("zoe", "late"))
        await trio.sleep(ANSWER_SECONDS - 1)
        await them[3].send(line("zoe", "in time"))
        them[2].client.wire.reset()
        await trio.sleep(2)
        assert [(await publisher.answer())[0] for publisher in them[:2]] == [503, 503]
        disk.free.set()
        assert (await them[3].answer())[0] == 202
        zoe = await world.websocket("zoe", query="position=1-0")
        await zoe.hear()
        assert zoe.lines == ["first"] * 4 + ["late"] * 3 + ["in time"]


async def test_an_answer_that_cannot_be_made_is_its_own_connections_trouble(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    async with publishers(tmp_path, 3, disk) as (world, them):
        headers = world.server.access.cors_headers

        def broken(head: Any) -> Any:
            if head.header("x-broken"):
                raise RuntimeError("planted")
            return headers(head)

        await them[1].send(line("zoe", "first"), "X-Broken: yes\r\n")
        assert (await them[1].answer())[0] == 202
        monkeypatch.setattr(world.server.access, "cors_headers", broken)
        disk.hold()
        await them[0].send(line("zoe", "a"))
        await them[1].send(line("zoe", "b"), "X-Broken: yes\r\n")
        await them[2].send(line("zoe", "c"))
        await trio.sleep(1)
        disk.free.set()
        assert [(await publisher.answer())[0] for publisher in them] == [202, 500, 202]


async def test_a_batch_has_no_more_than_is_set(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = Disk()
    async with publishers(tmp_path, 10, disk, message_batch_size=4) as (world, them):
        disk.hold()
        sizes: list[int] = []
        commit = world.server.storage._database.commit

        def count(batch: Any, now: float) -> Any:
            sizes.append(sum(isinstance(effect, Append) for one in batch for effect in one.effects))
            return commit(batch, now)

        world.server.storage._database.commit = count  # type: ignore[method-assign]
        for publisher in them:
            await publisher.send(line("ann", "x"))
        await trio.sleep(1)
        assert world.server.dispatcher.queued == 10
        disk.free.set()
        assert {(await publisher.answer())[0] for publisher in them} == {202}
        assert max(sizes) <= 4
        assert sum(sizes) >= 10
        await world.server.dispatcher.wait_idle()
        assert world.server.dispatcher.queued == 0
