"""python-socketio on uvicorn, mounted on FastAPI for the POST: a room for each player, as its documentation advises."""

from __future__ import annotations

from typing import Any

import socketio
from fastapi import FastAPI
from pydantic import BaseModel

sio = socketio.AsyncServer(async_mode="asgi")
api = FastAPI()


class Message(BaseModel):
    type: str
    content: Any


class Publication(BaseModel):
    player_id: str | None = None
    channel: str | None = None
    broadcast: bool = False
    message: Message


async def connect(sid: str, environ: dict[str, Any], auth: dict[str, str]) -> None:
    await sio.enter_room(sid, f"player-{auth['player']}")
    await sio.emit("message", {"type": "welcome", "player_id": auth["player"]}, to=sid)


async def subscribe(sid: str, said: dict[str, Any]) -> None:
    await sio.enter_room(sid, said["channel"])
    await sio.emit("message", {"type": "reply", "id": said["id"], "ok": True}, to=sid)


async def command(sid: str, said: dict[str, Any]) -> None:
    await sio.emit("message", {"type": "reply", "id": said["id"], "ok": True, "content": said["content"]}, to=sid)


@api.post("/api/messages")
async def publish(publication: Publication) -> dict[str, bool]:
    if publication.broadcast:
        room = None
    elif publication.channel is not None:
        room = publication.channel
    else:
        room = f"player-{publication.player_id}"
    await sio.emit("message", publication.message.model_dump(), room=room)
    return {"ok": True}


@api.get("/health")
async def health() -> dict[str, str]:
    return {"status": "healthy"}


for handler in (connect, subscribe, command):
    sio.event(handler)

app = socketio.ASGIApp(sio, other_asgi_app=api)
