"""What came out: a table for the terminal, JSON, and tables and plots for docs/performance.rst.

Ratios are taken inside a round, between measurements that lie side by side, and the median of the rounds is
shown: the machine's pace changes more between rounds than the ratios do.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from attrs import asdict, define, evolve, field, frozen
from rich.console import Console
from rich.table import Table

from tests.bench import plots
from tests.bench.measure import OURS, PEERS, RIVAL, ROOT, Programs
from tests.bench.scenarios import CONTROL, SCENARIOS, Result, Scenario

PAGE: Final = ROOT / "docs" / "performance.rst"
PLOTS: Final = ROOT / "docs" / "performance"
BEGIN: Final = ".. The part between these two lines is written by: nox -s bench -- --write"
END: Final = ".. End of what is written by nox -s bench"
LIBRARIES: Final = ("trio", "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "websockets", "python-socketio")

# Against itself.
TAIL: Final = 5.0
"""p99 by p50 at half of the greatest rate."""
FLAT: Final = 1.3
"""The dearest case by the cheapest."""
START: Final = 3.0
"""Start-up with a million messages by that with a thousand."""
LAG_MS: Final = 50.0


@frozen
class Verdict:
    """One of the promises about figures. *kept* is None if it was not measured."""

    what: str
    measured: str
    wanted: str
    kept: bool | None
    goal: bool | None = None

    @property
    def word(self) -> str:
        if self.kept is None:
            return "not measured"
        if not self.kept:
            return "missed"
        return "goal reached" if self.goal else "kept" if self.goal is None else "floor held"


@define
class Report:
    quick: bool
    machine: dict[str, Any] = field(factory=dict)
    results: list[Result] = field(factory=list)
    failures: list[str] = field(factory=list)

    @classmethod
    def here(cls, quick: bool) -> Report:
        versions = {name: _version(name) for name in LIBRARIES}
        machine = {
            "date": time.strftime("%Y-%m-%d"),
            "processor": _processor(),
            "processors": os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "versions": versions,
        }
        return cls(quick, machine)

    @classmethod
    def load(cls, path: Path) -> Report:
        stored = json.loads(path.read_text())
        results = [Result(**result) for result in stored["results"]]
        return cls(stored["quick"], stored["machine"], results, stored["failures"])

    def save(self, path: Path) -> None:
        stored = {
            "quick": self.quick,
            "machine": self.machine,
            "results": [result.asdict() for result in self.results],
            "failures": self.failures,
            "medians": [self._cells(*row).asdict() for row in self._rows()],
            "verdicts": [[v.what, v.measured, v.wanted, v.word] for v in self.verdicts()],
        }
        path.write_text(json.dumps(stored, indent=1))

    def programs(self, programs: Programs) -> None:
        self.machine["server_cpus"] = sorted(programs.server_cpus)
        self.machine["load_cpus"] = sorted(programs.load_cpus)

    # Reading the results.

    def of(self, scenario: str, peer: str, case: str = "") -> list[Result]:
        return [r for r in self.results if (r.scenario, r.peer, r.case) == (scenario, peer, case)]

    def median(self, scenario: str, peer: str, name: str, case: str = "") -> float | None:
        values = [v for r in self.of(scenario, peer, case) if (v := getattr(r, name)) is not None]
        return statistics.median(values) if values else None

    def ratios(self, scenario: str, peer: str, name: str, case: str = "") -> list[float]:
        """How many times less than `RIVAL`, round by round."""
        theirs = {r.round: getattr(r, name) for r in self.of(scenario, RIVAL, case)}
        return [
            theirs[r.round] / value
            for r in self.of(scenario, peer, case)
            if (value := getattr(r, name)) and theirs.get(r.round)
        ]

    def _rows(self) -> Iterable[tuple[Scenario, str, str]]:
        """Every scenario, case and peer that was measured."""
        for scenario in SCENARIOS:
            cases = list(dict.fromkeys(r.case for r in self.results if r.scenario == scenario.name))
            for case in cases:
                for peer in PEERS:
                    if self.of(scenario.name, peer, case):
                        yield scenario, case, peer

    def _cells(self, scenario: Scenario, case: str, peer: str) -> Cells:
        names = (
            "cpu_us",
            "user_us",
            "rate",
            "p50_ms",
            "p99_ms",
            "load_busy",
            "kib",
            "start_seconds",
            "turn_ms",
            "max_lag_ms",
        )
        medians = {name: self.median(scenario.name, peer, name, case) for name in names}
        cost = "kib" if medians["kib"] is not None else "cpu_us"
        ratios = self.ratios(scenario.name, peer, cost, case)
        return Cells(
            scenario.name,
            case,
            peer,
            ratio=statistics.median(ratios) if ratios else None,
            least=min(ratios, default=None),
            most=max(ratios, default=None),
            **medians,
        )

    # What was promised.

    def verdicts(self) -> list[Verdict]:
        found = [self._against_rival(scenario) for scenario in SCENARIOS if scenario.floor is not None]
        found += [self._tail(case) for case in ("POST", "command")]
        found += [self._flat("connections"), self._flat("stored"), self._start(), self._lag()]
        return found

    def missed(self) -> list[str]:
        return [verdict.what for verdict in self.verdicts() if verdict.kept is False]

    def _against_rival(self, scenario: Scenario) -> Verdict:
        assert scenario.floor is not None
        assert scenario.goal is not None
        name = "kib" if scenario.name.startswith("memory") else "cpu_us"
        ratios = self.ratios(scenario.name, OURS, name)
        wanted = f"{scenario.floor:g} (goal {scenario.goal:g})"
        if not ratios:
            return Verdict(scenario.title, "-", wanted, None)
        ratio = statistics.median(ratios)
        return Verdict(scenario.title, f"{ratio:.2f} × less", wanted, ratio >= scenario.floor, ratio >= scenario.goal)

    def _tail(self, case: str) -> Verdict:
        what = f"p99 at half of the greatest rate, {case}"
        tails = {peer: self._tail_of(peer, case) for peer in (OURS, RIVAL, CONTROL)}
        others = [f"{peer} {tail:.1f}" for peer, tail in tails.items() if tail is not None and peer != OURS]
        verdict = _below(what, tails[OURS], TAIL, "× p50")
        return evolve(verdict, measured=f"{verdict.measured} ({', '.join(others)})") if others else verdict

    def _tail_of(self, peer: str, case: str) -> float | None:
        tails = [r.p99_ms / r.p50_ms for r in self.of("half", peer, case) if r.p99_ms and r.p50_ms]
        return statistics.median(tails) if tails else None

    def _flat(self, name: str) -> Verdict:
        scenario = next(s for s in SCENARIOS if s.name == name)
        cases = {r.case for r in self.results if r.scenario == name and r.peer == OURS}
        costs = [cost for case in cases if (cost := self.median(name, OURS, "cpu_us", case))]
        spread = max(costs) / min(costs) if len(costs) > 1 else None
        return _below(f"{scenario.title}: the dearest by the cheapest", spread, FLAT, "×")

    def _start(self) -> Verdict:
        empty = self.median("stored", OURS, "start_seconds", "1000")
        million = self.median("stored", OURS, "start_seconds", "1000000")
        ratio = million / empty if million and empty else None
        return _below("Start with a million stored messages, by that with a thousand", ratio, START, "×")

    def _lag(self) -> Verdict:
        turns = [r.turn_ms for r in self.results if r.turn_ms is not None]
        what = "The longest turn of the event loop in any scenario, processor time"
        return _below(what, max(turns, default=None), LAG_MS, "ms")

    # For the terminal.

    def line(self, result: Result) -> str:
        case = f"[{result.case}] ".replace("[", r"\[") if result.case else ""
        if result.kib is not None:
            return f"{case}{result.kib:.2f} KiB"
        lag = ""
        if result.turn_ms is not None:
            lag = f", turn {result.turn_ms:.0f} ms (garbage {result.collection_ms:.0f}), lag {result.max_lag_ms:.0f} ms"
        return (
            f"{case}{_figure(result.cpu_us)} µs, {_figure(result.rate)}/s, p50 {_figure(result.p50_ms)} ms, "
            f"p99 {_figure(result.p99_ms)} ms, load {_percent(result.load_busy)}{lag}"
        )

    def show(self, console: Console) -> None:
        if self.quick:
            console.print("[yellow]--quick: everything runs, and the figures mean nothing[/yellow]")
        table = Table(title="Medians; × less: server processor time for a unit (or memory) beside FastAPI + uvicorn")
        for head in HEADS:
            names = head in ("scenario", "peer")
            table.add_column(head, justify="left" if names else "right", no_wrap=names)
        before = ""
        for scenario, case, peer in self._rows():
            if scenario.name + case != before and before:
                table.add_section()
            first = scenario.name + case != before
            before = scenario.name + case
            table.add_row(f"{scenario.name} {case}" if first else "", *self._cells(scenario, case, peer).texts())
        console.print(table)
        self._show_verdicts(console)
        for failure in self.failures:
            console.print(f"[red]failed: {failure}[/red]")

    def _show_verdicts(self, console: Console) -> None:
        if self.quick:
            return
        table = Table(title="What was promised")
        for head in ("what", "measured", "wanted", ""):
            table.add_column(head)
        colours = {"missed": "red", "goal reached": "green", "kept": "green"}
        for verdict in self.verdicts():
            colour = colours.get(verdict.word, "default")
            table.add_row(verdict.what, verdict.measured, verdict.wanted, f"[{colour}]{verdict.word}[/{colour}]")
        console.print(table)

    # For the documentation.

    def write(self) -> None:
        """Tables and plots into docs/performance.rst, between `BEGIN` and `END`."""
        page = PAGE.read_text()
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"{PAGE} has not the lines {BEGIN!r} and {END!r}")
        drawn = plots.draw(self, PLOTS)
        PAGE.write_text(f"{before}{BEGIN}\n\n{self._rst(drawn)}\n{END}{after}")

    def rehearse(self, directory: Path) -> None:
        """Do what `write` does, and change nothing."""
        self._rst(plots.draw(self, directory))

    def _rst(self, drawn: list[tuple[str, str]]) -> str:
        blocks = [self._about(), self._rst_verdicts()]
        for scenario in SCENARIOS:
            rows = [row for row in self._rows() if row[0] is scenario]
            if rows:
                blocks.append(self._rst_scenario(scenario, [self._cells(*row) for row in rows]))
        blocks += [f".. figure:: performance/{name}.svg\n   :width: 100%\n\n   {caption}" for name, caption in drawn]
        return "\n\n".join(blocks) + "\n"

    def _about(self) -> str:
        machine = self.machine
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
        rounds = 1 + max((result.round for result in self.results), default=0)
        return (
            f"Measured on {machine['date']}: {machine['processor']}, {machine['processors']} processors (one for the\n"
            f"server, one for the load generator, if there are two), {machine['system']}, Python {machine['python']};\n"
            f"{versions}. Medians of {rounds} rounds."
        )

    def _rst_verdicts(self) -> str:
        rows = [(v.what, v.measured, v.wanted, v.word) for v in self.verdicts()]
        return _list_table("What was promised", ("what", "measured", "wanted", ""), rows, (50, 16, 18, 16))

    def _rst_scenario(self, scenario: Scenario, cells: list[Cells]) -> str:
        case = ("case",) if any(c.case for c in cells) else ()
        rows = [((_case(c.case), *c.texts()) if case else c.texts()) for c in cells]
        heads = (*case, *HEADS[1:])
        used = [i for i in range(len(heads)) if any(row[i] not in ("", "-") for row in rows)]
        return _list_table(
            f"{scenario.title}; unit: {scenario.unit}",
            tuple(heads[i] for i in used),
            [tuple(row[i] for i in used) for row in rows],
            tuple(24 if heads[i] == "peer" else 10 for i in used),
        )


HEADS: Final = (
    "scenario", "peer", "µs a unit", "× less", "(least–most)", "in user space", "units/s", "p50 ms", "p99 ms", "KiB",
    "start s", "turn ms", "lag ms", "load",
)  # fmt: skip


@frozen
class Cells:
    """The medians of one peer in one case of a scenario."""

    scenario: str
    case: str
    peer: str
    cpu_us: float | None
    user_us: float | None
    rate: float | None
    p50_ms: float | None
    p99_ms: float | None
    load_busy: float | None
    kib: float | None
    start_seconds: float | None
    turn_ms: float | None
    max_lag_ms: float | None
    ratio: float | None
    least: float | None
    most: float | None

    def texts(self) -> tuple[str, ...]:
        spread = f"{self.least:.2f}–{self.most:.2f}" if self.least is not None and self.most is not None else "-"
        ratio = f"{self.ratio:.2f}" if self.ratio is not None else "-"
        figures = (
            self.user_us,
            self.rate,
            self.p50_ms,
            self.p99_ms,
            self.kib,
            self.start_seconds,
            self.turn_ms,
            self.max_lag_ms,
        )
        same = self.peer == RIVAL
        shown = ("1", "-") if same else (ratio, spread)
        return (self.peer, _figure(self.cpu_us), *shown, *map(_figure, figures), _percent(self.load_busy))

    def asdict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def _below(what: str, value: float | None, bound: float, unit: str) -> Verdict:
    if value is None:
        return Verdict(what, "-", f"at most {bound:g} {unit}", None)
    return Verdict(what, f"{value:.2f} {unit}", f"at most {bound:g} {unit}", value <= bound)


def _figure(value: float | None) -> str:
    """Three figures, or all before the point."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _case(text: str) -> str:
    return f"{int(text):,}" if text.isdigit() else text


def _list_table(title: str, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], widths: tuple[int, ...]) -> str:
    lines = [f".. list-table:: {title}", "   :header-rows: 1", f"   :widths: {' '.join(map(str, widths))}", ""]
    for row in (heads, *rows):
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}".rstrip() for i, cell in enumerate(row)]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
