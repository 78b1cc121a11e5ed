"""The shortest plan that still breaks the same rule."""

from __future__ import annotations

import time
from collections.abc import Callable

from attrs import evolve

from tests.simulation.plan import Plan
from tests.simulation.world import Result, run_plan


def shrink(
    result: Result, *, seconds: float = 60.0, tell: Callable[[int, int], None] = lambda steps, runs: None
) -> Result:
    """Leave out steps, first many at once and then single ones, as long as the same rule is broken; then devices.

    :param tell: is told how many steps are left, and how many runs it took.
    """
    assert result.broken is not None  # there is something to shrink
    until = time.monotonic() + seconds
    best, runs = result, 0

    def attempt(plan: Plan) -> bool:
        nonlocal best, runs
        runs += 1
        found = run_plan(plan)
        if found.broken is None or result.broken is None or found.broken.rule != result.broken.rule:
            return False
        best = found
        tell(len(plan.steps), runs)
        return True

    size = max(1, len(best.plan.steps) // 2)
    while time.monotonic() < until:
        shorter, at = False, 0
        while at < len(best.plan.steps) and time.monotonic() < until:
            steps = best.plan.steps
            if attempt(evolve(best.plan, steps=steps[:at] + steps[at + size :])):
                shorter = True
            else:
                at += size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2)
    for device in best.plan.devices:
        if time.monotonic() < until and len(best.plan.devices) > 1:
            mentioned = any(getattr(step, "device", None) == device.name for _, step in best.plan.steps)
            if not mentioned:
                attempt(evolve(best.plan, devices=tuple(d for d in best.plan.devices if d is not device)))
    return best
