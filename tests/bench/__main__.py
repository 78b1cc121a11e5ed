"""``nox -s bench``: the server and its peers side by side. See docs/performance.rst."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.bench.measure import OURS, PEERS, BenchFailed, build, check_counting
from tests.bench.report import Report
from tests.bench.scenarios import SCENARIOS, Run, Scenario


def main() -> int:
    options = parse()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 190)
    report = Report.load(options.show) if options.show else Report.here(options.quick)
    if not options.show:
        measure(options, report, console)
    report.show(console)
    if options.json:
        report.save(options.json)
    if options.write:
        report.write()
    if options.thresholds and report.missed():
        console.print(f"[red]Below the floor: {', '.join(report.missed())}[/red]")
        return 1
    return 1 if report.failures else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s bench --", description="The server beside FastAPI and others.")
    parser.add_argument("--quick", action="store_true", help="a minute: everything runs once, the figures mean nothing")
    parser.add_argument("--full", action="store_true", help="with ten million stored messages")
    parser.add_argument("--rounds", type=int, default=3, help="each peer in turn, again and again; medians are shown")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--only", action="append", choices=names, metavar="SCENARIO", help=", ".join(names))
    parser.add_argument("--peer", action="append", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: show what --json has written")
    parser.add_argument("--write", action="store_true", help="put tables and plots into docs/performance.rst")
    parser.add_argument("--thresholds", action="store_true", help="fail if a floor does not hold")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    return options


def chosen(options: argparse.Namespace) -> list[tuple[int, Scenario, str]]:
    """What is measured, in this order: the peers' turns lie side by side. Quick: all peers once, then two each."""
    steps = []
    for number in range(options.rounds):
        for scenario in SCENARIOS:
            if options.only and scenario.name not in options.only:
                continue
            for index, peer in enumerate(PEERS.values()):
                wanted = peer.name in options.peer if options.peer else True
                if options.quick and index > 1 and scenario is not SCENARIOS[0]:
                    continue
                if wanted and scenario.takes(peer):
                    steps.append((number, scenario, peer.name))
    return steps


def measure(options: argparse.Namespace, report: Report, console: Console) -> None:
    steps = chosen(options)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, Progress(*columns, console=console) as progress:
        scratch = Path(directory)
        programs = build(scratch, quick=options.quick)
        report.programs(programs)
        if options.quick:
            check_counting(programs)
        task = progress.add_task("", total=len(steps))
        for step, (number, scenario, name) in enumerate(steps, 1):
            where = f"{step}/{len(steps)} round {number + 1}/{options.rounds} {scenario.name}: {name}"
            progress.update(task, description=where)

            def say(text: str, where: str = where) -> None:
                console.print(f"[dim]{where}: {text}[/dim]")

            run = Run(
                scenario.name, PEERS[name], programs, number, options.quick, options.full, scratch=scratch, say=say
            )
            began = time.monotonic()
            try:
                scenario.run(run)
            except (BenchFailed, AssertionError, httpx.HTTPError, OSError) as failure:
                report.failures.append(f"{scenario.name}: {name}")
                console.print(f"[red]{where}: failed[/red]")
                console.print(str(failure), markup=False)
            report.results += run.results
            for result in run.results:
                console.print(f"{where} {report.line(result)} ({time.monotonic() - began:.0f} s)")
            progress.advance(task)
            if options.json:
                report.save(options.json)
        if options.quick:
            report.rehearse(scratch)
    if name_missing := {OURS} - {name for _, _, name in steps}:
        console.print(f"[dim]without {', '.join(name_missing)} there are no ratios[/dim]")


if __name__ == "__main__":
    sys.exit(main())
