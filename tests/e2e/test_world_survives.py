"""kill -9 in the middle of a fight, again and again: afterwards the players' scrolls and the world's data agree.

``WORLD_KILLS`` says how often, ``WORLD_SECONDS`` how long at most.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import time
from contextlib import closing
from typing import Any

import pytest
from attrs import define, field

from tests.e2e.clients import Message, WebSocket
from tests.e2e.conftest import Make
from tests.e2e.games import DUELLISTS, START_POINTS
from tests.e2e.servers import DUEL, Server

KILLS = int(os.environ.get("WORLD_KILLS", "100"))
SECONDS = float(os.environ.get("WORLD_SECONDS", "90"))
# However slow the machine is.
LEAST = min(KILLS, 15)


@define(eq=False)
class Duellist:
    """A player: what it has been told over all lives of the server, and what it has not been answered."""

    name: str
    scroll: list[Message] = field(factory=list)
    position: str = ""
    asked: list[str] = field(factory=list)
    answers: dict[str, Any] = field(factory=dict)
    count: int = 0

    def connect(self, server: Server) -> WebSocket:
        query = f"?position={self.position}" if self.position else ""
        return WebSocket(f"{server.ws_url}/ws/{self.name}{query}")

    def hit(self, client: WebSocket, times: int) -> None:
        """Ask again what was not answered, then for *times* more."""
        for _ in range(times):
            self.asked.append(f"{self.name}-{self.count}")
            self.count += 1
        for id in self.asked:
            client.command("hit", id)

    def leave(self, client: WebSocket) -> None:
        """The server is gone, or this client goes: keep what has come."""
        client.close()
        self.position = client.position or self.position
        self.scroll += client.numbered
        for message in client.messages:
            if message["type"] == "reply" and message["ok"] and message["id"] in self.asked:
                self.answers[message["id"]] = message["content"]
                self.asked.remove(message["id"])

    def told(self, kind: str) -> list[Any]:
        return [message["content"] for message in self.scroll if message["type"] == kind]


def stored(server: Server) -> dict[str, Any]:
    with closing(sqlite3.connect(server.database)) as db:
        return {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM data")}


def compare(players: list[Duellist], data: dict[str, Any]) -> None:
    for player in players:
        seqs = [message["seq"] for message in player.scroll]
        assert seqs == sorted(set(seqs)), "twice, or out of order"
        assert [told["number"] for told in player.told("blow")] == list(range(data["blows"]))
        assert [told["number"] for told in player.told("hit")] == list(range(data["hits"]))
        mine = data[f"player/{player.name}"]
        assert [told["number"] for told in player.told("breath")] == list(range(mine["breaths"]))
        struck = [told for told in player.told("blow") + player.told("hit") if told["victim"] == player.name]
        assert mine["points"] == START_POINTS - sum(told["damage"] for told in struck)
        assert min(told["left"] for told in struck) == mine["points"]
        done = {told["id"]: told["number"] for told in player.told("hit") if told["id"].startswith(player.name)}
        assert done == player.answers, "what was answered is what has happened"


@pytest.mark.timeout(SECONDS + 60)
def test_a_fight_goes_on_after_every_kill(make: Make) -> None:
    """Killed at random moments: between two ticks, in mid-command, in the middle of a commit."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    server = make(game=DUEL, RATE_LIMIT_REQUESTS="100000")
    players = [Duellist(name) for name in DUELLISTS]
    kills, end = 0, time.monotonic() + SECONDS
    while kills < KILLS and (kills < LEAST or time.monotonic() < end):
        server.start()
        clients = [player.connect(server) for player in players]
        if kills == 0:
            for client in clients:
                client.ask("breathe", "breathe")
            clients[0].ask("fight", "fight")
        for player, client in zip(players, clients, strict=True):
            player.hit(client, dice.randrange(4))
        time.sleep(dice.uniform(0, 0.3))
        server.kill9()
        kills += 1
        for player, client in zip(players, clients, strict=True):
            client.wait_ended()
            player.leave(client)
    server.start()
    clients = [player.connect(server) for player in players]
    for player, client in zip(players, clients, strict=True):
        player.hit(client, 1)
        for id in player.asked:
            client.wait_reply(id)
        client.ask("stop", "stop")
    # Lines are written in order: after this one nothing of the fight can come.
    for player, client in zip(players, clients, strict=True):
        client.wait_seq(server.published(player.name, "the end")["seq"])
        player.leave(client)
    server.terminate()
    assert server.wait_exit() == 0
    data = stored(server)
    print(f"{kills} kills, {data['blows']} blows, {data['hits']} hits")
    compare(players, data)
    assert kills >= LEAST
    assert data["blows"] >= kills / 10, "there was hardly a fight"
