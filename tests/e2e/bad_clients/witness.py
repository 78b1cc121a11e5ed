"""Good clients while others are bad: ``python -m tests.e2e.bad_clients.witness PORT``.

Some players, each connected over both transports, and a publisher that writes to all of them at a steady
pace. A process of its own, so that its figures are the server's doing and not that of a flood sent by the
same interpreter. On its input it is told the name of each phase, and at the end ``stop``; then it says
as JSON how long messages of each phase took, and what went wrong.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Any, Final

from tests.e2e.clients import Raw, client_frame, open_websocket

PLAYERS: Final = ("good0", "good1", "good2")
PAUSE: Final = 0.04
STOP_SECONDS: Final = 15.0


class Reader(threading.Thread):
    """One connection of a player: the numbers that came, and how late each was."""

    def __init__(self, port: int, player: str) -> None:
        super().__init__(daemon=True)
        self.player = player
        self.numbers: list[int] = []
        self.late: list[tuple[str, float]] = []
        """The phase in which it was published, and the seconds until it was here."""
        self.trouble: str | None = None
        self.raw = Raw(port)
        self.raw.sock.settimeout(60)

    def run(self) -> None:
        try:
            while True:
                self._take(json.loads(self.next()))
        except (OSError, AssertionError) as error:
            self.trouble = f"{type(self).__name__} of {self.player} broke: {error!r}"[:300]

    def next(self) -> bytes:
        """The JSON of the next message."""
        raise NotImplementedError

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] in ("disconnect", "gap"):
            self.trouble = f"{self.player} was told {message}"
        if message["type"] == "tick":
            tick = message["content"]
            self.late.append((tick["phase"], time.monotonic() - tick["at"]))
            self.numbers.append(tick["number"])


class WebSocketReader(Reader):
    def __init__(self, port: int, player: str) -> None:
        super().__init__(port, player)
        open_websocket(self.raw, f"/ws/{player}")

    def next(self) -> bytes:
        while True:
            opcode, payload = self.raw.frame()
            if opcode == 9:
                self.raw.send(client_frame(10, payload))
            elif opcode == 8:
                raise AssertionError(f"closed: {payload!r}")
            else:
                return payload


class SSEReader(Reader):
    def __init__(self, port: int, player: str) -> None:
        super().__init__(port, player)
        self.raw.send(f"GET /sse/{player} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = self.raw.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head

    def next(self) -> bytes:
        lines = self.raw.read_until(b"\n\n").splitlines()
        return next(line for line in lines if line.startswith(b"data:")).removeprefix(b"data:")


class Publisher(threading.Thread):
    """Writes to all players in one request, answered before the next."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._raw = Raw(port)
        self._raw.sock.settimeout(60)
        self.phase = "start"
        self.count = 0
        self.running = True
        self.trouble: str | None = None

    def run(self) -> None:
        try:
            while self.running:
                self._publish()
                time.sleep(PAUSE)
        except (OSError, AssertionError) as error:
            self.trouble = f"the publisher broke: {error!r}"[:300]

    def _publish(self) -> None:
        tick = {"number": self.count, "phase": self.phase, "at": time.monotonic()}
        batch = [{"player_id": player, "message": {"type": "tick", "content": tick}} for player in PLAYERS]
        body = json.dumps(batch).encode()
        head = f"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self._raw.send(head.encode() + body)
        answer = self._raw.answer()
        assert answer.status == 202, answer
        self.count += 1


def wait_all(readers: Sequence[Reader], count: int) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and any(len(r.numbers) < count and not r.trouble for r in readers):
        time.sleep(0.01)


def problems(readers: Sequence[Reader], publisher: Publisher) -> list[str]:
    troubles = [publisher.trouble, *(reader.trouble for reader in readers)]
    found = [trouble for trouble in troubles if trouble]
    wanted = list(range(publisher.count))
    for reader in readers:
        if reader.numbers != wanted:
            missing, twice = set(wanted) - set(reader.numbers), len(reader.numbers) - len(set(reader.numbers))
            name = f"{type(reader).__name__} of {reader.player}"
            found.append(f"{name}: {len(missing)} of {len(wanted)} messages missing, {twice} twice, or out of order")
    return found


def figures(late: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    cuts = quantiles(late, n=100, method="inclusive") if len(late) > 1 else [0.0] * 99
    return {"count": len(late), "p50": cuts[49] * 1000, "p99": cuts[98] * 1000, "max": max(late, default=0.0) * 1000}


def main(port: int, told: Callable[[], str]) -> dict[str, Any]:
    readers = [kind(port, player) for player in PLAYERS for kind in (WebSocketReader, SSEReader)]
    publisher = Publisher(port)
    for thread in (*readers, publisher):
        thread.start()
    print("ready", flush=True)
    phases = []
    while (phase := told()) not in ("stop", ""):
        phases.append(phase)
        publisher.phase = phase
    publisher.running = False
    publisher.join(STOP_SECONDS)
    wait_all(readers, publisher.count)
    late = [entry for reader in readers for entry in reader.late]
    return {
        "phases": {name: figures([seconds for phase, seconds in late if phase == name]) for name in phases},
        "problems": problems(readers, publisher),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), lambda: sys.stdin.readline().strip())), flush=True)
