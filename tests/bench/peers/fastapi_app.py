"""FastAPI + uvicorn: the connection manager of FastAPI's documentation, grown by rooms and SSE.

``HISTORY=100`` keeps that many messages of each player and replays them to who names its position (for the
resume storm only).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

HISTORY = int(os.environ.get("HISTORY", "0"))


class Message(BaseModel):
    type: str
    content: Any


class Publication(BaseModel):
    player_id: str | None = None
    channel: str | None = None
    broadcast: bool = False
    message: Message


class ConnectionManager:
    def __init__(self) -> None:
        self.sockets: dict[str, set[WebSocket]] = defaultdict(set)
        self.queues: dict[str, set[asyncio.Queue[str]]] = defaultdict(set)
        self.rooms: dict[str, set[str]] = defaultdict(set)
        self.rooms_of: dict[str, set[str]] = defaultdict(set)
        self.history: dict[str, deque[tuple[int, str]]] = defaultdict(lambda: deque(maxlen=HISTORY))
        self.newest = 0

    async def connect(self, player: str, websocket: WebSocket) -> None:
        await websocket.accept()
        self.sockets[player].add(websocket)

    def disconnect(self, player: str, websocket: WebSocket) -> None:
        self.sockets[player].discard(websocket)
        self.forget(player)

    def forget(self, player: str) -> None:
        if not self.sockets.get(player) and not self.queues.get(player):
            self.sockets.pop(player, None)
            self.queues.pop(player, None)
            for room in self.rooms_of.pop(player, set()):
                self.rooms[room].discard(player)

    def subscribe(self, player: str, room: str) -> None:
        self.rooms[room].add(player)
        self.rooms_of[player].add(room)

    async def send(self, player: str, text: str) -> int:
        sent = 0
        for websocket in list(self.sockets.get(player, ())):
            try:
                await websocket.send_text(text)
                sent += 1
            except (RuntimeError, WebSocketDisconnect):
                self.disconnect(player, websocket)
        for queue in self.queues.get(player, ()):
            queue.put_nowait(text)
            sent += 1
        return sent

    async def publish(self, publication: Publication) -> int:
        text = publication.message.model_dump_json()
        self.newest += 1
        if publication.broadcast:
            players = list(self.sockets.keys() | self.queues.keys())
        elif publication.channel is not None:
            players = list(self.rooms[publication.channel])
        elif publication.player_id is not None:
            players = [publication.player_id]
            if HISTORY:
                self.history[publication.player_id].append((self.newest, text))
        else:
            raise HTTPException(422, "player_id, channel or broadcast")
        return sum([await self.send(player, text) for player in players])

    def missed(self, player: str, position: str | None) -> list[str]:
        if not position:
            return []
        after = int(position.partition("-")[2])
        return [text for number, text in self.history[player] if number > after]


app = FastAPI()
manager = ConnectionManager()


def welcome(player: str) -> str:
    said = {"type": "welcome", "player_id": player, "position": f"1-{manager.newest}"}
    return json.dumps(said, separators=(",", ":"))


@app.websocket("/ws/{player}")
async def websocket_endpoint(websocket: WebSocket, player: str, position: str | None = None) -> None:
    await manager.connect(player, websocket)
    try:
        await websocket.send_text(welcome(player))
        for text in manager.missed(player, position):
            await websocket.send_text(text)
        while True:
            said = await websocket.receive_json()
            if said["type"] == "subscribe":
                manager.subscribe(player, said["channel"])
            await websocket.send_json({"type": "reply", "id": said["id"], "ok": True, "content": said.get("content")})
    except WebSocketDisconnect:
        pass
    finally:
        manager.disconnect(player, websocket)


@app.get("/sse/{player}")
async def sse_endpoint(player: str) -> StreamingResponse:
    queue: asyncio.Queue[str] = asyncio.Queue()
    manager.queues[player].add(queue)

    async def events() -> AsyncIterator[str]:
        try:
            yield f"data: {welcome(player)}\n\n"
            while True:
                yield f"data: {await queue.get()}\n\n"
        finally:
            manager.queues[player].discard(queue)
            manager.forget(player)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


@app.post("/api/messages")
async def publish(publication: Publication | list[Publication]) -> dict[str, Any]:
    if isinstance(publication, list):
        return {"ok": True, "connections": [await manager.publish(one) for one in publication]}
    return {"ok": True, "connections": await manager.publish(publication)}


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "healthy"}
