"""Who keeps the server busy: publishers, and the players' commands. Each goes on until it is answered."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx
import trio
from attrs import define, field

from tests.soak.game import HALL, HALVES
from tests.soak.ledger import EVERYONE, Ledger, Promise, to_channel, to_player
from tests.soak.players import AGAIN, Player, Unanswered

PUBLISH_SECONDS: Final = 12.0
# A message that was refused is given up this often, so that it can be seen that it does not come.
GIVE_UP: Final = 0.15
ASK_AGAIN: Final = 0.05
UNKNOWN: Final = "not known"
"""Words of a refusal that does not say that nothing has happened."""


@define(eq=False)
class Gate:
    """Traffic flows while it is open; *under_way* is what has begun and is not answered."""

    open: bool = False
    under_way: int = 0
    _changed: trio.Event = field(factory=trio.Event)

    def set(self, open_: bool) -> None:
        self.open = open_
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def wait_open(self) -> None:
        while not self.open:
            await self._changed.wait()

    async def wait_empty(self) -> None:
        while self.under_way:
            await self._changed.wait()

    @contextmanager
    def passing(self) -> Iterator[None]:
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self._notify()


@define
class Counts:
    """What has happened, for the summary."""

    refused: int = 0
    """Publications that were answered 503."""
    unknown: int = 0
    """Requests to publish whose answer was lost."""
    duplicates: int = 0
    """Publications that turned out to be stored already."""
    asked_again: int = 0
    """Commands that were asked for again under their id."""


class Publisher:
    """Publishes to players, channels and everybody, one request after the other, each until it is answered."""

    def __init__(
        self, name: str, url: str, players: list[str], ledger: Ledger, counts: Counts, dice: random.Random
    ) -> None:
        self._name = name
        self._players = players
        self._ledger = ledger
        self._counts = counts
        self._dice = dice
        self._number = 0
        self._http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=PUBLISH_SECONDS)

    async def run(self, gate: Gate, pause: float) -> None:
        async with self._http:
            while True:
                await gate.wait_open()
                with gate.passing():
                    await self._publish()
                await trio.sleep(self._dice.uniform(0.0, 2 * pause))

    async def _publish(self) -> None:
        entries = [self._entry() for _ in range(1 if self._dice.random() < 0.8 else 3)]
        while True:
            try:
                answer = await self._post(entries)
            except (httpx.TransportError, OSError):
                self._counts.unknown += 1
                await trio.sleep(0.05)
                continue
            if answer.status_code == 202:
                self._take(entries, answer.json())
                return
            if answer.status_code != 503:
                self._ledger.violation(f"{self._name} was answered {answer.status_code} {answer.text}")
                return
            self._counts.refused += 1
            if self._gives_up(answer):
                self._ledger.given_up.update(id for _, id, _ in entries)
                return
            await trio.sleep(0.1)

    def _entry(self) -> tuple[str, str, dict[str, Any]]:
        """A target in the ledger's words, the id, and what is posted."""
        self._number += 1
        id = f"{self._name}-{self._number}"
        text = "x" * (3000 if self._dice.random() < 0.02 else self._dice.choice((10, 50, 200)))
        message = {"id": id, "type": "news", "content": {"id": id, "text": text}}
        chance = self._dice.random()
        if chance < 0.5:
            player = self._dice.choice(self._players)
            return to_player(player), id, {"player_id": player, "message": message}
        if chance < 0.8:
            channel = self._dice.choice((HALL, *HALVES))
            return to_channel(channel), id, {"channel": channel, "message": message}
        return EVERYONE, id, {"broadcast": True, "message": message}

    async def _post(self, entries: list[tuple[str, str, dict[str, Any]]]) -> httpx.Response:
        if len(entries) == 1:
            return await self._http.post("/api/messages", json=entries[0][2])
        headers = {"Idempotency-Key": f"batch-{entries[0][1]}", "Content-Type": "application/json"}
        body = json.dumps([entry for _, _, entry in entries])
        return await self._http.post("/api/messages", content=body, headers=headers)

    def _take(self, entries: list[tuple[str, str, dict[str, Any]]], body: Any) -> None:
        answers = body if isinstance(body, list) else [body]
        for (target, id, _), answer in zip(entries, answers, strict=True):
            if answer["id"] != id:
                self._ledger.violation(f"{self._name} published {id}, and was answered {answer}")
            self._counts.duplicates += answer.get("duplicate", False)
            self._ledger.promised(Promise(id, answer["seq"], target))

    def _gives_up(self, answer: httpx.Response) -> bool:
        refused = answer.json()["error_type"] in ("persistence_error", "capacity_error")
        return refused and UNKNOWN not in answer.text and self._dice.random() < GIVE_UP


class Commander:
    """Has a player count, one command after the other."""

    def __init__(self, player: Player, ledger: Ledger, counts: Counts, dice: random.Random) -> None:
        self.player = player
        self._ledger = ledger
        self._counts = counts
        self._dice = dice
        self._number = 0

    async def run(self, gate: Gate, pause: float) -> None:
        while True:
            await gate.wait_open()
            with gate.passing():
                await self._command()
            await trio.sleep(self._dice.uniform(0.0, 2 * pause))

    async def _command(self) -> None:
        account = self.player.account
        if account.commands and self._dice.random() < ASK_AGAIN:
            id = self._dice.choice(account.commands[-100:])
            self._counts.asked_again += 1
            account.answered_again(id, await self.ask(id, "count"))
            return
        self._number += 1
        id = f"{self.player.id}-{self._number}"
        account.answered(id, await self.ask(id, "count"))

    async def ask(self, id: str, content: str) -> Any:
        """The content of the reply; asked again, under the same id, until there is one."""
        while True:
            try:
                reply = await self.player.ask(id, content)
            except Unanswered:
                await trio.sleep(0.05)
            else:
                if reply["ok"]:
                    return reply["content"]
                if reply["error"]["error_type"] not in AGAIN:
                    self._ledger.violation(f"{self.player.id} was answered {reply} to {id}")
                    return None
                await trio.sleep(0.1)
            self._counts.asked_again += 1
