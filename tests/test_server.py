"""The process around a server: what a start that fails leaves behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mythos_trio import server
from mythos_trio.config import Settings
from mythos_trio.net import PortTaken, open_listeners
from mythos_trio.sqlite import SqliteDatabase
from mythos_trio.storage import StoreUnusable


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_a_store_that_is_held_is_said_to_be_and_the_port_is_free_again(tmp_path: Path) -> None:
    path = tmp_path / "mythos.db"
    holder = SqliteDatabase(path)
    holder.open(0.0)
    port = free_port()
    try:
        with pytest.raises(StoreUnusable, match=f"in use by process {os.getpid()}"):
            server.run(Settings(host="127.0.0.1", port=port, database_url=f"sqlite:///{path}"))
    finally:
        holder.close()
    for listener in open_listeners("127.0.0.1", port):
        listener.close()


def test_a_port_that_is_taken_leaves_the_store_alone(tmp_path: Path) -> None:
    path = tmp_path / "mythos.db"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(PortTaken):
            server.run(Settings(host="127.0.0.1", port=port, database_url=f"sqlite:///{path}"))
    assert not path.exists()
