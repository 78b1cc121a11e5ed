"""Everything that is checked, as sessions: ``nox`` runs all of them, ``nox -s lint`` one, ``nox -l`` lists them.

Each session has an environment of its own under ``.nox``; ``nox -R`` uses it again as it is, which is quick.
What a session installs stands in ``pyproject.toml``. Arguments behind ``--`` go to the session's main tool:
``nox -s tests -- -k resume``. ``nox -P 3.13 -s tests`` takes another Python, if there is one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"

PROJECT: Final = nox.project.load_toml("pyproject.toml")
SOURCES: Final = ("src", "tests", "noxfile.py", "docs/conf.py")

# Coverage may rise above these floors and never fall below: percent of lines and branches.
CORE_FLOOR: Final = 100
FLOOR: Final = 95

# ruff's ASYNC rules look at one function at a time; these find `yield` in a nursery and `await` in an
# unshielded `finally` too. Left out: deadlines are the caller's (109), a poll is named as one (110), what
# can be started is typed (114), an interface may be async and an answer need no wait (124), httpx is
# among the clients that the server is tried with (127), and task_status may be handed on (128).
FLAKE8_ASYNC: Final = (
    "--enable=ASYNC1,ASYNC2,ASYNC3",
    "--disable=ASYNC109,ASYNC110,ASYNC114,ASYNC124,ASYNC127,ASYNC128",
)

# Clients that we did not write.
NPM_PACKAGES: Final = ("wscat", "ws", "eventsource")


@nox.session
def lint(session: nox.Session) -> None:
    """Form, mistakes that can be seen without running, import directions, spelling."""
    install(session, "lint")
    session.run("ruff", "format", "--check", *SOURCES)
    session.run("ruff", "check", *SOURCES)
    session.log("flake8-async %s …", " ".join(FLAKE8_ASYNC))
    # On all processors: it takes a second for each file.
    together = f'printf "%s\\n" "$@" | xargs -P {os.cpu_count()} -n 16 flake8-async {" ".join(FLAKE8_ASYNC)}'
    session.run("sh", "-c", together, "sh", *python_files(), external=True, log=False)
    session.run("lint-imports", "--no-cache")
    session.run("codespell", *SOURCES, "docs", "README.rst", ".ci/run")
    session.run("sphinx-lint", "docs", "README.rst")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, on the code and its tests."""
    install(session, "types", "test", "bench")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, warnings as errors, and the examples in it. Read docs/_build/html/index.html."""
    install(session, "docs")
    for builder in ("html", "doctest"):
        session.run("sphinx-build", "-W", "--keep-going", "-n", "-q", "-b", builder, "docs", f"docs/_build/{builder}")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests but for those of whole processes, with coverage. (One of them runs mypy on the documentation.)"""
    install(session, "test", "types")
    session.run("pytest", "--ignore=tests/e2e", "-n", "auto", "--cov", "--cov-report=", *session.posargs)
    if session.posargs:
        return  # a part of the tests covers a part of the code
    session.run("coverage", "report", "--include=*/mythos_trio/core/*", f"--fail-under={CORE_FLOOR}")
    session.run("coverage", "report", f"--fail-under={FLOOR}")


@nox.session
def simulate(session: nox.Session) -> None:
    """The whole server on virtual time, with faults from seeds: a fixed number, and fresh ones. ``-- --help``."""
    install(session, "test")
    session.run("python", "-m", "tests.simulation", *session.posargs)


@nox.session
def e2e(session: nox.Session) -> None:
    """The server as a process, on real sockets, with clients that we did not write. Needs Node and curl."""
    install(session, "test")
    for program in ("node", "npm", "curl", "systemd-analyze"):
        if shutil.which(program) is None:
            session.error(f"{program} is needed for the end-to-end tests: apt-get install nodejs npm curl systemd")
    modules = npm_install(session)
    session.run("pytest", "tests/e2e", *session.posargs, env={"MYTHOS_NODE_MODULES": str(modules)})


@nox.session
def bench_quick(session: nox.Session) -> None:
    """The bench in a minute, without thresholds, so that it cannot rot. Needs a C compiler and Node."""
    run_bench(session, "--quick", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The server beside FastAPI and others: docs/performance.rst. ``nox -s bench -- --help`` names the options."""
    run_bench(session, *session.posargs)


def run_bench(session: nox.Session, *arguments: str) -> None:
    install(session, "test", "bench")
    for program in ("cc", "node", "npm"):
        if shutil.which(program) is None:
            session.error(f"{program} is needed for the bench: apt-get install gcc libc6-dev nodejs npm")
    environment = {"MYTHOS_NODE_MODULES": str(npm_install(session))}
    session.run("python", "-m", "tests.bench", *arguments, env=environment)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Ten minutes of kill -9, locked databases, full disks and the like: docs/reliability.rst."""
    run_soak(session, "--minutes", "10")


@nox.session
def soak_quick(session: nox.Session) -> None:
    """Each of its faults once: a minute or two."""
    run_soak(session, "--seconds", "60")


@nox.session(default=False)
def bench_transactions(session: nox.Session) -> None:
    """Commands with data a second, on this machine: the figures of docs/performance.rst. Half a minute a round."""
    install(session, "test")
    session.run("python", "-m", "tests.bench.bench_transactions", *session.posargs)


def run_soak(session: nox.Session, *length: str) -> None:
    """With arguments behind ``--``, such as ``--seed``, these come after the length, and win."""
    install(session, "test")
    session.run("python", "-m", "tests.soak", *length, *session.posargs)


@nox.session(default=False)
def fmt(session: nox.Session) -> None:
    """For people: put the form right."""
    session.install(*group("lint"))
    session.run("ruff", "check", "--fix", *SOURCES)
    session.run("ruff", "format", *SOURCES)


def group(name: str) -> tuple[str, ...]:
    """The requirements of a dependency group: read here, since pip knows of groups only from 25.1 on."""
    return tuple(nox.project.dependency_groups(PROJECT, name))


def install(session: nox.Session, *groups: str) -> None:
    requirements = [requirement for name in groups for requirement in group(name)]
    session.install("-e", ".", *requirements)


def python_files() -> list[str]:
    """flake8-async wants files, not directories."""
    files = [path for source in SOURCES for path in (Path(source), *Path(source).rglob("*.py")) if path.is_file()]
    return sorted(map(str, files))


def npm_install(session: nox.Session) -> Path:
    """The ``node_modules`` with `NPM_PACKAGES`, kept beside the sessions' environments: the registry may be slow."""
    home = Path(session.cache_dir).resolve() / "npm"  # what it is given to runs in other directories
    modules = home / "node_modules"
    if not all((modules / name).is_dir() for name in NPM_PACKAGES):
        home.mkdir(exist_ok=True)
        session.run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(home), *NPM_PACKAGES, external=True)
    return modules
