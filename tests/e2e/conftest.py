"""Real processes, real sockets, the real clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from tests.e2e.servers import PUPPET, Server
from tests.support.nothing_left import shared_ports

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


class Make(Protocol):
    """Make a server that is not started yet; settings are given as environment variables."""

    def __call__(self, *, game: str | None = None, directory: Path | None = None, **settings: str) -> Server: ...


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    yield from _maker(tmp_path, shared=False)


@pytest.fixture(scope="module")
def make_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """The same for a server that the tests of a module share."""
    yield from _maker(tmp_path_factory.mktemp("shared"), shared=True)


def _maker(above: Path, *, shared: bool) -> Iterator[Make]:
    with ExitStack() as stack:
        count = 0

        def make(*, game: str | None = None, directory: Path | None = None, **settings: str) -> Server:
            nonlocal count
            count += 1
            if directory is None:
                directory = above / f"server{count}"
            directory.mkdir(exist_ok=True)
            server = Server(directory, game=game, **settings)
            stack.callback(server.close)
            if shared:
                shared_ports.add(server.port)
            return server

        yield make


@pytest.fixture
def server(make: Make) -> Server:
    """A server with the default game."""
    return make().start()


@pytest.fixture
def puppet(make: Make) -> Server:
    """A server whose game does as it is told."""
    return make(game=PUPPET).start()
