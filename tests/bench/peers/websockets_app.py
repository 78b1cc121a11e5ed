"""The websockets library by itself: it has no HTTP, so publishers use a WebSocket too (``/publish``)."""

from __future__ import annotations

import asyncio
import http
import json
import os
from collections import defaultdict
from typing import Any

from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.http11 import Request, Response

players: dict[str, set[ServerConnection]] = defaultdict(set)
rooms: dict[str, set[ServerConnection]] = defaultdict(set)
everyone: set[ServerConnection] = set()


async def handler(connection: ServerConnection) -> None:
    assert connection.request is not None
    path = connection.request.path.partition("?")[0]
    if path == "/publish":
        async for text in connection:
            publish(json.loads(text))
            await connection.send('{"ok":true}')
        return
    player = path.removeprefix("/ws/")
    players[player].add(connection)
    everyone.add(connection)
    joined: set[str] = set()
    try:
        await connection.send(json.dumps({"type": "welcome", "player_id": player}))
        async for text in connection:
            said = json.loads(text)
            if said["type"] == "subscribe":
                joined.add(said["channel"])
                rooms[said["channel"]].add(connection)
            reply = {"type": "reply", "id": said["id"], "ok": True, "content": said.get("content")}
            await connection.send(json.dumps(reply, separators=(",", ":")))
    finally:
        everyone.discard(connection)
        players[player].discard(connection)
        if not players[player]:
            del players[player]
        for room in joined:
            rooms[room].discard(connection)


def publish(publication: dict[str, Any]) -> None:
    text = json.dumps(publication["message"], separators=(",", ":"))
    if publication.get("broadcast"):
        broadcast(everyone, text)
    elif "channel" in publication:
        broadcast(rooms[publication["channel"]], text)
    else:
        broadcast(players.get(publication["player_id"], set()), text)


def health(connection: ServerConnection, request: Request) -> Response | None:
    return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/health" else None


async def main() -> None:
    port = int(os.environ["PORT"])
    async with serve(handler, "127.0.0.1", port, process_request=health, backlog=4096):
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main())
