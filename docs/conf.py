"""Sphinx: ``nox -s docs``. Warnings are errors, and examples with ``>>>`` are run."""

from __future__ import annotations

from html import escape
from typing import Any, Final

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from mythos_trio import __version__
from mythos_trio.core.session import TRANSITIONS, Happening, State

project = "mythos-trio"
author = "the authors of mythos-trio"
version = release = __version__

extensions = ["sphinx.ext.doctest"]
exclude_patterns = ["_build"]
nitpicky = True
highlight_language = "text"
smartquotes = False  # what is shown is typed by readers

html_theme = "furo"
html_title = f"mythos-trio {version}"
html_show_copyright = False
html_copy_source = False

# The pictures of a session's life are made from the table that the server runs on, so they cannot be wrong.

BOX: Final = (110, 40)
STEP: Final = 210
MIDDLE: Final = 150


class SessionStates(Directive):
    """``.. session-states::`` draws `TRANSITIONS` and writes it as a table."""

    def run(self) -> list[nodes.Node]:
        picture = nodes.raw("", states_svg(), format="html")
        box = nodes.container()
        self.state.nested_parse(StringList(states_table(), source="core/session.py"), 0, box)
        return [picture, *box.children]


def states_table() -> list[str]:
    """The table: a row for each happening, a column for each state."""
    lines = [".. list-table::", "   :header-rows: 1", "", "   * - what happens"]
    lines += [f"     - {state}" for state in State]
    for happening in Happening:
        lines.append(f"   * - {happening.value}")
        for state in State:
            then = TRANSITIONS[state].get(happening)
            lines.append("     - " + ("–" if then is None else str(then)))
    return lines


def edges() -> dict[tuple[State, State], list[Happening]]:
    """What leads from one state to another; what changes nothing is left out."""
    found: dict[tuple[State, State], list[Happening]] = {}
    for state, ways in TRANSITIONS.items():
        for happening, then in ways.items():
            if then is not state:
                found.setdefault((state, then), []).append(happening)
    return found


def states_svg() -> str:
    """The states in a row; ways to the right run above it, ways to the left below."""
    place = {state: STEP // 2 + index * STEP for index, state in enumerate(State)}
    parts = [_way(place[a], place[b], happenings) for (a, b), happenings in edges().items()]
    for state, x in place.items():
        parts.append(
            f'<rect x="{x - BOX[0] // 2}" y="{MIDDLE - BOX[1] // 2}" width="{BOX[0]}" height="{BOX[1]}" rx="8" '
            'fill="none" stroke="currentColor"/>'
            f'<text x="{x}" y="{MIDDLE + 5}" text-anchor="middle" font-size="15">{escape(state)}</text>'
        )
    width = STEP * len(place)
    return (
        f'<svg viewBox="0 0 {width} {2 * MIDDLE}" role="img" aria-label="a session\'s life" '
        f'style="max-width: {width}px; width: 100%; font-family: sans-serif" fill="currentColor">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>' + "".join(parts) + "</svg>"
    )


def _way(start: int, end: int, happenings: list[Happening]) -> str:
    side = -1 if end > start else 1
    y = MIDDLE + side * BOX[1] // 2
    # Longer ways run further out, and leave and arrive further from the middle of their boxes.
    rise = side * 38 * abs(end - start) // STEP
    shift = 14 if end > start else -14
    label = " / ".join(happening.name.lower().replace("_", " ") for happening in happenings)
    return (
        f'<path d="M{start + shift} {y} C{start + shift} {y + rise} {end - shift} {y + rise} {end - shift} {y}" '
        'fill="none" stroke="currentColor" marker-end="url(#tip)"/>'
        f'<text x="{(start + end) // 2}" y="{y + rise * 3 // 4 - 4 if side < 0 else y + rise * 3 // 4 + 14}" '
        f'text-anchor="middle" font-size="12">{escape(label)}</text>'
    )


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("session-states", SessionStates)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
