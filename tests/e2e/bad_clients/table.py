"""The figures as a table, and the table in docs/reliability.rst."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.e2e.bad_clients.stage import Result

PAGE: Final = Path(__file__).resolve().parents[3] / "docs" / "reliability.rst"
BEGIN: Final = ".. table of bad clients: written by python -m tests.e2e.bad_clients --write\n"
END: Final = ".. end of the table of bad clients\n"
HEADINGS: Final = (
    "Case", "The client …", "What bounds it", "Bound, s", "Measured, s", "How many", "Others' latency ×", "Memory, MiB"
)  # fmt: skip


def as_rst(results: Sequence[Result]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", "   :class: small", ""]
    for cells in (HEADINGS, *map(cells_of, results)):
        for index, cell in enumerate(cells):
            lines.append(f"   {'* -' if index == 0 else '  -'} {cell}")
    return "\n".join(lines) + "\n"


def cells_of(result: Result) -> tuple[str, ...]:
    median, tail = result.ratios
    case = result.case
    return (
        f"``{case.name}``",
        case.does,
        case.bound.text,
        "–" if result.bound is None else f"{result.bound:g}",
        "stays" if result.bound is None else f"{result.measured:.1f}",
        str(case.clients),
        f"{median:.1f} / {tail:.1f}",
        memory(result),
    )


def write(results: Sequence[Result]) -> None:
    """Put the table between its marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{as_rst(results)}\n{END}{after}")


def as_text(result: Result) -> str:
    """For the console."""
    median, tail = result.ratios
    bound = "-" if result.bound is None else f"{result.bound:g}"
    others = ", ".join(f"{name} {result.meanwhile[name]:.1f}" for name in ("p50", "p99", "max"))
    left = " ".join(f"{name}={count}" for name, count in result.left.items() if count > 0)
    return (
        f"{result.case.name:28} bound {bound:>5} s, measured {result.measured:6.2f} s; "
        f"others ×{median:.2f} ×{tail:.2f} ({others} ms); "
        f"MiB {memory(result)} (at most {result.peak:.0f}); left: {left or 'nothing'}"
    ) + "".join(f"\n    {problem}" for problem in result.wrong())


def memory(result: Result) -> str:
    return " → ".join(f"{mib:.0f}" for mib in (result.before, result.after, result.again) if mib is not None)
