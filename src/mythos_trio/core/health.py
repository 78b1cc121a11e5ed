"""Whether a client is still there (contract, section 7)."""

from __future__ import annotations

from enum import Enum
from typing import Final

from attrs import define

# How often a client hears from the server at least; more often if HEALTH_CHECK_INTERVAL is shorter.
HEARTBEAT_SECONDS: Final = 30.0


class Verdict(Enum):
    FINE = "nothing to do"
    PROBE = "ask it for a sign of life"
    GONE = "it has not answered in time"


@define
class Liveness:
    """Signs of life of one connection. All times are seconds of one monotonic clock.

    A probe (WebSocket ping, SSE heartbeat) is sent when the last one is *interval* old; a client
    that has shown no life *pong_timeout* after a probe is gone. So a client that vanishes right
    after an answer is found out within interval + pong_timeout.
    """

    heard_at: float
    probed_at: float
    waiting: bool = False

    def heard(self, now: float) -> None:
        """A byte came, or what was sent has been acknowledged."""
        self.heard_at = now
        self.waiting = False

    def probed(self, now: float) -> None:
        """A probe has been sent."""
        self.probed_at = now
        self.waiting = True

    def verdict(self, now: float, *, interval: float, pong_timeout: float) -> Verdict:
        if self.waiting:
            return Verdict.GONE if now - self.probed_at >= pong_timeout else Verdict.FINE
        return Verdict.PROBE if now - self.probed_at >= interval else Verdict.FINE
