"""What the worker processes of the command line do: a module that they can import."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from tests.simulation import bugs
from tests.simulation.shrink import shrink
from tests.simulation.world import Result, run_seed


@frozen
class Found:
    """What one worker has found: seeds that broke a rule, and how many it ran."""

    ran: int
    broken: list[tuple[int, str]]
    virtual_seconds: float


def run_some(seeds: Sequence[int]) -> Found:
    broken, seconds = [], 0.0
    for seed in seeds:
        result = run_seed(seed)
        seconds += result.seconds
        if result.broken is not None:
            broken.append((seed, result.broken.rule))
    return Found(len(seeds), broken, seconds)


def find(name: str, first: int, count: int) -> tuple[int, Result] | None:
    """The first of *count* seeds that catches a bug."""
    with bugs.BY_NAME[name].planted():
        for seed in range(first, first + count):
            result = run_seed(seed)
            if result.broken is not None:
                return seed, result
    return None


def shrink_seed(seed: int, name: str | None, seconds: float) -> Result:
    if name is None:
        return shrink(run_seed(seed), seconds=seconds)
    with bugs.BY_NAME[name].planted():
        return shrink(run_seed(seed), seconds=seconds)
