"""The plots of docs/performance.rst, as small SVG files that are the same for the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt

from tests.bench.measure import OURS, PEERS
from tests.bench.scenarios import SCENARIOS, Scenario

if TYPE_CHECKING:
    from tests.bench.report import Report

BARS: Final = ("fan-out", "burst", "dual", "unicast-max", "command", "rooms", "connect-ws", "connect-sse")
COLOURS: Final = dict(zip(PEERS, ("#1b6f5c", "#b5651d", "#7a5ea8", "#3b6ea5", "#8a8f3c", "#888888"), strict=True))
STYLE: Final[Any] = {
    "svg.hashsalt": "mythos-trio",  # the same figures make the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


def draw(report: Report, directory: Path) -> list[tuple[str, str]]:
    """Write the plots for which there are figures; their names and captions."""
    directory.mkdir(exist_ok=True)
    drawn = []
    with matplotlib.rc_context(STYLE):
        costs = [scenario for scenario in SCENARIOS if scenario.name in BARS]
        if _bars(report, costs, "cpu_us", "processor time of the server for a unit, µs", directory / "cost.svg"):
            drawn.append(("cost", "What a unit costs the server, all threads. Shorter is better; the axes differ."))
        kept = [scenario for scenario in SCENARIOS if scenario.name.startswith("memory")]
        if _bars(report, kept, "kib", "memory of an idle connection, KiB", directory / "memory.svg"):
            drawn.append(("memory", "What an idle connection keeps of the server's memory."))
        drawn += [
            (scenario.name, f"{scenario.title}: what a {scenario.unit} costs the server.")
            for scenario in SCENARIOS
            if scenario.cases and _lines(report, scenario, directory / f"{scenario.name}.svg")
        ]
    return drawn


def _bars(report: Report, scenarios: list[Scenario], name: str, label: str, path: Path) -> bool:
    """One panel for each scenario, one bar for each peer."""
    shown = [s for s in scenarios if report.median(s.name, OURS, name) is not None]
    if not shown:
        return False
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 1.7 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for scenario, axis in zip(shown, axes.flat, strict=False):
        values = {peer: value for peer in PEERS if (value := report.median(scenario.name, peer, name)) is not None}
        axis.barh(list(values), list(values.values()), color=[COLOURS[peer] for peer in values])
        axis.invert_yaxis()
        axis.set_title(f"{scenario.name} ({scenario.unit})", fontsize=9)
        axis.tick_params(labelsize=7)
        for number, value in enumerate(values.values()):
            axis.text(value, number, f" {value:,.0f}" if value >= 100 else f" {value:.3g}", va="center", fontsize=7)
        axis.margins(x=0.25)
    figure.supxlabel(label, fontsize=8)
    _save(figure, path)
    return True


def _lines(report: Report, scenario: Scenario, path: Path) -> bool:
    figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
    for peer in PEERS:
        cases = {int(r.case) for r in report.results if r.scenario == scenario.name and r.peer == peer}
        points = [(case, report.median(scenario.name, peer, "cpu_us", str(case)) or 0.0) for case in sorted(cases)]
        if points:
            axis.plot([x for x, _ in points], [y for _, y in points], "o-", color=COLOURS[peer], label=peer)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel(scenario.cases)
    axis.set_ylabel(f"µs a {scenario.unit}")
    if axis.lines:
        axis.legend(frameon=False)
        _save(figure, path)
    return bool(axis.lines)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
    # What is committed has no spaces at the ends of lines.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
