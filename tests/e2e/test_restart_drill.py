"""Restarts under load (`tests.e2e.restart_drill`): nothing is lost, everybody comes back, and with a port that is kept
nobody is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.e2e.restart_drill import CASES, MARKS, PAGE, drilled, running, table, written

PLAYERS = 60


@pytest.mark.parametrize("name", ["plain", "socket", "supervisor", "kill"])
def test_a_restart_under_load(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with running(case, tmp_path) as server:
        report = trio.run(drilled, case, server, PLAYERS)
    print(report)
    assert report.came_back == report.connections == 2 * PLAYERS
    if case.keeps_port:
        assert report.refused == 0
    assert table({name: [report]}).count("* - ") == 2


def test_the_table_has_its_place() -> None:
    page = written("a table", PAGE.read_text())
    assert page.count("a table") == page.count(MARKS[0]) == page.count(MARKS[1]) == 1
