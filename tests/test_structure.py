"""What the documentation lists is what the code has; the two commands of README.rst are the ones that are used."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from attrs import frozen

from mythos_trio.core import errors, requests
from mythos_trio.core.errors import Close, ErrorType
from mythos_trio.core.messages import RESERVED_TYPES
from mythos_trio.core.session import State
from tests.e2e.bad_clients.cases import CASES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mythos_trio"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.rst"))
MODULES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if path.name != "__init__.py")
# Headings, the highest first.
LEVELS = "=-~"
CODES = sorted({value.code for value in vars(errors).values() if isinstance(value, Close)})


@frozen
class Page:
    """A page of the documentation."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text()

    def section(self, title: str) -> str:
        """What stands below the heading *title*, up to the next heading that is not below it."""
        found = re.search(rf"^{re.escape(title)}\n([{re.escape(LEVELS)}])\1+\n", self.text, re.MULTILINE)
        assert found is not None, f"{self.path.name} has no section {title!r}"
        ends = LEVELS[: LEVELS.index(found[1]) + 1]
        return re.split(
            rf"^.+\n([{re.escape(ends)}])\1{{3,}}\n", self.text[found.end() :], maxsplit=1, flags=re.MULTILINE
        )[0]


PROTOCOL = Page(DOCS / "protocol.rst")
ARCHITECTURE = Page(DOCS / "architecture.rst")
README = Page(ROOT / "README.rst")


# The protocol.


@pytest.mark.parametrize("code", CODES)
def test_every_close_code_is_explained(code: int) -> None:
    assert f"   * - {code}\n" in PROTOCOL.section("When a connection ends")


def test_no_close_code_is_explained_that_there_is_not() -> None:
    explained = re.findall(r"^   \* - (\d{4})$", PROTOCOL.section("When a connection ends"), re.MULTILINE)
    # 1002 is trio-websocket's own.
    assert sorted(map(int, explained)) == sorted({*CODES, 1002})


@pytest.mark.parametrize("type_", sorted(RESERVED_TYPES))
def test_every_control_message_is_explained(type_: str) -> None:
    assert re.search(rf"^``{type_}``$", PROTOCOL.section("Control messages"), re.MULTILINE)


@pytest.mark.parametrize("type_", sorted(requests._FIELDS))
def test_everything_that_a_client_may_say_is_explained(type_: str) -> None:
    section = PROTOCOL.section("What a client says")
    assert re.search(rf"^(``\w+``, )?``{type_}``(, ``\w+``)?$", section, re.MULTILINE)
    for field in requests._FIELDS[type_] - {"type"}:
        assert f'"{field}"' in section or f"``{field}``" in section


@pytest.mark.parametrize("reason", ["retention", "epoch", "future"])
def test_every_reason_of_a_gap_is_explained(reason: str) -> None:
    assert re.search(rf"^``{reason}``$", PROTOCOL.section("Gaps"), re.MULTILINE)


def test_every_state_of_a_session_is_named() -> None:
    section = PROTOCOL.section("What a session lives through")
    assert [state for state in State if f"*{state}*" not in section.replace("link-dead", "linkdead")] == []


@pytest.mark.parametrize("error_type", list(ErrorType))
def test_every_error_type_is_in_the_reference(error_type: ErrorType) -> None:
    assert f"``{error_type}``" in Page(DOCS / "http-api.rst").text


def test_the_protocol_is_for_clients_in_any_language() -> None:
    assert not re.search(r"mythos_trio|python|\.py\b|>>>", PROTOCOL.text, re.IGNORECASE)


# The architecture.


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_where_something_is_changed(module: str) -> None:
    assert f"``{module}``" in ARCHITECTURE.section("I want to change…")


def test_no_module_is_named_that_there_is_not() -> None:
    named = re.findall(r"``([\w/]+\.py)``", ARCHITECTURE.section("I want to change…"))
    assert set(named) <= {*MODULES}


def test_the_layers_on_the_page_are_those_that_are_checked() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r'containers = \["mythos_trio"\].*?layers = \[(.*?)\n\]', project, re.DOTALL)
    assert layers is not None
    checked = [line.split(" | ") for line in re.findall(r'"(.*)"', layers[1])]
    block = ARCHITECTURE.section("Who imports whom").partition(".. code-block:: text\n")[2]
    assert [line.strip().split(" │ ") for line in block.splitlines() if line.strip()] == checked


def test_the_map_of_the_package_names_every_module() -> None:
    top = {module.partition("/")[0].removesuffix(".py") for module in MODULES} - {"__main__"}
    described = re.findall(r"``(\w+)``", (SOURCE / "__init__.py").read_text().partition("from typing")[0])
    assert top - set(described) == set()
    assert set(described) - top == set()


# Reliability.


def test_the_table_of_bad_clients_has_the_cases_that_are_played() -> None:
    section = Page(DOCS / "reliability.rst").section("Bad clients")
    rows = re.findall(r"^   \* - ``([\w-]+)``\n     - (.*)\n     - (.*)$", section, re.MULTILINE)
    assert rows == [(case.name, case.does, case.bound.text) for case in CASES]


# The pages.


@pytest.mark.parametrize("page", [*PAGES, README.path], ids=lambda path: path.name)
def test_examples_do_what_they_show(page: Path) -> None:
    assert doctest.testfile(str(page), module_relative=False, encoding="utf-8").failed == 0


def test_examples_are_found() -> None:
    examples = doctest.DocTestParser().get_examples(ARCHITECTURE.text)
    assert len(examples) > 3


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_page_can_be_reached(page: Path) -> None:
    if page.name != "index.rst":
        assert re.search(rf"^   {page.stem}$", (DOCS / "index.rst").read_text(), re.MULTILINE)


# The two commands.


def command(section: str) -> str:
    """The one command in a section of README.rst."""
    found = re.findall(r"^    (python3 .*)$", README.section(section), re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


def test_ci_runs_the_test_command_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command("Test it") in [line.strip() for line in lines]


def test_the_run_command_serves_what_is_checked_out() -> None:
    assert command("Run it").endswith("/pip install . && .venv/bin/mythos-trio serve")
