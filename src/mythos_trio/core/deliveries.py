"""What became of a player's messages, counted (``message_delivery_stats`` of the API)."""

from __future__ import annotations

from attrs import define


@define
class Deliveries:
    """Counts of one session. A message counts once, however many connections carry it.

    *upto*: the newest number that any connection has been written. *acknowledged* is exact when all of
    it has surely arrived, else it may be behind by what was written since the last confirmation:
    keeping each number until then would cost memory for every player.
    """

    upto: int
    delivered: int = 0
    acknowledged: int = 0
    replaced: int = 0
    """Never written to any connection: the first that came to them was behind, and was written newer ones."""
    failed: int = 0
    last_failure: tuple[float, str] | None = None
    """(POSIX seconds, reason)."""
    _mark: tuple[int, int] | None = None

    def wrote(self, seq: int, count: int) -> None:
        """*count* messages that are new to the player, up to *seq*, have been written."""
        self.upto = seq
        self.delivered += count
        if self._mark is None:
            self._mark = (seq, self.delivered)

    def confirm(self, seq: int) -> None:
        """Everything up to *seq* has surely arrived."""
        if seq >= self.upto:
            self.acknowledged = self.delivered
            self._mark = None
        elif self._mark is not None and seq >= self._mark[0]:
            self.acknowledged = self._mark[1]
            self._mark = (self.upto, self.delivered)

    def fail(self, when: float, reason: str, count: int = 1) -> None:
        """*count* messages, or an unknown number told as one gap, will not arrive."""
        self.failed += count
        self.last_failure = (when, reason)
