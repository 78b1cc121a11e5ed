"""``python -m tests.simulation``: run seeds, replay one, show that the deliberate bugs are caught."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.simulation import bugs
from tests.simulation.oracle import RULES
from tests.simulation.plan import draw_plan
from tests.simulation.runs import Found, find, run_some, shrink_seed
from tests.simulation.world import Result, run_seed

# A seed is a run of a tenth of a second or so.
SEEDS = 1000
FRESH = 300
AT_ONCE = 8
# A bug that is not caught by then is not caught.
BUG_SEEDS = 400
SHRINK_SECONDS = 45.0


def _pool(jobs: int) -> ProcessPoolExecutor:
    # Not forked: the progress bar has a thread.
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def run_seeds(console: Console, seeds: Sequence[int], jobs: int) -> int:
    """Run *seeds*; the exit code."""
    began, broken, seconds = time.monotonic(), list[tuple[int, str]](), 0.0
    with _pool(jobs) as pool, _progress(console) as progress:
        task = progress.add_task("seeds", total=len(seeds), note="")
        for found in _completed(pool, seeds, 4 * jobs):
            broken += found.broken
            seconds += found.virtual_seconds
            for seed, rule in found.broken:
                progress.console.print(f"[bold red]seed {seed} breaks the rule “{rule}”[/]")
            progress.update(task, advance=found.ran, note=f"{len(broken)} broken" if broken else "all clean")
    took = time.monotonic() - began
    console.print(
        f"{len(seeds) - len(broken)} of {len(seeds)} seeds ran clean: {seconds / 3600:.1f} hours of virtual time "
        f"in {took:.0f} s"
    )
    if broken:
        show(console, shrink_seed(min(broken)[0], None, SHRINK_SECONDS))
    return 1 if broken else 0


def _completed(pool: ProcessPoolExecutor, seeds: Sequence[int], at_once: int) -> Iterator[Found]:
    """A bounded number of pieces is under way."""
    pieces = iter([seeds[at : at + AT_ONCE] for at in range(0, len(seeds), AT_ONCE)])
    waiting: set[Future[Found]] = set()
    while True:
        while len(waiting) < at_once and (piece := next(pieces, None)) is not None:
            waiting.add(pool.submit(run_some, piece))
        if not waiting:
            return
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def show(console: Console, result: Result, bug: str | None = None) -> None:
    """A run that broke a rule: its plan, its trace, and how to see it again."""
    console.print(f"\n[bold]The shortest that was found of seed {result.plan.seed}[/]")
    console.print(result.plan.text, highlight=False, markup=False)
    console.print("\n[bold]Trace[/]")
    console.print("\n".join(result.trace), highlight=False, markup=False)
    if result.broken is not None:
        console.print(f"\n[bold red]Broken: {result.broken.rule}[/] {RULES[result.broken.rule]}")
        console.print(result.broken.text, highlight=False, markup=False)
    planted = f" --bug {bug}" if bug else ""
    console.print(f"\nAll of the seed: nox -s simulate -- --from {result.plan.seed} --trace{planted}")


def run_bugs(console: Console, names: Sequence[str], jobs: int, first: int, count: int) -> int:
    """Plant each bug, run seeds until one catches it; the table of docs/reliability.rst. The exit code."""
    lines: dict[str, str] = {}
    missed = []
    with _pool(jobs) as pool, _progress(console) as progress:
        task = progress.add_task("bugs", total=len(names), note="")
        futures = {pool.submit(find, name, first, count): name for name in names}
        while futures:
            done, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                name = futures.pop(future)
                bug, found = bugs.BY_NAME[name], future.result()
                caught = found is not None and found[1].broken is not None and found[1].broken.rule in bug.rules
                if found is None or found[1].broken is None:
                    text = f"NOT CAUGHT by {count} seeds"
                else:
                    text = f"after {found[0] - first + 1} seeds by “{found[1].broken.rule}”"
                if not caught:
                    missed.append(name)
                lines[name] = text
                progress.console.print(f"{'caught' if caught else '[bold red]missed[/]'} {name}: {text}")
                progress.update(task, advance=1, note=f"{len(missed)} missed" if missed else "")
    console.print("\n.. list-table::\n   :header-rows: 1\n   :widths: 55 25 20\n")
    console.print("   * - bug\n     - caught by the rule\n     - after seeds")
    for bug in bugs.ALL:
        if bug.name in lines and " by “" in lines[bug.name]:
            after, _, rule = lines[bug.name].partition(" seeds by “")
            console.print(f"   * - {bug.what}\n     - {rule[:-1]}\n     - {after.removeprefix('after ')}", markup=False)
    return 1 if missed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nox -s simulate --", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="how many seeds; without it a fixed number, and fresh ones"
    )
    parser.add_argument("--from", type=int, dest="first", metavar="S", help="the first seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--trace", action="store_true", help="print what happens in the first seed, and no more")
    parser.add_argument("--bug", choices=sorted(bugs.BY_NAME), help="plant a bug, and see it caught")
    parser.add_argument("--bugs", action="store_true", help="plant each bug in turn; print the table")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    first = options.first or 0
    if options.trace:
        return _trace(console, first, options.bug)
    if options.bug:
        return _show_bug(console, options.bug, first, options.seeds or BUG_SEEDS)
    if options.bugs:
        return run_bugs(console, list(bugs.BY_NAME), options.jobs, first, options.seeds or BUG_SEEDS)
    if options.seeds is not None or options.first is not None:
        return run_seeds(console, range(first, first + (options.seeds or SEEDS)), options.jobs)
    fresh = int.from_bytes(os.urandom(4))
    console.print(f"{SEEDS} seeds from 0, and {FRESH} fresh ones: --from {fresh} --seeds {FRESH}")
    return run_seeds(console, [*range(SEEDS), *range(fresh, fresh + FRESH)], options.jobs)


def _trace(console: Console, seed: int, name: str | None) -> int:
    if name is not None:
        with bugs.BY_NAME[name].planted():
            result = run_seed(seed)
    else:
        result = run_seed(seed)
    console.print(draw_plan(seed).text + "\n", highlight=False, markup=False)
    console.print("\n".join(result.trace), highlight=False, markup=False)
    console.print(f"\ntrace {result.hash}, {'clean' if result.broken is None else 'broken: ' + result.broken.rule}")
    return 0 if result.broken is None else 1


def _show_bug(console: Console, name: str, first: int, count: int) -> int:
    console.print(f"{bugs.BY_NAME[name].what}: looking for a seed that catches it …")
    found = find(name, first, count)
    if found is None:
        console.print(f"[bold red]not caught by {count} seeds[/]")
        return 1
    console.print(f"caught by seed {found[0]}; looking for the shortest plan …")
    show(console, shrink_seed(found[0], name, SHRINK_SECONDS), name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
